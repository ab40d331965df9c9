"""Merging: the rules by hand, against PEFT's and mergekit's, and on adapters of every shape."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st
from made import adapter, one_line
from peft.utils import merge_utils
from torch import Tensor

from polytask.adapters import Adapter, HeadCard, load
from polytask.adapters.expression import mix
from polytask.adapters.store import save
from polytask.backbones import Backbone
from polytask.backbones import load as load_backbone
from polytask.composition.catalogue import catalogue
from polytask.composition.low_rank import as_lora, differences
from polytask.composition.merge import merge
from polytask.composition.merging.fitted import fitted_rules
from polytask.composition.merging.rule import build, rules
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request
from polytask.library import Library
from polytask.methods import build as method_of
from polytask.methods.lifting import Active, Plan

LINEAR = ("average", "task-arithmetic")
EVERYWHERE = ["*.attn.[qkvo]", "*.mlp.up", "*.mlp.down"]


def merged_by(name: str, τ: Sequence[Any] | Tensor, w: Sequence[float] | None = None, **hyper: Any) -> Tensor:
    """A rule on K differences, every draw from torch's own generator, as PEFT's are."""
    τ = torch.as_tensor(τ, dtype=torch.float64)
    w = torch.tensor([1.0] * len(τ) if w is None else w, dtype=torch.float64)
    rule = build(name, hyper)
    return rule.join(rule.keep(τ, [torch.default_generator] * len(τ)), w)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_average_by_hand():
    """(1·[2, 4] + 3·[6, 0]) / 4 = [5, 1]."""
    assert merged_by("average", [[2, 4], [6, 0]], [1, 3]).tolist() == [5, 1]


def test_task_arithmetic_by_hand():
    """0.4 · ([0.5, −0.5] + [0.1, 0.3]) = [0.24, −0.08]; with the second one taken away, [0.16, −0.32]."""
    τ = [[0.5, -0.5], [0.1, 0.3]]
    assert merged_by("task-arithmetic", τ, scale=0.4).tolist() == pytest.approx([0.24, -0.08])
    assert merged_by("task-arithmetic", τ, [1, -1], scale=0.4).tolist() == pytest.approx([0.16, -0.32])


ROWS = [[0.9, -0.1, 0.5, -0.6, 0.05], [0.2, 0.8, -0.4, -0.7, 0.0], [-1.0, 0.3, 0.1, 0.4, 0.6]]


def test_ties_by_hand():
    """0.6 of 5 is 3 a row: [.9, 0, .5, −.6, 0], [0, .8, −.4, −.7, 0], [−1, 0, 0, .4, .6]. Sums −.1, .8, .1, −.9, .6
    elect − + + − +, and the means of those that agree are −1, .8, .5, (−.6 − .7)/2, .6."""
    assert merged_by("ties", ROWS, density=0.6).tolist() == pytest.approx([-1, 0.8, 0.5, -0.65, 0.6])
    assert merged_by("ties", ROWS, density=0.6, scale=2).tolist() == pytest.approx([-2, 1.6, 1, -1.3, 1.2])
    kept = build("ties", {"density": 0.6}).keep(torch.tensor(ROWS), [])
    assert kept[2].tolist() == pytest.approx([-1, 0, 0, 0.4, 0.6])


def test_ties_weighs_before_it_elects():
    """Weight 2 on the third: its −2 and .8 against .9 and −.6 − .7 = −1.3; .8 is not enough."""
    assert merged_by("ties", ROWS, [1, 1, 2], density=0.6).tolist() == pytest.approx([-2, 0.8, 0.5, -0.65, 1.2])
    assert merged_by("ties", ROWS, [1, 1, 4], density=0.6).tolist() == pytest.approx([-4, 0.8, 0.5, 1.6, 2.4])


def test_ties_keeps_the_same_share_of_equal_magnitudes():
    """Half of six: both twos, and of the ones the first. What is no number is not lost."""
    rule = build("ties", {"density": 0.5})
    assert rule.keep(torch.tensor([[1.0, -2, 1, -1, 2, 1]]), []).tolist() == [[1, -2, 0, 0, 2, 0]]
    assert rule.keep(torch.zeros(1, 4), []).tolist() == [[0, 0, 0, 0]]
    assert rule.keep(torch.tensor([[1.0, torch.nan, 3, -4]]), []).isnan().tolist() == [[False, True, False, False]]


def test_ties_elects_nothing_where_two_cancel_out():
    assert merged_by("ties", [[1.0, 2.0], [-1.0, 2.0]], density=1).tolist() == [0, 2]


def test_breadcrumbs_by_hand():
    """The largest of ten, −.9, goes; of the rest .7, −.5, .4 and .3 stay."""
    v = [0.05, -0.9, 0.3, -0.2, 0.7, -0.01, 0.4, 0.1, -0.5, 0.02]
    found = merged_by("breadcrumbs", [v], density=0.4, drop_top=0.1, scale=1)
    assert found.tolist() == [0, 0, 0.3, 0, 0.7, 0, 0.4, 0, -0.5, 0]
    assert merged_by("breadcrumbs", [v, v], [1, 2], density=0.4, drop_top=0.1)[4] == pytest.approx(0.2 * 3 * 0.7)


def test_dare_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Kept 1 and 4 of [1, −2, 3, 4], twice as large: [2, 0, 0, 8]."""
    monkeypatch.setattr(torch, "bernoulli", lambda share, generator: torch.tensor([1.0, 0, 0, 1]))
    assert merged_by("dare", [[1, -2, 3, 4]], density=0.5).tolist() == [2, 0, 0, 8]
    assert merged_by("dare-ties", [[1, -2, 3, 4], [3, 1, 1, -5]], density=0.5).tolist() == [4, 0, 0, -10]


