"""KaSA against LoRA at equal rank: Wang et al. 2024, arXiv 2412.06071. See `claims.small`."""

from __future__ import annotations

from claims.claim import Rows, Verdict
from claims.small import TASKS, way

PAPER = "Wang et al. 2024"
CLAIM = "KaSA is not below LoRA at equal parameters"


def measure(rows: Rows) -> Verdict:
    lora, kasa = way("lora", (1e-3, 3e-3)), way("kasa", (1e-3, 3e-3))
    return Verdict(
        f"{len(TASKS)} tasks: KaSA {kasa.score:.1f} with {kasa.parameters:,} numbers, LoRA {lora.score:.1f} with "
        f"{lora.parameters:,} ({kasa.score - lora.score:+.1f} points)",
        kasa.score >= lora.score,
    )
