"""Merging with data: the equations by hand, gradients against differences, and merges that beat the average."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from commands import FRUIT, TOOLS, run, write_table
from made import adapter, one_line
from test_merging import made, product
from torch import Tensor

import polytask as pt
from polytask.adapters import Adapter, HeadCard
from polytask.backbones import Backbone, heads
from polytask.composition.differences import Weighed, places
from polytask.composition.merge import merge
from polytask.composition.merging.fitted import fitted_rules
from polytask.composition.merging.fitted.adamerging import entropy
from polytask.composition.merging.fitted.blend import Blend
from polytask.composition.merging.fitted.coefficients import Coefficients
from polytask.composition.merging.fitted.descent import backward, descend
from polytask.composition.merging.fitted.fisher import Fisher, Informed, surprise
from polytask.composition.merging.fitted.reading import Read, read
from polytask.composition.merging.fitted.regmean import Regressed, products, shrunk
from polytask.composition.merging.fitted.supermerge import SuperMerge, losses
from polytask.composition.merging.rule import Rule, build
from polytask.composition.overlap import overlap
from polytask.errors import UsageError
from polytask.library import Library
from polytask.methods import build as method_of
from polytask.methods import passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat
from polytask.tasks import Example, Label, Task

ONES = torch.ones(2, dtype=torch.float64)


def here(rule, τ: Sequence[object], w: Tensor = ONES) -> Tensor:
    """A rule's result at the place `p`."""
    local = rule.at("p")
    return local.join(local.keep(torch.as_tensor(τ, dtype=torch.float64), []), w)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_entropy_by_hand():
    """W = [[1, 0], [0, 1], [.5, −.5]] + .3·τ₁ + .3·τ₂ on x = [1, 2]: z = [1.15, 2.24, −.44], whose softmax is
    [.2393, .7119, .0488] and has the entropy .7316."""
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5]])
    τ = torch.tensor([[[0.5, 0], [0, 0], [0, 0]], [[0, 0], [0, 0.4], [0.2, 0]]])
    λ = torch.tensor([0.3, 0.3], requires_grad=True)
    one = Read("", Seat(HeadCard(kind="classification"), {}), [], [])

    def H(λ: Tensor) -> Tensor:
        return entropy(one, [0], ((W + torch.einsum("k,koi->oi", λ, τ)) @ torch.tensor([1.0, 2.0]))[None])[0]

    p = torch.tensor([1.15, 2.24, -0.44]).softmax(-1)
    assert float(H(λ).detach()) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    assert float(H(λ).detach()) == pytest.approx(0.7316, abs=5e-4)
    H(λ).backward()
    assert λ.grad is not None
    assert λ.grad.tolist() == pytest.approx([0.0836, -0.2007], abs=1e-3)


def test_entropy_of_several_labels_is_the_sum_of_each_one_s():
    """At z = 0 each label has ln 2; at ±30 it has nothing, and no number is lost."""
    one = Read("", Seat(HeadCard(kind="multilabel"), {}), [], [])
    found = entropy(one, [], torch.tensor([[0.0, 0.0], [30.0, -200.0]]))
    assert found.tolist() == pytest.approx([2 * math.log(2), 0], abs=1e-6)


def test_coefficients_by_hand():
    """θ₀ = [1, 1], τ = [.2, .4] and [1, −1], w = [.5, −1]: tanh is [.4621, −.7616], and θ = [.3308, 1.9464]."""
    a, b = (Weighed(adapter(n, seed=i), Active(method_of("lora"), {}), 1.0) for i, n in enumerate("ab"))
    rule = Coefficients([a, b], {"p": torch.tensor([0.5, -1.0]).tanh(), "q": torch.tensor([0.1, 0.2])}, "hand")
    assert (1 + here(rule, [[0.2, 0.4], [1, -1]])).tolist() == pytest.approx([0.3308, 1.9464], abs=1e-4)
    assert rule.at("p").coefficients(ONES) == pytest.approx([0.4621, -0.7616], abs=1e-4)
    assert rule.found()["coefficients"][b.adapter.id] == {"p": pytest.approx(-0.761594), "q": 0.2}
    assert rule.told() == ("coefficients by hand: a 0.281 (0.100 to 0.462), b -0.281 (-0.762 to 0.200)",)


