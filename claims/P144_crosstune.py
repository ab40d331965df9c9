"""CrossTune: Luo et al. 2024, arXiv 2403.12468. See `claims.short`.

The paper has the descriptions of the labels attend to what a frozen model makes of the input, with 16 examples of each
label, and is 5.7 points better on average than other ways of tuning a model whose weights cannot be had. Here its head
stands beside a linear one over the same frozen states of MiniLM. Both choose by as many examples again: the linear one
its penalty among four, the other the epoch it ends at. Descriptions are the words of the tasks' own definitions; where
there are none, names say enough. To tell what these do from what attention does, the head is also fitted where each
label goes by the next one's name and description. The paper's other half, examples that a large model writes and a
switch that leaves out bad ones, is not in polytask and not measured.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.tasks import Example, Label

PAPER = "Luo et al. 2024"
CLAIM = "with 16 examples a label, descriptions that attend to frozen states beat a linear head on them by 2 points"
TASKS: dict[str, dict[str, str]] = {
    "sib200_en_topic": {},
    "banking77_intent": {},
    "scicite": {
        "background": "it states a fact or concept",
        "method": "its method, tool or data is used",
        "result": "results are compared",
    },
    "hate_offensive": {
        "hate speech": "it attacks a group",
        "offensive language": "offensive language that is not hate speech",
        "neither": "neither hate speech nor offensive language",
    },
    "cr_polarity": {"negative": "it criticises the product", "positive": "it praises the product"},
}
WAYS = {"linear": pt.Reading(), "labels": pt.Reading(pool="labels"), "misnamed": pt.Reading(pool="labels")}
SHOTS, LABELS = 16, 20  # examples of each label; labels of a task at most
SEEDS = (0, 1, 2)
MORE = 2.0


def shots(name: str, seed: int) -> pt.Task:
    """SHOTS examples of each label to learn from and SHOTS to choose by, all of the training split, and the test
    examples of these labels: the first ones that there are enough of."""
    given = short.whole(name)
    drawn = Random(seed).sample(given.train, len(given.train))
    of_each = {label.name: [e for e in drawn if e.output == label.name] for label in given.labels}
    names = [one for one, rows in of_each.items() if len(rows) >= 2 * SHOTS][:LABELS]
    return replace(
        given,
        train=tuple(e for one in names for e in of_each[one][:SHOTS]),
        validation=tuple(e for one in names for e in of_each[one][SHOTS : 2 * SHOTS]),
        test=tuple(e for e in given.test if e.output in names)[: short.TEST],
        labels=tuple(Label(one, TASKS[name].get(one, "")) for one in names),
        demonstrations=(),
    )


def misnamed(task: pt.Task) -> pt.Task:
    """The same task, where each label goes by the next one's name."""
    names = [label.name for label in task.labels]
    called = dict(zip(names, [*names[1:], names[0]], strict=True))

    def split(rows: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(replace(e, output=called[str(e.output)]) for e in rows)

    return replace(task, train=split(task.train), validation=split(task.validation), test=split(task.test))


def run(name: str, way: str, seed: int) -> dict[str, Any]:
    task = misnamed(shots(name, seed)) if way == "misnamed" else shots(name, seed)
    adapter = pt.adapt(short.base(), task, "head", settings=short.settings(1e-3, seed), reading=WAYS[way])
    scores = adapter.card.scores
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "parameters": adapter.card.trained_parameters,
        "seconds": adapter.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    def row(name: str, way: str, seed: int) -> dict[str, Any]:
        return rows.get(lambda: run(name, way, seed), task=name, way=way, seed=seed)

    found = {way: {name: [row(name, way, seed) for seed in SEEDS] for name in TASKS} for way in WAYS}
    score = {way: short.points(mine) for way, mine in found.items()}
    each = {
        name: 100 * mean(a["test"] - b["test"] for a, b in zip(found["labels"][name], linear, strict=True))
        for name, linear in found["linear"].items()
    }
    more = score["labels"] - score["linear"]
    return Verdict(
        f"{len(TASKS)} tasks x {len(SEEDS)} draws of {SHOTS} a label: labels that attend {score['labels']:.1f}, a "
        f"linear head {score['linear']:.1f} ({more:+.1f} points; "
        f"{', '.join(f'{name} {gain:+.1f}' for name, gain in each.items())}); labels under a wrong name "
        f"{score['misnamed']:.1f}",
        more >= MORE,
    )
