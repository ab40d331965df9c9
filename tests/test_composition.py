"""Expressions over adapters: read, written, kept, and run; each against the same adapters one inside the other."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import TOKENS, task_of
from torch import Tensor
from writers import writer

import polytask as pt
from polytask.adapters import Adapter
from polytask.adapters.expression import Bare, Ensemble, Expression, Mix, Name, Parallel, Pipeline, Split, Stack, read
from polytask.backbones import Backbone, Batch
from polytask.composition import compose
from polytask.composition.kept import keep
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import build
from polytask.methods.composed import Seen
from polytask.methods.lifting import Active, Plan, Terms, planned
from polytask.tasks import Example, Label, Task

PAIRS = [
    ("bottleneck", "pfeiffer"),
    ("bottleneck", "bottleneck"),
    ("lora", "dora"),
    ("dora", "dora"),
    ("ia3", "ia3"),
    ("bitfit", "ia3"),
    ("compacter", "lofit"),
    ("lora", "full"),
    ("full", "bottleneck"),
    ("prefix", "dora"),
    ("rotation", "rotation"),
    ("lora", "lora"),
]


@cache
def backbone(family: str = "bert") -> Backbone:
    return tiny.backbone(family, tokenizer=TOKENS)


def active(base: Backbone, name: str, seed: int = 0, **hyper: object) -> Active:
    m = build(name, hyper)
    m = replace(m, sites=tuple(tiny.sites(base.family, *m.sites))) if m.sites else m
    draw = torch.Generator().manual_seed(seed)
    scale = 0.02 if m.swaps else 0.2
    tensors = {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in m.start(base, seed).items()}
    return Active.of(m, tensors)


def alone(one: Active) -> Terms:
    return ((1.0, one),)


def hidden(base: Backbone, who: list[Terms], batch: Batch) -> Tensor:
    order, weights = planned(who)
    with torch.no_grad():
        return Plan(base, order).hidden(batch, weights)


def nested(base: Backbone, actives: list[Active], batch: Batch) -> Tensor:
    """Each adapter's hooks put on the model after those before it, so that each sees what they left."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        wide, columns = batch, None
        for one in actives:
            plan, weights = Plan(base, [one]), torch.ones(len(batch.ids), 1)
            acting = stack.enter_context(plan.acting(weights))
            wide, moved = plan.widen(acting, wide, weights)
            columns = moved if columns is None else columns
        states = base.hidden(wide)
        return states if columns is None else states.gather(1, columns[:, :, None].expand(-1, -1, states.shape[-1]))


# -- texts -------------------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "tickets-v2", "0123456789abcdef", "1234567890123456", "two words", "stack", "ähre"])
weights_ = st.floats(-9, 9, allow_nan=False).map(lambda w: round(w, 3))
expressions: st.SearchStrategy[Expression] = st.recursive(
    names.map(Name),
    lambda inner: st.one_of(
        st.lists(st.tuples(weights_, inner), min_size=1, max_size=3).map(lambda terms: Mix(tuple(terms))),
        st.tuples(st.lists(st.tuples(weights_, inner), min_size=1, max_size=2), names).map(
            lambda said: Mix(tuple(said[0]), said[1])
        ),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Stack(tuple(parts))),
        st.lists(inner, min_size=2, max_size=2).map(lambda parts: Parallel(tuple(parts))),
        st.lists(inner, min_size=2, max_size=2).map(lambda parts: Ensemble(tuple(parts), "a")),
        st.lists(inner, min_size=3, max_size=3).map(lambda parts: Split(tuple(parts), None, (4, 9))),
        st.tuples(inner, names, inner, st.none() | inner).map(lambda p: Pipeline(p[0], ((p[1], p[2]),), p[3])),
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(expressions)
def test_an_expression_is_read_as_it_is_written(expression):
    again = read(str(expression))
    assert str(again) == str(expression)
    assert list(again.names()) == list(expression.names())


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a", Name("a")),
        ("0.7*a + 0.3*b", Mix(((0.7, Name("a")), (0.3, Name("b"))))),
        ("a - b", Mix(((1.0, Name("a")), (-1.0, Name("b"))))),
        ("-a", Mix(((-1.0, Name("a")),))),
        ("stack(a, 2*b)", Stack((Name("a"), Mix(((2.0, Name("b")),))))),
        ("split(4, 9, a, b, c)", Split((Name("a"), Name("b"), Name("c")), None, (4, 9))),
        ("pipeline(a, yes=b, else=c)", Pipeline(Name("a"), (("yes", Name("b")),), Name("c"))),
        ("bare(a)", Bare("a")),
        ("mix(a, b, head=b)", Mix(((1.0, Name("a")), (1.0, Name("b"))), "b")),
        ('"two words" + 1234567890123456', Mix(((1.0, Name("two words")), (1.0, Name("1234567890123456"))))),
    ],
)
def test_what_a_text_means(text, meant):
    assert read(text) == meant


