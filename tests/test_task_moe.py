"""Experts that tasks share, and the routes of tasks through them: by hand, against LoRA, and what training moves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run, write_table
from jobs import TOKENS, job_of, task_of
from torch import Tensor
from torch.nn import functional as F

import polytask as pt
from polytask.adapters import Adapter
from polytask.adapters.expression import Name
from polytask.backbones import Backbone
from polytask.composition.compose import Composer
from polytask.composition.routing.task_moe import experts, route
from polytask.errors import UsageError
from polytask.library import Library
from polytask.methods import build
from polytask.methods.lifting import Active, Plan, planned
from polytask.recipes.adapt import Plan as Wanted
from polytask.training import train


@cache
def base() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


# ------------------- experts


def test_a_layer_takes_its_expert_by_hand() -> None:
    """s = 4 / 1. Layer 0 takes expert 1: A x = 2, B = [0, 3] and so Δ = 4 · [0, 6]. Layer 1 takes expert 0: A x = 5,
    B = [1, −1] and Δ = 4 · [5, −5]."""
    m = build("task_experts", {"m": 2, "r": 1, "alpha": 4})
    A, B = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[1.0], [-1.0]], [[0.0], [3.0]]])
    p = {"A": A, "B": B, "z": torch.tensor([[0.1, 0.2], [3.0, 2.0]])}
    x = torch.tensor([[5.0, 2.0]])
    for row, expected in ((0, [0.0, 24.0]), (1, [20.0, -20.0])):
        assert m.delta(m.ready(p, {"layer": torch.tensor(row)}), x, x).tolist() == [expected]


def test_training_takes_one_expert_and_has_the_softmaxs_slope() -> None:
    """g is one-hot, and its slope that of softmax((z + G) / τ): (diag(s) − s sᵀ) / τ."""
    m = build("task_experts", {"m": 3, "tau": 0.5})
    z = torch.tensor([[0.3, -0.2, 0.9]], requires_grad=True)
    torch.manual_seed(3)
    g = m.sampled({"z": z})["g"]
    torch.manual_seed(3)
    s = ((z - torch.empty_like(z).exponential_().log()) / 0.5).softmax(-1)[0].detach()
    assert g[0].detach().round(decimals=6).tolist() == F.one_hot(s.argmax(), 3).tolist()
    [slope] = torch.autograd.grad(g[0, 2], z)
    torch.testing.assert_close(slope[0], (torch.eye(3)[2] * s - s * s[2]) / 0.5)


def shaken(m: Any, backbone: Backbone, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, seed).items()}


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_routed_adapter_is_the_lora_of_its_experts(family: str) -> None:
    backbone, batch = tiny.backbone(family), tiny.batch(3)
    m = build("task_experts", {"m": 3, "r": 4, "alpha": 12, "sites": ["*.attn.[qo]", "*.mlp.up"]})
    tensors = shaken(m, backbone)
    z = tensors["shared/z"] = torch.tensor([[0.0, 1, 0], [0, 0, 2], [3, 0, 0]] + [[0.0, 0, 9]] * (3 * (family == "t5")))
    taken = {n: t[z[int(n.removeprefix("enc.")[0])].argmax()] for n, t in tensors.items() if n[-1] in "AB"}
    lora = build("lora", {"r": 4, "alpha": 12})
    with torch.no_grad():
        found = Plan(backbone, [Active.of(m, tensors)]).hidden(batch)
        expected = Plan(backbone, [Active.of(lora, taken)]).hidden(batch)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-5, atol=1e-5)


def test_numbers_are_those_of_the_experts_and_the_route() -> None:
    made = build("task_experts", {"m": 3, "r": 4}).start(base(), 0)
    assert sum(t.numel() for t in made.values()) == 3 * 3 + 3 * 2 * 3 * 4 * (32 + 32)
    assert made["shared/z"].abs().max() < 0.1


def test_it_cools_down_while_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """2, 2 / e after a ninth, and 0.1 at last."""
    m = build("task_experts")
    assert [m.annealed(t).tau for t in (0.0, 1 / 9, 1.0)] == pytest.approx([2.0, 0.7358, 0.1], abs=1e-4)
    seen = []
    plain = F.gumbel_softmax
    monkeypatch.setattr(F, "gumbel_softmax", lambda z, tau, hard: (seen.append(tau), plain(z, tau, hard))[1])
    [learned] = train(base(), [job_of(task_of(), "task_experts", epochs=4)])
    steps = list(dict.fromkeys(seen))
    assert steps == pytest.approx([max(2 * 2.718281828 ** (-9 * n / 12), 0.1) for n in range(5)])  # of 12 steps
    assert learned.method == m


def joint(seed: int, **more: Any) -> Any:
    return job_of(task_of(seed=seed, held=0), "task_experts", {"m": 2, "r": 4}, **more)


def test_tasks_that_are_trained_together_share_experts_and_not_their_routes() -> None:
    first, second = train(base(), [joint(0), joint(1)])
    own = [n for n in first.tensors if n[-1] in "AB" and not n.startswith("head")]
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in own)
    assert not torch.equal(first.tensors["shared/z"], second.tensors["shared/z"])
    [alone] = train(base(), [joint(0)])
    assert any(not torch.equal(first.tensors[n], alone.tensors[n]) for n in own)


@cache
def trained() -> tuple[Adapter, ...]:
    settings = pt.Settings(epochs=2, batch=16, lr=2e-2)
    plans = [Wanted(task_of(seed=s), "task_experts", {"m": 2, "r": 4}, settings=settings) for s in range(2)]
    return tuple(pt.adapt_many(base(), plans))


def test_a_new_task_learns_its_route_alone() -> None:
    first, settings = trained()[0], pt.Settings(epochs=2, batch=16, lr=1e-1)
    hyper = {"m": 2, "r": 4, "route": True}
    new = pt.adapt(
        base(), task_of(seed=5, held=0), "task_experts", hyperparameters=hyper, begin=first, settings=settings
    )
    own = [n for n in new.tensors if n[-1] in "AB"]
    assert own
    assert all(torch.equal(first.tensors[n], new.tensors[n]) for n in own)
    assert not torch.equal(first.tensors["shared/z"], new.tensors["shared/z"])
    assert new.card.trained_parameters == 3 * 2 + 4 * 32 + 4


# ------------------- routes


def lora(seed: int, sites: list[str], scale: float = 0.3) -> Adapter:
    one = trained()[0]
    m = build("lora", {"r": 2, "sites": sites})
    own = {
        n: t + scale * torch.randn(t.shape, generator=torch.Generator().manual_seed(seed + 1))
        for n, t in m.start(base(), seed).items()
    }
    kept = {n: t for n, t in one.tensors.items() if n.startswith(("head/", "task/"))}
    card = one.card.model_copy(update={"name": f"lora-{seed}"})
    return replace(one, method="lora", hyperparameters=m.hyperparameters(), tensors={**kept, **own}, card=card)


def routed(over: list[Adapter], z: Tensor) -> Active:
    def active(one: Adapter) -> Active:
        return Active.of(build(one.method, one.hyperparameters), one.tensors)

    known = {one.id: one for one in over}
    at = list(dict.fromkeys(site for one in over for site in one.sites))
    hyper = {"over": [one.id for one in over], "sites": at}
    whole = replace(over[0], method="task_moe", hyperparameters=hyper, tensors={"shared/z": z})
    [(_, found)] = Composer(lambda ref: known.get(ref, whole), active).terms(Name(whole.id))
    return found


def test_each_layer_takes_one_adapter_and_nothing_where_that_does_not_act() -> None:
    over = [lora(0, ["*.attn.q"]), lora(1, ["*.attn.q", "*.mlp.up"]), lora(2, ["*.mlp.up", "embed"])]
    z = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
    taken = {n: t for n, t in over[2].tensors.items() if n.startswith(("embed/", "0."))}
    taken |= {n: t for n, t in over[1].tensors.items() if n.startswith("1.")}
    taken |= {n: t for n, t in over[0].tensors.items() if n.startswith("2.")}
    batch = tiny.batch(3)
    with torch.no_grad():
        order, weights = planned([((1.0, routed(over, z)),)] * 3)
        found = Plan(base(), order).hidden(batch, weights)
        expected = Plan(base(), [Active.of(build("lora", {"r": 2}), taken)]).hidden(batch)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-5, atol=1e-5)


def test_experts_of_a_training_are_loras_that_a_route_leads_through() -> None:
    one = trained()[1]
    parts = experts(one)
    assert [part.name for part in parts] == ["classification-1-expert-0", "classification-1-expert-1"]
    assert all(part.head is None and "task/mean" not in part.tensors for part in parts)
    batch = tiny.batch(2)
    with torch.no_grad():
        order, weights = planned([((1.0, routed(parts, one.tensors["shared/z"])),)] * 2)
        found = Plan(base(), order).hidden(batch, weights)
        own = Active.of(build(one.method, one.hyperparameters), one.tensors)
        expected = Plan(base(), [own]).hidden(batch)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="has no experts"):
        experts(parts[0])


def test_a_route_is_learnt_over_adapters_that_stay_as_they_are() -> None:
    """Of three adapters at the last block one was trained on the task; one does the contrary, one nothing."""
    few = task_of(n=48, seed=3, held=0)
    settings = pt.Settings(epochs=10, batch=16, lr=2e-2)
    good = pt.adapt(base(), few, "lora", hyperparameters={"r": 4, "sites": ["2.mlp.down"]}, settings=settings)
    over = [
        replace(good, tensors={n: factor * t if n.endswith("/B") else t for n, t in good.tensors.items()})
        for factor in (-1.0, 1.0, 0.0)
    ]
    before = [{n: t.clone() for n, t in one.tensors.items()} for one in over]
    settings = pt.Settings(epochs=20, batch=16, lr=1e-1)
    made = pt.adapt(base(), few, "task_moe", over=over, settings=settings)
    assert route(made)[2] == 1
    assert made.tensors["shared/z"][2].softmax(-1)[1] > 0.5
    assert made.card.trained_parameters == 3 * 3 + 4 * 32 + 4
    assert all(torch.equal(t, kept[n]) for one, kept in zip(over, before, strict=True) for n, t in one.tensors.items())
    assert made.card.lineage.parents == tuple(one.id for one in over)
    with pytest.raises(UsageError, match="no route"):
        route(over[1])


def test_from_the_command_line(tmp_path: Path) -> None:
    skills = tmp_path / "skills"
    sources = [write_table(tmp_path / f"{name}.csv") for name in ("one", "two")]
    sources[1].write_text(sources[1].read_text().replace("fruit", "food"))
    done = run("library", "build", *sources, "-l", skills, "-m", "task_experts", "--set", "m=2", "--epochs", "1", "-q")
    assert done.status == 0, done.err
    one, two = (Library(skills).get(name) for name in ("one", "two"))
    assert one.tensors["shared/z"].shape == (6, 2)
    assert torch.equal(one.tensors["0.attn.q/A"][0], two.tensors["0.attn.q/A"][0])
    said = ["adapt", write_table(tmp_path / "new.csv"), "-l", skills, "-m", "task_moe", "--epochs", "1", "--json"]
    done = run(*said, "--over", "one,two")
    assert done.status == 0, done.err
    assert len(route(Library(skills).get(done.json["adapter"]))) == 6
    assert run("predict", "-l", skills, "--adapter", "new", stdin=b"a new saw\n").status == 0
