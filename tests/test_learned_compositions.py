"""Compositions that learn numbers of their own over adapters: fusion, scaling, coefficients, and weights found without
gradients; against arithmetic written out and mixtures that are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import TOKENS, task_of
from torch import Tensor
from writers import clean, refused, writer

import polytask as pt
from polytask.adapters import Adapter
from polytask.backbones import Backbone, Batch, text
from polytask.composition import compose
from polytask.composition.learned.attention import attention
from polytask.composition.learned.fusion import Fusion
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Ask, Engine, Request, Sampling
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt
from polytask.methods import build
from polytask.methods.composed import Composed, Seen, Sources
from polytask.methods.lifting import Active, Plan, Terms, planned
from polytask.recipes.lorahub import composed, lorahub
from polytask.tasks import Example, Label, Task

SOURCES = ("lora", "bottleneck", "pfeiffer")
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fusion", {}),
    ("scalearn", {}),
    ("scalearn", {"shared": True}),
    ("scalearn_uniform", {}),
    ("scalearn_uniform", {"shared": True}),
    ("atlas", {}),
    ("atlas", {"K": 3}),
)
every_way = pytest.mark.parametrize(("name", "hyper"), WAYS, ids=[f"{n}-{'-'.join(h)}".strip("-") for n, h in WAYS])


@cache
def backbone(family: str = "bert") -> Backbone:
    return tiny.backbone(family, tokenizer=TOKENS)


def drawn(tensors: Mapping[str, Tensor], seed: int, scale: float = 0.2) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in tensors.items()}


def source(base: Backbone, name: str, seed: int = 0) -> Active:
    m = build(name)
    return Active.of(m, drawn(m.start(base, seed), seed))


def over(base: Backbone, sources: tuple[Active, ...], name: str, hyper: Mapping[str, Any] | None = None, **more: Any):
    """A composed method over sources, and its first tensors."""
    ids = [f"{n:016d}" for n in range(len(sources))]
    m = build(name, {"sites": compose.sites(sources), "over": ids, **(hyper or {}), **more})
    return m, m.start(base, 0)


def active(base: Backbone, sources: tuple[Active, ...], name: str, hyper: Mapping[str, Any], seed: int = 1) -> Active:
    m, start = over(base, sources, name, hyper)
    return Active.of(m, drawn(start, seed), sources)


def states(base: Backbone, who: list[Terms], batch: Batch) -> Tensor:
    order, weights = planned(who)
    with torch.no_grad():
        return Plan(base, order).hidden(batch, weights)


def constant(z: list[float]) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.tensor([z]).expand_as(y)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_fusion_by_hand():
    """q = [.6, −1]; k = [1, .5] and [0, 2]; scores .1 and −2; s = [.8909, .1091]; V is nearly the identity."""
    p = {
        "Q_y": torch.tensor([[1.0, 0.5], [0.0, 1.0]]),
        "b_Q": torch.tensor([0.1, 0.0]),
        "K": torch.tensor([[1.0, 0.0], [0.5, 1.0]]),
        "b_K": torch.zeros(2),
        "V": torch.tensor([[1.0, 1e-6], [1e-6, 1.0]]),
    }
    h = torch.tensor([[1.0, -1.0]])
    Δ = Fusion().join(p, h, h, Sources({0: constant([1.0, 0.0]), 1: constant([0.0, 2.0])}))
    s = math.exp(0.1) / (math.exp(0.1) + math.exp(-2))
    torch.testing.assert_close(Δ, torch.tensor([[s, 2 * (1 - s)]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(h + Δ, torch.tensor([[1.8909, -0.7818]]), rtol=0, atol=1e-4)


def fused(h: Tensor, z: list[Tensor], p: Mapping[str, Tensor], Q: Tensor) -> Tensor:
    """The paper's equations token by token, and as the library adapters computes them: keys and values of each."""
    rows = []
    for t in range(len(h)):
        q = Q @ h[t] + p["b_Q"]
        keys = [p["K"] @ each[t] + p["b_K"] for each in z]
        values = [p["V"] @ each[t] for each in z]
        weights = torch.stack([q @ key for key in keys]).softmax(0)
        rows.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(("kind", "site"), [("pfeiffer", "0.sum"), ("bottleneck", "0.mlp.down"), ("lora", "0.attn.q")])
