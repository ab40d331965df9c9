"""Surgical fine-tuning: Lodha et al. 2023, arXiv 2310.17041. See `claims.small`.

The paper fine-tunes the blocks with the highest Fisher score. Here the best quarter of six blocks (two), against all of
them and against each other pair of neighbours, which stand for random blocks.
"""

from __future__ import annotations

from statistics import mean

from claims.claim import Rows, Verdict
from claims.small import TASKS, way

PAPER = "Lodha et al. 2023"
CLAIM = "training the quarter of the blocks with the highest Fisher score comes within a point of training all"
RATES = (1e-4, 3e-4)


def measure(rows: Rows) -> Verdict:
    chosen, whole = way("full@fisher", RATES, {"select.share": 0.25}), way("full", RATES)
    pairs = [[f"*encoder.layer.{i}.*", f"*encoder.layer.{i + 1}.*"] for i in (0, 2, 4)]
    others = mean(way("full", RATES, {"weights": pair}).score for pair in pairs)
    return Verdict(
        f"{len(TASKS)} tasks: chosen blocks {chosen.score:.1f}, all blocks {whole.score:.1f}, pairs of neighbours "
        f"{others:.1f} on average ({chosen.score - whole.score:+.1f} and {chosen.score - others:+.1f} points)",
        chosen.score >= whole.score - 1 and chosen.score > others,
    )