def test_operators_make_the_same_values():
    a, b = Name("a"), Name("b")
    assert 0.7 * a + 0.3 * b == read("0.7*a + 0.3*b")
    assert a - 2 * b == read("a - 2*b")
    assert -pt.stack("a", b) == read("-stack(a, b)")
    assert pt.mix({"a": 1.0, "b": 2.0}, head="b") == read("mix(a, 2*b, head=b)")
    assert pt.split(4, a, "b") == read("split(4, a, b)")
    assert pt.pipeline("a", {"yes": b}, "c") == read("pipeline(a, yes=b, else=c)")


@pytest.mark.parametrize(
    "text",
    [
        *("", "a b", "stack(a)", "what(a, b)", "0.7*", "2 + 3", "a +", "stack(a, b", "a)", "1e9*a", "mix()"),
        *("split(a, b)", "split(9, 4, a, b, c)", "pipeline(a)", "pipeline(a, b)", "bare(a + b)"),
        *("stack(a, b, head=a + b)", "ensemble(a, b, rank=c)"),
    ],
)
def test_texts_that_say_nothing(text):
    with pytest.raises(UsageError) as caught:
        read(text)
    assert "\n" not in str(caught.value)


# -- stacks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "bart", "modernbert", "deberta-v2"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_stack_is_each_adapter_on_what_those_below_it_left(family, pair):
    base = backbone(family)
    batch = tiny.batch(3)
    one, two = (active(base, name, seed) for seed, name in enumerate(pair))
    expected = nested(base, sorted([one, two], key=lambda a: a.method.slots), batch)  # prefixes are put there last
    whole = compose.stack([alone(one), alone(two)])
    got = hidden(base, [whole] * 3, batch)
    torch.testing.assert_close(got[batch.mask], expected[batch.mask], rtol=2e-5, atol=2e-5)


def test_stacks_that_are_sums_are_run_as_sums():
    """LoRA's change does not read y, so the order is none and the fast path of mixtures serves."""
    base = backbone()
    lora, other, apart = active(base, "lora"), active(base, "lora", 1), active(base, "bottleneck", 2)
    assert compose.stack([alone(lora), alone(other), alone(apart)]) == ((1.0, lora), (1.0, other), (1.0, apart))
    [(weight, stacked)] = compose.stack([alone(apart), alone(active(base, "bottleneck", 3))])
    assert (weight, stacked.method.name) == (1.0, "stack")


def test_the_order_of_a_stack_matters():
    base, batch = backbone(), tiny.batch(3)
    one, two = active(base, "bottleneck", 0), active(base, "bottleneck", 1)
    there, back = (hidden(base, [compose.stack([alone(a), alone(b)])] * 3, batch) for a, b in ((one, two), (two, one)))
    both = hidden(base, [compose.mix([1.0, 1.0], [alone(one), alone(two)])] * 3, batch)
    assert not torch.allclose(there, back, atol=1e-3)
    assert not torch.allclose(there, both, atol=1e-3)


def test_by_hand():
    """y = [1, 2] with D = [1, 0], U = [.1, .2]: y₁ = [1.1, 2.2]; then D = [0, 1], U = [1, −1]: y₂ = [3.3, 0]."""
    m = build("pfeiffer")
    p = {"b_D": torch.zeros(1), "b_U": torch.zeros(2)}
    below = p | {"D": torch.tensor([[1.0, 0.0]]), "U": torch.tensor([[0.1], [0.2]])}
    top = p | {"D": torch.tensor([[0.0, 1.0]]), "U": torch.tensor([[1.0], [-1.0]])}
    whole = compose.stack([alone(Active(m, {"s": below})), alone(Active(m, {"s": top}))])[0][1]
    method, params = whole.equation("s", Seen())
    y = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(y + method.delta(params, y, y), torch.tensor([[3.3, 0.0]]))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_rows_of_different_expressions_share_a_pass(family):
    base, batch = backbone(family), tiny.batch(8)
    a, b, c = (active(base, "bottleneck", seed) for seed in range(3))
    lora, full = active(base, "lora", 3), active(base, "full", 4)
    stacked = compose.stack([alone(a), alone(b)])
    who: list[Terms] = [
        stacked,
        alone(a),
        compose.mix([0.5, -2.0], [stacked, alone(c)]),
        compose.stack([alone(b), alone(a), alone(lora)]),
        (),
        compose.stack([compose.mix([0.3, 0.7], [alone(a), alone(c)]), alone(b)]),
        compose.stack([alone(full), stacked]),
        compose.mix([0.5], [stacked]),
    ]
    together = hidden(base, who, batch)
    for i, terms in enumerate(who):
        row = batch.rows(torch.tensor([i]))
        by_itself = hidden(base, [terms], row) if terms else base.hidden(row)
        torch.testing.assert_close(together[i][batch.mask[i]], by_itself[0][row.mask[0]], rtol=2e-5, atol=2e-5)


