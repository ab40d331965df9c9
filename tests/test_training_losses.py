"""Losses by hand, class weights, when training stops and what it keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from jobs import LORA, job_of, task_of
from made import one_line
from torch import Tensor

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, heads
from polytask.errors import PolytaskError
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.tasks import Label, Task
from polytask.training import Event, Job, Learned, checkpoint, loop, probe, train
from polytask.training.learner import SOFTER


def first_loss(backbone: Backbone, job: Job) -> tuple[float, Learned]:
    events: list[Event] = []
    learned = train(backbone, [job], on_event=events.append)[0]
    return next(e.loss for e in events if e.kind == "step"), learned


@pytest.mark.parametrize("balanced", [False, True])
def test_the_first_loss_by_hand(backbone, balanced):
    """One batch of all rows: a mean of −log p at the softened probe, weighed by n / (C n_c) where balanced."""
    task = task_of(n=24)
    rows = [e for e in task.train if e.output != "a"] + [e for e in task.train if e.output == "a"][:1]
    task = replace(task, train=tuple(rows))
    job = job_of(task, batch=64, epochs=1, balanced=balanced)
    loss, learned = first_loss(backbone, job)
    φ = torch.stack(passes.features(backbone, job.head, passes.encode(backbone, job.head, task.train)))
    W, b = (SOFTER * learned.probe_tensors[f"head/{n}"] for n in "Wb")
    y = torch.tensor(["abcd".index(str(e.output)) for e in task.train])
    each = -(φ @ W.T + b).log_softmax(-1)[torch.arange(len(y)), y]
    if balanced:
        each = each * torch.tensor([len(y) / (4 * int((y == c).sum())) for c in range(4)])[y]
    assert loss == pytest.approx(float(each.mean()), rel=1e-4)


def test_the_loss_of_tags_is_a_mean_over_words(backbone):
    task = task_of("tagging", 12)
    job = job_of(task, batch=64, epochs=1)
    loss, learned = first_loss(backbone, job)
    φ = torch.cat(passes.features(backbone, job.head, passes.encode(backbone, job.head, task.train)))
    W, b = (SOFTER * learned.probe_tensors[f"head/{n}"] for n in "Wb")
    y = torch.tensor([("O", "B-X", "I-X").index(tag) for e in task.train for tag in e.output])
    each = -(φ @ W.T + b).log_softmax(-1)[torch.arange(len(y)), y]
    assert loss == pytest.approx(float(each.mean()), rel=1e-4)


def test_class_weights_help_a_rare_class(backbone):
    rows = list(task_of(n=200, length=40).train)
    rare = [replace(e, output="x" if e.output == "a" and i % 3 == 0 else "y") for i, e in enumerate(rows)]
    held = [replace(e, output="x" if e.output == "a" else "y") for e in task_of(seed=9, n=100, length=40).train]
    task = Task("rare", "classification", tuple(rare), tuple(held), labels=(Label("x"), Label("y")), metric="macro_f1")
    share = []
    for balanced in (False, True):
        job = job_of(task, "lora", {}, "first", epochs=1, lr=1e-4, balanced=balanced)
        learned = train(backbone, [job])[0]
        p = {n.removeprefix("head/"): t for n, t in learned.probe_tensors.items()}
        φ = torch.stack(passes.features(backbone, job.head, passes.encode(backbone, job.head, task.validation)))
        share.append(heads.decode(job.head, heads.logits(p, φ))[0].count("x") / len(held))
    assert share[1] > 2 * share[0]


def test_it_stops_when_nothing_gets_better_and_keeps_the_best(backbone):
    events: list[Event] = []
    job = job_of(task_of(), lr=1e-9, head_lr=1e-9, patience=2, epochs=20)
    learned = train(backbone, [job], on_event=events.append)[0]
    # Softening does not change which class is largest, so no evaluation is better than the probe's.
    assert learned.validation == learned.probe
    assert len(learned.history) == 2
    assert [e.kind for e in events][-1] == "done"
    assert learned.examples == 2 * 48
    assert all(torch.equal(t, learned.tensors[n]) for n, t in learned.probe_tensors.items())
    # The best is kept where a large rate spoils what comes after.
    wild = train(backbone, [job_of(task_of(), lr=0.5, patience=3, epochs=9)])[0]
    assert wild.validation == max(wild.probe, *(row["score"] for row in wild.history))


def test_what_is_kept_is_what_was_scored(backbone):
    task = task_of(n=96, length=40, metric="accuracy")
    job = job_of(task, "lora", LORA, "first", epochs=8)
    learned = train(backbone, [job])[0]
    assert learned.validation > learned.probe
    head = {n.removeprefix("head/"): t for n, t in learned.tensors.items() if n.startswith("head/")}
    plan = Plan(backbone, [Active.of(job.method, learned.tensors)])
    units = passes.encode(backbone, job.head, task.validation)
    found = passes.answer(plan, [passes.Seat(job.head, head, torch.ones(1))], units, [0] * len(units))
    right = [output == e.output for (output, _), e in zip(found, task.validation, strict=True)]
    assert sum(right) / len(right) == pytest.approx(learned.validation)


def test_a_loss_or_gradient_that_is_no_number_is_one_line(backbone, tmp_path, monkeypatch):
    task = task_of(n=32)
    with pytest.raises(PolytaskError, match="the gradient became inf at step 1") as caught:
        train(backbone, [job_of(task, "lora", {"alpha": 1e38}, epochs=5)], folder=tmp_path)
    assert not checkpoint.found(tmp_path)
    message = one_line(caught.value)
    assert task.name in message
    assert "smaller lr than 0.005" in message
    losses, calls = heads.losses, 0

    def breaks(head: HeadCard, z: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += z.requires_grad and not z.is_leaf and len(z) == 16
        return losses(head, z, y, weights) * (math.nan if calls > 1 else 1)

    monkeypatch.setattr(loop.heads, "losses", breaks)
    monkeypatch.setattr(probe, "_minimise", lambda head, φ, y, W0, W, b, *more: (W, b))
    with pytest.raises(PolytaskError, match="the loss became nan at step 2") as caught:
        train(backbone, [job_of(task, epochs=5)])
    one_line(caught.value)


def test_a_methods_own_penalty_and_fixed_tensors_are_minded(backbone):
    """KaSA's: with a large weight the singular values shrink, and what is fixed stays as it was."""
    hyper = {"r": 2, "sites": ["*.attn.q"]}
    start = build("kasa", hyper).start(backbone, 0)
    sizes = {}
    for beta in (0.0, 5.0):
        learned = train(backbone, [job_of(task_of(held=0), "kasa", {**hyper, "beta": beta}, epochs=9, lr=0.05)])[0]
        sizes[beta] = sum(float(t.square().sum()) for n, t in learned.tensors.items() if n.endswith("/d"))
        for n, t in learned.tensors.items():
            if n.endswith(("/U", "/V")):
                assert torch.equal(t, start[n])
            elif n in start:
                assert not torch.equal(t, start[n])
    assert sizes[5.0] < 0.5 * sizes[0.0]
