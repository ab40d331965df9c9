"""Comparisons whose every row takes well under a minute on one core: short texts on the embedded encoder.

The first EXAMPLES of each training split, two seeds, equal epochs. A way's rate is the one of its rates with the better
validation score on PICKED_ON at the first seed; all ways have equally many to choose from. Rows are each claim's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, zip_longest
from random import Random
from statistics import mean
from typing import Any

import polytask as pt
from claims.claim import data

TASKS = ("cr_polarity", "hate_offensive", "sib200_en_topic")
PICKED_ON = TASKS[0]
SEEDS = (0, 1)
EXAMPLES, HELD, TEST = 300, 100, 300
EPOCHS, BATCH = 4, 16
LIMIT = 48  # tokens a text is cut to; one in fifty is longer
BLOCKS = ["*encoder.layer.*"]  # MiniLM's weights without its embeddings, which are half of all

Row = dict[str, Any]


@cache
def base() -> pt.Backbone:
    return pt.load()


@cache
def whole(name: str) -> pt.Task:
    folder = data()
    assert folder is not None
    return pt.Task.read(folder / name)


def task(name: str) -> pt.Task:
    given = whole(name)
    return replace(given, train=given.train[:EXAMPLES], validation=given.validation[:HELD], test=given.test[:TEST])


def few(name: str, n: int, seed: int) -> pt.Task:
    """The task with n training examples, drawn by the seed from all labels alike as far as n allows."""
    given = task(name)
    drawn = Random(seed).sample(whole(name).train, len(whole(name).train))
    of_each = [[e for e in drawn if e.output == label.name] for label in given.labels]
    in_turn = [e for e in chain.from_iterable(zip_longest(*of_each)) if e is not None]
    return replace(given, train=tuple(in_turn[:n]), demonstrations=())


def settings(rate: float, seed: int, **more: Any) -> pt.Settings:
    own = {"epochs": EPOCHS, "batch": BATCH, "limit": LIMIT, "patience": EPOCHS}
    return pt.Settings(lr=rate, seed=seed, **{**own, **more})


def picked(tries: Sequence[Any], row: Callable[[str, Any, int], Row]) -> tuple[Any, dict[str, list[Row]]]:
    """The rate of the tries, and its rows of every task, one for each seed."""
    best = max(tries, key=lambda rate: row(PICKED_ON, rate, SEEDS[0])["validation"])
    return best, {name: [row(name, best, seed) for seed in SEEDS] for name in TASKS}


def points(found: dict[str, list[Row]], what: str = "test") -> float:
    """The mean over tasks and seeds, times 100."""
    return 100 * mean(row[what] for rows in found.values() for row in rows)
