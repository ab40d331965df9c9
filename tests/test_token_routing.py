"""Routing token by token over many LoRAs: by hand, against PEFT, and grouped products against one adapter at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from jobs import TOKENS, task_of
from torch import Tensor, nn

import polytask as pt
from polytask.adapters import Adapter
from polytask.backbones import Backbone
from polytask.composition import compose
from polytask.composition.clustering import clusters
from polytask.composition.routing.arrow import Arrow, arrow
from polytask.composition.routing.meteora import MeteoRA
from polytask.composition.routing.phatgoose import Phatgoose, phatgoose
from polytask.composition.routing.token_level import trace
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request
from polytask.methods import build, composed, methods
from polytask.methods.composed import Composed, Seen, Sources
from polytask.methods.lifting import Active, Plan, planned
from polytask.methods.method import Method, Params
from polytask.recipes.adapt import Plan as Asked
from polytask.recipes.adapt import adapt_many

SCALES = {"A": 0.3, "B": 0.3}


@cache
def backbone(family: str = "bert") -> Backbone:
    return tiny.backbone(family, tokenizer=TOKENS)


def lora(N: int, reads: int = 6, width: int = 5, r: int = 2, seed: int = 0) -> list[tuple[Method, Params]]:
    draw = torch.Generator().manual_seed(seed)
    method = build("lora", {"r": r, "alpha": 3.0})
    return [
        (method, {"A": torch.randn(r, reads, generator=draw), "B": torch.randn(width, r, generator=draw)})
        for _ in range(N)
    ]


def whole(method: Composed, own: Params, sources: list[tuple[Method, Params]]) -> tuple[Method, Params]:
    """The composed method at one site, with what its equation gets there."""
    over = tuple(str(n) for n in range(len(sources)))
    actives = tuple(Active(m, {"s": p}) for m, p in sources)
    bound, p = Active(replace(method, over=over), {"s": own}, actives).equation("s", Seen())
    return bound, bound.ready(p, {})


def one_by_one(sources: list[tuple[Method, Params]], x: Tensor, y: Tensor) -> Sources:
    """The sources without anything joined."""
    each = {n: (lambda new, m=m, p=p: m.delta(m.ready(p, {}), x, new)) for n, (m, p) in enumerate(sources)}
    return Sources(each)


# -- the grouped products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_joined_loras_do_what_each_does(ranks):
    loras = [lora(1, r=r, seed=r + n)[0] for n, r in enumerate(ranks)]
    bottleneck = build("bottleneck", {"reduction": 2})
    draw = torch.Generator().manual_seed(9)
    p = {n: torch.randn(s, generator=draw) for n, s in {"D": (2, 5), "b_D": (2,), "U": (5, 2), "b_U": (5,)}.items()}
    sources = [loras[0], (bottleneck, p), *loras[1:]]
    x, y = torch.randn(7, 6, generator=draw), torch.randn(7, 5, generator=draw)
    g = torch.randn(7, 4, generator=draw)

    class Given(Composed):
        def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
            assert list(sources) == [0, 1, 2, 3]
            for n, change in one_by_one(self_sources, x, y).items():
                torch.testing.assert_close(sources[n](y), change(y))
            return sources.weighted(g, y)

    self_sources = sources
    method, ready = whole(Given(), {}, sources)
    assert {n for n in ready if n.endswith((".A", ".B", ".U"))} == {"-1.A", "-1.U", "1.U"}
    expected = sum(g[:, n, None] * change(y) for n, change in one_by_one(sources, x, y).items())
    torch.testing.assert_close(method.delta(ready, x, y), expected)


ROWS = [name for name, one in methods().items() if one.rows]


@pytest.mark.parametrize("name", ROWS)
def test_methods_with_rows_are_what_their_two_halves_make(name):
    base = backbone()
    one = active(base, name, 0)
    group = Plan(base, [one]).groups[next(iter(one.at))][0]
    [p] = group.params
    site = base.sites[next(iter(one.at))]
    x, y = torch.randn(5, site.reads), torch.randn(5, site.width)
    U, c = one.method.up(p)
    made = one.method.down({row: p[row] for row in one.method.rows}, x, y) @ U + (0 if c is None else c)
    torch.testing.assert_close(made, one.method.delta(p, x, y), rtol=1e-4, atol=1e-4)
    joined = {row: torch.cat([p[row], 2 * p[row]]) for row in one.method.rows}
    wide = one.method.down(joined, x, y)
    torch.testing.assert_close(wide[:, : len(U)], one.method.down(p, x, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "pfeiffer"])
def test_a_joined_composition_is_the_one_of_each(kind, monkeypatch: pytest.MonkeyPatch):
    """Weights by what each does along a direction, then the weighted sum, for what is joined and what is not."""

    joined = []

    class Given(Composed):
        def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
            joined.append(sources._wide is not None)
            return sources.weighted(sources.along(y.sin(), y).softmax(-1), y)

    base, batch = backbone(), tiny.batch(3)
    parts = tuple(active(base, name, seed) for seed, name in enumerate((kind, "dora", kind)))
    over = Active.of(Given(over=("0", "1", "2")), {}, parts)
    with torch.no_grad():
        together = Plan(base, [over]).hidden(batch)
        assert any(joined)
        joined.clear()
        monkeypatch.setattr(composed.Bound, "_widened", lambda self, parts: parts)
        apart = Plan(base, [over]).hidden(batch)
    assert not any(joined)
    torch.testing.assert_close(together[batch.mask], apart[batch.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_only_the_chosen_are_computed_where_there_are_many(k, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(composed, "LARGE", 0)
    sources = lora(30, reads=8, width=5, r=4)
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(11, 8, generator=draw), torch.randn(11, 5, generator=draw)
    g = torch.randn(11, k, generator=draw).requires_grad_()
    which = torch.stack([torch.randperm(30, generator=draw)[:k] for _ in range(11)])
    used = []

    class Given(Composed):
        def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
            assert sources._wide is not None
            used.append(sources._wide.takes(k))
            return sources.chosen(g, which, y)

    method, ready = whole(Given(), {}, sources)
    x.requires_grad_()
    Δ = method.delta(ready, x, y)
    slopes = torch.autograd.grad(Δ.square().sum(), (g, x))
    assert used == [composed.GROUPED is not None]
    each = torch.stack([change(y) for change in one_by_one(sources, x, y).values()], dim=1)  # [T, N, width]
    expected = (each.gather(1, which[..., None].expand(-1, -1, 5)) * g[..., None]).sum(1)
    torch.testing.assert_close(Δ, expected, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(slopes, torch.autograd.grad(expected.square().sum(), (g, x)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_a_mixture_within_a_stack_is_the_weighted_sum():
    base, batch = backbone(), tiny.batch(3)
    a, b, c = (active(base, "lora", seed) for seed in range(3))
    top = active(base, "bitfit", 3)
    order, weights = planned([compose.stack([((0.3, a), (-2.0, b), (1.5, c)), ((1.0, top),)])] * 3)
    assert [one.method.name for one in order] == ["stack"]
    with torch.no_grad():
        got = Plan(base, order).hidden(batch, weights)
        apart = Plan(base, [a, b, c, top]).hidden(batch, torch.tensor([[0.3, -2.0, 1.5, 1.0]] * 3))
    torch.testing.assert_close(got[batch.mask], apart[batch.mask], rtol=2e-5, atol=2e-5)  # none of them reads y


def active(base: Backbone, name: str, seed: int) -> Active:
    method = build(name)
    draw = torch.Generator().manual_seed(seed)
    return Active.of(
        method, {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in method.start(base, seed).items()}
    )


# -- Arrow -------------------------------------------------------------------------------------------------------------


def test_arrow_by_hand():
    """x = [.5, −1, 2]; A = [1, 0, 0], [0, 1, 1], [0, 0, 2]; B = [1, 0], [0, 1], [1, 1]. v = [1, 0, 0], [0, 1, 1]/√2,
    [0, 0, 1], z = [.5, .7071, 2]; of the two greatest w = [0, .2154, .7846]; Δ_2 = [0, 1], Δ_3 = [4, 4]."""
    A = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 2]])
    B = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    sources = [
        (build("lora", {"r": 1, "alpha": 1.0}), {"A": a[None], "B": b[:, None]}) for a, b in zip(A, B, strict=True)
    ]
    v = torch.stack([torch.tensor([1.0, 0, 0]), torch.tensor([0, 0.5, 0.5]).sqrt(), torch.tensor([0.0, 0, 1])])
    method, p = whole(Arrow(top_k=2), {"v": v}, sources)
    Δ = method.delta(p, torch.tensor([[0.5, -1.0, 2.0]]), torch.zeros(1, 2))
    torch.testing.assert_close(Δ, torch.tensor([[3.1385, 3.3539]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_arrow_gives_what_peft_gives(top_k):
    """Prototypes too: PEFT's power iteration, from tensors whose largest singular value stands apart."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer
    from peft.tuners.lora.config import ArrowConfig

    base = backbone()
    site = base.sites["1.attn.q"]
    draw = torch.Generator().manual_seed(4)
    adapters = []
    for n in range(5):
        A, B = torch.randn(3, site.reads, generator=draw), torch.randn(site.width, 3, generator=draw)
        B[:, 0] *= 8
        adapters.append(made(f"t{n}", {"1.attn.q/A": A, "1.attn.q/B": B}, r=3, alpha=6.0))
    names = [f"task_{n}" for n in range(5)]
    config = ArrowConfig(top_k=top_k, router_temperature=0.7, rng_seed=0)
    config.task_adapter_names = names  # as `create_arrow_model` does
    theirs = ArrowLoraLinearLayer(site.reads, config)
    lora_A, lora_B = nn.ModuleDict(), nn.ModuleDict()
    for name, one in zip(names, adapters, strict=True):
        for store, letter in ((lora_A, "A"), (lora_B, "B")):
            t = one.tensors[f"1.attn.q/{letter}"]
            store[name] = nn.Linear(t.shape[1], t.shape[0], bias=False)
            store[name].weight.data = t.clone()
    theirs.build_prototypes(lora_A, lora_B)
    x = torch.randn(9, site.reads, generator=draw)
    expected = theirs(x, lora_A, lora_B, nn.Identity(), dict.fromkeys(names, 2.0))

    ours = arrow(base, adapters, top_k=top_k, temperature=0.7)
    v = ours.tensors["1.attn.q/v"]
    assert (v * theirs.prototypes).sum(1).abs().min() > 1 - 1e-5
    method = build(ours.method, ours.hyperparameters)
    sources = [(build("lora", one.hyperparameters), one.at("1.attn.q")) for one in adapters]
    bound, p = whole(method, {"v": v}, sources)
    torch.testing.assert_close(bound.delta(p, x, torch.zeros(9, site.width)), expected, rtol=2e-3, atol=2e-2)
    exact = {"v": theirs.prototypes}
    bound, p = whole(method, exact, sources)
    torch.testing.assert_close(bound.delta(p, x, torch.zeros(9, site.width)), expected, rtol=1e-5, atol=1e-4)


