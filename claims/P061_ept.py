"""EPT: Lan et al. 2024, arXiv 2405.11464. See `claims.small`.

A prompt of 50 tokens against EPT with 20 of them, in subspaces and with low-rank changes of the text's embeddings, at
no more numbers.
"""

from __future__ import annotations

from claims.claim import Rows, Verdict
from claims.small import TASKS, way

PAPER = "Lan et al. 2024"
CLAIM = "a short prompt with low-rank parts is not below a long prompt"
RATES = (3e-3, 1e-2)


def measure(rows: Rows) -> Verdict:
    long = way("prompt", RATES, {"n": 50})
    short = way("ept", RATES, {"s": 20, "n": 64, "rank": 2, "spaces": 4})
    return Verdict(
        f"{len(TASKS)} tasks: EPT {short.score:.1f} with 20 tokens and {short.parameters:,} numbers, prompt of 50 "
        f"tokens {long.score:.1f} with {long.parameters:,} ({short.score - long.score:+.1f} points)",
        short.score >= long.score - 0.5 and short.parameters <= long.parameters,
    )
