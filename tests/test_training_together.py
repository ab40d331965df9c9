"""Jobs at once, over a cached prefix, in two processes: each learns what it learns alone and without."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest
import tiny
import torch
from jobs import TOKENS, environment, job_of, task_of, timeless
from torch import Tensor

from polytask.backbones import Backbone
from polytask.training import Job, Learned, loop, train


def near(a: Learned, b: Learned, tolerance: float = 2e-3) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        torch.testing.assert_close(tensor, b.tensors[name], rtol=tolerance, atol=tolerance)
    assert a.validation == pytest.approx(b.validation, abs=1e-6)


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
import sys, tiny, torch
torch.set_num_threads(1)
from accelerate import Accelerator
from jobs import TOKENS
from pathlib import Path
from polytask.training import checkpoint, train
from safetensors.torch import save_file
from test_training_together import jobs_for_two
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
backbone = tiny.backbone("bert", tokenizer=TOKENS)
folder = Path(sys.argv[1])
found = train(backbone, jobs_for_two(), accelerator=accelerator, folder=folder / "checkpoint")
for i, learned in enumerate(found):
    losses = torch.tensor([row["loss"] for row in learned.history])
    save_file(learned.tensors | {"losses": losses}, folder / f"{accelerator.process_index}-{i}.safetensors")
accelerator.wait_for_everyone()
assert checkpoint.found(folder / "checkpoint")
"""


def jobs_for_two() -> list[Job]:
    return [
        job_of(task_of(n=33, held=0), "lora", epochs=2),  # the last batch has one row: one process has none
        job_of(task_of("tagging", 20, held=0), "bottleneck", epochs=2),
    ]


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
