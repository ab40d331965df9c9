"""The runtime of the algebra, for every family and method: rows get what their adapters alone give, and nothing else
changes. Tensors are random and not zero, rows are padded to different lengths, all is fp32."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from polytask.backbones import Backbone, Batch
from polytask.backbones.weights import fingerprint
from polytask.errors import PolytaskError, UsageError
from polytask.methods import Method, Params, lifting, lora, methods
from polytask.methods import build as build_method
from polytask.methods.lifting import Active, Columns, Group, Plan, lifted
from polytask.methods.method import METHODS, method

NAMES = tuple(name for name in methods() if name != "head")  # a new method is tested without a line here
NEEDED = {  # what a method has no default for
    "peft": {"type": "VERA", "sites": ["*.attn.[qv]"]},
    "reprogram": {"alphabet": "ACDEFGHIKLMNPQRSTVWY"},
}
DECODERS = {"bitune"}  # what is for these alone
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
every_method = pytest.mark.parametrize("name", NAMES)


def build(name: str, hyper: dict[str, object] | None = None) -> Method:
    return build_method(name, NEEDED.get(name, {}) | (hyper or {}))


def fitting(backbone: Backbone, name: str, hyper: dict[str, object] | None = None) -> Method:
    """The method, at those of its sites that the family has: see test_moe.py."""
    m = build(name, hyper)
    return replace(m, sites=tuple(tiny.sites(backbone.family, *m.sites))) if m.sites else m


@cache
def backbone_of(family: str) -> Backbone:
    return tiny.backbone(family)


@pytest.fixture(autouse=True)
def untouched():
    """Whatever a test does, the backbones that it used are bit-identical afterwards, and no hook is left."""
    yield
    for family in tiny.FAMILIES:
        if family in used:
            assert fingerprint(backbone_of(family).model) == backbone_of(family).fingerprint, family
            clean(backbone_of(family))
    used.clear()


used: set[str] = set()


def base(family: str) -> Backbone:
    used.add(family)
    return backbone_of(family)


def clean(backbone: Backbone) -> None:
    for module in backbone.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())


def shaken(m: Method, backbone: Backbone, seed: int = 0) -> dict[str, Tensor]:
    """The method's tensors, all of them moved away from where they start."""
    draw = torch.Generator().manual_seed(seed)
    scale = 0.02 if m.swaps else 0.2
    return {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, seed).items()}


def active(backbone: Backbone, name: str, seed: int = 0, **hyper: object) -> Active:
    m = fitting(backbone, name, hyper)
    return Active.of(m, shaken(m, backbone, seed))


def for_decoders(family: str, name: str) -> None:
    if name in DECODERS and backbone_of(family).kind != "decoder":
        pytest.skip("opens a causal mask")


