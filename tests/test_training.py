"""Training: it learns, it is the same each time, after an interruption, alone or with others, in one process or two."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from made import die, killed, one_line
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, heads, load
from polytask.backbones.backbone import fingerprint
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.tasks import Example, Label, Task
from polytask.training import Event, Job, Learned, Settings, checkpoint, loop, probe, train

WORDS = "abcdefgh"
TOKENS = tiny.words(*WORDS)
LORA = {"sites": ["*.attn.[qkvo]", "*.mlp.*"]}


def task_of(kind: str = "classification", n: int = 48, *, length: int = 12, seed: int = 0, held: int = 32, **more: Any):
    """Which of a, b, c and d stands among other words: as a label, labels, a number, tags, or whether two agree."""
    draw = random.Random(seed)
    labels = {"classification": "abcd", "multilabel": "abcd", "tagging": "X", "regression": "", "similarity": ""}[kind]

    def text(key: str) -> list[str]:
        words = [draw.choice("efgh") for _ in range(draw.randint(length // 2, length))]
        words[draw.randrange(len(words))] = key
        return words

    def row(i: int) -> Example:
        key = draw.choice("abcd")
        words = text(key)
        if kind == "tagging":
            return Example(str(i), tuple(words), tuple("B-X" if word in "abcd" else "O" for word in words))
        if kind == "similarity":
            other = draw.choice("abcd")
            return Example(str(i), " ".join(words), float(key == other), " ".join(text(other)))
        if kind == "multilabel":
            second = draw.choice("abcd")
            return Example(str(i), " ".join([*words, second]), tuple(sorted({key, second})))
        output: str | float = key if kind == "classification" else float("abcd".index(key))
        return Example(str(i), " ".join(words), output)

    train_rows, held_rows = (tuple(row(i) for i in range(k)) for k in (n, held))
    return Task(f"{kind}-{seed}", kind, train_rows, held_rows, labels=tuple(map(Label, labels)), **more)  # type: ignore


def job_of(
    task: Task, method: str = "lora", hyper: dict[str, Any] | None = None, pool: str = "mean", **more: Any
) -> Job:
    pair = more.pop("pair", "separate")
    causal = more.pop("causal", True)
    settings = Settings(**{"epochs": 3, "batch": 16, "lr": 5e-3, "patience": 99, **more})
    return Job(task, build(method, hyper or {}), heads.design(task, pool=pool, pair=pair, causal=causal), settings)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


def same(a: Learned, b: Learned) -> None:
    """Bit for bit, but for the clock. (Without a validation split the last tensors are kept: those are compared.)"""
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name
    assert (a.validation, a.probe, a.examples) == (b.validation, b.probe, b.examples)
    assert timeless(a) == timeless(b)


def timeless(learned: Learned) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in learned.history]


def near(a: Learned, b: Learned, tolerance: float = 2e-3) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        torch.testing.assert_close(tensor, b.tensors[name], rtol=tolerance, atol=tolerance)
    assert a.validation == pytest.approx(b.validation, abs=1e-6)


# -- it learns ---------------------------------------------------------------------------------------------------------


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


# -- the same each time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(backbone, method):
    hyper = {"dropout": 0.2} if method == "lora" else {}
    one, two, other = (
        train(backbone, [job_of(task_of(held=0), method, hyper, seed=seed, lr=1e-3)])[0] for seed in (0, 0, 1)
    )
    same(one, two)
    assert any(not torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


class Stop(Exception):
    pass


def stop_at(kind: str, step: int, error: BaseException) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        if event.kind == kind and event.step == step:
            raise error

    return tell


def jobs_for_resuming() -> list[Job]:
    """Several methods, a tagger, one that stops early and one without steps; dropout draws random numbers."""
    return [
        job_of(task_of(held=0), "lora", {"dropout": 0.2}, epochs=4),
        job_of(task_of("tagging", 20, held=0), "bottleneck", {}, epochs=3),
        job_of(task_of(seed=3), "ia3", {}, epochs=9, patience=1, lr=1e-6),
        job_of(task_of(seed=4), "head"),
    ]


def test_training_that_was_interrupted_goes_on_to_the_same_bits(backbone, tmp_path):
    whole = train(backbone, jobs_for_resuming())
    for n, (kind, step, error) in enumerate(
        [
            ("step", 1, Stop()),  # before there is a checkpoint
            ("score", 3, Stop()),
            ("step", 4, KeyboardInterrupt()),
            ("step", 8, Stop()),
            ("done", 12, Stop()),
        ]
    ):
        folder = tmp_path / str(n)
        with pytest.raises(type(error)):
            train(backbone, jobs_for_resuming(), folder=folder, on_event=stop_at(kind, step, error))
        began: list[Event] = []
        resumed = train(backbone, jobs_for_resuming(), folder=folder, on_event=began.append)
        first = next((e.step for e in began if e.kind == "step" and e.job == 0), None)
        assert first == {1: 1, 3: 3, 4: 4, 8: 7, 12: 10}[step] or step < 3
        for a, b in zip(resumed, whole, strict=True):
            same(a, b)
        # And what is finished is there at once.
        after: list[Event] = []
        for a, b in zip(train(backbone, jobs_for_resuming(), folder=folder, on_event=after.append), whole, strict=True):
            same(a, b)
        assert {e.kind for e in after} == {"probe"}
        assert [p.name for p in folder.iterdir()] == [checkpoint.FILE]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(backbone, tmp_path, where, monkeypatch):
    jobs = [job_of(task_of(n=32, held=0), epochs=3)]
    whole = train(backbone, jobs)
    with pytest.raises(Stop):
        train(backbone, jobs, folder=tmp_path, on_event=stop_at("step", 3, Stop()))
    before = (tmp_path / checkpoint.FILE).read_bytes()

    def work() -> None:
        if where == "fsync":
            os.fsync = die
        else:
            Path.replace = die  # type: ignore[method-assign]
        train(backbone, jobs, folder=tmp_path)

    killed(work)
    assert (tmp_path / checkpoint.FILE).read_bytes() == before
    same(train(backbone, jobs, folder=tmp_path)[0], whole[0])


CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import test_training as t
backbone = t.tiny.backbone("bert", tokenizer=t.TOKENS)
t.train(backbone, t.jobs_for_kill(), folder=Path(sys.argv[1]), on_event=lambda event: t.time.sleep(0.01))
"""


