"""A new task from a library: the ways, how they are compared, and what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from jobs import TOKENS, task_of

import polytask as pt
from polytask.adapters import Adapter
from polytask.adapters.expression import Ensemble, Mix, Name
from polytask.backbones import Backbone
from polytask.composition.kept import expression_of
from polytask.errors import UsageError
from polytask.inference import Engine, Request
from polytask.recipes import reuse as module
from polytask.recipes.reading import Reading
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
    """Differences .2, .3: mean .25, standard error √(.005/2) = .05; .1, .3: mean .2, error .1, of which it takes more
    than two; −1, 1.1: mean .05, error 1.05."""
    assert way("b", -0.8, -0.7).better_than(way("a", -1.0, -1.0))
    assert not way("b", -0.9, -0.69).better_than(way("a", -1.0, -1.0))
    assert not way("b", -2.0, 0.1).better_than(way("a", -1.0, -1.0))
    assert not way("b", -1.0, -1.0).better_than(way("a", -1.0, -1.0))


def test_the_mean_is_of_probabilities():
    """Half of .2 and .6 is .4."""
    one, two = way("a", math.log(0.2), math.log(0.5)), way("b", math.log(0.6), math.log(0.5))
    torch.testing.assert_close(Way.mean([one, two]).each.exp(), torch.tensor([0.4, 0.5]))


def test_lora_or_a_mean_with_it_is_taken_unless_another_is_surely_better():
    lora, lucky, better = way("lora", -1.0, -1.0), way("x", 0.0, -1.9), way("y", -0.5, -0.6)
    mean = Way.mean([lora, way("z", -0.9, -0.9)])
    assert module._chosen([lucky, lora]) is lora
    assert module._chosen([lucky, lora, mean]) is mean
    assert module._chosen([lora, better]) is better
    both = module._chosen([lora, better, mean])
    assert both.name == "y and (lora and z)"
    assert both.weighed() == {better: 0.5, lora: 0.25, mean.members[1]: 0.25}
    torch.testing.assert_close(both.each.exp(), (better.each.exp() + mean.each.exp()) / 2)
    surely = way("z", -0.1, -0.1)  # one of the mean's own
    again = Way.mean([lora, surely])
    assert module._chosen([lora, surely, again]).weighed() == {surely: 0.75, lora: 0.25}


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
    assert found.taken != "on bad"


@pytest.mark.parametrize(
    ("wanted", "above", "made"), [("on bad", 1, 0), ("mean of two", 1, 1), ("lora from good", 0, 0), ("lora", 0, 0)]
)
def test_what_is_taken_is_built(wanted, above, made, monkeypatch):
    """Whatever way is the best one, the adapter is made so: on one adapter, on several, from one."""
    name = {"mean of two": lambda w: w.name.startswith("on ") and "+" in w.name}.get(wanted, lambda w: w.name == wanted)
    monkeypatch.setattr(module, "_chosen", lambda ways: next(w for w in ways if name(w)))
    found = reuse(base(), few(12), library(), settings=pt.Settings(epochs=1))
    assert (len(found.adapter.above), len(found.support)) == (above, made)
    assert found.adapter.method == ("lora" if wanted.startswith("lora") else "head")
    if wanted == "on bad":
        assert found.adapter.above == (library()[1].id,)
    if wanted == "lora from good":
        assert library()[0].id in found.adapter.card.lineage.parents
    assert any(found.taken in note for note in found.adapter.card.notes)


def test_a_mean_of_several_answers_and_is_routed_to(monkeypatch):
    monkeypatch.setattr(module, "_chosen", lambda ways: next(w for w in ways if w.members))
    found = reuse(base(), few(12), library(), settings=pt.Settings(epochs=1))
    # LoRA, again, and from the nearest
    assert [one.card.recipe["settings"]["seed"] for one in found.support] == [0, 1, 0]
    assert library()[0].id in found.support[2].card.lineage.parents
    assert found.adapter.card.scores["test"].n == 32
    engine = Engine(base(), adapters=[*library(), *found.support, found.adapter])
    [answer] = engine.answer([Request("a e f", adapter="new")])
    each = engine.answer([Request("a e f", adapter=one.id) for one in found.support])
    assert (answer.name, answer.adapter) == ("new", found.adapter.id)
    assert [part.output for part in answer.parts] == [one.output for one in each]
    assert engine.answer([Request("a e f")])[0].adapter not in {one.id for one in found.support}
    assert "mean" in found.adapter.at("task")
    assert not any(one.at("task") for one in found.support)


def test_a_way_beside_the_mean_counts_as_much_as_it(monkeypatch):
    def chosen(ways):
        return Way.mean([next(w for w in ways if w.name == "on bad"), next(w for w in ways if w.members)])

    monkeypatch.setattr(module, "_chosen", chosen)
    found = reuse(base(), few(12), library(), settings=pt.Settings(epochs=1))
    assert [one.method for one in found.support] == ["head", "lora", "lora", "lora"]
    assert found.support[0].above == (library()[1].id,)
    kept = expression_of(found.adapter)
    weights = (1 / 2, 1 / 6, 1 / 6, 1 / 6)
    assert kept == Ensemble(tuple(Mix(((w, Name(one.id)),)) for w, one in zip(weights, found.support, strict=True)))
    engine = Engine(base(), adapters=[*library(), *found.support, found.adapter])
    [answer] = engine.answer([Request("a e f", adapter="new")])
    assert answer.name == "new"
    assert len(answer.parts) == 4


def test_without_examples_the_adapter_with_these_labels_answers():
    empty = replace(few(4), train=(), validation=())
    found = reuse(base(), empty, library())
    assert found.adapter.id in {one.id for one in library()}
    with pytest.raises(UsageError, match="no adapter of the library answers with its labels"):
        reuse(base(), empty, [])


def test_adapters_of_other_weights_are_left_out():
    other = [replace(one, backbone=tiny.backbone("bert", seed=3, tokenizer=TOKENS).card()) for one in library()]
    found = reuse(base(), few(8), other, settings=pt.Settings(epochs=1))
    assert [w.name for w in found.ways] == ["features", "lora", "lora again", "lora and lora again"]


def test_adapters_whose_tasks_are_near_are_tried_first_and_those_without_a_profile_last():
    """A profile of an earlier polytask has half of the numbers."""
    good, bad, _ = library()
    mean = good.tensors["task/mean"]
    far = replace(bad, tensors=bad.tensors | {"task/mean": -mean})
    old = replace(good, tensors=good.tensors | {"task/mean": mean[: len(mean) // 2]})
    new, settings = few(8), pt.Settings()
    head = Reading().design(base(), new, None)
    trial = module._Trial(base(), new, head, settings, [old, far, good], None)
    assert [one.id for one in trial.near(3)] == [good.id, far.id, old.id]
    assert [one.id for one in trial.near(1)] == [good.id]


def test_nothing_surely_better_leaves_lora_or_its_mean(monkeypatch):
    monkeypatch.setattr(Way, "better_than", lambda self, other: False)
    found = reuse(base(), few(8), library(), settings=pt.Settings(epochs=1))
    assert isinstance(found.ways[1].below, Name)
    assert found.taken.startswith("lora")
