"""CoFiTune: Zhang et al. 2024, arXiv 2404.10306. See `claims.short`.

The paper fine-tunes decoders of 7 and 13 billion parameters to a speciality and asks what is left of all else that they
could do; it searches the blocks and maps whose training leaves most of both, and scales gradients by how little a unit
matters. Here: MiniLM is fine-tuned on one of two tasks, by `full@cofitune` or by `full`; what is left is what heads of
the other one and a third, which were fitted to the model as it was, score on the changed one. Both choose among four
settings, on the first task at the first seed, by the paper's unified score: the mean of the new task and of the old
ones, on validation splits. CoFiTune chooses blocks and a rate, fine-tuning a rate alone. What the same settings come to
where only the new task's validation split picks is told beside. What differs: the maps are up and down, where the
paper's search of maps ends; and `full` leaves the embeddings as they are, half of MiniLM, which is to its advantage.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from claims.P102_half import after, reader
from polytask.recipes.adapt import measure as score

PAPER = "Zhang et al. 2024"
CLAIM = "CoFiTune keeps 10 points more of other tasks than full fine-tuning, and loses at most 2 of its own"
TASKS = ("cr_polarity", "banking77_intent", "sib200_en_topic")
NEW = TASKS[:2]
TEST = 200  # of each task; a row looks at all three
BLOCKS = {"lower middle": (0.25, 0.5), "upper half": (0.5, 1.0)}  # of all, as shares; the first is the paper's
Try = tuple[str, float]
WAYS: dict[str, tuple[Try, ...]] = {
    "full": tuple(("all", rate) for rate in (3e-5, 1e-4, 3e-4, 1e-3)),
    "full@cofitune": tuple((blocks, rate) for blocks in BLOCKS for rate in (2e-4, 6e-4)),
}
MORE, LESS = 10.0, 2.0


def task_of(name: str) -> pt.Task:
    task = short.task(name)
    return replace(task, test=task.test[:TEST])


@cache
def old(name: str) -> pt.Adapter:
    """A head for the model as it is."""
    return pt.adapt(short.base(), task_of(name), "head", settings=short.settings(1e-3, short.SEEDS[0]))


def run(way: str, name: str, blocks: str, rate: float, seed: int) -> dict[str, Any]:
    base, task = short.base(), task_of(name)
    hyper: dict[str, Any] = {"weights": short.BLOCKS}
    if blocks in BLOCKS:
        hyper |= dict(zip(("select.first", "select.last"), BLOCKS[blocks], strict=True))
    adapter = pt.adapt(
        base,
        replace(task, validation=(), test=()),  # the last step is kept, so that none ends where it began
        way,
        hyperparameters=hyper,
        settings=short.settings(rate, seed),
    )
    moved = after(base, adapter)
    heads = {other: old(other) for other in TASKS if other != name} | {name: adapter}

    def found(split: str) -> dict[str, float]:
        each = {}
        for one, head in heads.items():
            held = task_of(one)
            each[one] = score(moved, reader(head, moved), held, held.split(split), short.LIMIT).value
        return each

    test, validation = found("test"), found("validation")
    return {
        "new": test.pop(name),
        "old": mean(test.values()),
        "new validation": (own := validation.pop(name)),
        "validation": (own + mean(validation.values())) / 2,
        "before": mean(old(one).card.scores["test"].value for one in test),
        "numbers": adapter.card.trained_parameters,
        "seconds": adapter.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    found, taken, greedy = {}, {}, {}
    for way, tries in WAYS.items():

        def row(one: Try, name: str = NEW[0], seed: int = short.SEEDS[0], way: str = way) -> dict[str, Any]:
            blocks, rate = one
            measured = partial(run, way, name, blocks, rate, seed)
            return rows.get(measured, way=way, task=name, blocks=blocks, rate=rate, seed=seed)

        taken[way] = max(tries, key=lambda one: float(row(one)["validation"]))
        greedy[way] = row(max(tries, key=lambda one: float(row(one)["new validation"])))
        mine = [row(taken[way], name, seed) for name in NEW for seed in short.SEEDS]
        found[way] = {what: 100 * mean(one[what] for one in mine) for what in ("new", "old", "before")}
    full, fine = (found[way] for way in WAYS)
    alone, fine_alone = (greedy[way] for way in WAYS)
    more, gain = fine["old"] - full["old"], fine["new"] - full["new"]
    blocks, rate = taken["full@cofitune"]
    return Verdict(
        f"{len(NEW)} tasks x {len(short.SEEDS)} seeds: of other tasks' {full['before']:.1f}, CoFiTune ({blocks}, "
        f"{rate:g}) leaves {fine['old']:.1f} and full fine-tuning ({taken['full'][1]:g}) {full['old']:.1f} "
        f"({more:+.1f} points); their own task {fine['new']:.1f} and {full['new']:.1f} ({gain:+.1f}); where {NEW[0]} "
        f"alone picks, {100 * fine_alone['old']:.1f} and {100 * alone['old']:.1f} are left, its own "
        f"{100 * fine_alone['new']:.1f} and {100 * alone['new']:.1f}",
        more >= MORE and gain >= -LESS,
    )
