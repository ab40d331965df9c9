"""A new task from a library: the ways, how they are compared, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from jobs import TOKENS, task_of

import polytask as pt
from polytask.adapters import Adapter
from polytask.adapters.expression import Name
from polytask.backbones import Backbone
from polytask.errors import UsageError
from polytask.inference import Engine, Request
from polytask.recipes import reuse as module
from polytask.recipes.reuse import Way, reuse


@cache
def base() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


@cache
def library() -> tuple[Adapter, ...]:
    """One that leaves the words' states as they are for the most part, two that spoil them, and a head alone."""
    made = []
    for seed, (name, method, noise) in enumerate((("good", "lora", 0.05), ("bad", "lora", 9.0), ("head", "head", 0.0))):
        one = pt.adapt(base(), replace(task_of(seed=seed), name=name), method, settings=pt.Settings(epochs=1))
        draw = torch.Generator().manual_seed(seed)
        moved = {n: t + noise * torch.randn(t.shape, generator=draw) for n, t in one.tensors.items() if "attn" in n}
        made.append(replace(one, tensors={**one.tensors, **moved}))
    return tuple(made)


def few(n: int, kind: str = "classification"):
    own = task_of(kind, n, seed=50)
    return replace(own, name="new", validation=(), test=own.validation)


def way(name: str, *each: float) -> Way:
    return Way(name, None, "head", torch.tensor(each), 0.0)


def test_a_way_is_better_by_more_than_chance():
    """Differences .1, .3: mean .2, standard error √(.02/2) = .1, so .2 > .05; differences −1, 1.1: .05 < .5 · 1.05."""
    assert way("b", -0.9, -0.7).better_than(way("a", -1.0, -1.0))
    assert not way("b", -2.0, 0.1).better_than(way("a", -1.0, -1.0))
    assert not way("b", -1.0, -1.0).better_than(way("a", -1.0, -1.0))


def test_folds_hold_each_example_once():
    for n, kind in ((8, "classification"), (3, "classification"), (12, "tagging"), (7, "regression")):
        folds = module._folds(few(n, kind))
        assert sorted(i for _, held in folds for i in held) == list(range(n))
        assert all(not set(taught) & set(held) for taught, held in folds)
    with pytest.raises(UsageError, match="at least two"):
        module._folds(few(1))


@pytest.mark.parametrize("kind", ["classification", "multilabel", "tagging", "regression"])
def test_every_way_is_tried_and_one_is_kept(kind):
    before = {one.id: {n: t.clone() for n, t in one.tensors.items()} for one in library()}
    said: list[str] = []
    found = reuse(base(), few(12, kind), library(), settings=pt.Settings(epochs=2), tell=said.append)
    names = [w.name for w in found.ways]
    assert names[0] == "features"
    assert {"on good", "on bad"} <= set(names)
    assert "on head" not in names  # it does nothing below a head
    assert {"lora"} <= set(names)
    assert any(name.startswith("lora from") for name in names)
    assert any("+" in name for name in names)
    assert said[-1] == f"taken: {found.taken}"
    assert all(len(w.each) == 12 for w in found.ways)
    assert all(torch.equal(t, before[one.id][n]) for one in library() for n, t in one.tensors.items())
    engine = Engine(base(), adapters=[*library(), *found.support, found.adapter])
    assert engine.answer([Request("a e f", adapter="new")])[0].name == "new"


def test_the_spoilt_features_are_not_taken():
    found = reuse(base(), few(24), library(), settings=pt.Settings(epochs=1))
    scores = {w.name: w.score for w in found.ways}
    assert scores["on good"] > scores["on bad"]
    assert "bad" not in found.taken


def test_what_is_taken_is_built(monkeypatch):
    """Whatever way is the best one, the adapter is made so: on one adapter, on several, from one."""
    for wanted, above, made in (("on bad", 1, 0), ("on good + bad", 1, 1), ("lora from good", 0, 0), ("lora", 0, 0)):
        monkeypatch.setattr(Way, "better_than", lambda self, other, wanted=wanted: self.name == wanted)
        order = ("good", "bad")
        found = reuse(base(), few(12), library(), settings=pt.Settings(epochs=1))
        if wanted not in {w.name for w in found.ways}:
            wanted = "on bad + good"
            monkeypatch.setattr(Way, "better_than", lambda self, other: self.name == "on bad + good")
            found = reuse(base(), few(12), library(), settings=pt.Settings(epochs=1))
        assert found.taken == wanted, order
        assert (len(found.adapter.above), len(found.support)) == (above, made)
        assert found.adapter.method == ("lora" if wanted.startswith("lora") else "head")
        if wanted == "on bad":
            assert found.adapter.above == (library()[1].id,)
        if wanted == "lora from good":
            assert library()[0].id in found.adapter.card.lineage.parents
        assert any(wanted in note for note in found.adapter.card.notes)


def test_without_examples_the_adapter_with_these_labels_answers():
    empty = replace(few(4), train=(), validation=())
    found = reuse(base(), empty, library())
    assert found.adapter.id in {one.id for one in library()}
    with pytest.raises(UsageError, match="no adapter of the library answers with its labels"):
        reuse(base(), empty, [])


def test_adapters_of_other_weights_are_left_out():
    other = [replace(one, backbone=tiny.backbone("bert", seed=3, tokenizer=TOKENS).card()) for one in library()]
    found = reuse(base(), few(8), other, settings=pt.Settings(epochs=1))
    assert [w.name for w in found.ways] == ["features", "lora"]


def test_the_best_of_equals_is_the_cheaper(monkeypatch):
    monkeypatch.setattr(Way, "score", property(lambda self: 0.0))
    found = reuse(base(), few(8), library(), settings=pt.Settings(epochs=1))
    assert isinstance(found.ways[1].below, Name)