def jobs_for_kill() -> list[Job]:
    return [job_of(task_of(n=64, held=0), "lora", {"dropout": 0.1}, epochs=25)]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def test_a_process_killed_at_any_moment_goes_on_to_the_same_bits(backbone, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=environment())
    deadline = time.monotonic() + 60
    while not (tmp_path / checkpoint.FILE).is_file() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    events: list[Event] = []
    resumed = train(backbone, jobs_for_kill(), folder=tmp_path, on_event=events.append)
    first = next(e.step for e in events if e.kind == "step")
    assert 4 < first < 100
    same(resumed[0], train(backbone, jobs_for_kill())[0])


def test_checkpoints_that_are_not_this_works(backbone, tmp_path):
    task = task_of(n=32)
    mine = job_of(task)
    with pytest.raises(Stop):
        train(backbone, [mine], folder=tmp_path, on_event=stop_at("step", 3, Stop()))
    data = (tmp_path / checkpoint.FILE).read_bytes()
    elsewhere = tiny.backbone("bert", seed=1, tokenizer=TOKENS)
    rows = task.train[1:] + task.train[:1]
    for other, where in (
        ([job_of(task_of(n=32, seed=1))], backbone),
        ([job_of(replace(task, train=rows))], backbone),
        ([job_of(task, "ia3")], backbone),
        ([job_of(task, "lora", {"r": 4})], backbone),
        ([job_of(task, pool="first")], backbone),
        ([job_of(task, lr=1e-3)], backbone),
        ([job_of(task, seed=1)], backbone),
        ([mine, mine], backbone),
        ([mine], elsewhere),
    ):
        with pytest.raises(PolytaskError, match="other work") as caught:
            train(where, other, folder=tmp_path)
        one_line(caught.value)
        assert (tmp_path / checkpoint.FILE).read_bytes() == data
    for damaged in (b"", b"{}", data[: len(data) // 2], data[:-1], b"\x80\x04pickle" + data, b"\xff" * 100):
        (tmp_path / checkpoint.FILE).write_bytes(damaged)
        with pytest.raises(PolytaskError, match="not a whole checkpoint") as caught:
            train(backbone, [mine], folder=tmp_path)
        assert checkpoint.FILE in one_line(caught.value)


def test_a_checkpoint_that_cannot_be_written_is_one_line(backbone, tmp_path, monkeypatch):
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PolytaskError, match="No space left") as caught:
        train(backbone, [job_of(task_of(n=16))], folder=tmp_path)
    one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


# -- many at once, cached prefixes, two processes ----------------------------------------------------------------------


def test_jobs_at_once_learn_what_each_learns_alone(backbone):
    jobs = [
        job_of(task_of(seed=1, held=0), "lora", {"r": 4}),
        job_of(task_of(seed=2, n=30, held=0), "lora", {"r": 8}, epochs=5),
        job_of(task_of("tagging", 24, held=0), "lora"),
        job_of(task_of("multilabel", held=0), "bottleneck", pool="attention"),
        job_of(task_of("similarity", held=0), "pfeiffer"),
        job_of(task_of("similarity", held=0), "ia3", pair="joint"),
        job_of(task_of("regression", held=0), "full", lr=5e-4, batch=7),
        job_of(task_of(seed=3), "head"),
        job_of(task_of(seed=5), "lora", balanced=True, patience=1, lr=1e-5, epochs=8),
    ]
    together = train(backbone, jobs)
    for job, learned in zip(jobs, together, strict=True):
        alone = train(backbone, [job])[0]
        near(learned, alone)
        assert timeless(learned)[0]["score"] == timeless(alone)[0]["score"] if alone.history else True
        assert len(learned.history) == len(alone.history)
        for a, b in zip(learned.history, alone.history, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3, abs=1e-4)


def test_one_task_may_be_learned_by_several_methods_at_once(backbone):
    task = task_of(held=0)
    jobs = [job_of(task), job_of(task), job_of(task, "ia3"), job_of(task, seed=1)]
    one, two, three, four = train(backbone, jobs)
    near(one, two, 1e-6)
    near(one, train(backbone, jobs[:1])[0])
    near(three, train(backbone, jobs[2:3])[0])
    assert not torch.allclose(one.tensors["0.attn.q/B"], four.tensors["0.attn.q/B"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_jobs_with_and_without_a_causal_mask_do_not_share_passes(family):
    decoder = tiny.backbone(family, tokenizer=TOKENS)
    jobs = [
        job_of(task_of(seed=1, held=0), "lora", {}, "first", causal=False, epochs=2),
        job_of(task_of(seed=2, held=0), "lora", {}, "last", epochs=2),
    ]
    for job, learned in zip(jobs, train(decoder, jobs), strict=True):
        near(learned, train(decoder, [job])[0])


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "llama"])
@pytest.mark.parametrize("sites", [["-1.attn.[qv]"], ["1-.mlp.up"]])
def test_a_cached_prefix_changes_nothing(family, sites, monkeypatch):
    model = tiny.backbone(family, tokenizer=TOKENS)
    jobs = [
        job_of(task_of(seed=1, held=0), "lora", {"sites": sites}, epochs=2),
        job_of(task_of("similarity", held=0), "lora", {"sites": ["-1.attn.q"]}, epochs=2),
        job_of(task_of("tagging", 20, held=0), "bottleneck", {"sites": ["-1.mlp.down"]}, epochs=2),
    ]
    starts: list[int] = []
    upto = Backbone.upto

    def look(self: Backbone, batch: Any, block: int, **more: Any) -> Tensor:
        starts.append(block)
        return upto(self, batch, block, **more)

    monkeypatch.setattr(Backbone, "upto", look)
    cached = train(model, jobs)
    assert set(starts) == {2 if sites[0].startswith("-1") else 1}
    starts.clear()
    monkeypatch.setattr(loop, "CACHE_BYTES", 0)
    for a, b in zip(cached, train(model, jobs), strict=True):
        near(a, b, 5e-4)
    assert not starts


def test_a_prefix_is_cached_only_below_every_trained_site(backbone, monkeypatch):
    def first(*jobs: Job) -> int:
        learners = [loop._prepare(backbone, job) for job in jobs]
        return loop.Loop(backbone, learners, lambda event: None, None, None).start

    task = task_of(n=16)
    assert first(job_of(task, "lora", {"sites": ["2.attn.q"]})) == 2
    assert first(job_of(task, "lora", {"sites": ["2.attn.q"]}), job_of(task, "ia3", {"sites": ["1.mlp"]})) == 1
    assert first(job_of(task, "lora", {"sites": ["2.attn.q", "embed"]})) == 0
    assert first(job_of(task, "full")) == 0
    causal = job_of(task, "lora", {"sites": ["2.attn.q"]}, causal=False)
    assert first(job_of(task, "lora", {"sites": ["2.attn.q"]}), causal) == 0


PROCESS = """
import sys, torch
torch.set_num_threads(1)
import test_training as t
from accelerate import Accelerator
from pathlib import Path
from safetensors.torch import save_file
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
backbone = t.tiny.backbone("bert", tokenizer=t.TOKENS)
folder = Path(sys.argv[1])
found = t.train(backbone, t.jobs_for_two(), accelerator=accelerator, folder=folder / "checkpoint")
for i, learned in enumerate(found):
    losses = torch.tensor([row["loss"] for row in learned.history])
    save_file(learned.tensors | {"losses": losses}, folder / f"{accelerator.process_index}-{i}.safetensors")
t.checkpoint_of_both(folder, accelerator)
"""


def jobs_for_two() -> list[Job]:
    return [
        job_of(task_of(n=33, held=0), "lora", epochs=2),  # the last batch has one row: one process has none
        job_of(task_of("tagging", 20, held=0), "bottleneck", epochs=2),
    ]


def checkpoint_of_both(folder: Path, accelerator: Any) -> None:
    accelerator.wait_for_everyone()
    assert checkpoint.found(folder / "checkpoint")


def test_two_processes_learn_what_one_does(backbone, tmp_path):
    from safetensors.torch import load_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    say = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)], env=environment(RANK=rank, LOCAL_RANK=rank, **say)
        )
        for rank in "01"
    ]
    one = train(backbone, jobs_for_two())
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    for i, alone in enumerate(one):
        first, second = (load_file(tmp_path / f"{rank}-{i}.safetensors") for rank in "01")
        for name, tensor in alone.tensors.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
        losses = torch.tensor([row["loss"] for row in alone.history])
        torch.testing.assert_close(first["losses"], losses, rtol=1e-4, atol=1e-5)


