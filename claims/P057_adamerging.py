"""AdaMerging: Yang et al. 2023, arXiv 2310.02575. See `claims.merging`.

Four LoRAs; a coefficient for each of them at each linear map, found as in the paper on the test inputs without their
labels; 200 steps at 2.5e-3 reach as far as its 500 at 1e-3. Against it the best of four coefficients for all, which
labelled validation data chose.
"""

from __future__ import annotations

from claims.claim import Rows, Verdict
from claims.merging import SCALES, SIX, alone, best, row

PAPER = "Yang et al. 2023"
CLAIM = "coefficients found without labels merge four LoRAs at least 2 points better than the best single one"
FOUR = SIX[:4]


def measure(rows: Rows) -> Verdict:
    whole = best(rows, FOUR, "task-arithmetic", [{"scale": λ} for λ in SCALES])
    one = row(rows, FOUR, "task-arithmetic", whole, "test")
    each = row(rows, FOUR, "adamerging", {"split": "test", "steps": 200, "lr": 2.5e-3}, "test")
    more = each["points"] - one["points"]
    return Verdict(
        f"{len(FOUR)} tasks: AdaMerging {each['points']:.1f}, one coefficient {one['points']:.1f} "
        f"(λ = {one['hyper']['scale']:g}; {more:+.1f} points), each one's own {alone(rows, FOUR)['points']:.1f}",
        more >= 2,
    )
