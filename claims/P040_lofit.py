"""LoFiT: Yin et al. 2024, arXiv 2406.01563. See `claims.small`.

Offsets at the tenth of MiniLM's 72 heads that the first step chose (the paper's 3 % would be two heads), against LoRA
and against offsets at all heads.
"""

from __future__ import annotations

from claims.claim import Rows, Verdict
from claims.small import TASKS, way

PAPER = "Yin et al. 2024"
CLAIM = "offsets at a few chosen heads come near LoRA with at least 20 times fewer parameters"


def measure(rows: Rows) -> Verdict:
    lora = way("lora", (1e-3, 3e-3))
    chosen = way("lofit", (1e-2, 3e-2), {"select.share": 0.1})
    return Verdict(
        f"{len(TASKS)} tasks: LoFiT {chosen.score:.1f} with {chosen.parameters:,} numbers, LoRA {lora.score:.1f} "
        f"with {lora.parameters:,} ({chosen.score - lora.score:+.1f} points, "
        f"{lora.parameters / chosen.parameters:.0f} times fewer)",
        chosen.score >= lora.score - 2 and lora.parameters >= 20 * chosen.parameters,
    )