# -- losses, weights, stopping -----------------------------------------------------------------------------------------


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
    W, b = (loop.SOFTER * learned.probe_tensors[f"head/{n}"] for n in "Wb")
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
    W, b = (loop.SOFTER * learned.probe_tensors[f"head/{n}"] for n in "Wb")
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


# -- the probe ---------------------------------------------------------------------------------------------------------


def features_of(task: Task, backbone: Backbone, head: HeadCard) -> Tensor:
    return torch.stack(passes.features(backbone, head, passes.encode(backbone, head, task.train)))


def test_the_probe_is_scikit_learns_minimum(backbone):
    task = task_of(n=200, length=40)
    head = heads.design(task, pool="first")
    φ = features_of(task, backbone, head)
    y = torch.tensor(["abcd".index(str(e.output)) for e in task.train])
    zero = {"W": torch.zeros(4, 32), "b": torch.zeros(4)}
    λ = 1e-2
    p = probe.fit(head, φ.clone(), y, zero, lambda p: 0.0, penalties=[λ], steps=300)
    z = (φ - φ.mean(0)) / φ.std(0, correction=0)
    # mean loss + λ‖W‖² is scikit-learn's Σ loss + ‖W‖² / 2C at C = 1 / (2 λ n).
    theirs = LogisticRegression(C=1 / (2 * λ * len(z)), tol=1e-8, max_iter=3000).fit(z.numpy(), y.numpy())
    mine = (p["W"] * φ.std(0, correction=0)).numpy()
    assert np.allclose(mine - mine.mean(0), theirs.coef_ - theirs.coef_.mean(0), atol=2e-3)
    right = (heads.logits(p, φ).argmax(-1) == y).float().mean()
    assert right > 0.5  # chance is a quarter
    # The gradient of the objective is zero there.
    W, b = mine_in(p, φ)
    loss = heads.losses(head, z @ W.T + b, y).mean() + λ * W.square().sum()
    loss.backward()
    assert W.grad.abs().max() < 1e-4
    assert b.grad.abs().max() < 1e-4


