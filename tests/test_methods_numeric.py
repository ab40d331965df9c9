"""Methods and heads against other people's code and against numbers worked out by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import peft
import pytest
import tiny
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, Batch, Site, heads
from polytask.errors import UsageError
from polytask.methods import build
from polytask.methods.compacter import kronecker
from polytask.methods.lifting import Active, Plan
from polytask.tasks import Example, Task

# -- LoRA and (IA)³ against PEFT ---------------------------------------------------------------------------------------


def shaken(backbone: Backbone, name: str, scale: float = 0.2, **hyper: object) -> Active:
    draw = torch.Generator().manual_seed(1)
    m = build(name, hyper)
    started = m.start(backbone, 0)
    return Active.of(m, {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in started.items()})


def states(model: nn.Module, backbone: Backbone, batch: Batch) -> Tensor:
    reader = model.get_encoder() if backbone.kind == "encoder-decoder" else model
    options = {"use_cache": False} if backbone.kind == "decoder" else {}
    with torch.no_grad():
        return reader(input_ids=batch.ids, attention_mask=batch.mask.long(), **options).last_hidden_state


def agree(backbone: Backbone, adapter: Active, model: nn.Module, plain: bool = False) -> None:
    batch = tiny.batch(4)
    with torch.no_grad():
        ours = Plan(backbone, [adapter]).hidden(batch)
    theirs = states(model, backbone, batch)
    torch.testing.assert_close(ours[batch.mask], theirs[batch.mask], rtol=1e-5, atol=1e-5)
    assert (theirs - states(backbone.model, backbone, batch))[batch.mask].abs().max() > 1e-2


LORA_SITES = {
    "bert": ["*.attn.q", "*.attn.v", "*.mlp.up"],
    "llama": ["*.attn.[qkvo]", "*.mlp.gate", "*.mlp.down"],
    "t5": ["*.attn.[qv]", "*.mlp.down"],
    "deberta-v2": ["*.attn.[qkv]"],
    "gpt2": ["*.attn.o", "*.mlp.up", "*.mlp.down"],
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", LORA_SITES)
def test_lora_is_pefts(family, rslora):
    backbone = tiny.backbone(family)
    adapter = shaken(backbone, "lora", r=3, alpha=5, rslora=rslora, sites=LORA_SITES[family])
    paths = {site: backbone.sites[site].path for site in adapter.at}
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=list(paths.values()), fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval().base_model.model
    for site, p in adapter.at.items():
        module = model.get_submodule(paths[site])
        module.lora_A["default"].weight.data = p["A"]
        module.lora_B["default"].weight.data = p["B"]
    agree(backbone, adapter, model)


def test_lora_at_parts_of_a_fused_projection_is_pefts_with_blocks():
    """GPT-2's q, k and v are one Conv1D: three LoRAs of rank r are one of rank 3r whose B is in blocks."""
    backbone = tiny.backbone("gpt2")
    adapter = shaken(backbone, "lora", r=2, alpha=3, sites=["*.attn.[qkv]"])
    config = peft.LoraConfig(r=6, lora_alpha=9, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval().base_model.model
    for i in range(3):
        parts = [adapter.at[f"{i}.attn.{letter}"] for letter in "qkv"]
        module = model.get_submodule(f"h.{i}.attn.c_attn")
        module.lora_A["default"].weight.data = torch.cat([p["A"] for p in parts])
        module.lora_B["default"].weight.data = torch.block_diag(*[p["B"] for p in parts])
    agree(backbone, adapter, model)


IA3 = {
    "bert": ("attention.self.key", "attention.self.value", "output.dense"),
    "llama": ("k_proj", "v_proj", "down_proj"),
    "t5": ("SelfAttention.k", "SelfAttention.v", "DenseReluDense.wo"),
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
}


@pytest.mark.parametrize("family", IA3)
def test_ia3_is_pefts(family):
    backbone = tiny.backbone(family)
    adapter = shaken(backbone, "ia3")
    sites = backbone.reader_sites
    blocks = range(len(backbone.blocks))
    prefix = "enc." if family == "t5" else ""
    forward = [sites[f"{prefix}{i}.mlp.act"].path for i in blocks]
    outward = [sites[f"{prefix}{i}.attn.{letter}"].path for i in blocks for letter in "kv"]
    config = peft.IA3Config(
        target_modules=[*dict.fromkeys(outward), *forward],
        feedforward_modules=forward,
        fan_in_fan_out=family == "gpt2",
    )
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval().base_model.model
    for site, p in adapter.at.items():
        l = model.get_submodule(sites[site].path).ia3_l["default"].data  # noqa: E741
        part = sites[site].part
        if part is None:
            l.copy_(p["l"].view_as(l))
        else:
            l[part.start : part.stop, 0] = p["l"]
    assert all(path.endswith(IA3[family]) for path in (*forward, *outward))
    agree(backbone, adapter, model)


# -- bottlenecks by hand -----------------------------------------------------------------------------------------------


def test_lora_worked_by_hand():
    p = {"A": torch.tensor([[0.5, -0.5]]), "B": torch.tensor([[1.0], [2.0]])}
    x = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    # A x = −0.5 and −2; s = 2.
    expected = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]])
    assert torch.equal(build("lora", {"r": 1, "alpha": 2}).delta(p, x, x), expected)
    assert torch.equal(build("lora", {"r": 4, "alpha": 8}).delta(p, x, x), expected)
    assert torch.equal(build("lora", {"r": 4, "alpha": 4, "rslora": True}).delta(p, x, x), expected)