def states(backbone: Backbone, adapters: list[Active], batch: Batch, weights: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return Plan(backbone, adapters).hidden(batch, weights)


def close(a: Tensor, b: Tensor, mask: Tensor | None = None, tolerance: float = 1e-5) -> None:
    if mask is not None:
        a, b = a[mask], b[mask]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- one adapter -------------------------------------------------------------------------------------------------------


@every_family
@every_method
def test_the_start_is_the_backbone_and_other_tensors_are_not(family, name):
    for_decoders(family, name)
    backbone, batch = base(family), tiny.batch(3)
    m = fitting(backbone, name)
    plain = backbone.hidden(batch)
    if not m.elsewhere:
        assert torch.equal(states(backbone, [Active.of(m, m.start(backbone, 0))], batch), plain)
    moved = states(backbone, [active(backbone, name)], batch)
    assert (moved - plain)[batch.mask].abs().max() > 1e-3
    assert torch.equal(states(backbone, [active(backbone, name)], batch, torch.zeros(3, 1)), plain)


@every_family
@every_method
def test_gradients_reach_the_methods_tensors_and_nothing_else(family, name):
    for_decoders(family, name)
    backbone, batch = base(family), tiny.batch(3)
    m = fitting(backbone, name)
    tensors = {n: t.requires_grad_() if m.trains(n) else t for n, t in shaken(m, backbone).items()}
    h = Plan(backbone, [Active.of(m, tensors)], training=True).hidden(batch)
    h[batch.mask].square().sum().backward()
    # A shift of all keys moves all scores of a query alike, and softmax does not see it.
    shifts = {n for n in tensors if n.endswith(("key/bias", "k_proj/bias", "k_lin/bias"))}
    for n, t in tensors.items():
        if not m.trains(n):
            continue
        assert t.grad is not None, n
        assert (t.grad.abs().max() > 0) or n in shifts, n


def test_a_scaled_tensor_moves_the_output_as_its_gradient_says():
    """The gradient is right in size too: a finite difference along each kind of tensor, in fp64."""
    backbone = tiny.backbone("bert")
    backbone.model.double()
    backbone.dtype = torch.float64
    batch = tiny.batch(2)
    for name in (name for name in NAMES if name not in DECODERS):
        m = build(name)
        tensors = {n: t.double().requires_grad_() for n, t in shaken(m, backbone).items()}
        if m.precise or name in ("dora", "task_experts"):
            continue  # cast to fp32; takes norms for constants (see test_methods_numeric); a hard choice, a soft slope
        draw = torch.Generator().manual_seed(3)
        step = {n: torch.randn(t.shape, generator=draw, dtype=torch.float64) for n, t in tensors.items()}

        def value(at: dict[str, Tensor], m: Method = m) -> Tensor:
            torch.manual_seed(0)  # what training draws is drawn alike
            return Plan(backbone, [Active.of(m, at)], training=True).hidden(batch)[batch.mask].sin().sum()

        value(tensors).backward()
        slope = sum(float((t.grad * step[n]).sum()) for n, t in tensors.items())
        ε = 1e-6 if not m.swaps else 1e-3  # so small that no choice (top k) changes; θ + Δθ is summed in fp32
        with torch.no_grad():
            up, down = ({n: t + s * step[n] for n, t in tensors.items()} for s in (ε, -ε))
            assert float(value(up) - value(down)) / (2 * ε) == pytest.approx(slope, rel=1e-4 if not m.swaps else 2e-2)


def test_counts_are_those_of_the_equations():
    backbone = base("llama")  # 3 blocks, d = 32, q 32, k and v 16, feed-forward 64
    count = {name: sum(t.numel() for t in build(name).start(backbone, 0).values()) for name in NAMES}
    m = 32 // 16
    assert count["lora"] == 3 * (8 * (32 + 32) + 8 * (32 + 16))
    assert count["bottleneck"] == 3 * 2 * (2 * 32 * m + 32 + m)
    assert count["pfeiffer"] == 3 * (2 * 32 * m + 32 + m)
    assert count["ia3"] == 3 * (16 + 16 + 64)
    assert count["full"] == sum(p.numel() for p in backbone.model.parameters())
    wide = build("lora", {"r": 3, "sites": ["*.mlp.up", "embed"]}).start(backbone, 0)
    assert sum(t.numel() for t in wide.values()) == 3 * 3 * (32 + 64) + 3 * (32 + 32)


# -- a batch of many adapters ------------------------------------------------------------------------------------------


def zoo(backbone: Backbone) -> list[Active]:
    """All methods, several ranks, widths, scales and places."""
    return [
        active(backbone, "lora", 1, r=4),
        active(backbone, "lora", 2, r=2, alpha=3, rslora=True, sites=["*.attn.[qkvo]", "*.mlp.*"]),
        active(backbone, "lora", 3, r=4),
        active(backbone, "bottleneck", 4),
        active(backbone, "bottleneck", 5, reduction=8, sites=["*.attn.o", "*", "embed"]),
        active(backbone, "pfeiffer", 6),
        active(backbone, "ia3", 7),
        active(backbone, "ia3", 8, sites=["*.attn.[qv]", "*.mlp"]),
        active(backbone, "full", 9),
        active(backbone, "full", 10),
    ]


@every_family
def test_rows_of_a_batch_get_what_their_adapters_alone_give(family):
    backbone = base(family)
    adapters = zoo(backbone) + [
        active(backbone, name, 11) for name in NAMES if name not in DECODERS or backbone.kind == "decoder"
    ]
    K = len(adapters)
    mixtures = [{0: 0.7, 2: 0.3}, {1: 0.5, 3: 1.5}, {5: 0.4, 6: -0.6}, {8: 0.5, 9: 0.5}, {4: 1.0, 7: 0.2, 8: 1.0}, {}]
    rows = [{k: 1.0} for k in range(K)] + mixtures + [{0: 1.0}, {8: 1.0}]
    weights = torch.tensor([[row.get(k, 0.0) for k in range(K)] for row in rows])
    batch = tiny.batch(len(rows))
    together = states(backbone, adapters, batch, weights)
    for i, row in enumerate(rows):
        one = batch.rows(torch.tensor([i]))
        mine = [adapters[k] for k in row]
        alone = states(backbone, mine, one, torch.tensor([list(row.values())])) if mine else backbone.hidden(one)
        close(together[i : i + 1], alone, one.mask, 3e-5 if family in ("t5", "mt5", "umt5") else 1e-5)
    # Padding is of no consequence: a row cut to its own length has the same states.
    n = int(batch.mask[1].sum())
    short = Batch(batch.ids[1:2, :n], batch.mask[1:2, :n])
    close(together[1:2, :n], states(backbone, [adapters[1]], short))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "deberta-v2", "bart", "modernbert"])
