"""Weights in 8 and 4 bits: a quantised backbone is in every respect the plain one of the numbers that it stands for,
and takes the room that it says."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import FRUIT, SAYINGS, TOOLS, run, write_table
from jobs import TOKENS, task_of
from test_lifting import NAMES, fitting, shaken
from torch import Tensor, nn
from torch.nn import functional as F
from writers import tokenizer

import polytask as pt
from polytask.backbones import Backbone
from polytask.backbones import backbone as backbones
from polytask.backbones.lean import Lean
from polytask.backbones.quantised import QUANTISED, Quantised, quantising, whole
from polytask.errors import UsageError
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import Method, build
from polytask.methods.lifting import Active, Plan

ao = pytest.importorskip("torchao.quantization")

both = pytest.mark.parametrize("precision", QUANTISED)
NAMED = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@cache
def backbone_of(family: str, precision: str, tokenizer: Any = None) -> Backbone:
    return tiny.backbone(family, precision=precision, tokenizer=tokenizer)


def twin(backbone: Backbone) -> Backbone:
    """The plain backbone of the numbers that a quantised one stands for."""
    model = copy.deepcopy(backbone.model)
    return Backbone(model, backbone.tokenizer, "twin", precision=NAMED[backbone.dtype], device="cpu")  # type: ignore[arg-type]


def maps(backbone: Backbone) -> list[Quantised]:
    return [module for module in backbone.model.modules() if isinstance(module, Quantised)]


def kept(weight: Any) -> list[Tensor]:
    """The tensors that a weight is kept as."""
    parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
    return [t for name in parts for t in kept(getattr(weight, name))] or [weight]


def snapshot(backbone: Backbone) -> list[Tensor]:
    return [t.clone() for parameter in backbone.model.parameters() for t in kept(parameter.detach())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def one_map(precision: str, W: Tensor, b: Tensor | None = None) -> Quantised:
    """A map with these weights, quantised as the only one of a model."""
    width, reads = W.shape
    backbone = tiny.make("bert")
    linear = backbone.get_submodule("encoder.layer.0.attention.self.query")
    linear.weight, linear.bias = nn.Parameter(W), None if b is None else nn.Parameter(b)
    linear.in_features, linear.out_features = reads, width
    backbone.requires_grad_(False)
    with quantising(backbone, precision, torch.device("cpu"), W.dtype):
        pass
    return linear


# -- one map -----------------------------------------------------------------------------------------------------------


def test_int8_by_hand() -> None:
    # The largest of a row over 127.5 is its scale: 0.01 and 0.02. Halves go to the even number, 127.5 would be 128, of
    # which int8 has only the negative one.
    W = torch.tensor([[1.275, -0.5, 0.004, 0.1], [0.0, 0.03, -2.55, 2.55]])
    made: Any = one_map("int8", W)._parameters["weight"]
    assert made.qdata.tolist() == [[127, -50, 0, 10], [0, 2, -128, 127]]
    torch.testing.assert_close(whole(made), torch.tensor([[1.27, -0.5, 0, 0.1], [0, 0.04, -2.56, 2.54]]))


def test_nf4_is_torchaos() -> None:
    W = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        made: Any = one_map("nf4", W.to(dtype))._parameters["weight"]
        assert torch.equal(whole(made), made.get_original_weight())
        # Every number is one of 16, times the scale of its block of 64.
        blocks = whole(made).view(-1, 64)
        assert max(len(block.unique()) for block in blocks) <= 16
        assert (whole(made) - W).norm() < 0.1 * W.norm()


@both
def test_a_map_is_that_of_its_numbers_and_holds_no_others_for_the_way_back(precision: str) -> None:
    draw = torch.Generator().manual_seed(0)
    W, b = torch.randn(64, 128, generator=draw), torch.randn(64, generator=draw)
    linear = one_map(precision, W, b)
    b = linear.bias.requires_grad_()
    x = torch.randn(2, 5, 128, generator=draw).requires_grad_()
    seen: list[torch.Size] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = linear(x)
    assert W.shape not in seen
    expected = F.linear(x, linear.weight, b)
    assert torch.equal(y, expected)
    g = torch.randn(y.shape, generator=draw)
    for mine, own in zip(torch.autograd.grad(y, (x, b), g), torch.autograd.grad(expected, (x, b), g), strict=True):
        torch.testing.assert_close(mine, own)


@both
def test_what_the_weights_take(precision: str) -> None:
    linear = one_map(precision, torch.randn(256, 256, dtype=torch.bfloat16))
    bits = 8 * sum(t.nbytes for t in kept(linear._parameters["weight"])) / 256**2
    # 8, and an fp32 scale and a zero point for a row; 4, 8 for each 64 weights, 16 for each 64 · 256 and the table.
    assert bits == pytest.approx(8 + 40 / 256 if precision == "int8" else 4 + 8 / 64 + 16 / 2**14, abs=0.01)


# -- a whole backbone --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "gpt2"])
def test_every_family_computes_what_its_twin_does(family: str, precision: str) -> None:
    backbone, batch = tiny.backbone(family, precision=precision), tiny.batch(3)
    plain = twin(backbone)
    assert (backbone.precision, backbone.fingerprint) == (precision, tiny.backbone(family).fingerprint)
    assert not maps(plain)
    assert len(maps(backbone)) >= 4 * len(backbone.blocks)
    assert torch.equal(backbone.hidden(batch), plain.hidden(batch))
    named = [[(path, name) for path, name, _ in b.weights_read()] for b in (backbone, plain)]
    assert named[0] == named[1]


def answers(backbone: Backbone, m: Method, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Last hidden states with an adapter, and its gradients of their squares."""
    batch = tiny.batch(3)
    own = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    torch.manual_seed(0)
    hidden = Plan(backbone, [Active.of(m, own)], training=True).hidden(batch)
    hidden[batch.mask].float().square().sum().backward()
    return hidden, {n: t.grad for n, t in own.items()}


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "int8") for name in NAMES), *((name, "nf4") for name in ("lora", "dora", "bottleneck", "full", "peft"))],
)
def test_every_method_learns_on_it_as_on_its_twin(name: str, precision: str) -> None:
    backbone = backbone_of("llama", precision)
    before, plain = snapshot(backbone), twin(backbone)
    m = fitting(backbone, name)
    for tensor, (n, started) in zip(m.start(plain, 0).values(), m.start(backbone, 0).items(), strict=True):
        assert torch.equal(tensor, started), n
    tensors = shaken(m, backbone)
    hidden, slopes = answers(backbone, m, tensors)
    expected, its = answers(plain, m, tensors)
    assert torch.equal(hidden, expected)
    assert any(slope is not None for slope in slopes.values())
    for n, slope in slopes.items():
        assert (slope is None) == (its[n] is None)
        assert slope is None or torch.equal(slope, its[n]), n
    assert same(snapshot(backbone), before)


