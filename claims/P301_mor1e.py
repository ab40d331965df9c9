"""MoR1E: Liu et al. 2024, arXiv 2404.08985.

The paper trains one adapter on 14 data sets at once, without saying which example is of which, and gains 2.15 points of
accuracy over its baselines. Here six tasks are one: their labels side by side, their examples shuffled, and a head over
all of the labels. The same rank-1 experts are weighed by a router and the clusters of the inputs, or by the router
alone (`prior` = 0); a LoRA of as many ranks on the same maps stands beside them. Purity is the share of training inputs
whose cluster has their task as its most frequent one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from random import Random
from statistics import mean
from typing import Any

from torch.nn import functional as F

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter
from polytask.methods import passes
from polytask.tasks import Example, Label, Task

PAPER = "Liu et al. 2024"
CLAIM = "on six tasks in one, clusters of the inputs beside the router gain 1.5 points, and are 80 % pure"
TASKS = ("cr_polarity", "hate_offensive", "sib200_en_topic", "scicite", "csabstruct", "banking77_intent")
EACH = 120  # training inputs of a task
RATES = (1e-3, 3e-3)
R = 32
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "clusters and router": ("mor1e", {"r": R}),
    "router alone": ("mor1e", {"r": R, "prior": 0.0}),
    "LoRA": ("lora", {"r": R, "alpha": float(R), "sites": ("*.attn.[qkvo]", "*.mlp.[gud]*")}),
}
MORE, PURE = 1.5, 0.8


@cache
def mixed() -> Task:
    """All tasks as one. An example's id says which it was of, and nothing else does."""
    parts = [short.task(name) for name in TASKS]

    def split(which: str, n: int) -> tuple[Example, ...]:
        rows = [
            replace(e, id=f"{name}/{e.id}", output=f"{name}: {e.output}")
            for name, part in zip(TASKS, parts, strict=True)
            for e in part.split(which)[:n]
        ]
        return tuple(Random(0).sample(rows, len(rows)))

    train = split("train", EACH)
    known = {str(e.output) for e in train}  # 120 examples do not show all of 77 intents

    def seen(rows: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(e for e in rows if str(e.output) in known)

    labels = tuple(Label(name) for name in sorted(known))
    held, test = seen(split("validation", EACH // 4)), seen(split("test", EACH))
    return Task("six in one", "classification", train, held, test, labels=labels, metric="accuracy")


def purity(made: Adapter) -> float:
    """Of the clusters that an adapter has, on its training inputs."""
    rows = mixed().train
    e = F.normalize(passes.embed(short.base(), [e.text for e in rows], short.LIMIT), dim=-1)
    near = (e @ made.tensors["shared/C"].T).argmax(-1).tolist()
    clusters: dict[int, Counter[str]] = {}
    for row, cluster in zip(rows, near, strict=True):
        clusters.setdefault(cluster, Counter())[row.id.partition("/")[0]] += 1
    return sum(max(found.values()) for found in clusters.values()) / len(rows)


def run(way: str, rate: float, seed: int) -> dict[str, Any]:
    method, hyper = WAYS[way]
    made = pt.adapt(short.base(), mixed(), method, hyperparameters=hyper, settings=short.settings(rate, seed))
    return {
        "test": made.card.scores["test"].value,
        "validation": made.card.scores["validation"].value,
        "purity": purity(made) if method == "mor1e" else None,
        "parameters": made.card.trained_parameters,
        "seconds": made.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    score: dict[str, float] = {}
    pure = 0.0
    for way in WAYS:

        def row(rate: float, seed: int, way: str = way) -> dict[str, Any]:
            return rows.get(partial(run, way, rate, seed), way=way, rate=rate, seed=seed)

        rate = max(RATES, key=lambda rate: float(row(rate, short.SEEDS[0])["validation"]))
        found = [row(rate, seed) for seed in short.SEEDS]
        score[way] = 100 * mean(one["test"] for one in found)
        if way == "clusters and router":
            pure = mean(one["purity"] for one in found)
    more = score["clusters and router"] - score["router alone"]
    return Verdict(
        f"{len(TASKS)} tasks in one x {len(short.SEEDS)} seeds: clusters and router "
        f"{score['clusters and router']:.1f}, router alone {score['router alone']:.1f} ({more:+.1f}), LoRA "
        f"{score['LoRA']:.1f}; {R} clusters are {pure:.0%} pure",
        more >= MORE and pure >= PURE,
    )