def test_ia3_worked_by_hand():
    y = torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    l = torch.tensor([0.5, 3.0])  # noqa: E741
    assert torch.equal(y + build("ia3").delta({"l": l}, y, y), torch.tensor([[0.5, 6.0], [-1.5, 12.0]]))


def test_bottlenecks_worked_by_hand():
    p = {
        "D": torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
        "b_D": torch.zeros(2),
        "U": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        "b_U": torch.zeros(2),
    }
    h = torch.tensor([[1.0, -1.0]])
    other = torch.tensor([[100.0, 100.0]])
    # h Dᵀ = [0, 1]; relu leaves it, gelu(1) = Φ(1) = 0.841345; U doubles the second.
    assert torch.equal(h + build("pfeiffer").delta(p, h, other), torch.tensor([[1.0, 1.0]]))
    houlsby = h + build("bottleneck").delta(p, other, h)
    torch.testing.assert_close(houlsby, torch.tensor([[1.0, -1.0 + 2 * 0.8413447]]))
    biased = p | {"b_D": torch.tensor([1.0, -3.0]), "b_U": torch.tensor([10.0, 20.0])}
    assert torch.equal(build("pfeiffer").delta(biased, h, other), torch.tensor([[11.0, 20.0]]))


def bert_by_hand(model: nn.Module, batch: Batch, after_attention, after_mlp, at_sum) -> Tensor:
    """BERT from its weights: no module of transformers runs but the embeddings'."""
    h = model.embeddings(input_ids=batch.ids)
    for i, layer in enumerate(model.encoder.layer):
        own = layer.attention.self

        def linear(module: nn.Linear, x: Tensor) -> Tensor:
            return x @ module.weight.T + module.bias

        def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias

        q, k, v = (linear(m, h).unflatten(-1, (4, 8)).transpose(1, 2) for m in (own.query, own.key, own.value))
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(~batch.mask[:, None, None, :], -torch.inf)
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        out = layer.attention.output
        x = norm(out.LayerNorm, after_attention(i, linear(out.dense, context)) + h)
        f = after_mlp(i, linear(layer.output.dense, F.gelu(linear(layer.intermediate.dense, x))))
        last = layer.output.LayerNorm
        s = f + x
        h = norm(last, s + at_sum(i, norm(last, s)))
    return h


