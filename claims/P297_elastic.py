"""Elastic LoRA (LoNAS, Shears, SQFT): Muñoz et al. 2025, arXiv 2501.16372. See `claims.short`.

The paper trains an adapter once at several ranks inside each other, searches for each map's rank within a budget, and
loses little by it, on pruned or quantised decoders of 7 billion parameters and more. Here nothing is pruned: MiniLM,
the authors' ranks of 32, 24 and 16 with 8 beside them, without which half of the budget would leave nothing to choose.
From the same training come the whole adapter, one of rank 16 everywhere, and one of as many numbers or less whose ranks
were searched for on the validation split. All three are measured on the test split, which the search does not see.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter
from polytask.recipes.adapt import measure as score
from polytask.recipes.elastic import cut, shrink

PAPER = "Muñoz et al. 2025"
CLAIM = "ranks searched for at half of the budget are within 0.5 points of all and better than half of each"
HALF = 16
HYPER: dict[str, Any] = {"r": 2 * HALF, "nested": (24, HALF, 8), "alpha": 64.0}
RATES = (3e-4, 1e-3)
TRIES = 50
WITHIN = 0.5


@cache
def fit(name: str, rate: float, seed: int) -> Adapter:
    settings = short.settings(rate, seed)
    return pt.adapt(short.base(), short.task(name), "elastic", hyperparameters=HYPER, settings=settings)


def numbers(made: Adapter) -> int:
    """Those beside the head."""
    return sum(t.numel() for n, t in made.tensors.items() if not n.startswith(("head/", "task/")))


def learnt(name: str, rate: float, seed: int) -> dict[str, Any]:
    made = fit(name, rate, seed)
    return {
        "test": made.card.scores["test"].value,
        "validation": made.card.scores["validation"].value,
        "head": made.card.scores["baseline"].value,
        "numbers": numbers(made),
        "seconds": made.card.seconds,
    }


def halved(name: str, rate: float, seed: int) -> dict[str, Any]:
    """What is left of an elastic adapter at half of its numbers: searched for, and of one rank everywhere."""
    made, task = fit(name, rate, seed), short.task(name)
    alike = cut(made, dict.fromkeys(made.sites, HALF))
    found = shrink(short.base(), task, made, 0.5, tries=TRIES, seed=seed, limit=short.LIMIT)

    def at(one: Adapter, split: str) -> float:
        return score(short.base(), one, task, task.split(split), short.LIMIT).value

    return {
        "alike": at(alike, "test"),
        "alike validation": at(alike, "validation"),
        "alike numbers": numbers(alike),
        "searched": found.card.scores["test"].value,
        "searched validation": found.card.scores["validation"].value,
        "searched numbers": numbers(found),
        "ranks": dict(found.card.recipe["ranks"]),
    }


def measure(rows: Rows) -> Verdict:
    def row(name: str, rate: float, seed: int) -> dict[str, Any]:
        return rows.get(partial(learnt, name, rate, seed), way="learnt", task=name, rate=rate, seed=seed)

    best, found = short.picked(RATES, row)
    halves = {
        name: [
            rows.get(partial(halved, name, best, seed), way="halved", task=name, rate=best, seed=seed)
            for seed in short.SEEDS
        ]
        for name in short.TASKS
    }
    whole, head = short.points(found), short.points(found, "head")
    alike, searched = short.points(halves, "alike"), short.points(halves, "searched")
    left = max(row["searched numbers"] for mine in halves.values() for row in mine)
    return Verdict(
        f"{len(short.TASKS)} tasks x {len(short.SEEDS)} seeds: all ranks {whole:.1f} with "
        f"{found[short.PICKED_ON][0]['numbers']:,} numbers; ranks searched for {searched:.1f} with at most {left:,} "
        f"({searched - whole:+.1f}), half of each {alike:.1f} ({searched - alike:+.1f} for the search), the head alone "
        f"{head:.1f}; on the validation split {short.points(halves, 'searched validation'):.1f} and "
        f"{short.points(halves, 'alike validation'):.1f}",
        whole - searched <= WITHIN and searched > alike,
    )