def mine_in(p: dict[str, Tensor], φ: Tensor) -> tuple[Tensor, Tensor]:
    """The head in the coordinates of standardised features."""
    W = (p["W"] * φ.std(0, correction=0)).clone().requires_grad_()
    return W, (p["b"] + p["W"] @ φ.mean(0)).clone().requires_grad_()


def test_the_probe_of_numbers_is_ridge_regression(backbone):
    task = task_of("regression", 150)
    head = heads.design(task)
    φ = features_of(task, backbone, head)
    y = torch.tensor([float(e.output) for e in task.train])
    first = {"W": torch.full((1, 32), 0.1), "b": torch.zeros(1)}
    λ = 1e-2
    p = probe.fit(head, φ.clone(), y, first, lambda p: 0.0, penalties=[λ], steps=300)
    σ, μ = φ.std(0, correction=0).double(), φ.mean(0).double()
    z, W0, n = (φ.double() - μ) / σ, first["W"][0].double() * σ, len(y)
    residual = y.double() - y.double().mean() - z @ W0
    W = W0 + torch.linalg.solve(z.T @ z / n + λ * torch.eye(32).double(), z.T @ residual / n)
    torch.testing.assert_close(p["W"][0].double() * σ, W, rtol=1e-3, atol=1e-3)
    assert float((heads.logits(p, φ)[:, 0] - y).square().mean()) < float(y.var()) / 2


