"""SUPERMERGE: Yang et al. 2024, arXiv 2412.10416. See `claims.merging`.

Four LoRAs; a coefficient for each of them at each linear map, learned from 50 labelled examples of each task. The same
examples choose λ of task arithmetic and of TIES, from four.
"""

from __future__ import annotations

from claims.claim import Rows, Verdict
from claims.merging import SCALES, SIX, alone, best, row

PAPER = "Yang et al. 2024"
CLAIM = "coefficients learned from 50 examples a task merge four LoRAs 3 points better than any other rule"
FOUR = SIX[:4]
FEW = 50


def measure(rows: Rows) -> Verdict:
    tries = [{"scale": λ} for λ in SCALES]
    ours = row(rows, FOUR, "supermerge", {"examples": FEW}, "test")
    others = {"average": row(rows, FOUR, "average", {}, "test")["points"]}
    for rule in ("task-arithmetic", "ties"):
        others[rule] = row(rows, FOUR, rule, best(rows, FOUR, rule, tries, FEW), "test")["points"]
    more = ours["points"] - max(others.values())
    said = ", ".join(f"{rule} {points:.1f}" for rule, points in others.items())
    return Verdict(
        f"{len(FOUR)} tasks: SUPERMERGE {ours['points']:.1f}, {said} ({more:+.1f} points to the best), each one's own "
        f"{alone(rows, FOUR)['points']:.1f}",
        more >= 3,
    )
