"""Merges of one handful of adapters that several claims compare: LoRAs of sentence tasks from `claims.library`.

What is merged answers each task through that task's own head. What a rule leaves to choose is chosen on validation
splits, from equally many tries for every rule; scores are those of the test splits, in points, the mean over tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows
from claims.library import skill
from polytask.adapters import Adapter
from polytask.composition.merging.fitted import fitted_rules
from polytask.composition.merging.rule import build
from polytask.recipes.adapt import measure as score

SIX = ("cr_polarity", "sib200_en_topic", "hate_offensive", "scicite", "csabstruct", "clinc150_intent")
SCALES = (0.3, 0.6, 1.0, 1.5)  # tries of λ, for whichever rule has one

Row = dict[str, Any]


def merged(names: Sequence[str], rule: str, hyper: Mapping[str, Any]) -> Adapter:
    tasks: list[pt.Task] = []
    if rule in fitted_rules():
        few = hyper.get("examples")  # of the validation split the first, which also choose other rules' numbers
        tasks = [replace(task, validation=task.validation[:few]) for task in map(short.task, names)]
    made, _ = pt.merge(short.base(), [skill(name, "lora") for name in names], build(rule, hyper), tasks=tasks)
    return made


def scored(made: Adapter, name: str, split: str, most: int | None = None) -> float:
    """Through the task's own head."""
    task, own = short.task(name), skill(name, "lora")
    body = {n: t for n, t in made.tensors.items() if not n.startswith(("head/", "task/"))}
    head = {n: t for n, t in own.tensors.items() if n.startswith("head/")}
    answers = replace(made, tensors=body | head, head=own.head)
    return score(short.base(), answers, task, task.split(split)[:most], short.LIMIT).value


def row(rows: Rows, names: Sequence[str], rule: str, hyper: Mapping[str, Any], split: str, most: int = 300) -> Row:
    """Measured, or found measured: each task's score on the first `most` examples, and their mean in points."""

    def measure() -> Row:
        made = merged(names, rule, hyper)
        by_task = {name: scored(made, name, split, most) for name in names}
        return {"by_task": by_task, "points": 100 * mean(by_task.values()), "notes": list(made.card.notes[2:])}

    return rows.get(measure, names=list(names), rule=rule, hyper=dict(hyper), split=split, most=most)


def alone(rows: Rows, names: Sequence[str]) -> Row:
    """Each task's own adapter."""

    def measure() -> Row:
        by_task = {name: scored(skill(name, "lora"), name, "test") for name in names}
        return {"by_task": by_task, "points": 100 * mean(by_task.values())}

    return rows.get(measure, names=list(names), rule="none")


def best(
    rows: Rows, names: Sequence[str], rule: str, tries: Sequence[Mapping[str, Any]], most: int = 100
) -> Mapping[str, Any]:
    """The try with the best mean validation score of these tasks, on so many examples of each."""
    return max(tries, key=lambda hyper: row(rows, names, rule, hyper, "validation", most)["points"])