def bottleneck(p: dict[str, Tensor], x: Tensor, f) -> Tensor:
    return f(x @ p["D"].T + p["b_D"]) @ p["U"].T + p["b_U"]


def test_bottlenecks_in_bert_are_where_the_papers_put_them():
    backbone, batch = tiny.backbone("bert"), tiny.batch(3)

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    with torch.no_grad():
        plain = bert_by_hand(backbone.model, batch, lambda i, h: h, lambda i, h: h, lambda i, z: 0)
        torch.testing.assert_close(backbone.hidden(batch)[batch.mask], plain[batch.mask], rtol=1e-5, atol=1e-5)

        houlsby = shaken(backbone, "bottleneck")
        assert {p["D"].shape for p in houlsby.at.values()} == {(2, 32)}
        by_hand = bert_by_hand(
            backbone.model,
            batch,
            lambda i, h: h + bottleneck(houlsby.at[f"{i}.attn.o"], h, gelu),
            lambda i, h: h + bottleneck(houlsby.at[f"{i}.mlp.down"], h, gelu),
            lambda i, z: 0,
        )
        ours = Plan(backbone, [houlsby]).hidden(batch)
        torch.testing.assert_close(ours[batch.mask], by_hand[batch.mask], rtol=1e-5, atol=1e-5)

        pfeiffer = shaken(backbone, "pfeiffer", reduction=8)
        assert {p["D"].shape for p in pfeiffer.at.values()} == {(4, 32)}
        by_hand = bert_by_hand(
            backbone.model,
            batch,
            lambda i, h: h,
            lambda i, h: h,
            lambda i, z: bottleneck(pfeiffer.at[f"{i}.sum"], z, torch.relu),
        )
        ours = Plan(backbone, [pfeiffer]).hidden(batch)
        torch.testing.assert_close(ours[batch.mask], by_hand[batch.mask], rtol=1e-5, atol=1e-5)


def test_where_a_block_norms_first_pfeiffer_reads_the_blocks_output():
    """The last block's states go through the final norm, so the first block of a model of one is looked at."""
    backbone, batch = tiny.backbone("llama", num_hidden_layers=1), tiny.batch(2)
    adapter = shaken(backbone, "pfeiffer")
    with torch.no_grad():
        out = backbone.model(batch.ids, attention_mask=batch.mask.long(), use_cache=False, output_hidden_states=True)
        seen: list[Tensor] = []
        handle = backbone.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
        backbone.hidden(batch)
        handle.remove()
        s = seen[0]
        expected = backbone.model.norm(s + bottleneck(adapter.at["0.sum"], s, torch.relu))
        ours = Plan(backbone, [adapter]).hidden(batch)
    assert out.last_hidden_state.shape == ours.shape
    torch.testing.assert_close(ours[batch.mask], expected[batch.mask], rtol=1e-5, atol=1e-5)


def test_tensors_start_as_the_papers_say():
    backbone = tiny.backbone("bert", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    A = torch.cat([t.flatten() for n, t in build("lora", {"r": 64}).start(backbone, 0).items() if n.endswith("/A")])
    assert A.abs().max() <= 1 / 16
    assert float(A.std()) == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)
    D = torch.cat([t.flatten() for n, t in build("bottleneck").start(backbone, 0).items() if n.endswith("/D")])
    assert D.abs().max() <= 0.02
    assert float(D.std()) == pytest.approx(0.01 * 0.8796, rel=0.03)  # of a normal cut at two deviations
    again, other = (build("lora").start(backbone, seed) for seed in (0, 1))
    assert all(torch.equal(t, again[n]) for n, t in build("lora").start(backbone, 0).items())
    assert not torch.equal(other["0.attn.q/A"], again["0.attn.q/A"])
    assert not torch.equal(again["0.attn.q/A"], again["1.attn.q/A"])


# -- heads by hand -----------------------------------------------------------------------------------------------------

H = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [90.0, 90.0]], [[5.0, -6.0], [70.0, 70.0], [80.0, 80.0]]])
M = torch.tensor([[True, True, False], [True, False, False]])


