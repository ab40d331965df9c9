"""MoR1E: the authors' numbers, a step-by-step model, and where the clusters come from."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import TOKENS, job_of
from torch import Tensor
from torch.nn import functional as F
from writers import writer

import polytask as pt
from polytask.backbones import Backbone
from polytask.errors import UsageError
from polytask.inference import Engine, Request
from polytask.methods import build
from polytask.methods.lifting import Active, Plan
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Label, Task
from polytask.training import train


@pytest.mark.parametrize(
    ("o", "expected"), [(0.0, [5.8, 4.2, 4.0, 4.4]), (0.01, [6.8167, 5.9560, 5.8485, 6.0636])], ids=["half", "one"]
)
def test_by_hand(o: float, expected: list[float]) -> None:
    """s = [.9, .1, 0, .2] and a uniform softmax: g_i = 32 w / 4 + 4 (1 − w) s_i with w = σ(0) = .5, and σ(100 · .01) =
    .7311. With A_i · x = 1, B = I and b = 0 half of it is added."""
    m = build("mor1e", {"r": 4, "steep": 100})
    p = {"A": torch.ones(4, 1), "B": torch.eye(4), "R": torch.zeros(4, 1)}
    p |= {"o": torch.tensor([o]), "b": torch.zeros(1)}
    s = torch.tensor([[0.9, 0.1, 0.0, 0.2]])
    Δ = m.delta(p, torch.ones(1, 1), torch.zeros(1, 4), s)  # type: ignore[call-arg]
    torch.testing.assert_close(2 * Δ, torch.tensor([expected]), atol=1e-4, rtol=0)
    torch.testing.assert_close(m.delta(p, torch.ones(1, 1), torch.zeros(1, 4), 0 * s), m.delta(p, torch.ones(1, 1), s))  # type: ignore[call-arg]


def test_a_router_prefers_what_a_token_shows() -> None:
    """R x = [log 3, 0]: softmax [.75, .25], g = 16 times that; A x = [1, 2], B = I, and half of g ∘ A x = [12, 8]."""
    m = build("mor1e", {"r": 2})
    p = {"A": torch.tensor([[1.0], [2.0]]), "B": torch.eye(2), "R": torch.tensor([[3.0], [1.0]]).log()}
    p |= {"o": torch.zeros(1), "b": torch.zeros(1)}
    torch.testing.assert_close(m.delta(p, torch.ones(1, 1), torch.zeros(1, 2)), torch.tensor([[6.0, 4.0]]))


def shaken(backbone: Backbone, **hyper: Any) -> tuple[Any, dict[str, Tensor]]:
    m, draw = build("mor1e", {"r": 4, **hyper}), torch.Generator().manual_seed(0)
    tensors = {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, 0).items()}
    tensors["shared/C"] = F.normalize(torch.randn(4, backbone.hidden_size, generator=draw), dim=-1)
    return m, tensors


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_each_text_has_the_prior_of_its_own_embedding(family: str) -> None:
    """One text at a time and without padding, by hooks of the test's own."""
    backbone = tiny.backbone(family)
    m, tensors = shaken(backbone)
    at = Active.of(m, tensors).at
    texts = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14]]
    batch = backbone.collate(texts)

    def hook(name: str, s: Tensor, _module: Any, args: Any, y: Tensor) -> Tensor:
        p, part, x = at[name], backbone.sites[name].part, args[0]
        w = torch.sigmoid(2.5 * p["o"])
        g = 32 * w * (x @ p["R"].T).softmax(-1) + 4 * (1 - w) * s
        Δ = torch.sigmoid(2.5 * p["b"]) * (g * (x @ p["A"].T)) @ p["B"].T
        return y + Δ if part is None else part.put(y, part.take(y) + Δ)

    with torch.no_grad():
        found = Plan(backbone, [Active.of(m, tensors)]).hidden(batch)
        bare = Plan(backbone, [Active.of(replace(m, prior=0.0), tensors)]).hidden(batch)
        for i, ids in enumerate(texts):
            given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
            e = F.normalize(backbone.reader(**given).last_hidden_state[0].mean(0), dim=-1)
            s = tensors["shared/C"] @ e
            handles = [
                backbone.model.get_submodule(backbone.sites[n].path).register_forward_hook(partial(hook, n, s))
                for n in at
            ]
            expected = backbone.reader(**given).last_hidden_state[0]
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(found[i, : len(ids)], expected, rtol=1e-4, atol=1e-4)
    assert (found - bare)[batch.mask].abs().max() > 1e-2