def test_fusion_at_each_kind_of_site(kind, site):
    """At a sum the query is what the sum's norm puts out, elsewhere the site's value, whatever its sources read."""
    base = backbone()
    sources = tuple(source(base, kind, seed) for seed in range(3))
    whole = active(base, sources, "fusion", {})
    draw = torch.Generator().manual_seed(3)
    reads, width = base.sites[site].reads, base.sites[site].width
    x, y = torch.randn(5, reads, generator=draw), torch.randn(5, width, generator=draw)
    method, params = whole.equation(site, Seen(torch.nn.LayerNorm(width)) if site.endswith("sum") else None)
    z = [one.method.delta(one.at[site], x, y) for one in sources]
    own = whole.at[site]
    at_sum = site.endswith("sum")
    expected = fused(x if at_sum else y, z, own, own["Q_x" if at_sum else "Q_y"])
    torch.testing.assert_close(method.delta(params, x, y), expected, rtol=1e-5, atol=1e-5)


def test_scalearn_by_hand():
    """[1, .5] ∘ [1, 2] + [.2, −1] ∘ [3, 4] = [1.6, −3], on [.1, .1]: [1.7, −2.9]."""
    y = torch.tensor([[0.1, 0.1]])
    z = {0: constant([1.0, 2.0]), 1: constant([3.0, 4.0])}
    Δ = build("scalearn").join({"w": torch.tensor([[1.0, 0.5], [0.2, -1.0]])}, y, y, z)
    torch.testing.assert_close(y + Δ, torch.tensor([[1.7, -2.9]]))
    Δ = build("scalearn_uniform").join({"w": torch.tensor([[2.0], [-1.0]])}, y, y, z)
    torch.testing.assert_close(Δ, torch.tensor([[-1.0, 0.0]]))


def test_atlas_by_hand():
    """Four features in groups 0 and 1: each takes its own group's coefficient of each source."""
    m = build("atlas", {"K": 2, "over": ["a", "b"]})
    p = m.ready({"λ": torch.tensor([[1.0, 10.0], [0.5, -2.0]])}, {"group": torch.tensor([0, 1, 1, 0])})
    y = torch.zeros(1, 4)
    Δ = m.join(p, y, y, {0: constant([1.0, 1.0, 2.0, 2.0]), 1: constant([2.0, 1.0, 0.0, 4.0])})
    assert Δ.tolist() == [[2.0, 8.0, 20.0, 4.0]]


def test_atlas_groups_are_all_used_and_the_same_for_blocks_of_a_size():
    base = backbone()
    m = build("atlas", {"K": 5})
    q, v, up = (m.frozen(base, base.sites[name])["group"] for name in ("0.attn.q", "2.attn.v", "0.mlp.up"))
    assert torch.equal(q, v)
    assert sorted(q.unique().tolist()) == [0, 1, 2, 3, 4]
    assert q.bincount().max() - q.bincount().min() <= 1
    assert q.tolist() != (torch.arange(len(q)) % 5).tolist()
    assert len(up) == 64


def test_one_coefficient_a_lora_is_their_weighted_sum():
    """λ of every site alike is task arithmetic, to the last bit that its fast path allows."""
    base, batch = backbone(), tiny.batch(3)
    sources = tuple(source(base, "lora", seed) for seed in range(2))
    for name, tensor, hyper in (("atlas", "λ", {}), ("scalearn_uniform", "w", {})):
        m, start = over(base, sources, name, hyper)
        one = Active.of(m, {n: torch.tensor([[0.7], [-0.3]]) for n in start}, sources)
        assert all(n.endswith(tensor) for n in start)
        expected = states(base, [((0.7, sources[0]), (-0.3, sources[1]))] * 3, batch)
        got = states(base, [((1.0, one),)] * 3, batch)
        torch.testing.assert_close(got[batch.mask], expected[batch.mask], rtol=2e-5, atol=2e-5)


# -- where they start --------------------------------------------------------------------------------------------------