def test_pools_by_hand():
    def pooled(pool: str, q: Tensor | None = None) -> list[list[float]]:
        return heads.features(HeadCard(kind="classification", pool=pool), H, M, q).tolist()

    assert pooled("mean") == [[2, 3], [5, -6]]
    assert pooled("first") == [[1, 2], [5, -6]]
    assert pooled("last") == [[3, 4], [5, -6]]
    assert pooled("attention", torch.zeros(2)) == [[2, 3], [5, -6]]
    # q·h = 0 and ln 3: weights ¼ and ¾.
    found = pooled("attention", torch.tensor([0.0, 1.0]) * math.log(3) / 2)
    assert np.allclose(found, [[2.5, 3.5], [5, -6]])
    tagged = heads.features(HeadCard(kind="tagging"), H, M)
    assert torch.equal(tagged, H)


def test_pair_features_by_hand():
    h = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])  # one pair: the first texts' rows come first
    m = torch.ones(2, 1, dtype=torch.bool)
    card = HeadCard(kind="classification", pair="separate")
    assert heads.features(card, h, m).tolist() == [[3, 4, 1, 0, 2, 4, 3, 0]]
    two = torch.cat([h[:1], 2 * h[:1], h[1:], -h[1:]])
    found = heads.features(card, two, torch.ones(4, 1, dtype=torch.bool))
    assert found.tolist() == [[3, 4, 1, 0, 2, 4, 3, 0], [6, 8, -1, 0, 7, 8, -6, 0]]
    assert heads.width(card, 2) == 8
    # A similarity reads unit vectors, and starts as their cosine: 3/5.
    card = HeadCard(kind="similarity", pair="separate")
    φ = heads.features(card, h, m)
    torch.testing.assert_close(φ, torch.tensor([[0.6, 0.8, 1, 0, 0.4, 0.8, 0.6, 0]]))
    torch.testing.assert_close(heads.logits(heads.start(card, 2, 0), φ), torch.tensor([[0.6]]))


def test_losses_by_hand():
    two = HeadCard(kind="classification", targets=("a", "b"))
    z = torch.tensor([[0.0, math.log(3)]])
    assert float(heads.losses(two, z, torch.tensor([1]))[0]) == pytest.approx(math.log(4 / 3))
    weighted = heads.losses(two, z, torch.tensor([1]), torch.tensor([1.0, 5.0]))
    assert float(weighted[0]) == pytest.approx(5 * math.log(4 / 3))
    many = HeadCard(kind="multilabel", targets=("a", "b"))
    both = heads.losses(many, z, torch.tensor([[1.0, 0.0]]))
    assert float(both[0]) == pytest.approx(math.log(2) + math.log(4))
    number = HeadCard(kind="regression")
    assert heads.losses(number, torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 1.0])).tolist() == [4, 0]


def test_answers_by_hand():
    two = HeadCard(kind="classification", targets=("a", "b"))
    assert heads.decode(two, torch.tensor([[0.0, math.log(3)]])) == (["b"], [pytest.approx(0.75)])
    many = HeadCard(kind="multilabel", targets=("a", "b", "c"))
    found = heads.decode(many, torch.tensor([[2.0, -1.0, 0.0], [-3.0, -1.0, -2.0]]))
    assert found[0] == [("a", "c"), ("b",)]
    assert found[1] == [pytest.approx(0.5), pytest.approx(1 / (1 + math.e))]
    assert heads.decode(HeadCard(kind="regression"), torch.tensor([[1.5]])) == ([1.5], [None])


def test_class_weights_are_scikit_learns():
    outputs = ["a"] * 6 + ["b"] * 3 + ["c"]
    weights = heads.class_weights(HeadCard(kind="classification", targets=("a", "b", "c", "d")), outputs)
    three = heads.class_weights(HeadCard(kind="classification", targets=("a", "b", "c")), outputs)
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=np.array(outputs))
    assert np.allclose(three, expected)
    assert weights[3] == 1