def made(name: str, tensors: dict[str, Tensor], method: str = "lora", **hyper: object) -> Adapter:
    one = skills()[0]
    sites = sorted({n.rpartition("/")[0] for n in tensors})
    said = build(method, {**hyper, "sites": sites}).hyperparameters()
    kept = {n: t for n, t in one.tensors.items() if n.startswith(("head/", "task/"))}
    return replace(
        one,
        method=method,
        hyperparameters=said,
        tensors=tensors | kept,
        card=one.card.model_copy(update={"name": name}),
    )


@cache
def skills() -> tuple[Adapter, ...]:
    found = []
    for seed in range(3):
        own = replace(task_of(seed=seed), name=f"skill-{seed}")
        one = pt.adapt(backbone(), own, "lora", settings=pt.Settings(epochs=1, batch=16, seed=seed))
        draw = torch.Generator().manual_seed(seed)
        moved = {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in one.tensors.items()}
        found.append(replace(one, tensors=moved))
    return tuple(found)


def library(*more: Adapter):
    return {one.id: one for one in (*skills(), *more)}.__getitem__


def test_prototypes_are_the_top_right_singular_vectors():
    base = backbone()
    ours = arrow(base, skills())
    for site in ("0.attn.q", "2.attn.v"):
        for n, one in enumerate(skills()):
            p = one.at(site)
            _, _, Vt = torch.linalg.svd((p["B"] @ p["A"]).double())
            assert float((Vt[0].float() * ours.tensors[f"{site}/v"][n]).sum().abs()) == pytest.approx(1.0, abs=1e-5)


