"""Methods that act on activations, against examples worked out by hand and models whose weights were changed instead;
and the search for an adapter without gradients."""

from __future__ import annotations

import copy
import math
from functools import cache

import mpmath
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from writers import clean, refused, writer

from polytask.adapters import Adapter
from polytask.backbones import Backbone, Site
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine
from polytask.methods import build, selectors
from polytask.methods.experts import pruned
from polytask.methods.lifting import Active, Plan
from polytask.recipes import blackbox
from polytask.recipes.adapt import request
from polytask.recipes.blackbox import begin, fit, log_gain, metric, probability, search
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Label, Task


def shaken(backbone: Backbone, name: str, **hyper: object) -> Active:
    draw = torch.Generator().manual_seed(1)
    m = build(name, hyper)
    started = m.start(backbone, 0)
    return Active.of(m, {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in started.items()})


def changed(backbone: Backbone, adapter: Active) -> Tensor:
    with torch.no_grad():
        return Plan(backbone, [adapter]).hidden(tiny.batch(3))


def agree(backbone: Backbone, adapter: Active, model: nn.Module) -> None:
    """The adapter does what these other weights do, and that is something."""
    batch = tiny.batch(3)
    other = Backbone(model, None, "changed", precision="fp32", device="cpu")
    expected = other.hidden(batch)[batch.mask]
    torch.testing.assert_close(changed(backbone, adapter)[batch.mask], expected, rtol=1e-5, atol=1e-5)
    assert (expected - backbone.hidden(batch)[batch.mask]).abs().max() > 1e-2


def projection(model: nn.Module, path: str) -> tuple[nn.Module, Tensor]:
    """An output projection, and its weight [out, in] as a view."""
    module = model.get_submodule(path)
    return module, module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T


# -- the invertible adapter --------------------------------------------------------------------------------------------


def test_invertible_by_hand() -> None:
    """F([3, −1]) = 2 · [0.5, −0.5], so o₁ = [2, 1]; G([2, 1]) = 2 · [1, 2], so o₂ = [5, 3]."""
    zero = {"b_DF": torch.zeros(1), "b_UF": torch.zeros(2), "b_DG": torch.zeros(1), "b_UG": torch.zeros(2)}
    p = zero | {
        "D_F": torch.tensor([[1.0, 1.0]]),
        "U_F": torch.tensor([[0.5], [-0.5]]),
        "D_G": torch.tensor([[1.0, 0.0]]),
        "U_G": torch.tensor([[1.0], [2.0]]),
    }
    m, e = build("invertible"), torch.tensor([[1.0, 2.0, 3.0, -1.0]])
    o = e + m.delta(p, e, e)
    assert o.tolist() == [[2.0, 1.0, 5.0, 3.0]]
    assert m.inverse(p, o).tolist() == e.tolist()


@pytest.mark.parametrize("hidden", [32, 36])  # halves that the reduction divides, and that it does not
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_the_inverse_finds_the_embeddings_again(family: str, hidden: int) -> None:
    """To fp32 rounding, from what the first block reads with the adapter."""
    backbone = tiny.backbone(family, hidden_size=hidden)
    adapter = shaken(backbone, "invertible", reduction=4)
    batch = tiny.batch(3)
    plain = backbone.upto(batch, 0)
    plan = Plan(backbone, [adapter])
    with plan.acting(torch.ones(3, 1)):
        coupled = backbone.upto(batch, 0)
    assert (coupled - plain).abs().max() > 0.1
    again = adapter.method.inverse(adapter.at["embed"], coupled)
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)


def test_the_inverse_of_an_odd_width() -> None:
    m, draw = build("invertible"), torch.Generator().manual_seed(0)
    p = {
        n: t + 0.5 * torch.randn(t.shape, generator=draw)
        for n, t in m.init(Site("embed", "", "stream", 7, 7), draw, {}).items()
    }
    e = torch.randn(5, 7, generator=draw)
    torch.testing.assert_close(m.inverse(p, e + m.delta(p, e, e)), e, rtol=1e-6, atol=1e-6)


def test_invertible_counts() -> None:
    """F and G of d = 32: halves of 16, bottlenecks of 8."""
    tensors = build("invertible").start(tiny.backbone("bert"), 0)
    assert sum(t.numel() for t in tensors.values()) == 2 * (16 * 8 + 8 + 8 * 16 + 16)


# -- LoFiT -------------------------------------------------------------------------------------------------------------