def test_the_probe_chooses_its_penalty_by_the_score(backbone):
    task = task_of(n=60, length=40)
    head = heads.design(task)
    φ = features_of(task, backbone, head)
    y = torch.tensor(["abcd".index(str(e.output)) for e in task.train])
    first = heads.start(head, 32, 0)
    sizes: list[float] = []

    def small(p: dict[str, Tensor]) -> float:
        sizes.append(float(p["W"].norm()))
        return -sizes[-1]

    p = probe.fit(head, φ.clone(), y, first, small)
    assert float(p["W"].norm()) == min(sizes)
    assert len(set(sizes)) == len(probe.PENALTIES)


# -- every kind, and the edges -----------------------------------------------------------------------------------------

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


# -- passes ------------------------------------------------------------------------------------------------------------


def test_passes_hold_every_unit_once_and_not_too_many_tokens():
    draw = random.Random(0)
    units = [passes.Unit(([1] * draw.randint(1, 90),) * draw.choice([1, 1, 2])) for _ in range(300)]
    found = passes.packs(units, 512)
    assert sorted(i for pack in found for i in pack) == list(range(300))
    for pack in found:
        longest = max(units[i].length for i in pack)
        assert len(pack) == 1 or longest * sum(len(units[i].ids) for i in pack) <= 512
    lengths = [units[i].length for pack in found for i in pack]
    assert lengths == sorted(lengths, reverse=True)
    assert passes.packs([]) == []
    assert passes.packs([passes.Unit(([1] * 9000,))], 512) == [[0]]


def test_units_are_what_the_head_reads(backbone):
    def ids(head: HeadCard, *rows: Example) -> Sequence[Any]:
        return [unit.ids for unit in passes.encode(backbone, head, rows)]

    plain = HeadCard(kind="classification")
    assert ids(plain, Example("0", "a b"), Example("1", ("a", "b"))) == [([1, 4, 5, 2],)] * 2
    pair = Example("0", "a", None, "b c")
    assert ids(plain.model_copy(update={"pair": "separate"}), pair) == [([1, 4, 2], [1, 5, 6, 2])]
    assert ids(plain.model_copy(update={"pair": "joint"}), pair) == [([1, 4, 2, 5, 6, 2],)]
    tags = passes.encode(backbone, HeadCard(kind="tagging", targets=("O",)), [Example("0", ("a", "\u200b", "b"))])
    assert (tags[0].ids, tags[0].starts) == (([1, 4, 5, 2],), [1, -1, 2])


def test_features_do_not_depend_on_the_budget(backbone, monkeypatch):
    for kind in ("classification", "similarity", "tagging"):
        task = task_of(kind, 20)
        head = heads.design(task)
        units = passes.encode(backbone, head, task.train)
        one = passes.features(backbone, head, units)
        monkeypatch.setattr(passes.packs, "__defaults__", (40,))
        for a, b in zip(one, passes.features(backbone, head, units), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()


def test_a_checkpoint_folder_is_made_and_can_be_thrown_away(backbone, tmp_path):
    deep = tmp_path / "a" / "b"
    one = train(backbone, [job_of(task_of(n=16))], folder=deep)[0]
    assert checkpoint.found(deep)
    shutil.rmtree(deep)
    same(train(backbone, [job_of(task_of(n=16))], folder=deep)[0], one)
