"""Adapters as a mixture of experts: its weights by hand, who is averaged, and what training moves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from commands import run, write_table
from jobs import TOKENS, task_of
from torch import Tensor

import polytask as pt
import polytask.backbones
from polytask.adapters import Adapter
from polytask.adapters.expression import Name
from polytask.backbones import Backbone
from polytask.composition.compose import Composer
from polytask.composition.routing.bam import BAM
from polytask.library import Library
from polytask.methods import build
from polytask.methods.composed import Sources
from polytask.methods.lifting import Active, Plan, planned

SITES = {"sites": ["*.attn.[qo]", "*.mlp", "*"]}


@cache
def base() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


def tensors(seed: int, sites: dict[str, list[str]] = SITES, method: str = "pfeiffer") -> Adapter:
    """An adapter that changes much, in attention, in feed-forward networks and between blocks."""
    one = pt.adapt(base(), replace(task_of(n=8, seed=seed), validation=()), "head")
    made = build(method, {"reduction": 8, **sites} if method == "pfeiffer" else sites)
    draw = torch.Generator().manual_seed(seed)
    own = {n: 0.5 * torch.randn(t.shape, generator=draw) for n, t in made.start(base(), seed).items()}
    card = one.card.model_copy(update={"name": f"{method}-{seed}"})
    return replace(
        one, method=method, hyperparameters=made.hyperparameters(), tensors={**one.tensors, **own}, card=card
    )


@cache
def experts() -> tuple[Adapter, ...]:
    return tuple(tensors(seed) for seed in range(3))


@cache
def mixture(top_k: int = 2) -> Adapter:
    settings = pt.Settings(epochs=2, lr=1e-2)
    return pt.adapt(
        base(), task_of(n=24, seed=9), "bam", hyperparameters={"top_k": top_k}, over=experts(), settings=settings
    )


def hidden(adapters: list[Adapter], known: list[Adapter], texts: list[str]) -> Tensor:
    """Hidden states of texts, each of its own adapter."""
    get = {one.id: one for one in (*adapters, *known)}.__getitem__
    composer = Composer(get, lambda a: Active.of(build(a.method, a.hyperparameters), a.tensors))
    order, weights = planned([composer.terms(Name(one.id)) for one in adapters])
    with torch.no_grad():
        return Plan(base(), order).hidden(base().collate(base().tokenize(texts)), weights)


def join(own: dict[str, Tensor], *changes: list[float], top_k: int = 2, here: tuple[int, ...] | None = None) -> list:
    """At one token x = [1]."""
    each = zip(here or range(len(changes)), changes, strict=True)
    sources = Sources({n: lambda y, Δ=Δ: torch.tensor([Δ]) for n, Δ in each})
    x, y = torch.ones(1, 1), torch.zeros(1, len(changes[0]))
    return BAM(top_k=top_k).join(own, x, y, sources)[0].tolist()


def test_weights_by_hand():
    """R x = [1, 0]: e / (e + 1) = .7311 of [1, 0] and .2689 of [0, 2]; of the greatest alone, all of it."""
    R = torch.tensor([[1.0], [0.0]])
    Δ = [1.0, 0.0], [0.0, 2.0]
    assert join({"R_a": R}, *Δ) == pytest.approx([0.7311, 0.5379], abs=1e-4)
    assert join({"R_a": R}, *Δ, top_k=1) == pytest.approx([0.7311, 0.5379], abs=1e-4)
    assert join({"R_f": R}, *Δ) == pytest.approx([0.7311, 0.5379], abs=1e-4)
    assert join({"R_f": R}, *Δ, top_k=1) == [1.0, 0.0]
    assert join({"N": torch.tensor(2.0)}, *Δ) == [0.5, 1.0]


def test_an_expert_that_was_left_as_it_was_is_an_expert():
    """Of three, the second does nothing here, and its weight goes to no other. R x = [0, ln 2, −1]: 1, 2 and 1/e of
    3 + 1/e; of the best two, ⅓ and ⅔."""
    R = torch.tensor([[0.0], [0.6931472], [-1.0]])
    e = 2.718281828
    assert join({"R_a": R}, [1.0], [10.0], here=(0, 2)) == pytest.approx([(1 + 10 / e) / (3 + 1 / e)], rel=1e-4)
    assert join({"R_f": R}, [1.0], [10.0], here=(0, 2)) == pytest.approx([1 / 3], rel=1e-4)
    assert join({"N": torch.tensor(3.0)}, [1.0], [10.0], here=(0, 2)) == pytest.approx([11 / 3])


def test_routers_stand_where_the_paper_has_them():
    kept = {n: tuple(t.shape) for n, t in mixture().tensors.items() if not n.startswith(("head", "task"))}
    assert kept == {
        **{f"{i}.attn.{at}/R_a": (3, 32) for i in range(3) for at in "qo"},
        **{f"{i}.mlp/R_f": (3, 32) for i in range(3)},
        **{f"{i}/N": () for i in range(3)},
    }
    head = sum(t.numel() for n, t in mixture().tensors.items() if n.startswith("head/"))
    assert mixture().card.trained_parameters - head == 3 * 3 * 3 * 32
    two = BAM(over=("a", "b"), sites=("enc.*.attn.q", "dec.*.cross.v", "enc.*.mlp.up", "enc.*"))
    made = two.start(tiny.backbone("t5"), 0, writing=True)
    assert {n.rpartition("/")[2] for n in made if ".attn." in n or ".cross." in n} == {"R_a"}
    assert {n.rpartition("/")[2] for n in made if ".mlp." in n} == {"R_f"}
    assert "enc.1/N" in made


def test_only_routers_learn():
    before = {one.id: {n: t.clone() for n, t in one.tensors.items()} for one in experts()}
    method = build("bam", mixture().hyperparameters)
    first = method.start(base(), 0)
    for name, t in first.items():
        assert torch.equal(mixture().tensors[name], t) == name.endswith("/N"), name
    assert mixture().hyperparameters["over"] == [one.id for one in experts()]
    assert all(torch.equal(t, before[one.id][n]) for one in experts() for n, t in one.tensors.items())


@pytest.mark.parametrize("k", [1, 2])
def test_experts_that_agree_are_one(k):
    """Three of the same: whatever a router says, the mixture is the adapter itself."""
    twins = [replace(experts()[0], hyperparameters=dict(experts()[0].hyperparameters)) for _ in range(3)]
    same = replace(mixture(k), hyperparameters={**mixture(k).hyperparameters, "over": [one.id for one in twins]})
    texts = ["a e f g", "b h"]
    together = hidden([same] * 2, twins, texts)
    alone = hidden([experts()[0]] * 2, [], texts)
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1, :4], alone[1, :4], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hidden([mixture(k)] * 2, [*experts()], texts)[0], alone[0], atol=1e-2)


def test_a_mixed_batch_is_each_row_alone():
    rows = [mixture(1), experts()[1], mixture(2), mixture(1)]
    texts = ["a e f g", "a e f g", "c h e f", "d g h e"]
    together = hidden(rows, [*experts()], texts)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        torch.testing.assert_close(hidden([row], [*experts()], [text])[0], together[i], rtol=1e-4, atol=1e-4)


def test_loras_that_meet_at_no_site():
    one, two = (tensors(seed, {"sites": sites}, "lora") for seed, sites in ((0, ["*.attn.q"]), (1, ["*.mlp.up"])))
    made = pt.adapt(base(), task_of(n=16), "bam", over=[one, two], settings=pt.Settings(epochs=1))
    assert {n.rpartition("/")[2] for n in made.tensors if ".attn." in n or ".mlp." in n} == {"R_a", "R_f"}


def test_bam_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polytask.backbones, "load", cache(polytask.backbones.load))
    skills = tmp_path / "skills"
    for name, method in (("one", "lora"), ("two", "parallel")):
        source = write_table(tmp_path / f"{name}.csv")
        assert run("adapt", source, "-l", skills, "-m", method, "--epochs", "1", "-q").status == 0
    said = ["adapt", write_table(tmp_path / "both.csv"), "-l", skills, "-m", "bam", "--epochs", "1", "--json"]
    done = run(*said, "--over", "one,two", "--set", "top_k=1")
    assert done.status == 0, done.err
    assert Library(skills).get(done.json["adapter"]).hyperparameters["top_k"] == 1
    assert run("predict", "-l", skills, "--adapter", "both", stdin=b"a new saw\n").status == 0