def test_the_gradient_of_a_mixed_batch_is_that_of_each_row_alone(family):
    backbone = base(family)
    made = [build(n, h) for n, h in (("lora", {"r": 4}), ("lora", {"r": 2}), ("bottleneck", {}), ("pfeiffer", {}))]
    made += [build("ia3"), build("full"), build("lora", {"r": 4, "alpha": 4})]
    rows = [{k: 1.0} for k in range(len(made))] + [{0: 0.5, 2: 0.5}, {5: 0.3, 6: 0.7}, {}]
    weights = torch.tensor([[row.get(k, 0.0) for k in range(len(made))] for row in rows])
    batch = tiny.batch(len(rows))

    def gradients(parts: list[Tensor]) -> list[dict[str, Tensor]]:
        tensors = [{n: t.requires_grad_() for n, t in shaken(m, backbone, k).items()} for k, m in enumerate(made)]
        plan = Plan(backbone, [Active.of(m, t) for m, t in zip(made, tensors, strict=True)], training=True)
        for part in parts:
            some = batch.rows(part)
            loss = plan.hidden(some, weights[part])[some.mask].square().sum()
            if loss.requires_grad:
                loss.backward()
        return [{n: torch.zeros(()) if t.grad is None else t.grad for n, t in own.items()} for own in tensors]

    mixed = gradients([torch.arange(len(rows))])
    alone = gradients(list(torch.arange(len(rows))[:, None]))
    for a, b in zip(mixed, alone, strict=True):
        for n in a:
            scale = b[n].abs().max().clamp(min=1e-3)
            close(a[n] / scale, b[n] / scale, tolerance=2e-4)


def test_one_row_is_one_row():
    """A batch of one row, and rows that are all alike, take the flattened path; weights count there too."""
    for family in ("bert", "llama", "deberta-v2"):
        backbone = base(family)
        for adapter in zoo(backbone):
            batch = tiny.batch(4)
            three = states(backbone, [adapter], batch, torch.tensor([[0.3], [0.3], [0.3], [1.0]]))
            for i, w in ((0, 0.3), (3, 1.0)):
                one = batch.rows(torch.tensor([i]))
                close(three[i : i + 1], states(backbone, [adapter], one, torch.tensor([[w]])), one.mask)
            close(three[3:], states(backbone, [adapter], batch.rows(torch.tensor([3]))), batch.mask[3:])


def test_the_order_of_adapters_does_not_matter():
    backbone, batch = base("bert"), tiny.batch(3)
    # `0.attn` and `0.attn.o` are one module, `1` is the norm that `1.sum` stands before.
    adapters = [
        active(backbone, "ia3", 1, sites=["*.attn", "*"]),
        active(backbone, "lora", 2, sites=["*.attn.o"]),
        active(backbone, "pfeiffer", 3),
        active(backbone, "bottleneck", 4, sites=["*.attn.o", "*.mlp.down"]),
    ]
    w = torch.tensor([0.5, 1.0, 0.7, 1.2])
    first = states(backbone, adapters, batch, w.expand(3, 4))
    for order in itertools.permutations(range(4)):
        close(states(backbone, [adapters[k] for k in order], batch, w[list(order)].expand(3, 4)), first, batch.mask)