def test_adapters_of_one_kind_share_a_call_in_stacks_too():
    base = backbone()
    stacks = [
        compose.stack([alone(active(base, "bottleneck", s)), alone(active(base, "bottleneck", s + 9))])
        for s in range(3)
    ]
    order, _ = planned(stacks)
    assert [len(group.columns) for group in Plan(base, order).groups["0.attn.o"]] == [3]


# -- splits ------------------------------------------------------------------------------------------------------------


def test_a_split_gives_each_part_its_tokens():
    """On a decoder nothing runs backwards: the first tokens' states are the first adapter's."""
    base, batch = backbone("llama"), tiny.batch(4)
    a, b = active(base, "bottleneck", 0), active(base, "lora", 1)
    got = hidden(base, [compose.split([3], [alone(a), alone(b)])] * 4, batch)
    first = hidden(base, [alone(a)] * 4, batch)
    early = batch.mask & (torch.arange(batch.ids.shape[1]) < 3)
    torch.testing.assert_close(got[early], first[early], rtol=1e-5, atol=1e-5)
    everywhere = hidden(base, [compose.split([64], [alone(a), alone(b)])] * 4, batch)
    torch.testing.assert_close(everywhere[batch.mask], first[batch.mask], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[:, 3:][batch.mask[:, 3:]], first[:, 3:][batch.mask[:, 3:]], atol=1e-3)


def test_a_split_counts_in_packed_rows_and_behind_prompts():
    base = backbone("llama")
    texts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15]]
    a, b, prompt = active(base, "bottleneck", 0), active(base, "bottleneck", 1), active(base, "prompt", 2, n=3)
    split = compose.split([2], [alone(a), alone(b)])
    for terms in (split, compose.stack([alone(prompt), split])):
        packed = hidden(base, [terms], base.pack([texts]))
        at = 0
        for ids in texts:
            own = hidden(base, [terms], base.collate([ids]))
            torch.testing.assert_close(packed[0, at : at + len(ids)], own[0, : len(ids)], rtol=2e-5, atol=2e-5)
            at += len(ids)


def test_what_is_written_belongs_to_the_last_part():
    """Writing token by token is as reading prompt and answer at once with the answer's tokens the last part's."""
    base = writer("llama")
    a, b = active(base, "bottleneck", 0), active(base, "bottleneck", 1)
    order, weights = planned([compose.split([2], [alone(a), alone(b)])])
    plan = Plan(base, order)
    prompt = [5, 6, 7, 8]
    [written] = generate(plan, [Prompt(prompt, weights[0], Sampling(max_tokens=5))])
    ids = torch.tensor([[*prompt, *written.tokens]])
    asked = torch.tensor([[True] * len(prompt) + [False] * len(written.tokens)])
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), asked=asked)
    at = torch.tensor([[0, len(prompt) - 1 + k] for k in range(len(written.tokens))])
    with torch.no_grad():
        z = plan.logits(batch, weights, at)
    assert z.argmax(-1).tolist() == list(written.tokens)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused_before_it_runs():
    base = backbone("llama")
    prompt, prefix, lora = (active(base, name) for name in ("prompt", "prefix", "lora"))
    for wrong in (
        lambda: compose.stack([alone(prompt), alone(prefix)]),
        lambda: compose.split([3], [alone(lora), alone(prefix)]),
        lambda: compose.split([3], [alone(lora), alone(active(base, "full"))]),
    ):
        with pytest.raises(UsageError) as caught:
            wrong()
        assert "\n" not in str(caught.value)


# -- through the engine ------------------------------------------------------------------------------------------------


@cache
def skills() -> tuple[Adapter, ...]:
    """Three adapters of one task and one of another."""
    kinds = {"a": "lora", "b": "bottleneck", "c": "bottleneck", "kind": "lora"}
    return tuple(trained(name, method, seed) for seed, (name, method) in enumerate(kinds.items()))