def test_pefts_methods_that_read_the_weight_find_numbers() -> None:
    pytest.importorskip("peft")
    backbone = backbone_of("llama", "int8")
    m = build("peft", {"type": "HIRA", "r": 4, "sites": ["*.attn.[qv]"]})
    tensors = shaken(m, backbone)
    assert torch.equal(answers(backbone, m, tensors)[0], answers(twin(backbone), m, tensors)[0])


@both
def test_it_writes_what_its_twin_writes(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In bf16 two tokens may be equally likely, and the twin's products are joined.
    monkeypatch.setattr(backbones, "pick_dtype", lambda *_: torch.float32)
    model = tiny.make_lm("llama", vocab_size=len(tokenizer()))
    backbone = Backbone(model, tokenizer(), "writer", precision=precision, device="cpu")  # type: ignore[arg-type]
    plain = twin(backbone)
    m = build("lora")
    asked = [Prompt(ids, torch.ones(1), Sampling(max_tokens=12)) for ids in ([5, 9, 3], [7, 4, 8, 6, 5])]
    written = []
    for b in (backbone, plain):
        lean = Lean(b)
        assert (Lean.fits(b), lean.joins) == (True, b is plain)
        written.append([one.tokens for one in generate(Plan(b, [Active.of(m, shaken(m, backbone))]), asked)])
    assert written[0] == written[1]


# -- from a task to answers --------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("method", ["head", "lora", "bottleneck"])
def test_an_adapter_is_trained_kept_and_answers_on_any_precision(method: str, precision: str, tmp_path: Path) -> None:
    backbone, task = backbone_of("bert", precision, TOKENS), task_of(n=64)
    before = snapshot(backbone)
    settings = pt.Settings(epochs=6, batch=16, lr=1e-2)
    made = pt.adapt(backbone, task, method, settings=settings)
    assert same(snapshot(backbone), before)
    assert made.card.recipe["precision"] == precision
    pt.Library(tmp_path).add(made)
    kept = pt.Library(tmp_path).get(made.name)
    assert (kept.id, kept.backbone) == (made.id, made.backbone)
    asked = [pt.Request(e.text, adapter=made.name) for e in task.validation]
    mine = pt.Engine(backbone, adapters=[kept]).answer(asked)
    plain = pt.Engine(tiny.backbone("bert", tokenizer=TOKENS), adapters=[kept]).answer(asked)
    agreed = sum(a.output == b.output for a, b in zip(mine, plain, strict=True)) / len(asked)
    assert agreed >= (0.9 if precision == "int8" else 0.7), agreed


def test_the_embedded_encoder_learns_in_int8_and_answers_in_fp32(tmp_path: Path) -> None:
    table, library = write_table(tmp_path / "things.csv"), tmp_path / "skills"
    options = ["--method", "lora", "--epochs", "1", "--precision", "int8", "--library", library]
    done = run("adapt", table, *options, "--json")
    assert (done.status, done.err) == (0, "")
    texts = [saying.format(word) for word in FRUIT[:4] + TOOLS[:4] for saying in SAYINGS]
    asked = "\n".join(texts).encode()
    said = {}
    for precision in ("int8", "fp32"):
        done = run("predict", "-l", library, "-a", "things", "--precision", precision, "--json", stdin=asked)
        said[precision] = [(line["output"], line["probability"]) for line in done.lines]
    for (one, p), (other, q) in zip(said["int8"], said["fp32"], strict=True):
        assert p == pytest.approx(q, abs=0.05)
        assert one == other or q < 0.55  # of two labels


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match=r"^precision int8 and nf4 need torchao: run `pip install 'polytask\[quant"):
        tiny.backbone("bert", precision="int8")


def test_a_model_without_linear_maps_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gpt2 has no linear maps that can be quantised; take bf16 or fp32$"):
        tiny.backbone("gpt2", precision="int8")


def test_other_precisions_are_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"^precision 'int4': one of auto, fp32, bf16, int8, nf4$"):
        tiny.backbone("bert", precision="int4")


def test_a_plain_backbone_has_no_quantised_map() -> None:
    model = tiny.make("bert")
    before = backbones.fingerprint(model)
    with quantising(model, "bf16", torch.device("cpu"), torch.bfloat16):
        pass
    assert backbones.fingerprint(model) == before
    assert not any(isinstance(m, Quantised) for m in model.modules())