def test_another_linear_method_has_prototypes_too_and_nothing_has_none():
    base = backbone()
    draw = torch.Generator().manual_seed(0)
    start = build("kasa", {"sites": ["0.attn.q"]}).start(base, 0)
    kasa = made("kasa", {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in start.items()}, "kasa")
    zero = made("zero", build("lora", {"sites": ["0.attn.q"]}).start(base, 0))
    v = arrow(base, [kasa, zero]).tensors["0.attn.q/v"]
    method = build("kasa", kasa.hyperparameters)
    frozen = method.frozen(base, base.sites["0.attn.q"])
    p = method.ready(kasa.at("0.attn.q"), frozen)
    W, b = (base.linear(base.sites["0.attn.q"])[n] for n in "Wb")
    eye = torch.eye(W.shape[1])
    ΔW = (method.delta(p, eye, eye @ W.T + b) - method.delta(p, 0 * eye, 0 * eye + b)).T
    assert float((torch.linalg.svd(ΔW)[2][0] * v[0]).sum().abs()) == pytest.approx(1.0, abs=1e-4)
    assert not v[1].any()


def test_an_arrow_is_an_adapter(tmp_path: Path):
    """It is saved, loaded and asked, alone and in a batch with others."""
    base = backbone()
    ours = arrow(base, skills(), top_k=2, head=skills()[1], name="all")
    assert set(ours.needs) == {one.id for one in skills()}
    ours.save(tmp_path / "all")
    back = Adapter.load(tmp_path / "all")
    assert back.id == ours.id
    texts = ["a e f", "g", "e b h h"]
    alone = Engine(base, adapters=[*skills(), back]).answer([Request(t, adapter="all") for t in texts])
    mixed = Engine(base, adapters=[*skills(), back]).answer(
        [Request(t, adapter=who) for t in texts for who in ("all", "skill-1")]
    )
    assert [a.output for a in mixed[::2]] == [a.output for a in alone]
    for a, b in zip(mixed[::2], alone, strict=True):
        assert a.probability == pytest.approx(b.probability, abs=1e-5)
    assert [a.probability for a in mixed[1::2]] != [a.probability for a in alone]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_arrow_over_one_is_that_one_and_rows_do_not_see_each_other(family):
    base = backbone(family)
    batch = tiny.batch(4)
    loras = [active(base, "lora", seed) for seed in range(3)]
    draw = torch.Generator().manual_seed(3)
    v = {site: {"v": torch.randn(3, base.sites[site].reads, generator=draw)} for site in loras[0].at}
    single = Active(Arrow(over=("0",)), {site: {"v": p["v"][:1]} for site, p in v.items()}, (loras[0],))
    many = Active(Arrow(over=("0", "1", "2"), top_k=2), v, tuple(loras))
    with torch.no_grad():
        one, same = Plan(base, [loras[0]]).hidden(batch), Plan(base, [single]).hidden(batch)
        torch.testing.assert_close(one[batch.mask], same[batch.mask], rtol=1e-5, atol=1e-5)
        both = Plan(base, [many, replace(many)]).hidden(batch, torch.eye(2)[[0, 1, 0, 1]])  # lifted by vmap
        apart = Plan(base, [many]).hidden(batch)
    torch.testing.assert_close(both[batch.mask], apart[batch.mask], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(apart[batch.mask], one[batch.mask], atol=1e-2)


def test_what_arrow_refuses():
    base = backbone()
    ours = arrow(base, skills())
    start = build("bottleneck").start(base, 0)
    bent = made("bent", {n: t + 0.1 for n, t in start.items()}, "bottleneck")
    other = tiny.backbone("bert", seed=5)
    with pytest.raises(UsageError, match="made of other adapters"):
        arrow(base, [skills()[0], ours])
    with pytest.raises(UsageError, match=r"no linear map|not linear"):
        arrow(base, [skills()[0], bent])
    with pytest.raises(UsageError, match="give some"):
        arrow(base, [])
    with pytest.raises(PolytaskError, match="other weights"):
        arrow(other, skills())


# -- MeteoRA -----------------------------------------------------------------------------------------------------------


def test_meteora_by_hand():
    """G = [[1, 0], [0, 1], [.5, −.5]], x = [1, 2], k = 2, s = 2: z = [1, 2, −.5], w = .7311 on the second and .2689 on
    the first; A = [1, 0], [0, 1], [1, 1], B = [1, 0], [0, 1], [1, 1]: Δ = .2689·[2, 0] + .7311·[0, 4]."""
    A = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    sources = [
        (build("lora", {"r": 1, "alpha": 2.0}), {"A": a[None], "B": b[:, None]}) for a, b in zip(A, A, strict=True)
    ]
    G = torch.tensor([[1.0, 0], [0, 1], [0.5, -0.5]])
    method, p = whole(MeteoRA(), {"G": G}, sources)
    Δ = method.delta(
        p | {"at": torch.zeros(1), "owner": torch.tensor(-1)}, torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    )
    torch.testing.assert_close(Δ, torch.tensor([[0.5379, 2.9242]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lifted", [False, True])
def test_gates_get_the_gradient_of_their_own_loss_beside_the_tasks(lifted):
    """That of c Σ −log softmax(G x)_owner over real tokens; lifted over rows whose owners differ too."""
    sources = lora(4)
    draw = torch.Generator().manual_seed(2)
    R, T = 3, 5
    x, y = torch.randn(R, T, 6, generator=draw), torch.randn(R, T, 5, generator=draw)
    at = torch.tensor([[0, 1, 2, -1, -1], [0, 1, 2, 3, 4], [0, -1, -1, -1, -1]])
    owner = torch.tensor([2, 0, 2])
    G = torch.randn(4, 6, generator=draw)

    def task_loss(G: Tensor, taught: bool) -> Tensor:
        method, p = whole(MeteoRA(gate=0.3 if taught else 0.0), {"G": G}, sources)

        def row(x: Tensor, y: Tensor, at: Tensor, owner: Tensor) -> Tensor:
            return method.delta(p | {"at": at, "owner": owner}, x, y)

        if lifted:
            return torch.func.vmap(row)(x, y, at, owner).square().sum()
        return torch.stack([row(*each) for each in zip(x, y, at, owner, strict=True)]).square().sum()

    slopes = []
    for taught in (False, True):
        own = G.clone().requires_grad_()
        loss = task_loss(own, taught)
        slopes.append(torch.autograd.grad(loss, own)[0])
    own = G.clone().requires_grad_()
    z = (x @ own.T).log_softmax(-1).gather(-1, owner[:, None, None].expand(-1, T, 1))[..., 0]
    gate = torch.autograd.grad(0.3 * -(z * (at >= 0)).sum(), own)[0]
    torch.testing.assert_close(slopes[1], slopes[0] + gate, rtol=1e-4, atol=1e-4)
    assert gate.abs().max() > 0.1


def test_a_site_where_the_owner_does_not_act_teaches_nothing():
    sources = lora(3)
    x, y = torch.randn(5, 6), torch.randn(5, 5)
    at = torch.arange(5)
    slopes = []
    for owner in (-1, 1):
        G = torch.ones(3, 6).mul_(torch.arange(18).view(3, 6) / 9).requires_grad_()
        actives = tuple(Active(m, {"s": p} if n != 1 else {}) for n, (m, p) in enumerate(sources))
        method, p = Active(
            MeteoRA(over=("0", "1", "2")), {"s": {"G": G, "owner": torch.tensor(owner)}}, actives
        ).equation("s", Seen())
        Δ = method.delta(method.ready(p, {}) | {"at": at}, x, y)
        slopes.append(torch.autograd.grad(Δ.square().sum(), G)[0])
    torch.testing.assert_close(slopes[0], slopes[1])
    assert not slopes[0][1].any()


def asked() -> list[Asked]:
    settings = pt.Settings(epochs=2, batch=16, lr=0.02, patience=9)
    return [
        Asked(
            replace(task_of(seed=seed, n=32, held=16), name=f"skill-{seed}"),
            "meteora",
            {"owner": one.id},
            settings,
            over=skills(),
        )
        for seed, one in enumerate(skills()[:2])
    ]


def test_gates_are_shared_by_the_jobs_of_many_tasks_and_nothing_else_moves():
    base = backbone()
    before = {one.id: {n: t.clone() for n, t in one.tensors.items()} for one in skills()}
    plans = [replace(plan, task=replace(plan.task, validation=())) for plan in asked()]  # so that the last tensors stay
    first, second = adapt_many(base, plans)
    for one in skills():
        assert all(torch.equal(t, before[one.id][n]) for n, t in one.tensors.items())
    gates = [n for n in first.tensors if n.endswith("/G")]
    assert len(gates) == len(skills()[0].sites)
    assert all(first.tensors[n].shape == (3, base.sites[n.removesuffix("/G")].reads) for n in gates)
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in gates)
    assert (int(first.tensors["shared/owner"]), int(second.tensors["shared/owner"])) == (0, 1)
    assert not torch.equal(first.tensors["head/W"], second.tensors["head/W"])
    alone = adapt_many(base, plans[:1])[0]
    assert not torch.equal(alone.tensors[gates[0]], first.tensors[gates[0]])
    start = build("meteora", first.hyperparameters).start(base, 0)
    assert not torch.equal(start[gates[0]], first.tensors[gates[0]])


def test_the_gate_loss_makes_tokens_take_their_owner(tmp_path: Path):
    base = backbone()
    taught = pt.adapt(
        base, asked()[0].task, "meteora", hyperparameters={"owner": skills()[2].id, "gate": 1.0}, over=skills(),
        settings=pt.Settings(epochs=3, batch=8, lr=0.03, patience=9),
    )  # fmt: skip
    plain = pt.adapt(
        base, asked()[0].task, "meteora", over=skills(), settings=pt.Settings(epochs=3, batch=8, lr=0.03, patience=9)
    )
    shares = [float(trace(base, one, library(), "a e f g h b").mean[:, 2].mean()) for one in (taught, plain)]
    assert shares[0] > 0.85
    assert shares[1] < 0.7
    taught.save(tmp_path / "taught")
    back = Adapter.load(tmp_path / "taught")
    asked_for = [Request(text, adapter=back.id) for text in ("a e", "f g b")]
    engine = Engine(base, adapters=[*skills(), back])
    assert [a.output for a in engine.answer(asked_for)]


def test_an_arrow_is_not_trained():
    with pytest.raises(UsageError, match="arrow is not trained"):
        pt.adapt(backbone(), asked()[0].task, "arrow", over=skills())
    above = pt.adapt(backbone(), asked()[0].task, "head", above=[arrow(backbone(), skills())], library=shelf())
    assert above.tensors["head/W"].shape == (4, 32)


class shelf:
    def get(self, ref: str) -> Adapter:
        return library()(ref)


def test_an_owner_must_be_among_the_adapters():
    with pytest.raises(UsageError, match="owner nobody"):
        pt.adapt(backbone(), asked()[0].task, "meteora", hyperparameters={"owner": "nobody"}, over=skills())


# -- PHATGOOSE ---------------------------------------------------------------------------------------------------------


def test_phatgoose_by_hand():
    """u = [1, 2, 3] is [−1.2247, 0, 1.2247] standardised, v₂ = [2, 0, 1] is [1.2247, −1.2247, 0]: z₂ = −1.5/√3; v₁ =
    [.5, −1, .5] is [.7071, −1.4142, .7071]: z₁ = 0; w = [.7039, .2961]."""
    one = build("lora", {"r": 1, "alpha": 1.0})
    sources = [(one, {"A": torch.tensor([[1.0, 0, 0]]), "B": b[:, None]}) for b in torch.eye(2)]
    v = torch.tensor([[0.5, -1.0, 0.5], [2.0, 0.0, 1.0]])
    method, p = whole(Phatgoose(), {"v": v}, sources)
    Δ = method.delta(p, torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 2))
    torch.testing.assert_close(Δ, torch.tensor([[0.7039, 0.2961]]), atol=1e-4, rtol=0)


def test_a_gate_halves_its_adapter_at_first_and_is_all_that_is_trained():
    base, batch = backbone(), tiny.batch(3)
    one = skills()[0]
    gate = pt.adapt(
        base, asked()[0].task, "phatgoose_gate", over=[one], settings=pt.Settings(epochs=1, batch=16, lr=0.02)
    )
    assert {n.rpartition("/")[2] for n in gate.tensors if not n.startswith(("head", "task"))} == {"v"}
    assert gate.card.trained_parameters == 32 * len(one.sites) + gate.tensors["head/W"].numel() + 4
    assert any(gate.tensors[f"{site}/v"].any() for site in one.sites)
    source = Active.of(build("lora", one.hyperparameters), one.tensors)
    method = build("phatgoose_gate", gate.hyperparameters)
    start = Active.of(method, method.start(base, 0), (source,))
    with torch.no_grad():
        half, same = (
            Plan(base, [a]).hidden(batch, w) for a, w in ((source, torch.full((3, 1), 0.5)), (start, torch.ones(3, 1)))
        )
    torch.testing.assert_close(half[batch.mask], same[batch.mask], rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="a gate is for one adapter"):
        pt.adapt(base, asked()[0].task, "phatgoose_gate", over=skills())


def test_gates_that_know_nothing_of_each_other_route_together(tmp_path: Path):
    base = backbone()
    settings = pt.Settings(epochs=1, batch=16, lr=0.02)
    gates = [pt.adapt(base, asked()[0].task, "phatgoose_gate", over=[one], settings=settings) for one in skills()[:2]]
    ours = phatgoose(base, gates, head=skills()[0])
    assert set(ours.needs) == {one.id for one in skills()[:2]}
    ours.save(tmp_path / "all")
    back = Adapter.load(tmp_path / "all")
    answers = Engine(base, adapters=[*skills(), back]).answer([Request(t, adapter=back.id) for t in ("a e f", "g")])
    assert all(a.output in "abcd" for a in answers)
    found = trace(base, back, library(), "a e f")
    assert len(found.weights) == len(skills()[0].sites)
    site = "0.attn.q"
    [ids] = base.tokenize(["a e f"])
    u = base.upto(base.collate([ids]), 0)[0, : len(ids)]
    v = torch.stack([gate.tensors[f"{site}/v"] for gate in gates])

    def standard(t: Tensor) -> Tensor:
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    expected = (standard(u) @ standard(v).T / 32**0.5).softmax(-1)
    torch.testing.assert_close(found.weights[site], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="train its gate"):
        phatgoose(base, skills())


# -- what took what ----------------------------------------------------------------------------------------------------


def test_a_trace_says_what_each_token_took():
    """At the site whose prototypes are set by hand each token takes the adapter that its own state points at."""
    base = backbone()
    ours = arrow(base, skills(), top_k=1)
    text = "a b c a"
    [ids] = base.tokenize([text])
    states = base.upto(base.collate([ids]), 0)[0, : len(ids)]
    site = "0.attn.q"
    v = torch.stack([states[1], states[2], states[3]])
    ours = replace(ours, tensors={**ours.tensors, f"{site}/v": v})
    found = trace(base, ours, library(), text)
    assert found.tokens == ("[CLS]", "a", "b", "c", "a", "[SEP]")
    assert found.over == tuple(one.id for one in skills())
    assert set(found.weights) == set(skills()[0].sites)
    expected = (states @ v.T).abs().argmax(-1)
    assert torch.equal(found.weights[site].argmax(-1), expected)
    for w in found.weights.values():
        torch.testing.assert_close(w.sum(-1), torch.ones(len(ids)))
    took = [found.over.index(one) for one in found.took]
    assert took == found.mean.argmax(-1).tolist()
    assert found.switches == tuple(t for t in range(1, len(took)) if took[t] != took[t - 1])
    assert str(found).startswith(f"[CLS][{took[0]}] a[{took[1]}]")
    with pytest.raises(UsageError, match="nothing to trace"):
        trace(base, skills()[0], library(), text)


# -- clusters ----------------------------------------------------------------------------------------------------------


def test_clusters_are_what_the_tensors_say():
    """Two directions with noise, and one adapter of its own; scale does not count."""
    draw = torch.Generator().manual_seed(0)
    means = [torch.randn(4, 32, generator=draw) for _ in range(3)]
    adapters = []
    for i, cluster in enumerate([0, 1, 0, 2, 1, 0]):
        A = (means[cluster] + 0.3 * torch.randn(4, 32, generator=draw)) * (1 + i)
        adapters.append(made(f"t{i}", {"0.attn.q/A": A, "0.attn.q/B": torch.ones(32, 4) * (1 + i)}, r=4))
    ids = [one.id for one in adapters]
    assert clusters(adapters, 3) == ((ids[0], ids[2], ids[5]), (ids[1], ids[4]), (ids[3],))
    assert clusters(adapters, 1) == (tuple(ids),)


def test_what_is_small_does_not_count():
    """Half of the numbers, the smaller half, are alike in all and louder than nothing else: with q = 0 they decide."""
    big = torch.eye(2, 8).repeat_interleave(2, 0)  # adapters 0, 1 and 2, 3
    rest = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]) * 0.45 * torch.ones(4, 24)
    θ = torch.cat([2 * big, rest], dim=1)
    adapters = [
        made(f"t{i}", {"0.attn.q/A": row[None], "0.attn.q/B": torch.zeros(32, 1)}, r=1) for i, row in enumerate(θ)
    ]
    ids = [one.id for one in adapters]
    assert clusters(adapters, 2, q=0.0) == ((ids[0], ids[2]), (ids[1], ids[3]))
    assert clusters(adapters, 2, q=0.97) == ((ids[0], ids[1]), (ids[2], ids[3]))


def test_what_cannot_be_clustered():
    one, two = skills()[:2]
    short = made("short", {"0.attn.q/A": torch.ones(1, 32), "0.attn.q/B": torch.ones(32, 1)}, r=1)
    with pytest.raises(UsageError, match="3 clusters of 2"):
        clusters([one, two], 3)
    with pytest.raises(UsageError, match="other tensors"):
        clusters([one, short], 2)
    with pytest.raises(UsageError, match="q = 1"):
        clusters([one, two], 2, q=1.0)
    assert np.size(clusters([one, two], 2)) == 2