def test_lofit_by_hand() -> None:
    """Two heads of two features: only the second is moved, and W_o (z + v) = W_o z + W_o v."""
    W = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, -1], [1, 1, 1, 1], [0, 0, 1, 0]])
    z, v = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0.0, 0.0, 0.5, -0.5])
    moved = z + build("lofit").delta({"v": v}, z, z)
    assert (moved @ W.T).tolist() == [[8.0, -1.5, 10.0, 3.5]]
    assert (W @ v).tolist() == [1.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox"])
def test_lofit_is_a_bias_of_the_output_projection(family: str) -> None:
    backbone = tiny.backbone(family)
    adapter = shaken(backbone, "lofit")
    model = copy.deepcopy(backbone.model)
    for site, p in adapter.at.items():
        module, W = projection(model, backbone.sites[site].path)
        bias = W @ p["v"] + (0 if module.bias is None else module.bias)
        module.bias = nn.Parameter(bias, requires_grad=False)
    agree(backbone, adapter, model)


def test_lofit_has_a_number_for_each_feature_of_the_heads() -> None:
    tensors = build("lofit").start(tiny.backbone("llama"), 0)  # 4 heads of 8 that share 2 keys
    assert {name: list(t.shape) for name, t in tensors.items()} == {f"{i}.attn.heads/v": [4 * 8] for i in range(3)}


def test_lofit_comes_with_the_choice_of_heads() -> None:
    assert selectors.named("lofit") == ("lofit", "heads")


# -- TaRot -------------------------------------------------------------------------------------------------------------


def test_rotation_by_hand() -> None:
    """(1, 0) turned by 0.3 is (cos 0.3, −sin 0.3); (0.5, −1) turned by −0.2."""
    m, z = build("rotation"), torch.tensor([[1.0, 0.0, 0.5, -1.0]])
    turned = z + m.delta(m.ready({"theta": torch.tensor([0.3, -0.2])}, {}), z, z)
    torch.testing.assert_close(turned, torch.tensor([[0.9553, -0.2955, 0.6887, -0.8807]]), rtol=0, atol=5e-5)
    torch.testing.assert_close(turned.norm(), z.norm())


@pytest.mark.parametrize("shared", [1, 4, 16])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_rotation_is_a_turned_output_projection(family: str, shared: int) -> None:
    """z R W_oᵀ = z (W_o Rᵀ)ᵀ, R the blocks of angles; 4 pairs are a head, 16 all heads of a block."""
    backbone = tiny.backbone(family)
    adapter = shaken(backbone, "rotation", shared=shared)
    assert {t.numel() for p in adapter.at.values() for t in p.values()} == {16 // shared}
    model = copy.deepcopy(backbone.model)
    for site, p in adapter.at.items():
        angles = p["theta"].repeat_interleave(shared).tolist()
        blocks = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in angles]
        _, W = projection(model, backbone.sites[site].path)
        W.copy_(W @ torch.block_diag(*blocks).T)
    agree(backbone, adapter, model)


def test_a_small_angle_is_kept_in_bf16() -> None:
    """1 − cos 0.01 = 5 · 10⁻⁵, where bf16's cos 0.01 is 1."""
    ready = build("rotation").ready({"theta": torch.tensor([0.01])}, {})
    assert ready["cos − 1"].to(torch.bfloat16).tolist() == pytest.approx([-5e-5, -5e-5], rel=1e-2)


@pytest.mark.parametrize("shared", [0, 3, 32])
def test_angles_that_do_not_fit_are_refused(shared: int) -> None:
    refused(
        lambda: build("rotation", {"shared": shared}).start(tiny.backbone("bert"), 0),
        r"give a divisor of 16|at least 1 is needed",
    )


# -- experts -----------------------------------------------------------------------------------------------------------


def test_experts_by_hand() -> None:
    """α = (ln 3, 0): g = (3/4, 1/4). A₁ = 2 · (1 · relu(1 · 2)) = 4, A₂ = 2 · (5 · relu(−1 · 2 + 3) + 1) = 12."""
    p = {
        "D": torch.tensor([[1.0], [-1.0]]),
        "b_D": torch.tensor([0.0, 3.0]),
        "U": torch.tensor([[1.0, 5.0]]),
        "b_U": torch.tensor([[0.0], [1.0]]),
        "alpha": torch.tensor([math.log(3), 0.0]),
    }
    m, x = build("experts", {"experts": 2, "scale": 2}), torch.tensor([[2.0]])
    torch.testing.assert_close(m.delta(m.ready(p, {}), x, x), torch.tensor([[0.75 * 4 + 0.25 * 12]]))
    colder = build("experts", {"experts": 2, "scale": 2, "tau": 0.5})  # g = (9/10, 1/10)
    torch.testing.assert_close(colder.delta(colder.ready(p, {}), x, x), torch.tensor([[0.9 * 4 + 0.1 * 12]]))


def test_experts_are_a_gated_sum_of_parallel_adapters() -> None:
    backbone = tiny.backbone("bert")
    adapter = shaken(backbone, "experts", experts=3, reduction=8, scale=1.5)
    alone = build("parallel", {"reduction": 8, "scale": 1.5})
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for p in adapter.at.values():
        parts = [
            {"D": D, "b_D": b_D, "U": U, "b_U": b_U}
            for D, b_D, U, b_U in zip(p["D"].chunk(3), p["b_D"].chunk(3), p["U"].chunk(3, dim=1), p["b_U"], strict=True)
        ]
        g = p["alpha"].softmax(0)
        expected = sum(w * alone.delta(part, x, x) for w, part in zip(g, parts, strict=True))
        found = adapter.method.delta(adapter.method.ready(p, {}), x, x)
        torch.testing.assert_close(found, expected)


def test_experts_count() -> None:
    """E (2 d m + m + d) + E a block, of d = 32 and m = 8."""
    tensors = build("experts", {"experts": 3, "reduction": 4}).start(tiny.backbone("llama"), 0)
    assert sum(t.numel() for t in tensors.values()) == 3 * (3 * (2 * 32 * 8 + 8 + 32) + 3)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_greatest_gates_of_each_layer(keep: int) -> None:
    """What is dropped has hardly a weight here, so the states stay; what is kept has the shapes of its method."""
    backbone = tiny.backbone("llama")
    m = build("experts", {"experts": 4, "reduction": 8})
    draw = torch.Generator().manual_seed(0)
    tensors = {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, 0).items()}
    orders = [[2, 0, 3, 1], [1, 3, 0, 2], [3, 2, 1, 0]]
    for i, order in enumerate(orders):
        for rank, expert in enumerate(order):
            tensors[f"{i}.mlp/alpha"][expert] = -rank / 4 if rank < keep else -40.0
    fewer, left = pruned(m, tensors | {"head/W": torch.ones(2, 2)}, keep)
    assert fewer.name == ("parallel" if keep == 1 else "experts")
    assert torch.equal(left.pop("head/W"), torch.ones(2, 2))
    made = fewer.start(backbone, 0)
    assert {n: t.shape for n, t in left.items()} == {n: t.shape for n, t in made.items()}
    before, after = (changed(backbone, Active.of(*pair)) for pair in ((m, tensors), (fewer, left)))
    mask = tiny.batch(3).mask
    torch.testing.assert_close(after[mask], before[mask], rtol=1e-5, atol=1e-5)
    assert (before - backbone.hidden(tiny.batch(3)))[mask].abs().max() > 1e-2


