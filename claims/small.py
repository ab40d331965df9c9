"""Comparisons on small training sets that several claims share: three tasks of sentences on the embedded encoder.

The first EXAMPLES of each training split, two seeds, equal epochs. A way's rate is the one of its rates with the best
mean validation score at the first seed; all ways have equally many to choose from. Rows are kept for all claims
together in `claims/results/small.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean
from typing import Any

import polytask as pt
from claims.claim import Rows, data

TASKS = ("cr_polarity", "scicite", "hate_offensive")
SEEDS = (0, 1)
EPOCHS, EXAMPLES, HELD, TEST = 6, 400, 200, 800
LIMIT = 64  # tokens a text is cut to; the longest hundredth is longer


@dataclass(frozen=True)
class Way:
    """What a way to adapt came to: mean test score in points over tasks and seeds, and by task; the numbers it trains
    beside the head; its rate."""

    score: float
    by_task: dict[str, float]
    parameters: int
    rate: float


@cache
def base() -> pt.Backbone:
    return pt.load()


@cache
def task(name: str) -> pt.Task:
    folder = data()
    assert folder is not None
    whole = pt.Task.read(folder / name)
    return replace(whole, train=whole.train[:EXAMPLES], validation=whole.validation[:HELD], test=whole.test[:TEST])


def run(name: str, method: str, hyper: Mapping[str, Any], rate: float, seed: int) -> dict[str, Any]:
    settings = pt.Settings(lr=rate, seed=seed, epochs=EPOCHS, limit=LIMIT, patience=EPOCHS)
    adapter = pt.adapt(base(), task(name), method, hyperparameters=hyper, settings=settings)
    scores = adapter.card.scores
    head = sum(t.numel() for n, t in adapter.tensors.items() if n.startswith("head/"))
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "head": scores["baseline"].value,
        "parameters": adapter.card.trained_parameters - head,
        "seconds": adapter.card.seconds,
    }


def way(method: str, rates: Sequence[float], hyper: Mapping[str, Any] | None = None) -> Way:
    """Measure a method with these hyperparameters, or find it measured."""
    rows, given = Rows("small"), dict(hyper or {})

    def row(name: str, rate: float, seed: int) -> dict[str, Any]:
        key = {"task": name, "method": method, "hyper": given, "rate": rate, "seed": seed}
        return rows.get(lambda: run(name, method, given, rate, seed), **key)

    best = max(rates, key=lambda rate: mean(row(name, rate, SEEDS[0])["validation"] for name in TASKS))
    found = {name: [row(name, best, seed) for seed in SEEDS] for name in TASKS}
    by_task = {name: 100 * mean(r["test"] for r in mine) for name, mine in found.items()}
    return Way(mean(by_task.values()), by_task, round(mean(r["parameters"] for r in found[TASKS[0]])), best)