def test_fisher_by_hand():
    """F = [1, .1] and [.2, .4], θ = [1, 2] and [3, −1]: [(1 + .6)/1.2, (.2 − .4)/.5] = [1.3333, −.4]; with the second
    one twice as heavy [(1 + 1.2)/1.4, (.2 − .8)/.9]."""
    rule = Informed({"p": torch.tensor([[1, 0.1], [0.2, 0.4]])})
    assert here(rule, [[1, 2], [3, -1]]).tolist() == pytest.approx([4 / 3, -0.4])
    twice = here(rule, [[1, 2], [3, -1]], torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert twice.tolist() == pytest.approx([2.2 / 1.4, -0.6 / 0.9])


@pytest.mark.parametrize(("α", "expected"), [(1, [0.8333, 1.0833]), (0.9, [0.7833, 1.05])])
def test_regmean_by_hand(α, expected):
    """X₁ᵀX₁ = [[2, 1], [1, 1]] and X₂ᵀX₂ = [[1, −1], [−1, 5]]; W = [1, 2] and [−1, .5]."""
    X = torch.tensor([[[1.0, 0], [1, 1]], [[0, 2], [1, -1]]])
    rule = Regressed({"p": shrunk(X.mT @ X, α)})
    assert here(rule, [[[1, 2]], [[-1, 0.5]]])[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_regmean_of_a_weight_that_is_no_linear_map_s_is_the_mean():
    assert here(Regressed({}), [[1, 2], [3, 4]]).tolist() == [2, 3]


def test_an_answer_that_is_drawn_has_the_fisher_information_of_its_logits():
    """E (∂ log p(ŷ) / ∂z_c)² = p_c (1 − p_c); of a number with variance ½, 2."""
    draw = torch.Generator().manual_seed(0)
    z = torch.tensor([[0.5, -0.3, 1.1]])
    p = z.softmax(-1)[0]
    for head, logits, expected in [
        (HeadCard(kind="classification", targets=("a", "b", "c")), z, p * (1 - p)),
        (HeadCard(kind="multilabel", targets=("a", "b", "c")), z, z.sigmoid()[0] * (1 - z.sigmoid()[0])),
        (HeadCard(kind="regression"), z[:, :1], torch.tensor([2.0])),
    ]:
        rows = logits.repeat(20_000, 1).requires_grad_()
        surprise(head, rows, draw).backward()
        assert rows.grad is not None
        torch.testing.assert_close(rows.grad.square().mean(0), expected, rtol=0.05, atol=0.01)


# -- on a model --------------------------------------------------------------------------------------------------------

WORDS = (*FRUIT, *TOOLS, "red", "blue", "old", "new")


@cache
def backbone() -> Backbone:
    return tiny.backbone("bert", tokenizer=tiny.words(*WORDS))


def about(*labels: str, name: str, words: Sequence[str], n: int = 24) -> Task:
    """Texts of two words, the first half of the vocabulary being of one label."""
    half = len(words) // 2
    rows = [
        Example(
            f"{name}{i}", f"{words[i % len(words)]} {WORDS[(5 * i + 3) % len(WORDS)]}", labels[i % len(words) >= half]
        )
        for i in range(3 * n)
    ]
    return Task(
        name=name,
        kind="classification",
        labels=tuple(map(Label, labels)),
        train=tuple(rows[:n]),
        validation=tuple(rows[n : 2 * n]),
        test=tuple(rows[2 * n :]),
        metric="accuracy",
    )


TASKS = [
    about("fruit", "tool", name="things", words=(*FRUIT[:4], *TOOLS[:4])),
    about("yes", "no", name="asked", words=(*FRUIT[4:], *TOOLS[4:])[::-1]),
]


def two(method: str = "lora", scale: float = 0.2, **hyper: object) -> list[Adapter]:
    """With heads that know the tasks' labels."""
    parts = []
    for k, task in enumerate(TASKS):
        own = {"r": 2, "sites": ["*.attn.[qv]"]} if method == "lora" else {}
        one = made(backbone(), method, own | hyper, k + 1, scale)
        head = HeadCard(kind="classification", targets=task.targets)
        parts.append(Adapter(one.method, one.hyperparameters, one.tensors, one.backbone, one.card, head))
    return parts


def sources(parts: Sequence[Adapter]) -> list[Weighed]:
    return [Weighed(one, Active.of(method_of(one.method, one.hyperparameters), one.tensors), 1.0) for one in parts]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("objective", [entropy, losses])
def test_coefficients_get_the_gradients_that_differences_show(whole: bool, objective: Callable[..., Tensor]):
    base = backbone()
    parts = sources(two())
    at = places(base, parts)
    rule = build("adamerging")
    reads = read(rule, base, parts, TASKS, 4, labelled=True)
    blend = Blend(base, [[(source, torch.ones(len(at)))] for source in parts], at, whole=whole)
    w = torch.full((2, len(at)), 0.4) + 0.05 * torch.randn(2, len(at), generator=torch.Generator().manual_seed(0))

    def value(w: Tensor) -> float:
        return backward(base, blend, reads, [[0, 1, 2, 3], [0, 1]], w.requires_grad_(), torch.tanh, objective)

    leaf = w.clone().requires_grad_()
    backward(base, blend, reads, [[0, 1, 2, 3], [0, 1]], leaf, torch.tanh, objective)
    assert leaf.grad is not None
    for k, p in [(0, 0), (0, 3), (1, 1), (1, len(at) - 1)]:
        step = torch.zeros_like(w)
        step[k, p] = 3e-2
        slope = (value((w + step).detach()) - value((w - step).detach())) / 6e-2
        assert float(leaf.grad[k, p]) == pytest.approx(slope, rel=0.05, abs=2e-4)
    assert float(leaf.grad.abs().max()) > 1e-3
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_a_blend_is_what_merging_makes(whole: bool, monkeypatch: pytest.MonkeyPatch):
    """The same hidden states as the adapter that comes out."""
    base = backbone()
    parts = two(r=3, alpha=5)
    at = places(base, sources(parts))
    λ = torch.randn(2, len(at), generator=torch.Generator().manual_seed(1))
    rule = Coefficients(sources(parts), dict(zip(at, λ.T, strict=True)), "hand")
    monkeypatch.setattr(SuperMerge, "fit", lambda *_: rule)
    one, report = merge(base, parts, "supermerge", tasks=TASKS)
    assert (one.method, one.hyperparameters["r"], report.whole < 1e-6) == ("lora", 6, True)
    blend = Blend(base, [[(source, torch.ones(len(at)))] for source in sources(parts)], at, whole=whole).active(λ)
    batch = tiny.batch(3)
    with torch.no_grad():
        mine = Plan(base, [blend]).hidden(batch)
        its = Plan(base, [Active.of(method_of("lora", one.hyperparameters), one.tensors)]).hidden(batch)
    torch.testing.assert_close(mine[batch.mask], its[batch.mask], rtol=1e-4, atol=1e-5)


def test_fisher_of_a_model_is_the_square_of_what_reaches_a_weight():
    """∂L/∂W = Σ_t (∂L/∂y_t) x_tᵀ at the model with the adapter, for one example; here from what a hook at it sees."""
    base = backbone()
    [part, _] = sources(two())
    rule = Fisher(examples=1, floor=0.0)
    [one] = read(rule, base, [part], TASKS[:1], 1, labelled=False)
    at = places(base, [part])
    whole = Blend(base, [[(part, torch.ones(len(at)))]], at, whole=True).active(torch.ones(1, len(at)))
    F = rule._squares(base, whole, one)
    path = base.sites["1.attn.q"].path
    seen: dict[str, Tensor] = {}

    def hook(_module: object, args: tuple[Tensor], y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        seen["x"] = args[0].detach()
        y.register_hook(lambda grad: seen.update(grad=grad))
        return y

    handle = base.model.get_submodule(path).register_forward_hook(hook)
    try:
        [(_, _, z)] = passes.forward(Plan(base, [part.active]), [one.seat], one.units, [0])
    finally:
        handle.remove()
    surprise(one.head, z, torch.Generator().manual_seed(rule.seed)).backward()
    by_hand = torch.einsum("rto,rti->oi", seen["grad"], seen["x"]).square()
    torch.testing.assert_close(F[f":{path}/weight"], by_hand, rtol=1e-3, atol=1e-12)
    assert float(by_hand.max()) > 0


def test_regmean_s_products_are_those_of_the_tokens_without_padding():
    base = backbone()
    [part, _] = sources(two())
    path = base.sites["2.attn.v"].path
    task = replace(TASKS[0], train=(Example("s", "apple", "fruit"), Example("l", "old saw new red drill", "tool")))
    [one] = read(build("regmean"), base, [part], [task], 2, labelled=False)
    together = products(base, part.active, one, {path})[path]
    each, n = torch.zeros_like(together), 0
    for unit in one.units:
        rows: list[Tensor] = []
        handle = base.model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, rows=rows: rows.append(args[0])
        )
        with torch.no_grad():
            Plan(base, [part.active]).hidden(base.collate(unit.ids))
        handle.remove()
        x = rows[0][0, : len(unit.ids[0])].double()
        each, n = each + x.T @ x, n + len(x)
    torch.testing.assert_close(together, each / n, rtol=1e-5, atol=1e-6)


def test_regmean_is_nearest_to_what_each_adapter_puts_out():
    """No other map of the same inputs has less Σ ‖X_k (τ − τ_k)ᵀ‖²: the slope there is 0."""
    draw = torch.Generator().manual_seed(3)
    X = torch.randn(2, 30, 6, generator=draw, dtype=torch.float64)
    τ = torch.randn(2, 4, 6, generator=draw, dtype=torch.float64)
    found = here(Regressed({"p": shrunk(X.mT @ X / 30, 1.0)}), τ).requires_grad_()
    sum(((x @ (found - t).T) ** 2).sum() for x, t in zip(X, τ, strict=True)).backward()
    assert float(found.grad.abs().max()) < 1e-9


@cache
def taught() -> tuple[Adapter, ...]:
    """LoRAs that learned their tasks through heads that stayed as they were drawn."""
    parts = []
    for one, task in zip(two(scale=0.02, sites=["*.attn.[qkvo]", "*.mlp.up"]), TASKS, strict=True):
        lora, tensors = method_of("lora", one.hyperparameters), {n: t.clone() for n, t in one.tensors.items()}
        own = [t.requires_grad_() for n, t in tensors.items() if not n.startswith("head/")]
        [mine] = read(build("supermerge", {"split": "train"}), backbone(), sources([one]), [task], 24, labelled=True)
        adam = torch.optim.Adam(own, 1e-2)
        for _ in range(40):
            plan = Plan(backbone(), [Active.of(lora, tensors)])
            [(_, members, z)] = passes.forward(plan, [mine.seat], mine.units, [0] * 24)
            adam.zero_grad()
            losses(mine, members, z).mean().backward()
            adam.step()
        parts.append(replace(one, tensors={n: t.detach() for n, t in tensors.items()}))
    return tuple(parts)


def loss(merged: Adapter, split: str = "validation") -> float:
    """Both tasks' mean losses through their own heads, added up."""
    total = 0.0
    for part, task in zip(taught(), TASKS, strict=True):
        own = {n: t for n, t in merged.tensors.items() if not n.startswith(("head/", "task/"))}
        active = Active.of(method_of(merged.method, merged.hyperparameters), own)
        assert part.head is not None
        seat = Seat(part.head, part.at("head"), torch.ones(1))
        units = passes.encode(backbone(), part.head, task.split(split))
        z = torch.stack(passes.logits(Plan(backbone(), [active]), [seat], units, [0] * len(units)))
        y = torch.tensor([heads.encode(part.head, e.output) for e in task.split(split)])
        total += float(heads.losses(part.head, z, y).mean())
    return total


@pytest.mark.parametrize("tree", [0, 2])
def test_supermerge_is_better_than_the_average_on_what_it_learns_from(tree: int):
    base, parts = backbone(), list(taught())
    tasks = list(TASKS)
    if tree:  # three adapters, so that one waits for the next level
        parts, tasks = [*parts, parts[0]], [*tasks, tasks[0]]
    plain, _ = merge(base, parts, "average")
    rule = build("supermerge", {"steps": 25, "tree": tree, "lr": 0.05, "examples": 24})
    one, report = merge(base, parts, rule, tasks=tasks)
    assert loss(one) < loss(plain) - 0.01
    assert report.whole < 1e-6
    assert one.method == "lora"
    found = one.card.recipe["coefficients"]
    assert all(abs(c) < 1 for own in found.values() for c in own.values())
    assert one.card.recipe["hyperparameters"]["tree"] == tree
    assert one.card.notes[2].startswith("coefficients by the loss on ")


@pytest.mark.parametrize("per", ["place", "task"])
def test_adamerging_makes_the_answers_surer_without_a_label(per: str):
    base, parts = backbone(), taught()
    blind = [replace(t, validation=tuple(replace(e, output=None) for e in t.validation)) for t in TASKS]
    rule = build("adamerging", {"steps": 25, "lr": 0.02, "per": per})
    one, _ = merge(base, parts, rule, tasks=blind)
    found = torch.tensor([[*own.values()] for own in one.card.recipe["coefficients"].values()])
    assert bool(((found >= 0) & (found <= 1)).all())
    assert bool((found == found[:, :1]).all()) == (per == "task")
    assert float((found - 0.3).abs().max()) > 0.05
    before, after = (float(part) for part in re.findall(r"[\d.]+(?= at first| in the end)", one.card.notes[2]))
    assert after < before
    assert "on 48 inputs" in one.card.notes[2]


def off(rule: Rule, τ: dict[str, Tensor], parts: Sequence[Adapter]) -> float:
    """What Fisher merging and RegMean have least of: Σ_k Σ F_k (τ − τ_k)², Σ_k tr (τ − τ_k) G_k (τ − τ_k)ᵀ."""
    total = 0.0
    for site in parts[0].sites:
        for k, part in enumerate(parts):
            Δ = τ[site] - product(part, site)
            if isinstance(rule, Regressed):
                total += float(torch.einsum("oi,ij,oj->", Δ, rule.G[site][k].double(), Δ))
            else:
                assert isinstance(rule, Informed)
                total += float((rule.F[site][k].double() * Δ.square()).sum())
    return total


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_rules_that_weigh_numbers_are_nearer_to_all_than_the_average(name: str):
    base, parts = backbone(), taught()
    plain, _ = merge(base, parts, "average")
    rule = build(name, {"examples": 24})
    one, report = merge(base, parts, rule, tasks=TASKS)
    assert (one.method, report.whole < 1e-6) == ("full", True)
    found = rule.fit(base, sources(parts), TASKS)
    own = {site: one.tensors[f":{base.sites[site].path}/weight"].double() for site in parts[0].sites}
    assert off(found, own, parts) < 0.95 * off(found, {site: product(plain, site) for site in own}, parts)
    cut, missing = merge(base, parts, rule, 4, tasks=TASKS)
    assert cut.hyperparameters["r"] == 4
    assert (missing.whole < 1e-6) == (name == "regmean")  # which leaves the columns of B₁ and B₂ as they are


@pytest.mark.parametrize("name", fitted_rules())
def test_the_same_adapter_twice_stays_what_it_is(name: str):
    """Whatever weighs them, a mean of equal things is that thing; by coefficients it is a multiple of it."""
    base, [a, _] = backbone(), two()
    hyper = {"examples": 4} | ({"steps": 2} if name in ("adamerging", "supermerge") else {})
    one, _ = merge(base, [a, a], build(name, hyper), tasks=[TASKS[0], TASKS[0]])
    path = base.sites["1.attn.v"].path
    s = a.hyperparameters["alpha"] / a.hyperparameters["r"]
    τ = s * a.at("1.attn.v")["B"] @ a.at("1.attn.v")["A"]
    if one.method == "full":
        torch.testing.assert_close(one.tensors[f":{path}/weight"], τ, rtol=1e-3, atol=1e-5)
    else:
        c = sum(own["1.attn.v"] for own in one.card.recipe["coefficients"].values())
        c = 2 * c if len(one.card.recipe["coefficients"]) == 1 else c
        p = one.at("1.attn.v")
        torch.testing.assert_close(p["B"] @ p["A"], c * τ, rtol=1e-3, atol=1e-4)


def test_full_differences_have_coefficients_too():
    """With norms and biases each a place of its own."""
    base, parts = backbone(), two("full")
    one, report = merge(base, parts, build("supermerge", {"steps": 2, "examples": 4}), tasks=TASKS)
    assert one.method == "full"
    assert report.whole < 1e-6
    [own, _] = one.card.recipe["coefficients"].values()
    name = next(n for n in own if n.endswith("LayerNorm/weight"))
    c = [each[name] for each in one.card.recipe["coefficients"].values()]
    expected = c[0] * parts[0].tensors[name] + c[1] * parts[1].tensors[name]
    torch.testing.assert_close(one.tensors[name], expected, rtol=1e-4, atol=1e-5)


def test_answers_in_text_are_read_where_the_prompt_ends():
    """Entropy needs no answer; the loss reads all of its tokens."""
    model = tiny.make_lm("llama", attn_implementation="eager")
    base = Backbone(model, tiny.words(*WORDS, "fruit", "tool"), "tiny-llama", precision="fp32", device="cpu")
    reading = pt.Reading(in_text="yes")
    head = reading.design(base, TASKS[0])
    parts = []
    for seed in (1, 2):
        one = made(base, "lora", {"r": 2}, seed)
        own = {n: t for n, t in one.tensors.items() if not n.startswith("head/")}
        parts.append(Adapter(one.method, one.hyperparameters, own, one.backbone, one.card, head))
    tasks = [TASKS[0]] * 2
    sure = read(build("adamerging"), base, sources(parts), tasks, 3, labelled=False)
    assert [unit.at for unit in sure[0].units] == [[len(unit.ids[0]) - 1] for unit in sure[0].units]
    for name in fitted_rules():
        hyper = {"examples": 3} | ({"steps": 2} if name in ("adamerging", "supermerge") else {})
        merged, report = merge(base, parts, build(name, hyper), tasks=tasks)
        assert report.whole < 1e-6
        assert merged.sites or merged.method == "full"


# -- what sparse differences share -------------------------------------------------------------------------------------


def test_overlap_by_hand():
    """[.5, 0, 0, −.2] and [0, .3, 0, .1] meet in one of two numbers, and pull apart there."""
    card = backbone().card()
    path = backbone().sites["0.attn.q"].path
    rows = ([0.5, 0, 0, -0.2], [0, 0.3, 0, 0.1], [0.1, 0.2, 0.0, -0.3])
    a, b, c = (
        adapter(name, tensors={f":{path}/bias": torch.tensor(v)}, method="full", backbone=card)
        for name, v in zip("abc", rows, strict=True)
    )
    found = overlap(a, b)
    assert (found.sizes, found.both, found.share, found.agreement) == ((2, 2), 1, 0.5, 0.0)
    assert str(found) == ("a (2 numbers) and b (2) meet in 1, 50.0% of the smaller; signs agree in 0.0% of these")
    assert (overlap(a, c).share, overlap(a, c).agreement) == (1, 1)
    d = adapter("d", tensors={":elsewhere/weight": torch.ones(2)}, method="full", backbone=card)
    assert (overlap(a, d).share, overlap(a, d).agreement) == (0, 1)


def test_merging_sparse_differences_says_what_they_share():
    base = backbone()
    path = base.sites["1.attn.q"].path
    parts = []
    for seed in (1, 2):
        Δ = torch.zeros(32, 32)
        Δ[seed], Δ[5, 5] = 1.0, float(seed)
        hyper = {"weights": [f"{path}.weight"]}
        parts.append(
            adapter(
                f"s{seed}", tensors={f":{path}/weight": Δ}, method="full", hyperparameters=hyper, backbone=base.card()
            )
        )
    one, _ = merge(base, parts, build("task-arithmetic", {"scale": 1}))
    assert one.card.notes[-1] == (
        "s1 (33 numbers) and s2 (33) meet in 1, 3.0% of the smaller; signs agree in 100.0% of these"
    )
    dense, _ = merge(base, two("full"), "average")
    assert not any("meet in" in note for note in dense.card.notes)


# -- wrong use ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_fitted():
    base, parts = backbone(), two()
    numbers = HeadCard(kind="regression")
    bare = [Adapter(one.method, one.hyperparameters, one.tensors, one.backbone, one.card, None) for one in parts]
    odd = [Adapter(one.method, one.hyperparameters, one.tensors, one.backbone, one.card, numbers) for one in parts]
    other = replace(TASKS[0], validation=(Example("x", "apple", "cheese"),))
    for says, these, rule, tasks in [
        ("adamerging is fitted to data: 0 tasks for 2 adapters", parts, "adamerging", []),
        ("average reads no data; leave out the tasks", parts, "average", TASKS),
        ("adapter lora1 has no head to read task things by", bare, "regmean", TASKS),
        ("lora1 answers with a number, which has no entropy", odd, "adamerging", TASKS),
        ("answers regression, and task things is classification", odd, "fisher", TASKS),
        ("does not know label 'cheese' of task things", parts, "supermerge", [other, TASKS[1]]),
        ("task things has no examples in split train", parts, "fisher", [replace(TASKS[0], train=()), TASKS[1]]),
        ("no labelled examples in split validation", parts, "supermerge", [replace(t, validation=()) for t in TASKS]),
        ("needs at least two adapters", parts[:1], "supermerge", TASKS[:1]),
    ]:
        with pytest.raises(UsageError, match=says) as error:
            merge(base, these, rule, tasks=tasks)
        one_line(error.value)
    for name, hyper, says in [
        ("adamerging", {"per": "layer"}, "adamerging.per = 'layer': place or task"),
        ("adamerging", {"start": 2}, "a number from 0 to 1"),
        ("adamerging", {"split": "dev"}, "adamerging.split = 'dev': one of train, validation, test"),
        ("supermerge", {"tree": 1}, "at least 2 at a time"),
        ("regmean", {"alpha": 1.5}, "regmean.alpha = 1.5"),
        ("fischer", {}, "with data adamerging, fisher, regmean, supermerge"),
    ]:
        with pytest.raises(UsageError, match=says) as error:
            build(name, hyper)
        one_line(error.value)


def test_a_loss_that_is_no_number_is_said():
    base, parts = backbone(), sources(two())
    at = places(base, parts)
    reads = read(build("adamerging"), base, parts, TASKS, 4, labelled=False)
    blend = Blend(base, [[(source, torch.ones(len(at)))] for source in parts], at)
    w = torch.full((2, len(at)), math.nan)
    with pytest.raises(pt.PolytaskError, match=r"the loss became nan at step 1; try a smaller lr than 0.1"):
        descend(base, blend, reads, w, torch.tanh, entropy, lr=0.1, steps=3, batch=2, seed=0)


# -- on the command line -----------------------------------------------------------------------------------------------


def test_the_command_takes_a_task_for_each_adapter(tmp_path: Path):
    base = pt.load("minilm", precision="fp32")
    own = tmp_path / "skills"
    head = HeadCard(kind="classification", targets=("fruit", "tool"))
    for seed in (1, 2):
        one = made(base, "lora", {"r": 2, "sites": ["0.attn.q", "5.attn.v"]}, seed, 0.02, name=f"s{seed}")
        Library(own).add(Adapter(one.method, one.hyperparameters, one.tensors, one.backbone, one.card, head))
    table = write_table(tmp_path / "things.csv")
    given = ("--rule", "supermerge", "--set", "steps=2", "--set", "examples=4", "-l", own)
    said = run("merge", "s1", "s2", *given, "--data", f"{table},{table}", "--json").json
    assert (said["rule"], said["method"], said["rank"]) == ("supermerge", "lora", 4)
    assert said["notes"][0].startswith("coefficients by the loss on 8 examples, ")
    kept = Library(own).get(said["adapter"]).card.recipe["coefficients"]
    assert [[*own] for own in kept.values()] == [["0.attn.q", "5.attn.v"]] * 2
    told = run("merge", "s1", "s2", "--rule", "regmean", "--set", "examples=4", "-l", own, "--data", f"{table},{table}")
    assert told.status == 0, told.err
    for more, says in [
        (("--data", str(table)), "supermerge is fitted to data: 1 tasks for 2 adapters"),
        ((), "supermerge is fitted to data: 0 tasks for 2 adapters"),
        (("--data", f"{table},{table}", "--set", "tree=1"), "supermerge.tree = 1"),
    ]:
        refused = run("merge", "s1", "s2", *given, *more)
        assert refused.status == 2
        assert says in refused.error
    assert "adamerging" in run("methods").out