def test_pruning_to_no_expert_is_refused() -> None:
    m = build("experts")
    for keep in (0, 5):
        refused(lambda keep=keep: pruned(m, {}, keep), r"give a number from 1 to 4")


def test_gates_are_drawn_in_training_only() -> None:
    """softmax(α + Gumbel) falls on expert e most often with probability softmax(α)_e (Gumbel's trick)."""
    m = build("experts", {"experts": 3})
    α = torch.tensor([1.0, 0.0, -1.0])
    torch.manual_seed(0)
    drawn = torch.stack([m.sampled({"alpha": α})["alpha"] for _ in range(4000)])
    share = F.one_hot(drawn.argmax(-1), 3).float().mean(0)
    torch.testing.assert_close(share, α.softmax(0), rtol=0, atol=0.025)

    backbone, batch = tiny.backbone("bert"), tiny.batch(2)
    adapter = shaken(backbone, "experts")
    with torch.no_grad():
        noisy, still = Plan(backbone, [adapter], training=True), Plan(backbone, [adapter])
        assert not torch.equal(noisy.hidden(batch), noisy.hidden(batch))
        assert torch.equal(still.hidden(batch), still.hidden(batch))


def test_gates_find_the_expert_that_helps() -> None:
    """One expert can see what the target depends on, three see nothing: in each of ten layers its gate is the greatest,
    and it alone does as well as the mixture."""
    m = build("experts", {"experts": 4, "reduction": 2, "scale": 1, "sites": ["*.mlp"]})
    alone = build("parallel", {"reduction": 2, "scale": 1})
    for seed in range(10):
        torch.manual_seed(seed)
        x, able = torch.randn(256, 8), seed % 4
        p = {"D": torch.zeros(16, 8), "b_D": torch.zeros(16), "U": torch.zeros(8, 16), "b_U": torch.zeros(4, 8)}
        p["D"][4 * able : 4 * able + 4] = torch.randn(4, 8) / 8**0.5
        target = F.relu(x @ p["D"][4 * able : 4 * able + 4].T) @ torch.randn(4, 8)
        p["alpha"] = torch.zeros(4)
        learned = [p[name].requires_grad_() for name in ("U", "b_U", "alpha")]
        optimiser = torch.optim.Adam(learned, lr=0.03)
        for _ in range(200):
            optimiser.zero_grad()
            (m.delta(m.ready(m.sampled(p), {}), x, x) - target).square().mean().backward()
            optimiser.step()
        with torch.no_grad():
            assert int(p["alpha"].argmax()) == able
            _, left = pruned(m, {f"0.mlp/{name}": t for name, t in p.items()})
            one = {name.removeprefix("0.mlp/"): t for name, t in left.items()}
            mixed, kept = (
                (made - target).square().mean() for made in (m.delta(m.ready(p, {}), x, x), alone.delta(one, x, x))
            )
            assert kept < mixed + 0.01 * target.square().mean()


