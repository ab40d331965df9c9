"""Task-level mixture of experts: Ye, Zha, Ren 2022, arXiv 2205.12701.

The paper trains experts and routes on 120 tasks and gains 2.6 % on new tasks of a few examples over one model for all.
Here sixteen tasks of four types, each of some labels of a larger task, of which one of each type is held out. Three
LoRA experts learn the other twelve together (`task_experts`), or one LoRA of as many numbers does. A held-out task then
has SHOTS examples: for a route over the experts and a head (`task_moe`), or for a head above the one LoRA. Purity is
that of the twelve routes in four clusters: the share of tasks whose cluster has their type as its most frequent one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from random import Random
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter
from polytask.composition.routing.task_moe import experts, route
from polytask.recipes.adapt import Plan
from polytask.tasks import Example, Task

PAPER = "Ye et al. 2022"
CLAIM = "of 16 examples, a route over shared experts beats one shared adapter by 2 points; routes tell types of tasks"
TYPES = {"banking77_intent": 6, "clinc150_intent": 6, "sib200_en_topic": 3, "csabstruct": 3}  # labels of each task
EACH, SHOTS = 96, 16
M, RANK = 3, 8
RATE = 3e-3  # of experts
RATES = (3e-2, 1e-1)  # of routes; heads have their own
MORE, PURE = 2.0, 0.7


@cache
def tasks(kind: str) -> tuple[Task, ...]:
    """Four tasks of some labels of one, the last of which is held out. Examples of labels that several have are shared
    out among them by chance."""
    whole, draw = short.whole(kind), Random(0)
    names = [label.name for label in whole.labels]
    found = []
    for i in range(4):
        own = draw.sample(names, TYPES[kind]) if len(names) < 4 * TYPES[kind] else names[i :: len(names) // TYPES[kind]]
        own = own[: TYPES[kind]]

        def some(rows: tuple[Example, ...], n: int, own: Sequence[str] = own) -> tuple[Example, ...]:
            mine = [e for e in rows if e.output in own]
            return tuple(draw.sample(mine, min(n, len(mine))))

        labels = tuple(label for label in whole.labels if label.name in own)
        train = some(whole.train, EACH if i < 3 else SHOTS)
        given = replace(whole, name=f"{kind}-{i}", labels=labels, train=train, demonstrations=(), negatives=())
        found.append(replace(given, validation=some(whole.validation, 48), test=some(whole.test, 200)))
    return tuple(found)


@cache
def together(m: int, seed: int) -> tuple[Adapter, ...]:
    """The twelve tasks' adapters, of m experts. Without validation splits, all have the last experts."""
    twelve = [replace(task, validation=()) for kind in TYPES for task in tasks(kind)[:3]]
    hyper = {"m": m, "r": RANK * M // m, "alpha": 2.0 * RANK * M // m, "sites": ("*.attn.[qkvo]",)}
    plans = [Plan(task, "task_experts", hyper, short.settings(RATE, seed)) for task in twelve]
    return tuple(pt.adapt_many(short.base(), plans))


def purity(seed: int) -> float:
    from sklearn.cluster import KMeans

    kinds = [kind for kind in TYPES for _ in range(3)]
    routes = [[float(e == taken) for taken in route(one) for e in range(M)] for one in together(M, seed)]
    clusters: dict[int, Counter[str]] = {}
    for kind, cluster in zip(kinds, KMeans(4, n_init=10, random_state=0).fit_predict(routes).tolist(), strict=True):
        clusters.setdefault(cluster, Counter())[kind] += 1
    return sum(max(found.values()) for found in clusters.values()) / len(kinds)


def few(m: int, rate: float, seed: int) -> dict[str, Any]:
    """The held-out tasks."""
    over = experts(together(m, seed)[0])
    settings = short.settings(rate, seed, epochs=20, patience=20)
    made = [pt.adapt(short.base(), tasks(kind)[3], "task_moe", over=over, settings=settings) for kind in TYPES]
    return {
        "test": mean(one.card.scores["test"].value for one in made),
        "validation": mean(one.card.scores["validation"].value for one in made),
        "by_type": {kind: one.card.scores["test"].value for kind, one in zip(TYPES, made, strict=True)},
        "purity": purity(seed) if m > 1 else None,
    }


def measure(rows: Rows) -> Verdict:
    score: dict[int, float] = {}
    pure = 0.0
    for m in (M, 1):

        def row(rate: float, seed: int, m: int = m) -> dict[str, Any]:
            return rows.get(partial(few, m, rate, seed), m=m, rate=rate, seed=seed)

        rate = max(RATES, key=lambda rate: float(row(rate, short.SEEDS[0])["validation"]))
        found = [row(rate, seed) for seed in short.SEEDS]
        score[m] = 100 * mean(one["test"] for one in found)
        if m > 1:
            pure = mean(one["purity"] for one in found)
    more = score[M] - score[1]
    return Verdict(
        f"{len(TYPES)} held-out tasks of {SHOTS} examples x {len(short.SEEDS)} seeds: a route over {M} experts of "
        f"{3 * len(TYPES)} tasks {score[M]:.1f}, one LoRA of as many numbers {score[1]:.1f} ({more:+.1f}); routes of "
        f"the {3 * len(TYPES)} tasks in {len(TYPES)} clusters are {pure:.0%} pure",
        more >= MORE and pure >= PURE,
    )