def test_targets_by_hand():
    assert heads.encode(HeadCard(kind="classification", targets=("a", "b")), "b") == 1
    assert heads.encode(HeadCard(kind="multilabel", targets=("a", "b", "c")), ("c", "a")) == [1, 0, 1]
    assert heads.encode(HeadCard(kind="tagging", targets=("O", "B-X", "I-X")), ("O", "I-X", "B-Y")) == [0, 2, -100]
    assert heads.encode(HeadCard(kind="regression"), "2.5") == 2.5


def test_design():
    one = Task("t", "classification", (Example("0", "x", "a"),))
    pair = Task("t", "similarity", (Example("0", "x", 1.0, "y"),))
    assert heads.design(one).pair == "none"
    assert heads.design(pair).pair == "separate"
    assert heads.design(pair, pair="joint").pair == "joint"
    for wrong in ({"pool": "max"}, {"pair": "both"}):
        with pytest.raises(UsageError, match="one of"):
            heads.design(one, **wrong)
    with pytest.raises(UsageError, match="no label head"):
        heads.design(Task("t", "generation", (Example("0", "x", "a"),)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_columns_of_nothing_but_padding_give_no_nan_and_change_nothing(family, causal):
    backbone, batch = tiny.backbone(family), tiny.batch(3)
    ids, mask = (F.pad(t, (0, 5)) for t in (batch.ids, batch.mask))
    wide = Batch(ids, mask)
    names = ("lora", "pfeiffer", "ia3")
    adapters = [shaken(backbone, name, sites=tiny.sites(family, *build(name).sites)) for name in names]
    for each in adapters:
        for tensors in each.at.values():
            for t in tensors.values():
                t.requires_grad_()
    found = []
    for some in (batch, wide):
        h = Plan(backbone, adapters, training=True).hidden(some, torch.eye(3), causal=causal)
        assert h.isfinite().all()
        φ = [
            heads.features(HeadCard(kind="classification", pool=pool), h, some.mask, torch.ones(32, requires_grad=True))
            for pool in heads.POOLS
        ]
        found.append(torch.stack(φ))
        found[-1].square().sum().backward()
    torch.testing.assert_close(found[0], found[1], rtol=2e-4, atol=2e-4)
    for each in adapters:
        for tensors in each.at.values():
            for t in tensors.values():
                assert t.grad.isfinite().all()


# -- DoRA against PEFT, and by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", LORA_SITES)
def test_dora_is_pefts(family, rslora):
    backbone = tiny.backbone(family)
    adapter = shaken(backbone, "dora", r=3, alpha=5, rslora=rslora, sites=LORA_SITES[family])
    paths = {site: backbone.sites[site].path for site in adapter.at}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        use_dora=True,
        target_modules=list(paths.values()),
        fan_in_fan_out=family == "gpt2",
    )
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval().base_model.model
    for site, p in adapter.at.items():
        module = model.get_submodule(paths[site])
        module.lora_A["default"].weight.data = p["A"]
        module.lora_B["default"].weight.data = p["B"]
        module.lora_magnitude_vector["default"].weight.data = p["m"]
    agree(backbone, adapter, model)


def test_dora_by_hand():
    """V = W + 2·B A = [[4, 3], [3, −2]], ‖V‖ = [5, √13], m = [5, 1], W' = [[4, 3], [3, −2]/√13]."""
    W, x = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    b = torch.tensor([0.5, -0.5])
    p = {"A": torch.tensor([[0.5, -0.5]]), "B": torch.tensor([[1.0], [2.0]]), "m": torch.tensor([5.0, 1.0])}
    m = build("dora", {"r": 1, "alpha": 2})
    y = x @ W.T + b
    found = y + m.delta(m.ready(p, {"W": W, "b": b}), x, y)
    torch.testing.assert_close(found, torch.tensor([[10.5, -0.5 - 1 / math.sqrt(13)]]))


def test_doras_gradients_take_the_norms_for_constants():
    """∂y/∂m = V x / ‖V‖, and ∂y/∂B = s m/‖V‖ (A x), without the norm's own part."""
    draw = torch.Generator().manual_seed(0)
    W, x = torch.randn(4, 3, generator=draw), torch.randn(1, 3, generator=draw)
    p = {"A": torch.randn(2, 3, generator=draw), "B": torch.randn(4, 2, generator=draw), "m": torch.ones(4)}
    for t in p.values():
        t.requires_grad_()
    m = build("dora", {"r": 2, "alpha": 4})
    m.delta(m.ready(p, {"W": W, "b": torch.zeros(())}), x, x @ W.T).sum().backward()
    with torch.no_grad():
        V = W + 2 * p["B"] @ p["A"]
        torch.testing.assert_close(p["m"].grad, (V @ x[0]) / V.norm(dim=1))
        torch.testing.assert_close(p["B"].grad, 2 * (p["m"] / V.norm(dim=1))[:, None] * (p["A"] @ x[0]))


def test_bitfit_is_a_longer_bias():
    backbone = tiny.backbone("bert")
    adapter = shaken(backbone, "bitfit")
    model = copy.deepcopy(backbone.model)
    with torch.no_grad():
        for site, p in adapter.at.items():
            model.get_submodule(backbone.sites[site].path).bias += p["b"]
    agree(backbone, adapter, model)


# -- parallel and Compacter by hand ------------------------------------------------------------------------------------


def test_parallel_by_hand():
    """D x + b_D = [1, −1], relu [1, 0], U [1, 0] + b_U = [2.5, 1], times s = 4."""
    p = {
        "D": torch.tensor([[1.0, 0.0], [0.0, -1.0]]),
        "b_D": torch.tensor([0.0, 1.0]),
        "U": torch.tensor([[2.0, 5.0], [1.0, 5.0]]),
        "b_U": torch.tensor([0.5, 0.0]),
    }
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[100.0, 100.0]])
    torch.testing.assert_close(build("parallel").delta(p, x, y), torch.tensor([[10.0, 4.0]]))