def test_starts():
    base, batch = backbone(), tiny.batch(3)
    sources = tuple(source(base, name) for name in SOURCES)
    m, start = over(base, sources, "fusion")
    assert {n.rpartition("/")[2] for n in start if n.startswith("1.sum")} == {"Q_x", "b_Q", "K", "b_K", "V"}
    assert {n.rpartition("/")[2] for n in start if n.startswith("1.mlp.down")} == {"Q_y", "b_Q", "K", "b_K", "V"}
    V = start["0.sum/V"]
    assert torch.equal(V.diagonal(), torch.ones(32))
    assert V.unique().tolist() == [pytest.approx(1e-6), 1.0]
    assert start["0.sum/Q_x"].std() == pytest.approx(0.02, rel=0.1)
    nearly = {n: torch.zeros_like(t) if n.rpartition("/")[2].startswith("Q") else t for n, t in start.items()}
    two = sources[:2]  # they meet nowhere, so that each has all of the attention where it acts
    _, fresh = over(base, two, "fusion")
    both = states(base, [((1.0, Active.of(m, {n: nearly[n] for n in fresh}, two)),)] * 3, batch)
    torch.testing.assert_close(both, states(base, [((1.0, two[0]), (1.0, two[1]))] * 3, batch), rtol=1e-4, atol=1e-4)

    three = tuple(source(base, "bottleneck", seed) for seed in range(3))
    m, start = over(base, three, "scalearn")
    w = torch.cat([t.flatten() for t in start.values()])
    assert w.mean() == pytest.approx(2 / 3, abs=1e-4)
    assert w.std() == pytest.approx(0.001, rel=0.1)
    at_once = tuple((2 / 3, one) for one in three)
    got = states(base, [((1.0, Active.of(m, start, three)),)] * 3, batch)
    torch.testing.assert_close(got, states(base, [at_once] * 3, batch), rtol=1e-2, atol=1e-2)
    _, other = over(base, three, "scalearn", c=1.0)
    assert torch.cat([t.flatten() for t in other.values()]).mean() == pytest.approx(1 / 3, abs=1e-4)

    m, start = over(base, three, "atlas")
    assert torch.equal(states(base, [((1.0, Active.of(m, start, three)),)] * 3, batch), base.hidden(batch))


def test_the_penalty_is_v_off_the_identity():
    """V = 2 I of three features: 0.01 · 3; at the start nothing but the six numbers beside the diagonal."""
    m = build("fusion")
    assert float(m.penalty({"V": 2 * torch.eye(3)})) == pytest.approx(0.03)
    assert float(m.penalty({"V": torch.full((3, 3), 1e-6).fill_diagonal_(1.0)})) == pytest.approx(0.06e-12)
    assert build("scalearn").penalty({"w": torch.ones(2, 3)}) is None