# -- DeBERTa's positions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_relative_positions_are_projected_by_the_rows_own_adapter(shared):
    """With share_att_key query_proj and key_proj also project the relative positions, which have no row axis: LoRA on
    them is the same as W + s B A in the model."""
    backbone = tiny.backbone("deberta-v2", share_att_key=shared)
    batch = tiny.batch(4)
    adapters = [active(backbone, "lora", k, r=k + 1, sites=["*.attn.[qk]"]) for k in range(3)]
    weights = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.5, 0.25, 0], [0, 0, 0]])
    together = states(backbone, adapters, batch, weights)
    for i, row in enumerate(weights):
        model = copy.deepcopy(backbone.model)
        for k, adapter in enumerate(adapters):
            for name, p in adapter.at.items():
                s = adapter.method.alpha / adapter.method.r
                model.get_submodule(backbone.sites[name].path).weight.data += row[k] * s * (p["B"] @ p["A"])
        with torch.no_grad():
            alone = model(batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        close(together[i], alone[i], batch.mask[i])
    scaled = [active(backbone, "ia3", 1, sites=["*.attn.k"])]
    model = copy.deepcopy(backbone.model)
    for name, p in scaled[0].at.items():
        module = model.get_submodule(backbone.sites[name].path)
        module.weight.data *= p["l"][:, None]
        module.bias.data *= p["l"]
    with torch.no_grad():
        alone = model(batch.ids, attention_mask=batch.mask.long()).last_hidden_state
    close(states(backbone, scaled, batch), alone, batch.mask)


def test_a_module_that_reads_something_else_than_the_rows_is_refused():
    """A site whose module runs on other things than the batch's rows has no row to take an adapter from."""
    backbone, batch = tiny.backbone("bert"), tiny.batch(3)
    layer = backbone.blocks[0]
    inner = layer.attention.self.query.forward

    def twice(x: Tensor) -> Tensor:
        layer.attention.self.value(x[:2])
        return inner(x)

    layer.attention.self.query.forward = twice
    with pytest.raises(PolytaskError, match=r"0\.attn\.v") as error:
        states(backbone, [active(backbone, "lora")], batch)
    assert "\n" not in str(error.value)
    del layer.attention.self.query.forward
    clean(backbone)


# -- the paths are equal -----------------------------------------------------------------------------------------------

WEIGHTS = {
    "one": [[0, 1, 0]] * 4,
    "one, weighted": [[0, 0.3, 0], [0, -2, 0], [0, 0.5, 0], [0, 1, 0]],
    "each its own": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]],
    "each its own, weighted": [[0.2, 0, 0], [0, 1, 0], [0, 0, -3], [0, 0.5, 0]],
    "some none": [[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]],
    "mixtures": [[0.7, 0.3, 0], [0, 1, 1], [0.1, 0.2, 0.3], [0, 0, 0]],
    "all of one row": [[0.5, 1, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
}


def group_of(name: str, hypers: list[dict[str, object]], site: str = "1.mlp.up") -> Group:
    backbone = base("llama")
    adapters = [active(backbone, name, k, sites=[site], **h) for k, h in enumerate(hypers)]
    group = Group(0, adapters[0].method, adapters[0].at[site], backbone, site)
    for k, adapter in enumerate(adapters[1:], 1):
        assert group.takes(adapter.method, adapter.at[site])
        group.add(k, adapter.method, adapter.at[site])
    return group


def by_hand(group: Group, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The sum as the docstring has it, one row and adapter at a time."""
    rows = []
    for xi, yi, wi in zip(x, y, w, strict=True):
        Δ = [wk * m.delta(p, xi, yi) for wk, m, p in zip(wi, group.methods, group.params, strict=True)]
        rows.append(yi + sum(Δ))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("wide", [128, 0], ids=["wide", "stacked"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 6, 3)], ids=["one rank", "ranks"])
def test_loras_own_path_is_the_generic_one(monkeypatch, kind, wide, ranks):
    monkeypatch.setattr(lora, "WIDE", wide)
    group = group_of("lora", [{"r": r, "alpha": 1 + r, "rslora": r == 6} for r in ranks])
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 5, 32, generator=draw), torch.randn(4, 5, 64, generator=draw)
    w = torch.tensor(WEIGHTS[kind], dtype=torch.float32)
    expected = by_hand(group, x, y, w)
    before = y.clone()
    for _ in range(2):  # what is joined is kept for the second call
        close(group.methods[0].mix(group, x, y, Columns(w)), expected)
    assert torch.equal(y, before)
    stacked = wide == 0 and len(set(ranks)) == 1 and Columns(w).whole
    assert list(group.joined) == ([] if kind.startswith("one") else ["stacked"] if stacked else ["wide"])
    if len(set(ranks)) == 1:
        same = group_of("lora", [{"r": 4}] * 3)
        close(same.methods[0].mix(same, x, y, Columns(w)), lifted(same, x, y, Columns(w)))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_ia3s_own_path_is_the_generic_one(kind):
    group = group_of("ia3", [{}] * 3)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 5, 32, generator=draw), torch.randn(4, 5, 64, generator=draw)
    w = torch.tensor(WEIGHTS[kind], dtype=torch.float32)
    before = y.clone()
    for _ in range(2):  # what is joined is kept for the second call
        found = group.methods[0].mix(group, x, y, Columns(w))
        close(found, by_hand(group, x, y, w))
        close(found, lifted(group, x, y, Columns(w)))
    assert torch.equal(y, before)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["lora", "bottleneck", "pfeiffer", "ia3"])
def test_gathered_and_looped_are_equal(monkeypatch, kind, name):
    group = group_of(name, [{}] * 3)
    draw = torch.Generator().manual_seed(0)
    reads = 32 if name == "lora" else 64
    x, y = torch.randn(4, 5, reads, generator=draw), torch.randn(4, 5, 64, generator=draw)
    w = torch.tensor(WEIGHTS[kind], dtype=torch.float32)
    expected = by_hand(group, x, y, w)
    called: list[object] = []
    vmap = torch.func.vmap
    monkeypatch.setattr(torch.func, "vmap", lambda f, **how: called.append(f) or vmap(f, **how))
    for limit in (0, 1 << 30):
        monkeypatch.setattr(lifting, "GATHER_LIMIT", limit)
        called.clear()
        close(lifted(group, x, y, Columns(w)), expected)
        assert bool(called) == (limit > 0 and not kind.startswith("one"))


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("wide", [0, 128])
def test_all_paths_in_a_whole_model(monkeypatch, limit, wide):
    backbone = base("bert")
    adapters = [active(backbone, n, k) for n in ("lora", "bottleneck", "ia3") for k in range(3)]
    batch = tiny.batch(9)
    expected = states(backbone, adapters, batch, torch.eye(9))
    monkeypatch.setattr(lifting, "GATHER_LIMIT", limit)
    monkeypatch.setattr(lora, "WIDE", wide)
    monkeypatch.setattr(METHODS["lora"], "mix", None if limit else METHODS["lora"].mix)
    close(states(backbone, adapters, batch, torch.eye(9)), expected, batch.mask)


def test_a_strangers_method_of_one_equation_works_in_mixed_batches():
    """What CONTRIBUTING promises: a file with `init` and `delta`, and many rows come for free."""

    @method("shift", place="activations", equation="y ← y + a", paper="test")
    class Shift(Method):
        sites: tuple[str, ...] = ("*.mlp",)

        def init(self, site, generator, frozen) -> Params:
            return {"a": torch.zeros(site.width)}

        def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
            return p["a"].expand(len(y), -1)

    try:
        backbone = base("bert")
        adapters = [active(backbone, "shift", 1), active(backbone, "lora", 2), active(backbone, "shift", 3)]
        batch = tiny.batch(3)
        together = states(backbone, adapters, batch, torch.eye(3))
        for i in range(3):
            close(together[i], states(backbone, [adapters[i]], batch)[i], batch.mask[i])
    finally:
        del METHODS["shift"]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_a_site_of_a_whole_sublayer_reads_what_the_sublayer_reads(family):
    """x of `mlp` is the input of its first map, y the output of its last; so for attention."""
    backbone, batch = base(family), tiny.batch(3)
    seen: dict[str, list[Tensor]] = {"x": [], "y": [], "read": [], "out": []}

    @method("spy", place="activations", equation="y ← y", paper="test")
    class Spy(Method):
        sites: tuple[str, ...] = ("*.mlp", "*.attn")

        def init(self, site, generator, frozen) -> Params:
            return {"a": torch.zeros(site.width)}

        def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
            seen["x"].append(x.detach())
            seen["y"].append(y.detach())
            return torch.zeros_like(y)

    try:
        spy = active(backbone, "spy", 1)
        states(backbone, [spy], batch)
    finally:
        del METHODS["spy"]
    sites = [site for name, site in backbone.sites.items() if name in spy.at]
    assert len(sites) == len(seen["x"]) == 2 * len(backbone.blocks)
    handles = []
    for site in sites:
        source, last = (backbone.model.get_submodule(path) for path in (site.source, site.path))
        handles.append(source.register_forward_pre_hook(lambda _, args: seen["read"].append(args[0].flatten(0, 1))))
        handles.append(last.register_forward_hook(lambda _, args, y: seen["out"].append(y.flatten(0, 1))))
    states(backbone, [], batch)
    for handle in handles:
        handle.remove()
    for found, right in ((seen["x"], seen["read"]), (seen["y"], seen["out"])):
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)


def test_dropout_is_for_training_alone():
    backbone, batch = base("bert"), tiny.batch(2)
    m = build("lora", {"dropout": 0.5})
    adapter = Active.of(m, shaken(m, backbone))
    plain = Active.of(build("lora"), adapter_tensors(adapter))
    close(states(backbone, [adapter], batch), states(backbone, [plain], batch))
    trained = Plan(backbone, [adapter], training=True)
    torch.manual_seed(0)
    one, two = trained.hidden(batch), trained.hidden(batch)
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(trained.hidden(batch), one)
    # Inverted dropout: the mean over draws is the value without it, at a site that nothing bends afterwards.
    group = Plan(backbone, [adapter], training=True).groups["0.attn.q"][0]
    plan, mix = Plan(backbone, [adapter], training=True), lifting.Mix(torch.ones(2, 1))
    x, y = torch.randn(2, 4, 32), torch.zeros(2, 4, 32)
    change = lifting.Change(plan, backbone.sites["0.attn.q"], [group], lifting.Acting(mix))
    mean = sum(change(x, y) for _ in range(3000)) / 3000
    close(mean, group.methods[0].delta(group.params[0], x, y), tolerance=0.25)


def adapter_tensors(adapter: Active) -> dict[str, Tensor]:
    return {f"{site}/{n}": t for site, p in adapter.at.items() for n, t in p.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_plan_sees_new_values(precision):
    """In bf16 the tensors are cast, and many LoRAs are joined: both anew after each step."""
    backbone, batch = tiny.backbone("bert", precision=precision), tiny.batch(2)
    for name in ("lora", "bottleneck", "ia3"):
        m = build(name)
        tensors = [shaken(m, backbone, seed) for seed in range(2)]
        adapters = [Active.of(m, own) for own in tensors]
        plan = Plan(backbone, adapters, training=True)
        before = plan.hidden(batch, torch.eye(2))
        for own in tensors:
            for t in own.values():
                t.mul_(1.5)
        after = plan.hidden(batch, torch.eye(2))
        assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)
        assert torch.equal(after, states(backbone, adapters, batch, torch.eye(2)))


def test_bf16_rows_are_close_to_fp32_and_mixed_equals_alone():
    """In bf16 a row's value does not depend on its neighbours beyond rounding."""
    for family in ("bert", "llama"):
        half, full = tiny.backbone(family, precision="bf16"), base(family)
        batch = tiny.batch(10)
        adapters = zoo(half)
        together = states(half, adapters, batch, torch.eye(10))
        assert together.dtype == torch.bfloat16
        exact = states(full, zoo(full), batch, torch.eye(10))
        error = (together.float() - exact)[batch.mask].norm() / exact[batch.mask].norm()
        assert error < 0.05
        for i in range(10):
            alone = states(half, [adapters[i]], batch.rows(torch.tensor([i])))
            difference = (together[i].float() - alone[0].float())[batch.mask[i]].norm()
            assert difference / alone.float().norm() < 0.03


# -- full --------------------------------------------------------------------------------------------------------------


@every_family
def test_full_is_a_model_with_other_weights(family):
    backbone, batch = base(family), tiny.batch(3)
    m = build("full")
    tensors = shaken(m, backbone)
    # Which weights are read is found out by gradient, in a copy.
    model = copy.deepcopy(backbone.model).requires_grad_()
    options = {"use_cache": False} if backbone.kind == "decoder" else {}
    reader = model.get_encoder() if backbone.kind == "encoder-decoder" else model
    reader(input_ids=batch.ids, attention_mask=batch.mask.long(), **options).last_hidden_state.square().sum().backward()
    read = {p for p in model.parameters() if p.grad is not None}
    moved = set()
    for name, Δ in tensors.items():
        path, _, parameter = name.removeprefix(":").rpartition("/")
        moved.add(model.get_submodule(path).get_parameter(parameter))
        model.get_submodule(path).get_parameter(parameter).data += Δ
    assert moved == read
    assert len(moved) == len(tensors)
    with torch.no_grad():
        out = reader(input_ids=batch.ids, attention_mask=batch.mask.long(), **options).last_hidden_state
    close(states(backbone, [Active.of(m, tensors)], batch), out, batch.mask)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_full_moves_tied_weights_wherever_they_stand(family):
    model = tiny.make_lm(family, tie_word_embeddings=True)
    backbone = Backbone(model, None, family, precision="fp32", device="cpu")
    tied = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is tied
    tensors = build("full").start(backbone, 0)
    places = [n for n in tensors if "embed" in n or "shared" in n or "wte" in n]
    assert sum(tensors[n].shape == tied.shape for n in places) == 1
    name = next(n for n in places if tensors[n].shape == tied.shape)
    path, _, parameter = name.removeprefix(":").rpartition("/")
    Δ = torch.randn(tied.shape)
    with backbone.weights_changed({(path, parameter): Δ}):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert torch.equal(model.get_output_embeddings().weight, tied + Δ)
    assert model.get_output_embeddings().weight is tied
    assert model.get_input_embeddings().weight is tied
    clean(backbone)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart", "bert"])
def test_full_has_the_same_names_in_a_bare_and_a_wrapped_model(family):
    """The fingerprint is of the base model, so an adapter must fit both."""
    auto = tiny.LM.get(family, AutoModelForMaskedLM)
    wrapped = Backbone(tiny.make(family, auto=auto), None, family, precision="fp32", device="cpu")
    assert build("full").start(wrapped, 0).keys() == build("full").start(base(family), 0).keys()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "pfeiffer", "full"])
