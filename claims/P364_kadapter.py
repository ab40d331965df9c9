"""K-Adapter: Wang et al. 2020, arXiv 2002.01808. See `claims.short`.

The paper trains one adapter on facts and one on syntax, each by itself beside RoBERTa-large, joins what they put out,
and gains on tasks that need such knowledge, with both together most. Here one learns which instrument 300 musicians
play, the other which sport 300 athletes do, each from three phrases about every one of them; their heads are dropped,
and hardly move before. Then a task asks of all 600 what they play, in words that neither has seen. It trains the map
that joins two adapters, and a head, on 340 of the questions, and is tested on 200 others, whose answers stand in an
adapter or nowhere; each seed draws which, for the same two adapters. An adapter alone is joined with one that was never
trained, which hands the backbone's states on as they are, and two of these are `none`: all train as many numbers. The
backbone stays frozen, where the paper trains it with the task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from random import Random
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict, data
from claims.library import Known
from polytask.inference import Answer
from polytask.methods import build
from polytask.recipes.adapt import measure as score
from polytask.tasks import Example, Label, Task

PAPER = "Wang et al. 2020"
CLAIM = "each of two adapters of facts helps where both are asked, both beat each by 20 points, and none is changed"
SETS = {"musicians": "person-instrument", "athletes": "person-sport"}
ARMS: dict[str, tuple[str, ...]] = {"none": (), **{of: (of,) for of in SETS}, "both": (*SETS,)}
TOLD = ("{}", "I have read about {}.", "Who is {}?")
ASKED = "What does {} play?"
PEOPLE, TRAIN, HELD = 300, 170, 30  # of each set; those left are the test
TELLINGS, LEARN, HEAD = 8, 1e-4, 1e-5  # epochs of what an adapter is told; rates, its own and its head's
EPOCHS, RATES, NEW_HEAD = 6, (3e-4, 1e-3), 1e-2  # of the task, whose head starts where one without adapters would be
LIMIT = 32
MORE = 20.0


@cache
def facts(of: str) -> dict[str, str]:
    """What each person of a set plays."""
    folder = data()
    assert folder is not None
    listed = json.loads((folder / "function_vectors" / "abstractive" / f"{SETS[of]}.json").read_text())
    known = {row["input"]: row["output"] for row in listed}
    return {name: known[name] for name in Random(0).sample(sorted(known), PEOPLE)}


def labels(rows: tuple[Example, ...]) -> tuple[Label, ...]:
    return tuple(map(Label, sorted({str(e.output) for e in rows})))


def told(of: str) -> Task:
    """A set's facts, to be learnt by heart."""
    rows = [(name, said, thing) for said in TOLD for name, thing in facts(of).items()]
    train = tuple(Example(str(i), said.format(name), thing) for i, (name, said, thing) in enumerate(rows))
    return Task(of, "classification", train, labels=labels(train), metric="accuracy")


def asked(seed: int, *sets: str) -> Task:
    """Questions about the people of these sets. An example's id says which set it is of, and nothing else does."""
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for of in sets:
        rows = [Example(f"{of}/{name}", ASKED.format(name), thing) for name, thing in facts(of).items()]
        Random(seed).shuffle(rows)
        splits["train"] += rows[:TRAIN]
        splits["validation"] += rows[TRAIN : TRAIN + HELD]
        splits["test"] += rows[TRAIN + HELD :]
    train, held, test = map(tuple, splits.values())
    return Task("who plays what", "classification", train, held, test, labels=labels(train), metric="accuracy")


@cache
def adapter(of: str) -> pt.Adapter:
    settings = short.settings(LEARN, 0, head_lr=HEAD, epochs=TELLINGS, batch=32, limit=LIMIT)
    return pt.adapt(short.base(), told(of), "kadapter", settings=settings)


def blank(seed: int) -> pt.Adapter:
    """One that was never trained: heads read the backbone's own last states."""
    like = adapter(next(iter(SETS)))
    head = {name: t for name, t in like.tensors.items() if name.startswith("head/")}
    return replace(like, tensors=head | build("kadapter").start(short.base(), seed))


def answers(of: str, seed: int, beside: Sequence[pt.Adapter] = ()) -> list[Answer]:
    """What an adapter answers about its set by its own head, where others are loaded beside it."""
    engine = pt.Engine(short.base(), adapters=[adapter(of), *beside])
    return engine.answer([pt.Request(e.input, adapter=adapter(of).id) for e in asked(seed, of).test], LIMIT)


def learnt(of: str) -> dict[str, Any]:
    """How much of its set an adapter knows by itself: as it was told, and as it is asked."""
    task, questions = told(of), asked(0, of).test
    return {
        "told": score(short.base(), adapter(of), task, task.train, LIMIT).value,
        "asked": score(short.base(), adapter(of), task, questions, LIMIT).value,
        "seconds": adapter(of).card.seconds,
    }


def joined(arm: str, rate: float, seed: int) -> dict[str, Any]:
    """What the task comes to with the adapters of an arm, and whether these answer as before."""
    before = {of: answers(of, seed) for of in ARMS[arm]}
    own = [adapter(of) for of in ARMS[arm]]
    over = [*own, *(blank(n) for n in range(len(SETS) - len(own)))]
    settings = short.settings(rate, seed, head_lr=NEW_HEAD, epochs=EPOCHS, patience=EPOCHS, limit=LIMIT)
    task = asked(seed, *SETS)
    made = pt.adapt(short.base(), task, "kadapters", settings=settings, over=over)

    def about(of: str) -> float:
        questions = [e for e in task.test if e.id.startswith(of)]
        return score(short.base(), made, task, questions, LIMIT, Known(over)).value

    return {
        "test": made.card.scores["test"].value,
        "validation": made.card.scores["validation"].value,
        **{of: about(of) for of in SETS},
        "same": all(answers(of, seed, [*over, made]) == said for of, said in before.items()),
        "parameters": made.card.trained_parameters,
        "seconds": made.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in ARMS:

        def row(rate: float, seed: int, arm: str = arm) -> dict[str, Any]:
            return rows.get(lambda: joined(arm, rate, seed), arm=arm, rate=rate, seed=seed)

        best = max(RATES, key=lambda rate: float(row(rate, short.SEEDS[0])["validation"]))
        found[arm] = [row(best, seed) for seed in short.SEEDS]
    knows = 100 * mean(rows.get(partial(learnt, of), set=of)["asked"] for of in SETS)

    def points(arm: str, what: str = "test") -> float:
        return 100 * float(mean(one[what] for one in found[arm]))

    none, both = points("none"), points("both")
    alone = {of: points(of) for of in SETS}
    more = both - max(alone.values())
    same = all(one["same"] for mine in found.values() for one in mine)
    of_each = {of: f"{of} {points(of, of):.1f} with theirs, {points('both', of):.1f} with both" for of in SETS}
    return Verdict(
        f"{len(short.SEEDS)} seeds: none {none:.1f}, {', '.join(f'of {of} {its:.1f}' for of, its in alone.items())}, "
        f"both {both:.1f} ({more:+.1f} points; {'; '.join(of_each.values())}); by its own head each answers "
        f"{knows:.1f} of its set, after joining {'as before' if same else 'OTHERWISE'}",
        min(alone.values()) > none and more >= MORE and same,
    )