# -- the search --------------------------------------------------------------------------------------------------------


def test_the_search_finds_a_known_optimum() -> None:
    c = np.array([0.3, -0.6, 0.1, 0.8])
    found = search(lambda u: -float(((u - c) ** 2).sum()), 4, budget=60, seed=0)
    assert len(found.scores) == 60
    assert found.scores[0] == pytest.approx(-float((c**2).sum()))  # the first point is 0
    assert found.score == max(found.scores) > -1e-3
    np.testing.assert_allclose(found.point, c, atol=0.03)


def test_the_search_is_better_than_chance() -> None:
    """In 30 dimensions, where 60 random points come nowhere near."""
    c = np.random.default_rng(5).uniform(-0.8, 0.8, 30)

    def value(u: np.ndarray) -> float:
        return -float(((u - c) ** 2).sum())

    for seed in range(2):
        chance = max(value(u) for u in np.random.default_rng(seed).uniform(-1, 1, (60, 30)))
        assert search(value, 30, budget=60, seed=seed).score > 0.6 * value(np.zeros(30)) > 0.6 * chance


def test_the_search_repeats_itself_and_stays_in_its_cube() -> None:
    seen: list[np.ndarray] = []

    def edge(u: np.ndarray) -> float:
        seen.append(u)
        return float(u.sum())

    first = search(edge, 3, budget=20, seed=3)
    told: list[tuple[int, float]] = []
    again = search(edge, 3, budget=20, seed=3, on_score=lambda n, score: told.append((n, score)))
    assert first.scores == again.scores != search(edge, 3, budget=20, seed=4).scores
    assert told == list(enumerate(again.scores, 1))
    assert max(float(np.abs(u).max()) for u in seen) <= 1
    assert first.score > 2.9


def test_a_search_of_few_scores_and_of_one_value() -> None:
    assert search(lambda u: 1.0, 2, budget=1).point.tolist() == [0.0, 0.0]
    flat = search(lambda u: 0.5, 2, budget=12)
    assert flat.score == 0.5
    assert flat.point.tolist() == [0.0, 0.0]  # of several that score alike the first


def test_searches_that_are_none_are_refused() -> None:
    refused(lambda: search(lambda u: 0.0, 0), r"0 numbers to search for")
    refused(lambda: search(lambda u: 0.0, 501), r"501 numbers to search for")
    refused(lambda: search(lambda u: 0.0, 2, budget=0), r"at least one score")
    refused(lambda: search(lambda u: math.nan, 2), r"score 1 of the search is nan", PolytaskError)


def test_the_gain_is_its_integral() -> None:
    """log E max(0, z + ε), ε ~ N(0, 1), in many digits, where the plain sum would be 0 too."""
    for z in (-200.0, -30.0, -20.0, -19.9, -5.0, -1.0, 0.0, 2.0, 40.0):
        with mpmath.workdps(200):
            exact = float(mpmath.log(mpmath.npdf(z) + z * mpmath.ncdf(z)))
        assert float(log_gain(np.array([z]))[0]) == pytest.approx(exact, rel=1e-6, abs=1e-9)