def test_dare_stays_the_same_on_average():
    τ = torch.ones(1, 100_000)
    kept = build("dare", {"density": 0.3}).keep(τ, [torch.Generator().manual_seed(0)])
    assert kept.mean() == pytest.approx(1, abs=0.02)
    assert (kept != 0).float().mean() == pytest.approx(0.3, abs=0.01)


# -- PEFT and mergekit on the same numbers -----------------------------------------------------------------------------

PAIRS = [
    ("task-arithmetic", {"scale": 1}, "task_arithmetic", {}),
    ("ties", {"density": 0.3}, "ties", {"density": 0.3}),
    ("breadcrumbs", {"density": 0.3, "drop_top": 0, "scale": 1}, "magnitude_prune", {"density": 0.3}),
    ("dare", {"density": 0.4}, "dare_linear", {"density": 0.4}),
    ("dare-ties", {"density": 0.4}, "dare_ties", {"density": 0.4}),
]


@pytest.mark.parametrize(("name", "hyper", "theirs", "its"), PAIRS)
def test_peft_computes_the_same(name, hyper, theirs, its):
    """Where signs are elected only with weights of 1: PEFT's election does not see them."""
    τ = torch.randn(4, 16, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.ones(4) if "ties" in name else torch.tensor([1, 0.5, -2, 0.3])
    torch.manual_seed(1)
    expected = getattr(merge_utils, theirs)(list(τ), w.double(), **its)
    torch.manual_seed(1)
    torch.testing.assert_close(merged_by(name, τ, w.tolist(), **hyper), expected)
    assert expected.count_nonzero() > 40


@pytest.mark.parametrize("name", ["average", "task-arithmetic", "ties", "breadcrumbs"])
def test_mergekit_computed_the_same(name):
    """Numbers of mergekit 0.1.5; the file has the script that made them."""
    kept = json.loads(Path(__file__).with_name("mergekit.json").read_text(encoding="utf-8"))
    case = kept["cases"][name]
    found = merged_by(name, kept["τ"], case["weights"], **case["hyperparameters"])
    torch.testing.assert_close(found, torch.tensor(case["merged"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


# -- what holds for any differences ------------------------------------------------------------------------------------


@st.composite
def stacks(draw: Any) -> Tensor:
    """Differences [K, 3, 4] without two of equal magnitude, so that none is kept by the order of a sort."""
    K, seed = draw(st.integers(1, 5)), draw(st.integers(0, 10**6))
    return torch.randn(K, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keeping(name: str, τ: Tensor, w: Tensor, who: Sequence[int]) -> Tensor:
    """By a rule with its defaults, each adapter's draws its own."""
    rule = build(name, {"density": 0.5} if "density" in vars(build(name)) else {})
    return rule.join(rule.keep(τ, [rule.draw(str(k), "here") for k in who]), w)


@pytest.mark.parametrize("name", rules())
@settings(max_examples=40, deadline=None)
@given(data=st.data(), τ=stacks(), c=st.floats(0.1, 10))
def test_what_every_rule_keeps_to(name, data, τ, c):
    K = len(τ)
    w = torch.tensor(data.draw(st.lists(st.floats(0.1, 3), min_size=K, max_size=K)), dtype=torch.float64)
    order = data.draw(st.permutations(range(K)))
    found = keeping(name, τ, w, range(K))
    torch.testing.assert_close(keeping(name, τ[order], w[order], order), found)  # in any order
    torch.testing.assert_close(keeping(name, c * τ, w, range(K)), c * found)  # in any unit
    torch.testing.assert_close(keeping(name, -τ, w, range(K)), -found)
    scaled = found if name == "average" else c * found
    torch.testing.assert_close(keeping(name, τ, c * w, range(K)), scaled)
    more = torch.cat([τ, torch.randn(1, 3, 4, dtype=torch.float64)])  # weight 0 is not being there
    torch.testing.assert_close(keeping(name, more, torch.cat([w, w.new_zeros(1)]), range(K + 1)), found)


@settings(max_examples=20, deadline=None)
@given(τ=stacks(), w=st.floats(0.1, 3))
def test_one_alone_is_itself(τ, w):
    torch.testing.assert_close(merged_by("average", τ[:1], [w]), τ[0])
    torch.testing.assert_close(merged_by("task-arithmetic", τ[:1], scale=1), τ[0])
    for name in ("ties", "breadcrumbs", "dare", "dare-ties"):
        whole = {"density": 1, "scale": 1} | ({"drop_top": 0} if name == "breadcrumbs" else {})
        torch.testing.assert_close(merged_by(name, τ[:1], **whole), τ[0])


@pytest.mark.parametrize("name", rules())
def test_a_rule_says_whether_it_is_linear(name):
    """Σ c_k τ_k with c from the weights alone, or not."""
    τ = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = torch.tensor([1, 0.5, -0.2], dtype=torch.float64)
    rule = build(name)
    found = rule.join(rule.keep(τ, [rule.draw(str(k), "") for k in range(3)]), w)
    by_hand = torch.einsum("k,kij->ij", rule.join(torch.eye(3, dtype=torch.float64), w), τ)
    assert torch.allclose(found, by_hand) == rule.linear == (name in LINEAR)


def test_the_catalogue_has_every_rule():
    found = {part.name: part for part in catalogue() if part.kind == "merge"}
    assert found.keys() == rules().keys() | fitted_rules().keys()
    assert all(part.equation and "arXiv" in part.paper for part in found.values())


@pytest.mark.parametrize(
    ("name", "hyper", "says"),
    [
        (
            "tise",
            {},
            "no merging rule 'tise'; the rules are average, breadcrumbs, dare, dare-ties, task-arithmetic, ties",
        ),
        ("ties", {"density": 0}, "ties.density = 0: a share above 0"),
        ("dare", {"density": 1.5}, "dare.density = 1.5: a share above 0"),
        ("ties", {"dencity": 0.5}, "ties has no hyperparameter 'dencity'; it has density, scale"),
        ("average", {"scale": 0.5}, "average has no hyperparameters, and got scale"),
        ("breadcrumbs", {"density": 0.5, "drop_top": 0.6}, "a share of at most 1 − density"),
    ],
)
def test_what_no_rule_is(name, hyper, says):
    with pytest.raises(UsageError) as error:
        build(name, hyper)
    assert says in one_line(error.value)


# -- adapters ----------------------------------------------------------------------------------------------------------


@cache
def backbone_of(family: str) -> Backbone:
    return tiny.backbone(family)


def made(
    backbone: Backbone, method: str, hyper: dict[str, Any] | None = None, seed: int = 1, scale: float = 0.2, **card: Any
) -> Adapter:
    """With tensors that have been moved from where they start, and a head."""
    m = method_of(method, hyper or {})
    draw = torch.Generator().manual_seed(seed)
    tensors = {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, 0).items()}
    tensors |= {"head/W": torch.randn(2, backbone.hidden_size, generator=draw), "head/b": torch.zeros(2)}
    head = HeadCard(kind="classification", targets=("a", "b"))
    name = card.pop("name", f"{method}{seed}")
    said = {"tensors": tensors, "method": method, "hyperparameters": m.hyperparameters(), "head": head}
    return adapter(name, backbone=backbone.card(), **said, **card)


def states(backbone: Backbone, adapters: Sequence[Adapter], weights: Sequence[float] = (1.0,)) -> Tensor:
    """Hidden states of a mixture."""
    batch = tiny.batch(4)
    active = [Active.of(method_of(one.method, one.hyperparameters), one.tensors) for one in adapters]
    with torch.no_grad():
        return Plan(backbone, active).hidden(batch, torch.tensor(weights).expand(4, -1))[batch.mask]


def product(one: Adapter, site: str) -> Tensor:
    """s B A in fp64."""
    p, said = one.at(site), one.hyperparameters
    return said["alpha"] / said["r"] * p["B"].double() @ p["A"].double()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox", "phi3", "t5"])
def test_loras_by_a_linear_rule_are_their_sum(family):
    """Other ranks, scales and sites; the merged LoRA computes what the mixture does."""
    backbone = backbone_of(family)
    a = made(backbone, "lora", {"r": 3, "alpha": 5, "sites": EVERYWHERE}, 1)
    b = made(backbone, "lora", {"r": 2, "alpha": 7, "rslora": True}, 2)
    c = made(backbone, "pissa", {"r": 2, "sites": ["*.attn.k", "*.mlp.up"]}, 3)
    w = [0.7, 0.3, -0.4]
    one, report = merge(backbone, [a, b, c], "task-arithmetic", weights=w)
    assert (one.method, one.hyperparameters["r"]) == ("lora", 3 + 4)
    ranks = {site.rpartition(".")[2]: len(one.at(site)["A"]) for site in one.sites}
    assert ranks == {"q": 3 + 2, "k": 3 + 4, "v": 3 + 2, "o": 3, "up": 3 + 4, "down": 3}
    assert report.whole < 1e-6
    assert max(report.sites.values()) < 1e-6
    mixed = states(backbone, [a, b, c], [0.3 * x for x in w])
    torch.testing.assert_close(states(backbone, [one]), mixed, rtol=1e-4, atol=5e-5)
    assert (mixed - states(backbone, [a], [0.0])).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3", "gpt_neox"])
def test_full_and_low_rank_together_are_their_sum(family):
    """Biases, norms and embeddings of `full` with ΔW of LoRA and KaSA; fused weights come together again."""
    backbone = backbone_of(family)
    parts = [made(backbone, "full", {}, 1, 0.02), made(backbone, "lora", {"r": 3}, 2), made(backbone, "kasa", {}, 3)]
    w = [0.5, 1, 0.25]
    one, report = merge(backbone, parts, "average", weights=w)
    assert one.method == "full"
    assert report.whole < 1e-6
    mixed = states(backbone, parts, [x / 1.75 for x in w])
    torch.testing.assert_close(states(backbone, [one]), mixed, rtol=1e-3, atol=2e-4)
    names = {name for name in parts[0].tensors if name.startswith(":")}
    assert set(one.tensors) == names
    assert set(report.sites) >= {"0.attn.q", "1.attn.v"}
    assert any(at in names for at in report.sites)


def test_a_method_that_only_has_a_weight_s_difference_is_kept_as_one():
    """DoRA's W' − W has no factors; by a linear rule it is exact as `full`."""
    backbone = backbone_of("llama")
    parts = [made(backbone, "dora", {"r": 2}, 1), made(backbone, "lora", {"r": 3}, 2)]
    one, report = merge(backbone, parts, "average")
    assert one.method == "full"
    assert report.whole < 1e-6
    torch.testing.assert_close(states(backbone, [one]), states(backbone, parts, [0.5, 0.5]), rtol=1e-4, atol=1e-4)


def test_sparse_differences_stay_sparse():
    """Two of `full` in which few numbers differ; TIES keeps no other."""
    backbone = backbone_of("bert")
    path = backbone.sites["1.attn.q"].path
    name = f":{path}/weight"
    parts = []
    for seed in (1, 2):
        Δ = torch.zeros(32, 32)
        Δ[seed], Δ[5, 5] = float(seed), 3.0 if seed == 1 else -5.0
        parts.append(
            adapter(
                f"s{seed}",
                tensors={name: Δ},
                method="full",
                hyperparameters={"weights": [name[1:].replace("/", ".")]},
                backbone=backbone.card(),
            )
        )
    one, report = merge(backbone, parts, "ties", weights=[1, 1])
    expected = torch.zeros(32, 32)
    expected[1], expected[2], expected[5, 5] = 1.0, 2.0, -5.0
    assert list(one.tensors) == [name]
    assert torch.equal(one.tensors[name], expected)
    assert report.conflicts == {"1.attn.q": 1.0}  # one number is changed by both, and they pull apart
    lora, cut = merge(backbone, parts, "ties", 1)
    σ = torch.linalg.svdvals(expected.double())
    assert cut.whole == pytest.approx(float(σ[1:].norm() / σ.norm()), rel=1e-5)
    assert cut.sites == {"1.attn.q": pytest.approx(cut.whole)}
    assert float((product(lora, "1.attn.q") - expected).norm() / σ.norm()) == pytest.approx(cut.whole, rel=1e-5)
    assert f"off by {cut.whole:.2%} in all" in lora.card.notes[0]


@pytest.mark.parametrize("name", rules())
def test_every_rule_works_on_exact_products(name):
    """`full` in the end, or cut to a rank, and the error is what is missing."""
    backbone = backbone_of("llama")
    parts = [made(backbone, "lora", {"r": 2}, seed) for seed in (1, 2, 3)]
    rule = build(name)
    one, report = merge(backbone, parts, rule, weights=[1, 0.5, 2])
    assert one.method == ("lora" if rule.linear else "full")
    assert report.whole < 1e-6
    cut, off = merge(backbone, parts, rule, 3, weights=[1, 0.5, 2])
    missing, norm = 0.0, 0.0
    for site in parts[0].sites:
        τ = torch.stack([product(part, site) for part in parts])
        w = torch.tensor([1, 0.5, 2], dtype=torch.float64)
        Δ = rule.join(rule.keep(τ, [rule.draw(part.id, site) for part in parts]), w)
        held = product(one, site) if rule.linear else one.tensors[f":{backbone.sites[site].path}/weight"].double()
        torch.testing.assert_close(held, Δ, rtol=1e-5, atol=1e-6)
        σ = torch.linalg.svdvals(Δ)
        assert off.sites[site] == pytest.approx(float(σ[3:].norm() / σ.norm()), abs=1e-6)
        missing, norm = math.hypot(missing, float(σ[3:].norm())), math.hypot(norm, float(σ.norm()))
    assert off.whole == pytest.approx(missing / norm, abs=1e-6)
    assert off.whole > 0.05
    assert cut.hyperparameters["r"] == 3


def test_conflicts_are_counted():
    """Of 32 × 32 numbers that two random LoRAs change, about half pull apart; by minus one times itself all do."""
    backbone = backbone_of("bert")
    a, b = (made(backbone, "lora", {"r": 3}, seed) for seed in (1, 2))
    _, report = merge(backbone, [a, b], "task-arithmetic")
    apart = [float(((product(a, s) > 0) ^ (product(b, s) > 0)).double().mean()) for s in a.sites]
    assert list(report.conflicts.values()) == pytest.approx(apart)
    assert report.conflict == pytest.approx(sum(apart) / len(apart))
    assert 0.4 < report.conflict < 0.6
    _, same = merge(backbone, [a, a], "average")
    assert same.conflict == 0
    _, against = merge(backbone, [a, a], "task-arithmetic", weights=[1, -0.5])
    assert against.conflict == 1


# -- PEFT's own merges of the same LoRAs -------------------------------------------------------------------------------


def in_peft(backbone: Backbone, adapters: Sequence[Adapter]) -> Any:
    """PEFT's model with them, by their names."""
    said = adapters[0].hyperparameters
    targets = [backbone.sites[site].path for site in adapters[0].sites]
    config = peft.LoraConfig(r=said["r"], lora_alpha=said["alpha"], target_modules=targets)
    model: Any = peft.get_peft_model(copy.deepcopy(backbone.model).double(), config, adapters[0].name)
    for one in adapters[1:]:
        model.add_adapter(one.name, config)
    for one in adapters:
        for site in one.sites:
            module = model.base_model.model.get_submodule(backbone.sites[site].path)
            module.lora_A[one.name].weight.data = one.at(site)["A"].double()
            module.lora_B[one.name].weight.data = one.at(site)["B"].double()
    return model


def delta(model: Any, backbone: Backbone, name: str, site: str) -> Tensor:
    found: Tensor = model.base_model.model.get_submodule(backbone.sites[site].path).get_delta_weight(name)
    return found.detach().double()


def test_the_sum_is_exact_where_that_of_peft_is_not():
    """PEFT's `linear` adds the A's and the B's, and so has A₁ with B₂ too."""
    backbone = backbone_of("bert")
    parts = [made(backbone, "lora", {"r": 4, "alpha": 8}, seed, 1.0) for seed in (1, 2, 3)]
    one, report = merge(backbone, parts, build("task-arithmetic", {"scale": 1}), weights=[1, 0.5, 2])
    model = in_peft(backbone, parts)
    model.add_weighted_adapter([p.name for p in parts], [1, 0.5, 2], "linear", combination_type="linear")
    model.add_weighted_adapter([p.name for p in parts], [1, 0.5, 2], "cat", combination_type="cat")
    for site in parts[0].sites:
        exact = sum(w * product(p, site) for w, p in zip([1, 0.5, 2], parts, strict=True))
        assert isinstance(exact, Tensor)
        assert float((product(one, site) - exact).norm() / exact.norm()) < 1e-6
        assert float((delta(model, backbone, "cat", site) - exact).norm() / exact.norm()) < 1e-6
        assert float((delta(model, backbone, "linear", site) - exact).norm() / exact.norm()) > 1
    assert report.whole < 1e-6
    assert "exact" in str(report)


@pytest.mark.parametrize(
    ("name", "hyper", "theirs", "its"),
    [
        ("task-arithmetic", {"scale": 1}, "svd", {}),
        ("ties", {"density": 0.3}, "ties_svd", {"density": 0.3}),
        ("breadcrumbs", {"density": 0.3, "drop_top": 0, "scale": 1}, "magnitude_prune_svd", {"density": 0.3}),
    ],
)
def test_cut_to_a_rank_it_is_what_peft_makes(name, hyper, theirs, its):
    backbone = backbone_of("bert")
    parts = [made(backbone, "lora", {"r": 4, "alpha": 8}, seed) for seed in (1, 2, 3)]
    one, _ = merge(backbone, parts, build(name, hyper), 4)
    model = in_peft(backbone, parts)
    model.add_weighted_adapter(
        [p.name for p in parts], [1.0, 1.0, 1.0], "both", combination_type=theirs, svd_rank=4, **its
    )
    for site in parts[0].sites:
        torch.testing.assert_close(
            product(one, site), delta(model, backbone, "both", site), rtol=1e-4, atol=1e-5, check_dtype=False
        )


# -- the adapter that comes out ----------------------------------------------------------------------------------------


def test_it_is_an_adapter_like_any_other(tmp_path: Path):
    backbone = tiny.backbone("bert", tokenizer=tiny.words("a", "b"))
    a = made(backbone, "lora", {"r": 2}, 1, name="first", licence="MIT")
    b = made(backbone, "dora", {"r": 2}, 2, name="second", licence="Apache-2.0")
    one, report = merge(backbone, [a, b], "ties", weights=[1, 0.5], head="second", name="both")
    assert one.head == b.head
    assert torch.equal(one.at("head")["W"], b.at("head")["W"])
    card = one.card
    assert (card.name, card.licence, card.scores) == ("both", "Apache-2.0 AND MIT", {})
    assert card.lineage.parents == (a.id, b.id)
    assert card.task == b.card.task
    assert card.notes[0] == f"1·first + 0.5·second, merged by ties (density = 0.2, scale = 1.0): {report}"
    assert card.recipe["weights"] == [1, 0.5]
    again = load(save(one, tmp_path / "both"))
    assert again.id == one.id
    engine = Engine(backbone, adapters=[again])
    [answer] = engine.answer([Request("a b", adapter=one.id)])
    assert answer.output in ("a", "b")


def test_without_a_head_of_its_own_it_answers_through_the_others():
    """Where heads differ it gets none; a mixture reads it through the head of an adapter of weight 0."""
    backbone = tiny.backbone("bert", tokenizer=tiny.words("a", "b"))
    a, b = (made(backbone, "lora", {"r": 2}, seed, name=name) for seed, name in ((1, "first"), (2, "second")))
    one, _ = merge(backbone, [a, b], "average")
    assert one.head is None
    assert not any(name.startswith(("head/", "task/")) for name in one.tensors)
    assert one.card.notes[1] == "no head"
    named, _ = merge(backbone, [a, b], "average", head=b.id)
    engine = Engine(backbone, adapters=[one, a, b, named])
    texts = ["a b", "b b a", "b"]
    asked = mix({one.id: 1, b.id: 0}, head=b.id)
    through = engine.answer([Request(text, adapter=asked) for text in texts])
    own = engine.answer([Request(text, adapter=named.id) for text in texts])
    assert [x.probability for x in through] == pytest.approx([x.probability for x in own], abs=1e-5)
    with pytest.raises(UsageError, match="has no head"):
        engine.answer([Request("a", adapter=one.id)])


def test_one_head_that_all_have_stays():
    backbone = backbone_of("bert")
    a, b = (made(backbone, "lora", {"r": 2}, seed) for seed in (1, 2))
    b = Adapter(b.method, b.hyperparameters, {**b.tensors, "head/W": a.tensors["head/W"]}, b.backbone, b.card, b.head)
    one, _ = merge(backbone, [a, b], "average")
    assert one.head == a.head
    assert torch.equal(one.tensors["head/W"], a.tensors["head/W"])


def test_one_merged_alone_is_itself():
    backbone = backbone_of("gpt2")
    a = made(backbone, "lora", {"r": 3, "alpha": 7, "sites": EVERYWHERE})
    one, _ = merge(backbone, [a], "average", weights=[0.3])
    for site in a.sites:
        torch.testing.assert_close(product(one, site), product(a, site), rtol=1e-5, atol=1e-6)
    assert one.head == a.head


def test_the_order_of_adapters_does_not_matter():
    backbone = backbone_of("bert")
    a, b, c = (made(backbone, "lora", {"r": 2}, seed) for seed in (1, 2, 3))
    first, _ = merge(backbone, [a, b, c], "dare-ties", weights=[1, 2, 3])
    second, _ = merge(backbone, [c, a, b], "dare-ties", weights=[3, 1, 2])
    for name, t in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], t)
    other, _ = merge(backbone, [a, b, c], build("dare-ties", {"seed": 1}), weights=[1, 2, 3])
    assert any(not torch.equal(other.tensors[name], t) for name, t in first.tensors.items() if name in other.tensors)


def test_modules_are_merged_one_after_the_other(monkeypatch):
    """When a module's differences are made, those of no other than the one before it are still there."""
    backbone = backbone_of("llama")
    parts = [made(backbone, "lora", {"r": 2, "sites": EVERYWHERE}, seed) for seed in (1, 2)]
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(*given: Any) -> Any:
        nonlocal most
        maps, rest = differences(*given)
        alive.extend(map(weakref.ref, maps.values()))
        most = max(most, sum(ref() is not None for ref in alive))
        return maps, rest

    monkeypatch.setattr("polytask.composition.differences.differences", watched)
    merge(backbone, parts, "ties", 2)
    assert len(alive) > 30
    assert 2 <= most <= 2 * len(parts)


# -- what cannot be merged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "hyper", "says"),
    [
        ("bert", "head", {}, "head changes nothing in the backbone, so there is no ΔW"),
        ("bert", "prompt", {}, "puts virtual tokens before the text, which have no ΔW"),
        ("bert", "bottleneck", {}, "bottleneck is not linear in what it reads at 0.attn.o, so there is no ΔW"),
        ("bert", "pfeiffer", {}, "pfeiffer acts at 0.sum, which is no linear map's output, so there is no ΔW"),
        ("bert", "bitfit", {}, "bitfit changes the bias part at 0.attn.q, which is in no ΔW; mix or route it"),
        ("bert", "peft", {"type": "VERA"}, "keeps PEFT's own layers; export it as a LoRA"),
        ("llama", "ia3", {}, "ia3 acts at .*, which is no linear map's output"),
    ],
)
def test_what_has_no_difference_is_refused_before_anything_is_merged(family, method, hyper, says, monkeypatch):
    backbone = backbone_of(family)
    parts = [made(backbone, "lora", {"r": 2}), made(backbone, method, hyper)]
    monkeypatch.setattr(type(build("ties")), "keep", lambda *_: pytest.fail("it was merged"))
    with pytest.raises(UsageError, match=says) as error:
        merge(backbone, parts, "ties")
    one_line(error.value)


def test_wrong_use():
    backbone = backbone_of("bert")
    a, b = (made(backbone, "lora", {"r": 2}, seed) for seed in (1, 2))
    full = made(backbone, "full")
    for says, parts, more in [
        ("at least one adapter", [], {}),
        ("2 weights for 1 adapters", [a], {"weights": [1, 2]}),
        ("numbers that are not all 0", [a, b], {"weights": [0, 0]}),
        ("numbers that are not all 0", [a, b], {"weights": [1, math.nan]}),
        ("rank = 0", [a], {"rank": 0}),
        ("add up to 0", [a, b], {"weights": [1, -1]}),
        ("'c': none of the adapters; they are lora1, lora2", [a, b], {"head": "c"}),
        ("has no place in a LoRA of rank 4; merge without a rank", [full, a], {"rank": 4}),
    ]:
        with pytest.raises(UsageError, match=says) as error:
            merge(backbone, parts, "average", **more)
        one_line(error.value)
    with pytest.raises(PolytaskError, match="belongs to other weights than those of tiny-llama; only adapters of one"):
        merge(backbone_of("llama"), [a, b], "average")
    with pytest.raises(PolytaskError, match="nothing is left of 1·lora1 \\+ -1·lora1"):
        merge(backbone, [a, a], "task-arithmetic", weights=[1, -1], rank=2)


def test_a_merged_full_difference_becomes_a_lora_afterwards():
    """As the error about norms and biases says."""
    backbone = backbone_of("bert")
    parts = [made(backbone, "full", {}, seed, 0.02) for seed in (1, 2)]
    one, _ = merge(backbone, parts, "ties")
    lora, off = as_lora(backbone, one, 4, drop=True)
    assert lora.method == "lora"
    assert 0 < off.left_out < 1


# -- on the command line -----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path):
    base = load_backbone("minilm", precision="fp32")
    own = tmp_path / "skills"
    parts = [made(base, "lora", {"r": 2, "sites": ["[0-1].attn.[qv]"]}, seed, name=f"s{seed}") for seed in (1, 2)]
    for one in parts:
        Library(own).add(one)
    done = run("merge", "s1", "s2", "--weights", "1,-0.5", "--rule", "task-arithmetic", "--set", "scale=1", "-l", own)
    assert done.status == 0, done.err
    assert "1·s1 + -0.5·s2, merged by task-arithmetic (scale = 1.0): exact; signs in conflict: " in done.out
    assert "a LoRA of rank 4" in done.out
    assert "it does not answer by itself" in done.out
    said = run(
        *("merge", "s1", "s2", "--rule", "ties", "--set", "density=0.3", "--rank", "3", "--head", "s1"),
        *("--name", "both", "-l", own, "--json"),
    ).json
    assert (said["name"], said["rule"], said["method"], said["rank"]) == ("both", "ties", "lora", 3)
    assert said["hyperparameters"] == {"density": 0.3, "scale": 1.0}
    assert said["parents"] == {one.id: 1.0 for one in parts}
    assert said["head"] == parts[0].id
    assert list(said["errors"]) == ["0.attn.q", "0.attn.v", "1.attn.q", "1.attn.v"]
    assert 0 < min(said["errors"].values()) <= said["error"] <= max(said["errors"].values()) < 1
    assert 0.3 < said["conflict"] < 0.7
    kept = Library(own).get("both")
    assert kept.id == said["adapter"]
    assert [e.id for e in Library(own).lineage("both").parents] == [one.id for one in parts]
    for given_, says in [
        (("s1", "s3"), "s3"),
        (("s1", "s2", "--rule", "mean"), "no merging rule 'mean'"),
        (("s1", "s2", "--weights", "1;2"), "write numbers with commas"),
        (("s1", "s2", "--weights", "1"), "1 weights for 2 adapters"),
        (("s1", "--head", "s2"), "--head s2 is none of the adapters that are merged: s1"),
        (("s1", "s2", "--set", "density"), "write it as NAME=VALUE"),
    ]:
        refused = run("merge", *given_, "-l", own)
        assert refused.status == 2
        assert says in refused.error
    assert "ties" in run("methods").out