def test_parallel_is_beside_the_whole_feed_forward_network():
    """Of a pre-norm block: h = r + mlp(n) + s U relu(D n), n the normed residual stream."""
    backbone = tiny.backbone("llama")
    adapter = shaken(backbone, "parallel", sites=["0.mlp"])
    p = adapter.at["0.mlp"]
    block, batch = backbone.model.layers[0], tiny.batch(2)
    with torch.no_grad():
        normed: list[Tensor] = []
        hook = block.mlp.register_forward_pre_hook(lambda _, args: normed.append(args[0]))
        backbone.hidden(batch)
        hook.remove()
        beside = 4 * (F.relu(normed[0] @ p["D"].T + p["b_D"]) @ p["U"].T + p["b_U"])
        hook = block.mlp.register_forward_hook(lambda _, args, out: out + beside)
        expected = backbone.hidden(batch)
        hook.remove()
        found = Plan(backbone, [adapter]).hidden(batch)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-5, atol=1e-5)


def test_compacter_by_hand():
    """n = 2, rank one: the sum of two Kronecker products, and torch's own kron."""
    C = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]])
    s, t = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[1.0, -1.0], [2.0, 1.0]])
    H = torch.tensor([[1.0, -1, -1, -0.5], [2, -2, 2, 1], [1, 0.5, 1, -1], [-2, -1, 2, -2]])
    torch.testing.assert_close(kronecker(C, s, t), H)
    torch.testing.assert_close(sum(torch.kron(C[i], torch.outer(s[i], t[i])) for i in range(2)), H)


def test_compacter_is_a_bottleneck_adapter_with_those_maps():
    backbone = tiny.backbone("bert")
    adapter = shaken(backbone, "compacter", reduction=4, n=2)
    maps = {site: adapter.method.ready(dict(p), {}) for site, p in adapter.at.items()}
    same = Active(build("bottleneck", {"reduction": 4}), maps)
    batch = tiny.batch(3)
    with torch.no_grad():
        found, expected = (Plan(backbone, [a]).hidden(batch)[batch.mask] for a in (adapter, same))
    torch.testing.assert_close(found, expected)


