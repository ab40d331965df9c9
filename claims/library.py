"""A library of adapters that claims about compositions share, and targets of a few examples to compose them for.

Eight tasks of short sentences on the embedded encoder. Each has an adapter, trained on EXAMPLES of it with one rate
for all. A target is one of three of these tasks with a few examples, drawn anew by each seed; what is composed for it
are the adapters of the other seven, and its own of the few. Adapters are trained once, for all claims: they are kept in
`claims/results/.library`, which git does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Any

import polytask as pt
from claims import claim, short
from claims.claim import Rows
from polytask.adapters import Adapter

SKILLS = (
    "banking77_intent",
    "clinc150_intent",
    "blimp_pairs",
    "scicite",
    "csabstruct",
    "cr_polarity",
    "hate_offensive",
    "sib200_en_topic",
)
TARGETS = ("cr_polarity", "sib200_en_topic", "hate_offensive")
SEEDS = (0, 1)
EXAMPLES, RATE = 300, 2e-3
EPOCHS = 10  # of a target
HELD = 64

Row = dict[str, Any]
At = Callable[[str, int, float], Row]
"""What a target at a seed and a rate comes to."""


class Known:
    """Adapters by their ids."""

    def __init__(self, adapters: list[Adapter]) -> None:
        self.adapters = {one.id: one for one in adapters}

    def get(self, ref: str) -> Adapter:
        return self.adapters[ref]


def kept(name: str, make: Callable[[], Adapter]) -> Adapter:
    """The adapter of that name, from the folder if it is there."""
    folder = claim.RESULTS / ".library" / name
    if folder.exists():
        found = Adapter.load(folder)
        if found.backbone.fingerprint == short.base().fingerprint:
            return found
    made = make()
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent / ".gitignore").write_text("*\n")
    made.save(folder)
    return made


@cache
def skill(name: str, method: str) -> Adapter:
    """A task's own adapter, of EXAMPLES."""
    task = replace(short.task(name), validation=(), test=())
    settings = short.settings(RATE, 0)
    said = f"{method}-{name}-{EXAMPLES}x{short.EPOCHS}-{RATE:g}"
    return kept(said, lambda: pt.adapt(short.base(), task, method, settings=settings))


def others(target: str, method: str) -> list[Adapter]:
    """The adapters of all tasks but the target."""
    return [skill(name, method) for name in SKILLS if name != target]


@cache
def target(name: str, examples: int, seed: int) -> pt.Task:
    few = short.few(name, examples, seed)
    return replace(few, validation=few.validation[:HELD])


def run(task: pt.Task, method: str, hyper: Mapping[str, Any], rate: float, seed: int, **more: Any) -> Row:
    """An adapter for the target; `over`, `above`, `library`: see `polytask.recipes.adapt.Plan`."""
    settings = short.settings(rate, seed, epochs=EPOCHS, patience=EPOCHS)
    made = pt.adapt(short.base(), task, method, hyperparameters=hyper, settings=settings, **more)
    return row_of(made)


def row_of(made: Adapter) -> Row:
    head = sum(t.numel() for n, t in made.tensors.items() if n.startswith("head/"))
    return {
        "metric": made.card.scores["test"].metric,
        "test": made.card.scores["test"].value,
        "validation": made.card.scores["validation"].value,
        "head": made.card.scores["baseline"].value,
        "parameters": made.card.trained_parameters - head,
        "seconds": made.card.seconds,
    }


@cache
def own(name: str, examples: int, seed: int, method: str, rate: float) -> Adapter:
    """The target's own adapter, of its few examples alone."""
    settings = short.settings(rate, seed, epochs=EPOCHS, patience=EPOCHS)
    task = target(name, examples, seed)
    said = f"{method}-{name}-{examples}x{EPOCHS}-{rate:g}-{seed}"
    return kept(said, lambda: pt.adapt(short.base(), task, method, settings=settings))


def best_rate(rows: Rows, rates: Sequence[float], run_at: At, **key: Any) -> float:
    """The rate with the best validation score on the first target at the first seed."""
    name, seed = TARGETS[0], SEEDS[0]

    def tried(rate: float) -> float:
        score: float = rows.get(lambda: run_at(name, seed, rate), **key, task=name, seed=seed, rate=rate)["validation"]
        return score

    return max(rates, key=tried)


def every(rows: Rows, rates: Sequence[float], run_at: At, **key: Any) -> list[Row]:
    """The rows of each target and seed at the best of the rates."""
    rate = best_rate(rows, rates, run_at, **key)
    return [
        rows.get(lambda n=name, s=seed: run_at(n, s, rate), **key, task=name, seed=seed, rate=rate)
        for name in TARGETS
        for seed in SEEDS
    ]


def points(found: Sequence[Row], what: str = "test") -> float:
    """The mean of the rows, times 100."""
    return 100 * mean(row[what] for row in found)