def test_scales_are_dropped_in_training_alone():
    torch.manual_seed(0)
    m = build("scalearn")
    w = m.sampled({"w": torch.ones(100, 50)})["w"]
    assert w.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert (w == 0).float().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(build("scalearn_uniform").sampled({"w": torch.ones(4, 1)})["w"], torch.ones(4, 1))
    base, batch = backbone(), tiny.batch(3)
    sources = tuple(source(base, "bottleneck", seed) for seed in range(2))
    one = active(base, sources, "scalearn", {})
    assert torch.equal(*(states(base, [((1.0, one),)] * 3, batch) for _ in range(2)))
    with torch.no_grad():
        first, second = (Plan(base, [one], training=True).hidden(batch) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_counts_are_the_papers(family):
    """N·d·L, N·L, N·d, N; 3 d² + 2 d for each of L sites; N·M·K."""
    base = backbone(family)
    sources = tuple(source(base, "bottleneck", seed) for seed in range(4))
    L, N, d = len(sources[0].at), 4, 32
    counts = {
        ("fusion", ()): L * (3 * d * d + 2 * d),
        ("scalearn", ()): N * d * L,
        ("scalearn", ("shared",)): N * d,
        ("scalearn_uniform", ()): N * L,
        ("scalearn_uniform", ("shared",)): N,
        ("atlas", ()): N * L,
        ("atlas", ("K",)): N * L * 3,
    }
    for name, hyper in WAYS:
        m, start = over(base, sources, name, hyper)
        assert sum(t.numel() for n, t in start.items() if m.trains(n)) == counts[name, tuple(hyper)]


def test_vectors_of_sites_that_differ_in_width_are_not_shared():
    base = backbone("llama")  # its values have half as many features as its queries
    sources = tuple(source(base, "lora", seed) for seed in range(2))
    refused(lambda: over(base, sources, "scalearn", {"shared": True}), "16 and 32 features cannot share a vector")
    assert over(base, sources, "scalearn_uniform", {"shared": True})[1]["shared/w"].shape == (2, 1)


# -- in passes ---------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gradients_reach_all_of_its_own_numbers_and_nothing_else(family, name, hyper):
    base, batch = backbone(family), tiny.batch(3)
    sources = tuple(source(base, kind, seed) for kind in SOURCES[1:2] for seed in range(2))
    m, start = over(base, sources, name, {**hyper, **({"dropout": 0.0} if name.startswith("scalearn") else {})})
    own = {n: t.requires_grad_() for n, t in drawn(start, 1).items()}
    h = Plan(base, [Active.of(m, own, sources)], training=True).hidden(batch)
    h[batch.mask].square().sum().backward()
    for n, t in own.items():
        assert t.grad is not None, n
        assert t.grad.abs().max() > 0 or n.endswith("b_K"), n  # which moves all of a token's scores alike
    assert all(t.grad is None for one in sources for p in one.at.values() for t in p.values())
    clean(base)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_rows_of_different_compositions_share_a_pass(family):
    base, batch = backbone(family), tiny.batch(10)
    a, b, c = (source(base, name, seed) for seed, name in enumerate(SOURCES))
    d = source(base, "bottleneck", 5)
    several = [active(base, (b, d), name, hyper, seed) for seed, (name, hyper) in enumerate(WAYS)]
    again = active(base, (b, d), "fusion", {}, 9)
    one_more = active(base, (a, b, c), "fusion", {}, 10)
    who: list[Terms] = [
        *(((1.0, one),) for one in several),
        ((0.5, again), (-1.0, a)),
        ((1.0, one_more),),
        ((1.0, d),),
    ]
    together = states(base, who, batch)
    for i, terms in enumerate(who):
        row = batch.rows(torch.tensor([i]))
        alone = states(base, [terms], row)
        torch.testing.assert_close(together[i][batch.mask[i]], alone[0][row.mask[0]], rtol=2e-5, atol=2e-5)
    clean(base)


def test_those_of_one_equation_share_a_call():
    base = backbone()
    b, d = source(base, "bottleneck"), source(base, "bottleneck", 5)
    order, _ = planned([((1.0, active(base, (b, d), "fusion", {}, seed)),) for seed in range(3)])
    assert [len(group.columns) for group in Plan(base, order).groups["0.attn.o"]] == [3]


# -- trained -----------------------------------------------------------------------------------------------------------


@cache
def skills() -> tuple[Adapter, ...]:
    made = []
    for seed, method in enumerate((*SOURCES, "bottleneck")):
        own = replace(task_of(seed=seed), name=f"{method}-{seed}")
        one = pt.adapt(backbone(), own, method, settings=pt.Settings(epochs=1, batch=16))
        inside = {n: t for n, t in one.tensors.items() if not n.startswith(("head/", "task/"))}
        made.append(replace(one, tensors={**one.tensors, **drawn(inside, seed)}))
    return tuple(made)


@cache
def learned(name: str, hyper: tuple[tuple[str, Any], ...]) -> Adapter:
    task = replace(task_of(seed=9, held=0), name=f"{name}-{len(hyper)}")
    return pt.adapt(
        backbone(),
        task,
        name,
        hyperparameters=dict(hyper),
        settings=pt.Settings(epochs=2, batch=16),
        over=skills(),
    )


@every_way
def test_training_moves_its_own_numbers_alone(name, hyper, tmp_path: Path):
    before = {one.id: {n: t.clone() for n, t in one.tensors.items()} for one in skills()}
    made = learned(name, tuple(hyper.items()))
    for one in skills():
        assert all(torch.equal(t, before[one.id][n]) for n, t in one.tensors.items())
    clean(backbone())
    ids = tuple(one.id for one in skills())
    m = build(name, made.hyperparameters)
    assert isinstance(m, Composed)
    assert m.over == made.needs == made.card.lineage.parents == ids
    start = m.start(backbone(), 0)
    own = {n: t for n, t in made.tensors.items() if not n.startswith(("head/", "task/"))}
    assert own.keys() == start.keys()
    met = {n for n in own if n.startswith("shared/") or (".attn.o/" in n or ".mlp.down/" in n)}  # where two act
    assert met
    assert not [n for n in met if torch.equal(own[n], start[n]) and not n.endswith("b_K")]
    head = sum(t.numel() for n, t in made.tensors.items() if n.startswith("head/"))
    assert made.card.trained_parameters == sum(t.numel() for t in own.values()) + head

    made.save(tmp_path / "made")
    back = Adapter.load(tmp_path / "made")
    assert back.id == made.id
    texts = [Request(said, adapter=made.id) for said in ("a e f", "g", "e b h h")]
    first, second = (Engine(backbone(), adapters=[*skills(), one]).answer(texts) for one in (made, back))
    assert [(a.output, a.probability) for a in first] == [(a.output, a.probability) for a in second]
    with pytest.raises(UsageError, match=ids[0]):
        Engine(backbone(), adapters=[back]).answer(texts)


def test_a_batch_of_all_of_them_answers_as_each_alone():
    made = [learned(name, tuple(hyper.items())) for name, hyper in WAYS]
    everyone = [*skills(), *made]
    texts = ("a e f", "g", "e b h h")
    engine = Engine(backbone(), adapters=everyone)
    requests = [Request(said, adapter=one.id) for one in everyone for said in texts]
    for request, answer in zip(requests, engine.answer(requests), strict=True):
        [alone] = Engine(backbone(), adapters=everyone).answer([request])
        assert (answer.output, answer.adapter) == (alone.output, alone.adapter)
        assert answer.probability == pytest.approx(alone.probability, abs=1e-5)


@every_way
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_writing_token_by_token_is_as_reading_it_at_once(family, name, hyper):
    base = writer(family)
    sources = []
    for seed, kind in enumerate(("lora", "bottleneck")):
        m = build(kind)
        sources.append(Active.of(m, drawn(m.start(base, seed, writing=True), seed)))
    ids = [f"{n:016d}" for n in range(2)]
    if name == "scalearn" and hyper and family == "llama":
        pytest.skip("values narrower than queries share no vectors")
    m = build(name, {"sites": compose.sites(sources), "over": ids, **hyper})
    one = Active.of(m, drawn(m.start(base, 0, writing=True), 1), tuple(sources))
    order, weights = planned([((1.0, one),)])
    plan = Plan(base, order)
    prompt = [5, 6, 7, 8]
    [written] = generate(plan, [Prompt(prompt, weights[0], Sampling(max_tokens=5))])
    said = list(written.tokens)
    if base.kind == "decoder":
        ids_ = torch.tensor([[*prompt, *said]])
        batch, first = Batch(ids_, torch.ones_like(ids_, dtype=torch.bool)), len(prompt) - 1
    else:
        begun = int(base.model.config.decoder_start_token_id)
        batch = replace(base.collate([prompt]), written=torch.tensor([[begun, *said]]))
        first = 0
    at = torch.tensor([[0, first + k] for k in range(len(said))])
    with torch.no_grad():
        z = plan.logits(batch, weights, at)
    assert z.argmax(-1).tolist() == said


# -- whom a fusion attends to ------------------------------------------------------------------------------------------


def told() -> tuple[Adapter, dict[str, Adapter]]:
    """A fusion of adapters that put out constants, at one site, whose scores are 0 and log 3."""
    base = backbone()
    known: dict[str, Adapter] = {}
    for k, one in enumerate((skills()[1], skills()[1])):
        m = build("bottleneck", {"sites": ["1.mlp.down"]})
        b = torch.zeros(32)
        b[k] = 1.0
        own = {"1.mlp.down/D": torch.zeros(2, 32), "1.mlp.down/b_D": torch.zeros(2)}
        own |= {"1.mlp.down/U": torch.zeros(32, 2), "1.mlp.down/b_U": b}
        card = one.card.model_copy(update={"name": f"c{k}"})
        made = Adapter("bottleneck", m.hyperparameters(), own, base.card(), card, one.head)
        known[made.id] = made
    m = build("fusion", {"sites": ["1.mlp.down"], "over": list(known)})
    b_Q = torch.zeros(32)
    b_Q[1] = math.log(3)
    own = m.start(base, 0) | {
        "1.mlp.down/Q_y": torch.zeros(32, 32),
        "1.mlp.down/b_Q": b_Q,
        "1.mlp.down/K": torch.eye(32),
    }
    heads = {n: t for n, t in skills()[1].tensors.items() if n.startswith("head/")}
    card = skills()[1].card.model_copy(update={"name": "fused"})
    return Adapter("fusion", m.hyperparameters(), own | heads, base.card(), card, skills()[1].head), known


def test_the_report_by_hand():
    """Scores 0 and log 3 are weights of one and three quarters, at every token, padded or not."""
    made, known = told()
    found = attention(backbone(), made, [Example("0", "a e f"), Example("1", "g")], known.__getitem__)
    assert found.over == ("c0", "c1")
    assert found.sites == {"1.mlp.down": (pytest.approx(0.25), pytest.approx(0.75))}
    assert found.whole == {"c1": pytest.approx(0.75), "c0": pytest.approx(0.25)}
    assert str(found) == "c1 0.75, c0 0.25"


def test_the_report_of_a_trained_fusion():
    made = learned("fusion", ())
    known = {one.id: one for one in skills()}
    examples = task_of(seed=9).train[:6]
    found = attention(backbone(), made, examples, known.__getitem__)
    assert found.over == tuple(one.name for one in skills())
    assert list(found.sites) == list(made.sites)
    for site, weights in found.sites.items():
        assert sum(weights) == pytest.approx(1)
        assert [w > 0 for w in weights] == [site in one.sites for one in skills()]
    # Tokens weigh alike, so that inputs together are the mean by their lengths.
    each = [attention(backbone(), made, [e], known.__getitem__) for e in examples]
    sizes = [len(backbone().tokenize([e.text])[0]) for e in examples]
    site = made.sites[0]
    mean = sum(n * one.sites[site][0] for n, one in zip(sizes, each, strict=True)) / sum(sizes)
    assert found.sites[site][0] == pytest.approx(mean, abs=1e-6)
    clean(backbone())


def test_a_report_of_no_fusion_is_refused():
    made, known = told()
    refused(lambda: attention(backbone(), skills()[0], [Example("0", "a")], known.__getitem__), "it is no fusion")
    refused(lambda: attention(backbone(), made, [], known.__getitem__), "inputs")


# -- weights found without gradients -----------------------------------------------------------------------------------

LABELS = (Label("home"), Label("mat"), Label("noon"))
TEXTS = ("the cat sat", "two dogs run", "no", "a café", "the dogs saw the cat", "yes")
EXAMPLES = tuple(Example(str(i), text, LABELS[i % 3].name) for i, text in enumerate(TEXTS))
TASK = Task("where", "classification", instruction="Where?", labels=LABELS, train=EXAMPLES, validation=EXAMPLES)
IN_TEXT = pt.Reading(in_text="yes", decide="likelihood")


@cache
def decoder() -> Backbone:
    return writer("llama", max_position_embeddings=256, num_hidden_layers=2, tie_word_embeddings=True)


@cache
def loras() -> tuple[Adapter, ...]:
    """The first was made for the task, the others are strangers."""
    base = decoder()
    one = pt.adapt(base, TASK, "lora", reading=IN_TEXT, settings=pt.Settings(epochs=10, batch=3, lr=2e-2, patience=99))
    inside = {n: t for n, t in one.tensors.items() if not n.startswith(("head/", "task/"))}
    made = [one]
    for seed in range(2):
        other = drawn({n: torch.zeros_like(t) for n, t in inside.items()}, seed, 0.05)
        card = one.card.model_copy(update={"name": f"stranger-{seed}"})
        made.append(replace(one, tensors={**one.tensors, **other}, card=card))
    return tuple(made)


def test_the_factors_are_summed_each_by_hand():
    """B̂ Â = [[.15, .24], [−.1, −.16]] for w = [.5, −.2]: products of each A with each B are in it."""
    base = decoder()
    card = loras()[0].card
    pairs = [
        {"A": torch.tensor([[1.0, 2.0]]), "B": torch.tensor([[1.0], [0.0]])},
        {"A": torch.tensor([[0.0, 1.0]]), "B": torch.tensor([[1.0], [1.0]])},
    ]
    hyper = build("lora", {"r": 1, "alpha": 1.0, "sites": ["s"]}).hyperparameters()
    over = [Adapter("lora", hyper, {f"s/{n}": t for n, t in p.items()}, base.card(), card) for p in pairs]
    made = composed(over, [0.5, -0.2])
    torch.testing.assert_close(made["s/B"] @ made["s/A"], torch.tensor([[0.15, 0.24], [-0.1, -0.16]]))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_report_of_answers_in_text(family):
    """Where a text is read and where its answer is written, in an encoder-decoder's two stacks too."""
    base = writer(family, max_position_embeddings=256)
    short = {"reading": pt.Reading(in_text="yes"), "settings": pt.Settings(epochs=1, batch=3, lr=1e-2)}
    over = [pt.adapt(base, replace(TASK, name=f"b{k}"), "bottleneck", **short) for k in range(2)]
    moved = [replace(one, tensors=drawn(one.tensors, k)) for k, one in enumerate(over)]
    made = pt.adapt(base, TASK, "fusion", over=moved, **short)
    found = attention(base, made, EXAMPLES[:2], {one.id: one for one in moved}.__getitem__)
    assert list(found.sites) == list(made.sites)
    assert {site.partition(".")[0] for site in found.sites} >= ({"enc", "dec"} if family == "t5" else {"0", "2"})
    for weights in found.sites.values():
        assert sum(weights) == pytest.approx(1)
        assert min(weights) > 0
    clean(base)


def test_the_hub_finds_weights_by_forward_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    base = decoder()
    over = loras()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.Tensor, "backward", never)
    seen: list[float] = []
    made = lorahub(base, TASK, over, reading=IN_TEXT, budget=16, seed=1, on_score=lambda n, score: seen.append(score))
    clean(base)
    recipe = made.card.recipe
    assert recipe["scores"] == seen
    assert len(seen) == 16
    assert max(seen) > seen[0]
    assert all(abs(w) <= 1.5 for w in recipe["weights"])
    assert made.method == "lora"
    assert made.card.lineage.parents == tuple(one.id for one in over)
    assert made.card.trained_parameters == 3
    for name, tensor in composed(over, recipe["weights"]).items():
        assert torch.equal(made.tensors[name], tensor)

    # The first score is the backbone's own loss, and the best that of the weights, with what they cost.
    assert made.head is not None
    prompts = [text.ask(made.head, e) for e in EXAMPLES]
    asks, answers = [Ask(p.text) for p in prompts], [f"{p.lead}{p.answer}" for p in prompts]
    engine = Engine(base, adapters=[made])
    for adapter, weights, score in ((None, [0.0] * 3, seen[0]), (made.id, recipe["weights"], max(seen))):
        log_p = torch.cat(engine.logprobs([replace(ask, adapter=adapter) for ask in asks], answers))
        cost = 0.05 * sum(map(abs, weights)) / 3
        assert score == pytest.approx(float(log_p.mean()) - cost, abs=1e-4)
    made.save(tmp_path / "hub")
    back = Adapter.load(tmp_path / "hub")
    requests = [Request(said, adapter=made.id) for said in TEXTS]
    assert Engine(base, adapters=[back]).answer(requests) == engine.answer(requests)


