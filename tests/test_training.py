"""It learns, and the same seed gives the same bits."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jobs import LORA, job_of, same, task_of

from polytask.backbones import load
from polytask.backbones.weights import fingerprint
from polytask.tasks import Example, Label, Task
from polytask.training import Event, Settings, train


@pytest.mark.parametrize(
    ("method", "hyper", "lr", "falls", "gains"),
    [
        ("lora", LORA, 5e-3, 0.2, 0.15),
        ("full", {}, 2e-3, 0.2, 0.05),
        ("bottleneck", {"reduction": 2}, 1e-2, 0.8, 0.0),
        ("pfeiffer", {"reduction": 2}, 1e-2, 0.8, 0.0),
        ("ia3", {}, 3e-2, 0.75, 0.0),
    ],
)
def test_it_learns_what_frozen_features_do_not_hold(backbone, method, hyper, lr, falls, gains):
    """The first token's state of a random model says little about one word in thirty."""
    task = task_of(n=96, length=40, metric="accuracy")
    learned = train(backbone, [job_of(task, method, hyper, "first", lr=lr, epochs=12)])[0]
    assert 0.3 < learned.probe < 0.85
    assert learned.validation >= learned.probe + gains
    assert learned.validation == max(learned.probe, *(row["score"] for row in learned.history))
    assert learned.history[-1]["loss"] < falls * learned.history[0]["loss"]
    assert learned.examples == 12 * 96
    assert all(not t.requires_grad for t in learned.tensors.values())
    assert backbone.fingerprint == tiny.backbone("bert").fingerprint
    assert all(
        torch.equal(a, b) for a, b in zip(backbone.model.parameters(), tiny.make("bert").parameters(), strict=True)
    )


def test_it_learns_on_the_embedded_encoder():
    """Who chased whom, from a softened start, in bf16."""
    animals = ("cat", "dog", "fox", "hen", "cow", "goat")
    pairs = [(a, b) for a in animals for b in animals if a != b]
    rows = [Example(f"{a}{b}{v}", f"the {a} {v} the {b}", a) for a, b in pairs for v in ("chased", "saw", "met")]
    random.Random(0).shuffle(rows)
    task = Task("who", "classification", tuple(rows[:64]), tuple(rows[64:]), labels=tuple(map(Label, animals)))
    minilm = load(precision="bf16", device="cpu")
    before = fingerprint(minilm.model)
    learned = train(minilm, [job_of(task, lr=2e-3, epochs=4)])[0]
    assert learned.validation > 0.9
    assert learned.history[-1]["score"] > 0.8
    assert learned.history[-1]["loss"] < 0.1 * learned.history[0]["loss"]
    assert fingerprint(minilm.model) == before


def test_the_head_alone_is_the_probe(backbone):
    events: list[Event] = []
    learned = train(backbone, [job_of(task_of(), "head")], on_event=events.append)[0]
    assert [e.kind for e in events] == ["probe"]
    assert (learned.validation, learned.examples, learned.history) == (learned.probe, 0, [])
    assert learned.tensors.keys() == {"head/W", "head/b"} == learned.probe_tensors.keys()
    assert all(torch.equal(t, learned.probe_tensors[n]) for n, t in learned.tensors.items())


def test_events_tell_the_whole_way(backbone):
    events: list[Event] = []
    task = task_of()
    train(backbone, [job_of(task, epochs=2), job_of(task, "head")], on_event=events.append)
    assert [(e.kind, e.job) for e in events] == [
        *[("probe", 0), ("probe", 1)],
        *[("step", 0)] * 3,
        ("score", 0),
        *[("step", 0)] * 3,
        ("score", 0),
        ("done", 0),
    ]
    steps = [e for e in events if e.kind == "step"]
    assert [(e.step, e.steps) for e in steps] == [(i, 6) for i in range(1, 7)]
    assert steps[2].epoch == 1.0


def test_the_rate_rises_and_falls_in_straight_lines(backbone, monkeypatch):
    seen: list[tuple[float, float]] = []
    step = torch.optim.AdamW.step

    def look(self: torch.optim.AdamW, *args: Any) -> Any:
        seen.append(tuple(group["lr"] for group in self.param_groups))  # type: ignore[arg-type]
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    train(backbone, [job_of(task_of(n=64), epochs=5, warmup=0.2, lr=0.01, head_lr=0.002)])
    # 20 steps, 4 of them rising.
    share = [1 / 4, 2 / 4, 3 / 4, 1.0, *[(20 - t) / 16 for t in range(4, 20)]]
    assert np.allclose(seen, [(0.01 * s, 0.002 * s) for s in share])


def test_the_default_rate_falls_with_the_width_above_that_of_the_embedded_encoder():
    own = Settings()
    assert [own.rate("lora", width) for width in (32, 384, 768, 3840)] == pytest.approx([2e-3, 2e-3, 1e-3, 2e-4])
    assert own.rate("of a stranger", 768) == pytest.approx(5e-4)
    assert Settings(lr=0.03).rate("lora", 3840) == 0.03


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(backbone, method):
    hyper = {"dropout": 0.2} if method == "lora" else {}
    one, two, other = (
        train(backbone, [job_of(task_of(held=0), method, hyper, seed=seed, lr=1e-3)])[0] for seed in (0, 0, 1)
    )
    same(one, two)
    assert any(not torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())
