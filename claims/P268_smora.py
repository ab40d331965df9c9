"""SMoRA: Zhao et al. 2025, arXiv 2501.15103.

The paper trains one adapter on a mixture of tasks, without saying which example is of which, and finds that the finer
the parts are between which a router chooses, the better, with fewer of them active. Here six tasks are one, as in
`claims.P301_mor1e`: each token takes 4 of 32 ranks, one by one or in pairs, and a LoRA has all 32 for every token, on
the same maps and of the same α. What pairs get is said and not judged. Four ranks in one piece are left out: the gate
of a single expert is always 1, and its router learns nothing.
"""

from __future__ import annotations

from functools import partial
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from claims.P301_mor1e import TASKS, mixed

PAPER = "Zhao et al. 2025"
CLAIM = "on six tasks in one, 4 of 32 ranks for each token beat a LoRA of all 32 by two points"
R, K = 32, 4
HYPER: dict[str, Any] = {"r": R, "alpha": float(R), "sites": ("*.attn.q", "*.attn.v")}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks": ("smora", {**HYPER, "k": K}),
    "pairs": ("smora", {**HYPER, "k": K, "block": 2}),
    "LoRA": ("lora", HYPER),
}
RATES = (1e-3, 3e-3)
MORE = 2.0


def run(way: str, rate: float, seed: int) -> dict[str, Any]:
    method, hyper = WAYS[way]
    made = pt.adapt(short.base(), mixed(), method, hyperparameters=hyper, settings=short.settings(rate, seed))
    scores, head = made.card.scores, sum(t.numel() for n, t in made.tensors.items() if n.startswith("head/"))
    return {
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "head": scores["baseline"].value,
        "numbers": made.card.trained_parameters - head,
        "seconds": made.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    score: dict[str, float] = {}
    numbers: dict[str, int] = {}
    head = 0.0
    for way in WAYS:

        def row(rate: float, seed: int, way: str = way) -> dict[str, Any]:
            return rows.get(partial(run, way, rate, seed), way=way, rate=rate, seed=seed)

        best = max(RATES, key=lambda rate: float(row(rate, short.SEEDS[0])["validation"]))
        found = [row(best, seed) for seed in short.SEEDS]
        score[way], numbers[way] = 100 * mean(one["test"] for one in found), found[0]["numbers"]
        head = 100 * mean(one["head"] for one in found)
    more, finer = score["ranks"] - score["LoRA"], score["ranks"] - score["pairs"]
    return Verdict(
        f"{len(TASKS)} tasks in one x {len(short.SEEDS)} seeds: {K} of {R} ranks {score['ranks']:.1f} "
        f"({numbers['ranks']:,} numbers), {K // 2} of {R // 2} pairs {score['pairs']:.1f} ({finer:+.1f} for the "
        f"finer), a LoRA of rank {R} {score['LoRA']:.1f} ({numbers['LoRA']:,}; {more:+.1f}), the head alone {head:.1f}",
        more >= MORE,
    )