def test_a_fusion_writes_beside_what_it_is_made_of():
    """Trained on answers in text, it writes in a batch with its sources, with the hub's LoRA and with none of them."""
    base = decoder()
    fused = pt.adapt(
        base,
        TASK,
        "fusion",
        over=loras(),
        reading=pt.Reading(in_text="yes"),
        settings=pt.Settings(epochs=2, batch=3, lr=1e-2),
    )
    assert fused.head is not None
    assert fused.head.text is not None
    hub = lorahub(base, TASK, loras(), reading=IN_TEXT, budget=5)
    engine = Engine(base, adapters=[*loras(), fused, hub])
    prompt = text.ask(fused.head, EXAMPLES[0]).text
    who = [fused.id, loras()[1].id, None, hub.id, fused.id]
    asks = [Ask(prompt, adapter, Sampling(max_tokens=6)) for adapter in who]
    together = engine.generate(asks)
    assert [one.tokens for one in together] == [engine.generate([ask])[0].tokens for ask in asks]
    assert together[0].tokens == together[4].tokens != together[2].tokens
    clean(base)


def test_what_the_hub_refuses():
    base = decoder()
    one, other = loras()[:2]
    refused(lambda: lorahub(base, TASK, [one]), "for answers in text")
    refused(lambda: lorahub(base, TASK, [], reading=IN_TEXT), "say which")
    refused(lambda: lorahub(base, replace(TASK, train=()), [one], reading=IN_TEXT), "no training", PolytaskError)
    refused(lambda: lorahub(base, TASK, [skills()[0]], reading=IN_TEXT), "belongs to", PolytaskError)
    refused(lambda: composed([one, replace(one, method="dora")], [1.0, 1.0]), "is by dora")
    refused(
        lambda: composed([one, replace(other, hyperparameters={**one.hyperparameters, "alpha": 1.0})], [1.0, 1.0]),
        "differ in scale",
    )
    fewer = {n: t for n, t in other.tensors.items() if not n.startswith("0.")}
    refused(lambda: composed([one, replace(other, tensors=fewer)], [1.0, 1.0]), "differ in sites or rank")