def test_an_exception_leaves_no_hook_and_no_swapped_weight(name):
    backbone = base("bert")
    plan = Plan(backbone, [active(backbone, name)])
    with pytest.raises(IndexError):
        plan.hidden(Batch(torch.full((2, 3), 9999), torch.ones(2, 3, dtype=torch.bool)))

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    handle = backbone.blocks[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan.hidden(tiny.batch(2))
    handle.remove()
    assert torch.equal(backbone.hidden(tiny.batch(2)), tiny.backbone("bert").hidden(tiny.batch(2)))


def test_a_site_that_is_not_there_is_refused():
    backbone = base("bert")
    with pytest.raises(UsageError, match="no site matches"):
        build("lora", {"sites": ["*.attn.query"]}).start(backbone, 0)
    with pytest.raises(UsageError, match="head"):
        build("bottleneck", {"sites": ["head"]}).start(backbone, 0)  # its tensors would be taken for the task's head
    m = build("lora")
    tensors = {name.replace("2.", "7."): t for name, t in m.start(backbone, 0).items()}
    with pytest.raises(PolytaskError, match=r"7\.attn\.q") as error:
        Plan(backbone, [Active.of(m, tensors)])
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="hyperparameter 'ranks'"):
        build("lora", {"ranks": 3})
    with pytest.raises(UsageError, match="no method 'lor'"):
        build("lor")


def test_an_encoder_decoder_is_adapted_where_its_head_reads():
    for family in ("t5", "bart"):
        for name in (name for name in NAMES if not methods()[name].swaps and not methods()[name].opaque):
            sites = {n.rpartition("/")[0] for n in build(name).start(base(family), 0)} - {"shared"}
            assert sites
            assert all(site.startswith("enc.") for site in sites)