# -- adapters without gradients ----------------------------------------------------------------------------------------

LABELS = (Label("home"), Label("mat"), Label("noon"))
TEXTS = ["the cat sat", "two dogs run", "no", "a café", "the dogs saw the cat", "yes"]
EXAMPLES = tuple(Example(str(i), text, LABELS[i % 3].name) for i, text in enumerate(TEXTS))
TASK = Task("where", "classification", instruction="Where?", labels=LABELS, train=EXAMPLES, validation=EXAMPLES)


@cache
def base_of(family: str) -> Backbone:
    small = {"num_hidden_layers": 2, **({"num_decoder_layers": 2} if family == "t5" else {})}
    return writer(family, max_position_embeddings=256, tie_word_embeddings=True, **small)


def started(family: str, method: str = "rotation", **hyper: object) -> Adapter:
    reading = Reading(in_text="yes", decide="likelihood")
    return begin(base_of(family), TASK, method, hyperparameters=hyper, reading=reading)


@pytest.fixture
def forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be differentiated fails."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a backward pass")

    for target, name in ((torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad")):
        monkeypatch.setattr(target, name, never)


@pytest.mark.usefixtures("forward_only")
@pytest.mark.parametrize(("method", "hyper"), [("rotation", {"shared": 4}), ("lofit", {"sites": ["1.attn.heads"]})])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_adapter_is_found_by_forward_passes_alone(family: str, method: str, hyper: dict[str, object]) -> None:
    base = base_of(family)
    engine = Engine(base)
    adapter = started(family, method, **hyper)
    passes = 0

    def watch(_module: nn.Module, _args: object, out: Tensor) -> None:
        nonlocal passes
        passes += 1
        assert not torch.is_grad_enabled()
        assert not out.requires_grad

    handle = base.model.get_output_embeddings().register_forward_hook(watch)
    score = probability(engine, EXAMPLES)
    try:
        before = score(adapter)
        found = fit(adapter, score, budget=14, seed=1)
    finally:
        handle.remove()
    assert passes >= 15
    assert not any(t.requires_grad for t in found.tensors.values())
    scores = found.card.recipe["scores"]
    assert scores[0] == pytest.approx(before)
    assert score(found) == pytest.approx(max(scores))
    assert max(scores) > before
    assert found.card.trained_parameters == sum(t.numel() for t in adapter.tensors.values()) == found.parameters
    reach = max(float((found.tensors[n] - t).abs().max()) for n, t in adapter.tensors.items())
    assert 0 < reach <= math.pi / 6 + 1e-6
    assert not engine.adapters
    clean(base)


def test_the_probability_is_that_of_the_right_options() -> None:
    engine, adapter = Engine(base_of("llama")), started("llama")
    engine.add(adapter)
    weighed = engine.weigh([request(example, adapter) for example in EXAMPLES])
    names = [label.name for label in LABELS]
    expected = [float(o.log_p.softmax(-1)[names.index(str(e.output))]) for o, e in zip(weighed, EXAMPLES, strict=True)]
    assert probability(engine, EXAMPLES)(adapter) == pytest.approx(sum(expected) / 6)
    assert [one.id for one in engine.adapters] == [adapter.id]  # one that was there stays
    strange = Example("x", "no", "nowhere")
    refused(lambda: probability(engine, [strange])(adapter), r"example x: its output 'nowhere' is none", PolytaskError)


def test_a_task_with_a_head_is_searched_by_its_metric() -> None:
    """The head is fitted first, and stays while the tensors inside are searched for."""
    base = base_of("llama")
    engine = Engine(base)
    adapter = begin(base, TASK, "rotation", hyperparameters={"shared": 16})
    assert {"head/W", "head/b", "0.attn.heads/theta", "1.attn.heads/theta"} <= set(adapter.tensors)
    assert not adapter.card.scores
    score = metric(engine, TASK, EXAMPLES)
    found = fit(adapter, score, budget=6)
    assert score(found) == max(found.card.recipe["scores"]) >= score(adapter)
    assert torch.equal(found.tensors["head/W"], adapter.tensors["head/W"])
    assert found.card.trained_parameters == 2


def test_what_is_too_large_to_search_for_is_refused() -> None:
    adapter = started("llama", "lora")
    with pytest.raises(UsageError, match=r"a lora of \d+ numbers: from 1 to 500") as error:
        fit(adapter, lambda adapter: 0.0)
    assert "\n" not in str(error.value)
    assert blackbox.MOST == 500
