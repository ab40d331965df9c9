"""Every kind of task trains, with little data and odd rows too; what cannot be learned from is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from jobs import job_of, task_of
from made import one_line

from polytask.backbones import heads
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.tasks import Example, Label, Task
from polytask.training import Event, Job, Settings, train

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("classification", {"pool": "attention"}),
    ("multilabel", {}),
    ("multilabel", {"balanced": True}),
    ("regression", {}),
    ("similarity", {"pair": "separate"}),
    ("similarity", {"pair": "joint"}),
    ("tagging", {}),
    ("tagging", {"balanced": True}),
]


@pytest.mark.parametrize(("kind", "how"), KINDS)
def test_every_kind_trains(backbone, kind, how):
    learned = train(backbone, [job_of(task_of(kind), epochs=2, **how)])[0]
    assert len(learned.history) == 2
    assert all(math.isfinite(row["loss"]) for row in learned.history)
    assert learned.history[1]["loss"] < learned.history[0]["loss"] * 1.2
    assert learned.validation >= learned.probe > 0
    assert all(t.isfinite().all() for t in learned.tensors.values())
    moved = [n for n, t in learned.tensors.items() if n.endswith("/B") and bool((t != 0).any())]
    if learned.validation > learned.probe:
        assert len(moved) == 6
    if how.get("pool") == "attention":
        assert "head/q" in learned.tensors


@pytest.mark.parametrize("kind", ["classification", "tagging", "similarity", "regression", "multilabel"])
def test_edges(backbone, kind):
    task = task_of(kind, 10)
    plain = Settings(epochs=2, batch=16, lr=1e-3)
    lone = replace(task, train=task.train[:1])
    blank = replace(task, validation=())
    for data, settings in (
        (task, replace(plain, batch=1)),
        (lone, plain),
        (blank, plain),
        (replace(lone, validation=()), replace(plain, batch=1)),
        (task, replace(plain, limit=4)),
    ):
        events: list[Event] = []
        job = Job(data, build("lora"), heads.design(data), settings)
        learned = train(backbone, [job], on_event=events.append)[0]
        assert all(t.isfinite().all() for t in learned.tensors.values())
        assert all(math.isfinite(e.loss) for e in events)
        if not data.validation:
            assert (learned.validation, learned.probe) == (0.0, 0.0)
            assert len(learned.history) == 2  # without a validation split it does not stop early
            moved = any(n.endswith("/B") and bool((t != 0).any()) for n, t in learned.tensors.items())
            assert moved or len(data.train) == 1  # the last is kept


def test_words_that_are_cut_off_or_dropped(backbone):
    """Words beyond the limit and words that the tokenizer drops have no loss, and answer `O`."""
    rows = [
        Example("0", ("a", "\u200b", "e", "f"), ("B-X", "B-X", "O", "O")),
        Example("1", tuple("efghefghea"), ("O",) * 9 + ("B-X",)),
        Example("2", ("\u200b",), ("B-X",)),
        Example("3", ("b", "e"), ("B-X", "O")),
    ]
    task = Task("cut", "tagging", tuple(rows), tuple(rows), labels=(Label("X"),))
    for batch in (1, 2, 4):
        job = job_of(task, batch=batch, limit=6, epochs=3)
        learned = train(backbone, [job])[0]
        assert all(t.isfinite().all() for t in learned.tensors.values())
        assert all(math.isfinite(row["loss"]) for row in learned.history)
    head = {n.removeprefix("head/"): t for n, t in learned.tensors.items() if n.startswith("head/")}
    plan = Plan(backbone, [Active.of(job.method, learned.tensors)])
    units = passes.encode(backbone, job.head, rows, 6)
    found = passes.answer(plan, [passes.Seat(job.head, head, torch.ones(1))], units, [0] * 4)
    tags = [output for output, _ in found]
    assert [len(t) for t in tags] == [4, 10, 1, 2]
    assert tags[0][1] == "O"
    assert tags[1][4:] == ("O",) * 6
    assert tags[2] == ("O",)


def test_what_cannot_be_learned_from(backbone):
    task = task_of(n=8)
    for wrong, says in (
        (replace(task, train=()), "no training examples"),
        (replace(task, train=(*task.train, Example("nine", "e"))), "nine has no output"),
    ):
        with pytest.raises(PolytaskError, match=says) as caught:
            train(backbone, [job_of(wrong)])
        one_line(caught.value)
    for wrong in ({"epochs": 0}, {"batch": 0}, {"limit": 0}, {"patience": 0}, {"lr": 0.0}, {"lr": -1.0}, {"lr": 11.0}):
        with pytest.raises(UsageError) as caught:
            Settings(**wrong)  # type: ignore[arg-type]
        one_line(caught.value)