def test_compacter_counts_and_refuses():
    """2 maps of n³ + m + d numbers, and the biases, twice a block."""
    backbone = tiny.backbone("bert")
    d, m, n = 32, 8, 4
    tensors = build("compacter", {"reduction": 4, "n": n}).start(backbone, 0)
    count = sum(t.numel() for t in tensors.values()) / len(backbone.blocks)
    assert count == 2 * (2 * (n**3 + m + d) + m + d)
    with pytest.raises(UsageError, match=r"n = 5 does not divide the 32 features"):
        build("compacter", {"n": 5}).start(backbone, 0)


def test_a_method_that_reads_weights_needs_a_linear_map():
    with pytest.raises(UsageError, match=r"site 0 is not the output of a linear map"):
        build("dora", {"sites": ["0"]}).start(tiny.backbone("llama"), 0)


def test_a_head_has_no_sites():
    with pytest.raises(UsageError, match=r"head.sites = \*.attn.q: head changes no site"):
        build("head", {"sites": ["*.attn.q"]})
    assert build("head", {"sites": []}) == build("head")


# -- KaSA against PEFT, and by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_kasa_is_pefts_and_so_is_its_penalty(family):
    backbone = tiny.backbone(family)
    sites = LORA_SITES[family]
    hyper = {"r": 3, "alpha": 5, "beta": 0.3, "gamma": 0.2, "sites": sites}
    m = build("kasa", hyper)
    draw = torch.Generator().manual_seed(1)
    tensors = {
        n: t + 0.1 * torch.randn(t.shape, generator=draw) if m.trains(n) else t for n, t in m.start(backbone, 0).items()
    }
    adapter = Active.of(m, tensors)
    paths = {site: backbone.sites[site].path for site in adapter.at}
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(paths.values()), kasa_config=peft.KasaConfig(beta=0.3, gamma=0.2)
    )
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval()
    for site, p in adapter.at.items():
        module = model.base_model.model.get_submodule(paths[site])
        module.lora_A["default"].weight.data = p["A"]
        module.lora_B["default"].weight.data = p["B"]
        module.lora_diag["default"].data = p["d"]
    agree(backbone, adapter, model.base_model.model)
    ours = sum(float(m.penalty(dict(p))) for p in adapter.at.values())
    assert ours == pytest.approx(float(model._get_kasa_loss().detach()), rel=1e-5)


def test_kasa_by_hand():
    """W = diag(3, 2, 1) loses its 1; B diag(0.5) A times s = 2 adds (0, 1, 1)ᵀ (1, 1, 0)."""
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    m = build("kasa", {"r": 1, "alpha": 2, "beta": 1.0, "gamma": 1.0})
    site = Site("0.attn.q", "", "output", 3, 3)
    p = m.init(site, torch.Generator().manual_seed(0), {"W": W, "b": torch.zeros(())})
    torch.testing.assert_close(p["U"] @ p["V"].T, torch.diag(torch.tensor([0.0, 0.0, 1.0])))
    p |= {"A": torch.tensor([[1.0, 1.0, 0.0]]), "B": torch.tensor([[0.0], [1.0], [1.0]]), "d": torch.tensor([0.5])}
    x = torch.eye(3)
    y = x @ W.T
    effective = (y + m.delta(m.ready(p, {}), x, y)).T
    torch.testing.assert_close(effective, torch.tensor([[3.0, 0, 0], [1, 3, 0], [1, 1, 0]]))
    assert float(m.penalty(p)) == pytest.approx(0.25 + 1 + 1)
    with pytest.raises(UsageError, match=r"r = 4 is more than the 3"):
        build("kasa", {"r": 4}).init(site, torch.Generator(), {"W": W, "b": torch.zeros(())})
