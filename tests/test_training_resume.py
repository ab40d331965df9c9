"""Training that was interrupted goes on to the same bits, and checkpoints are never half-written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from jobs import TOKENS, environment, job_of, same, task_of
from made import die, killed, one_line

from polytask.errors import PolytaskError
from polytask.training import Event, Job, checkpoint, train


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
import sys, time, tiny, torch
from pathlib import Path
torch.set_num_threads(1)
from jobs import TOKENS
from polytask.training import train
from test_training_resume import jobs_for_kill
backbone = tiny.backbone("bert", tokenizer=TOKENS)
train(backbone, jobs_for_kill(), folder=Path(sys.argv[1]), on_event=lambda event: time.sleep(0.01))
"""


def jobs_for_kill() -> list[Job]:
    return [job_of(task_of(n=64, held=0), "lora", {"dropout": 0.1}, epochs=25)]


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


def test_a_checkpoint_folder_is_made_and_can_be_thrown_away(backbone, tmp_path):
    deep = tmp_path / "a" / "b"
    one = train(backbone, [job_of(task_of(n=16))], folder=deep)[0]
    assert checkpoint.found(deep)
    shutil.rmtree(deep)
    same(train(backbone, [job_of(task_of(n=16))], folder=deep)[0], one)
