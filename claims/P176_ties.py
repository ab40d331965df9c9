"""TIES-Merging: Yadav et al. 2023, arXiv 2306.01708. See `claims.merging`.

Five LoRAs. λ of TIES (density 0.2, as in the paper) is one of four by validation; so is that of task arithmetic, of
which averaging is the case λ = 1/5.
"""

from __future__ import annotations

from claims.claim import Rows, Verdict
from claims.merging import SCALES, SIX, alone, best, row

PAPER = "Yadav et al. 2023"
CLAIM = "TIES merges five LoRAs at least 2 points better than averaging does"
FIVE = SIX[:5]


def measure(rows: Rows) -> Verdict:
    tries = [{"scale": λ} for λ in SCALES]
    ties = row(rows, FIVE, "ties", best(rows, FIVE, "ties", tries), "test")
    added = row(rows, FIVE, "task-arithmetic", best(rows, FIVE, "task-arithmetic", tries), "test")
    average = row(rows, FIVE, "average", {}, "test")
    more = ties["points"] - average["points"]
    return Verdict(
        f"{len(FIVE)} tasks: TIES {ties['points']:.1f} (λ = {ties['hyper']['scale']:g}), average "
        f"{average['points']:.1f} ({more:+.1f} points), task arithmetic {added['points']:.1f} "
        f"(λ = {added['hyper']['scale']:g}), each one's own {alone(rows, FIVE)['points']:.1f}",
        more >= 2,
    )