def test_numbers_are_those_of_the_equation() -> None:
    tensors = build("mor1e", {"r": 4}).start(tiny.backbone("llama"), 0)
    trained = sum(t.numel() for n, t in tensors.items() if build("mor1e").trains(n))
    maps = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert trained == 3 * sum(4 * (2 * reads + width) + 2 for reads, width in maps)
    assert tensors["shared/C"].shape == (4, 32)


# ------------------- clusters


@cache
def topics(n: int = 48) -> Task:
    """Texts of two vocabularies, whose label is the order of two of their words."""
    draw = random.Random(0)

    def row(i: int) -> Example:
        words = draw.sample("abcd" if i % 2 else "efgh", 4)
        return Example(str(i), " ".join(words), "up" if words[0] < words[1] else "down")

    rows = tuple(row(i) for i in range(2 * n))
    return Task("topics", "classification", rows[:n], rows[n:], labels=(Label("up"), Label("down")))


def base() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


def test_clusters_are_those_of_the_training_inputs() -> None:
    backbone, task = base(), topics()
    made = pt.adapt(backbone, task, "mor1e", hyperparameters={"r": 2}, settings=pt.Settings(epochs=1, batch=16))
    C = made.tensors["shared/C"]
    torch.testing.assert_close(C.norm(dim=-1), torch.ones(2))
    with torch.no_grad():
        rows = [
            backbone.hidden(backbone.collate([ids]))[0, : len(ids)]
            for ids in backbone.tokenize([str(e.input) for e in task.train])
        ]
    e = F.normalize(torch.stack([row.mean(0) for row in rows]), dim=-1)
    near = (e @ C.T).argmax(-1)
    assert len({int(c) for c in near[::2]}) == len({int(c) for c in near[1::2]}) == 1
    assert near[0] != near[1]
    for c in range(2):
        torch.testing.assert_close(C[c], F.normalize(e[near == c].mean(0), dim=-1), rtol=1e-4, atol=1e-5)
    head = 2 * 32 + 2
    assert made.card.trained_parameters == head + sum(
        t.numel() for n, t in made.tensors.items() if not n.startswith(("head/", "task/", "shared/"))
    )


def test_of_fewer_inputs_than_clusters_the_others_have_no_centre() -> None:
    task = replace(topics(), train=topics().train[:3])
    [learned] = train(base(), [job_of(task, "mor1e", {"r": 5}, epochs=1)])
    norms = learned.tensors["shared/C"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 1, 1, 0, 0]))


def test_it_learns_is_kept_and_answers(tmp_path: Path) -> None:
    settings = pt.Settings(epochs=12, batch=16, lr=1e-2, patience=99)
    made = pt.adapt(base(), topics(), "mor1e", hyperparameters={"r": 4}, settings=settings)
    assert made.card.scores["validation"].value > 0.8
    kept = pt.Adapter.load(made.save(tmp_path / "kept"))
    asked = [Request(str(e.input), None, made.id) for e in topics().validation[:4]]
    together = Engine(base(), adapters=[kept]).answer(asked)
    for one, answer in zip(asked, together, strict=True):
        [alone] = Engine(base(), adapters=[made]).answer([one])
        assert alone.probability == pytest.approx(answer.probability, abs=1e-5)
    further = pt.adapt(
        base(), replace(topics(), train=topics().train[::2]), begin=made, settings=replace(settings, epochs=1)
    )
    assert torch.equal(further.tensors["shared/C"], made.tensors["shared/C"])


def test_dropout_is_in_training_alone() -> None:
    backbone, batch = base(), tiny.batch(2)
    batch = replace(batch, ids=batch.ids % 12)
    m, tensors = shaken(backbone, dropout=1.0)
    with torch.no_grad():
        dropped = Plan(backbone, [Active.of(m, tensors)], training=True).hidden(batch)
        whole = Plan(backbone, [Active.of(m, tensors)]).hidden(batch)
    plain = backbone.hidden(batch)
    torch.testing.assert_close(dropped[batch.mask], plain[batch.mask])
    assert (whole - plain)[batch.mask].abs().max() > 1e-2


def test_answers_in_text_are_refused() -> None:
    with pytest.raises(UsageError, match="answered by a head"):
        pt.adapt(writer("llama"), topics(), "mor1e", reading=Reading(in_text="yes"))