def trained(name: str, method: str, seed: int) -> Adapter:
    """An adapter far enough from the backbone to be seen."""
    own = replace(task_of(seed=seed), name=name)
    if name == "kind":
        turn = {"a": "b", "b": "z", "c": "a", "d": "z"}
        own = replace(
            own,
            labels=tuple(map(Label, "baz")),
            train=tuple(replace(e, output=turn[str(e.output)]) for e in own.train),
            validation=tuple(replace(e, output=turn[str(e.output)]) for e in own.validation),
        )
    one = pt.adapt(backbone(), own, method, settings=pt.Settings(epochs=1, batch=8, seed=seed))
    draw = torch.Generator().manual_seed(seed)
    return replace(one, tensors={n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in one.tensors.items()})


def test_expressions_answer_like_adapters(tmp_path: Path):
    engine = Engine(backbone(), adapters=skills())
    texts = ["a e f", "g", "e b h h"]
    for said in ("0.5*a + 0.5*b", "stack(b, c)", "b - c", "mix(b, 0.2*c, head=c)", "split(2, b, c)", "2*stack(a, b)"):
        expression = read(said)
        answers = engine.answer([Request(text, adapter=said) for text in texts])
        assert answers == engine.answer([Request(text, adapter=expression) for text in texts])
        head = {"mix(b, 0.2*c, head=c)": "c", "stack(b, c)": "c", "split(2, b, c)": "c", "2*stack(a, b)": "b"}
        assert answers[0].name == head.get(said, said[0] if said[0] in "abc" else "a")
        one = keep(expression, engine_get(engine), engine_get(engine)(answers[0].name), "kept")
        one.save(tmp_path / "kept")
        back = Adapter.load(tmp_path / "kept")
        assert back.id == one.id
        again = Engine(backbone(), adapters=[*skills(), back]).answer([Request(t, adapter="kept") for t in texts])
        assert [(a.output, a.probability) for a in again] == [(a.output, a.probability) for a in answers]
        assert set(back.card.lineage.parents) == {engine.find(n) for n in expression.names()}


def engine_get(engine: Engine):
    return lambda ref: next(one for one in engine.adapters if one.id == engine.find(ref))


def test_an_ensemble_is_the_mean_of_probabilities():
    engine = Engine(backbone(), adapters=skills())
    text = "a e f"
    [whole] = engine.answer([Request(text, adapter="ensemble(a, 3*b)")])
    first, second = whole.parts
    [alone_a, alone_b] = engine.answer([Request(text, adapter="a"), Request(text, adapter="b")])
    assert first.output == alone_a.output
    assert first.probability == pytest.approx(alone_a.probability, abs=1e-6)
    assert second.probability == pytest.approx(alone_b.probability, abs=1e-6)
    if first.output == second.output == whole.output:
        assert whole.probability == pytest.approx(0.25 * first.probability + 0.75 * second.probability, abs=1e-6)
    same, _ = engine.answer([Request(text, adapter="ensemble(a, a)"), Request(text, adapter="a")])
    assert (same.output, same.probability) == (alone_a.output, pytest.approx(alone_a.probability, abs=1e-6))


def test_parallel_and_pipeline():
    engine = Engine(backbone(), adapters=skills())
    text = "a e f"
    a, b, kind = engine.answer([Request(text, adapter=name) for name in ("a", "b", "kind")])
    both, step, else_, stays = engine.answer(
        [
            Request(text, adapter="parallel(a, kind)"),
            Request(text, adapter=Pipeline(Name("kind"), ((str(kind.output), Name("b")),))),
            Request(text, adapter="pipeline(kind, nothing=a, else=b)"),
            Request(text, adapter="pipeline(kind, nothing=a)"),
        ]
    )
    assert both.parts == (a, kind)
    assert both.output is None
    assert (step.output, step.name, step.parts) == (b.output, "b", (kind, b))
    assert (else_.output, else_.name) == (b.output, "b")
    assert stays == kind
    with pytest.raises(UsageError, match="gives answers"):
        engine.answer([Request(text, adapter="0.5*parallel(a, b)")])
    with pytest.raises(UsageError, match="adapters of one task"):
        engine.answer([Request(text, adapter="ensemble(a, kind)")])
    for said, why in (
        ("ensemble(a, kind)", "adapters of one task"),
        ("pipeline(kind, z=ensemble(a, kind))", "adapters of one task"),
        ("parallel(a, parallel(b, a))", "gives answers"),
        ("a + nobody", "no adapter 'nobody'"),
    ):
        with pytest.raises(UsageError, match=why):
            engine.check(read(said))
    with pytest.raises(UsageError, match="no adapter 'nobody'"):
        engine.answer([Request(text, adapter="a + nobody")])


