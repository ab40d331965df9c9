"""Jobs at once, over a cached prefix, in two processes: each learns what it learns alone and without."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import TOKENS, environment, job_of, same, task_of, timeless
from torch import Tensor

import polytask as pt
from polytask.backbones import Backbone
from polytask.errors import UsageError
from polytask.training import Event, Job, Learned, Settings, loop, train
from polytask.training.learner import prepare


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
        learners = [prepare(backbone, job) for job in jobs]
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


def mtl(seed: int, method: dict[str, Any] | None = None, **more: Any) -> Job:
    return job_of(task_of(seed=seed, n=48 + 16 * seed, held=0), "mtl_lora", {"r": 4, **(method or {})}, **more)


def test_tasks_that_share_projections_end_with_the_same_ones_and_their_own_cores(backbone: Backbone) -> None:
    first, second = train(backbone, [mtl(0), mtl(1)])
    A, B, Λ, w = (sorted(n for n in first.tensors if n.endswith(f"/{p}")) for p in "ABLw")
    # The second task has more steps: what it learnt of the shared maps after the first ended is in its own copy only.
    assert all(first.tensors[n].shape == second.tensors[n].shape for n in A + B)
    assert any(not torch.equal(first.tensors[n], second.tensors[n]) for n in Λ + w)
    same_length = train(backbone, [mtl(0), mtl(0)])
    assert all(torch.equal(same_length[0].tensors[n], same_length[1].tensors[n]) for n in A + B)
    alone = train(backbone, [mtl(0)])[0]
    assert any(not torch.equal(alone.tensors[n], first.tensors[n]) for n in B)


def test_tasks_of_one_seed_mix_what_they_share_each_in_its_own_way(backbone: Backbone) -> None:
    """Were w equal, every B_i would get the same gradient but for its size, and they would stay one and the same."""
    first, second = train(backbone, [mtl(0), mtl(1)])
    w, other = (torch.cat([t for n, t in one.tensors.items() if n.endswith("/w")]) for one in (first, second))
    assert torch.corrcoef(torch.stack([w, other]))[0, 1].abs() < 0.7
    for name in ("0.attn.q/B", "0.attn.v/B"):
        B = torch.nn.functional.normalize(first.tensors[name].flatten(1), dim=1)
        assert (B @ B.T).min() < 0.95


def test_shared_tensors_get_the_gradients_of_all(backbone: Backbone) -> None:
    """The first step of two equal jobs moves what they share as one job does: Adam divides the sum by its own size."""
    one = train(backbone, [mtl(0, epochs=1, batch=48, weight_decay=0.0, clip=1e9)])[0]
    two = train(backbone, [mtl(0, epochs=1, batch=48, weight_decay=0.0, clip=1e9) for _ in range(2)])[0]
    for n in (n for n in one.tensors if n.endswith("/B")):
        apart = (one.tensors[n] - two.tensors[n]).abs().mean()  # ε counts where gradients are small
        assert apart < 0.05 * one.tensors[n].abs().mean()


def test_sharing_that_was_interrupted_goes_on_to_the_same_bits(backbone: Backbone, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "score" and event.step >= 4:
            raise KeyboardInterrupt

    whole = train(backbone, [mtl(0), mtl(1)])
    with pytest.raises(KeyboardInterrupt):
        train(backbone, [mtl(0), mtl(1)], folder=tmp_path, on_event=stop)
    again = train(backbone, [mtl(0), mtl(1)], folder=tmp_path)
    for a, b in zip(whole, again, strict=True):
        same(a, b)


def test_a_new_task_trains_its_core_on_the_projections_of_another(backbone: Backbone) -> None:
    settings = Settings(epochs=2, batch=16, lr=5e-3)
    first = pt.adapt(backbone, task_of(seed=0), "mtl_lora", hyperparameters={"r": 4}, settings=settings)
    core = {"r": 4, "core": True}
    new = pt.adapt(backbone, task_of(seed=1, held=0), "mtl_lora", hyperparameters=core, settings=settings, begin=first)
    own = {n for n in new.tensors if not n.startswith(("head/", "task/"))}
    assert all(torch.equal(first.tensors[n], new.tensors[n]) for n in own if n[-1] in "AB")
    assert all(not torch.equal(first.tensors[n], new.tensors[n]) for n in own if n.endswith("/L"))
    assert new.card.trained_parameters < first.card.trained_parameters / 2
    assert new.card.lineage.parents == (first.id,)


def test_training_begins_with_an_adapter_only_where_it_fits(backbone: Backbone) -> None:
    settings = Settings(epochs=1, batch=16, lr=1e-9, head_lr=1e-9)
    first = pt.adapt(backbone, task_of(held=0), "lora", settings=Settings(epochs=2, batch=16, lr=5e-3))
    again = pt.adapt(backbone, task_of(held=0), begin=first, settings=settings)
    assert (again.method, again.hyperparameters) == (first.method, first.hyperparameters)
    for n in (n for n in first.tensors if n.endswith(("/A", "/B"))):
        torch.testing.assert_close(again.tensors[n], first.tensors[n], rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match=r"cannot begin with adapter .* they differ in"):
        pt.adapt(backbone, task_of(), "lora", hyperparameters={"r": 3}, begin=first)
    with pytest.raises(UsageError, match="they differ in"):
        pt.adapt(backbone, task_of(), "ia3", begin=first)