# -- trained above -----------------------------------------------------------------------------------------------------


def top_task() -> Task:
    return replace(task_of(seed=9), name="top")


@pytest.mark.parametrize(("below", "top"), [("b", "bottleneck"), ("a", "lora"), ("b", "full"), ("c", "prompt")])
def test_training_above_moves_only_what_is_on_top(below, top, tmp_path: Path):
    base = backbone()
    under = next(one for one in skills() if one.name == below)
    before = {n: t.clone() for n, t in under.tensors.items()}
    own = pt.adapt(base, top_task(), top, settings=pt.Settings(epochs=2, batch=8), above=[under])
    assert all(torch.equal(t, before[n]) for n, t in under.tensors.items())
    assert own.above == (under.id,)
    own.save(tmp_path / "own")
    back = Adapter.load(tmp_path / "own")
    assert (back.id, back.above) == (own.id, own.above)
    engine = Engine(base, adapters=[*skills(), back])
    texts = [Request(text, adapter="top") for text in ("a e", "f g b")]
    answers = engine.answer(texts)
    stacked = engine.answer([replace(r, adapter=f"stack({below}, top)") for r in texts])
    assert [(a.output, a.probability) for a in stacked] == [(a.output, a.probability) for a in answers]
    off = engine.answer([replace(r, adapter="bare(top)") for r in texts])
    without = Engine(base, adapters=[replace(back, above=())]).answer(texts)
    assert [(a.output, a.probability) for a in off] == [(a.output, a.probability) for a in without]
    elsewhere = engine.answer([replace(r, adapter="stack(kind, top)") for r in texts])
    assert [a.probability for a in elsewhere] != [a.probability for a in answers]
    with pytest.raises(UsageError, match=under.id):
        Engine(base, adapters=[back]).answer(texts)


def test_an_id_changes_with_what_an_adapter_stands_on():
    one = skills()[0]
    assert replace(one, above=("0" * 16,)).id != one.id
    assert replace(one, above=()).id == one.id


def test_the_head_begins_on_what_stands_below():
    """The probe sees the states that the adapters below leave, so a head alone on top of one answers by those."""
    base = backbone()
    under = skills()[1]
    alone_, on_top = (
        pt.adapt(base, top_task(), "head", settings=pt.Settings(epochs=1), above=above) for above in ((), [under])
    )
    assert not torch.equal(alone_.tensors["head/W"], on_top.tensors["head/W"])


def test_adapters_of_other_weights_do_not_go_below():
    other = tiny.backbone("bert", seed=5)
    with pytest.raises(UsageError, match="was trained on"):
        pt.adapt(other, top_task(), "lora", above=[skills()[0]])
    strange = replace(skills()[0], backbone=other.card())
    with pytest.raises(PolytaskError, match="adapters of one backbone"):
        keep(read("a + x"), {"a": skills()[1], "x": strange}.__getitem__, None, "both")


def test_a_prompt_that_took_up_a_form_can_be_left_out(tmp_path: Path):
    """ProMoT: a prompt is learnt first, a LoRA above it, and both answer alone, together, and the LoRA without it."""
    base = writer("llama")
    said = [Example(str(i), "the cat", "two dogs" if i % 2 else "no cat") for i in range(8)]
    form = Task("form", "generation", tuple(said), tuple(said[:2]), instruction="Say.")
    settings_ = pt.Settings(epochs=1, batch=4, lr=1e-2)
    prompt = pt.adapt(base, form, "prompt", hyperparameters={"n": 3}, settings=settings_)
    own = pt.adapt(base, replace(form, name="top"), "lora", settings=settings_, above=[prompt])
    moved = {n: t + 0.2 for n, t in own.tensors.items() if n.endswith("/B")}
    own = replace(own, tensors={**own.tensors, **moved})
    assert own.above == (prompt.id,)
    engine = Engine(base, adapters=[prompt, own])
    ask = [pt.Ask("the cat sat", adapter=name) for name in ("top", "stack(form, top)", "bare(top)", "form")]
    together, stacked, without, alone_ = engine.logprobs(ask, [" on the mat"] * 4)
    torch.testing.assert_close(together, stacked)
    for other in (without, alone_):
        assert not torch.allclose(together, other, atol=1e-3)
    plain = Engine(base, adapters=[replace(own, above=())])
    [detached] = plain.logprobs([pt.Ask("the cat sat", adapter="top")], [" on the mat"])
    torch.testing.assert_close(without, detached)
    texts = engine.generate([replace(a, sampling=Sampling(max_tokens=4)) for a in ask])
    assert texts[0].tokens == texts[1].tokens
