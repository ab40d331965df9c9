"""Linear maps in 8 or 4 bits a weight: frozen, and adapters are trained through them.

    int8   W ≈ s[row] · Q              Q [width, reads] in −128 … 127, a scale for each row
    nf4    W ≈ s[block] · T[Q]         T the 16 quantiles of a normal distribution, a scale for each block of 64 weights

    y = W x + b,   ∂x = Wᵀ ∂y

torchao rounds. W is put together anew wherever it is used, and for the way back only Q and s are kept: autograd would
otherwise hold every map's whole W through a step of training, and nothing would be saved.

nf4, with its scales in 8 bits in their turn (double quantisation), is what QLoRA has: Dettmers, Pagnoni, Holtzman,
Zettlemoyer 2023, arXiv 2305.14314; 4.13 bits a weight. Quantised are the linear maps of the blocks, which are most of a
model. Embeddings, norms, biases, the language-model head, the routers of mixtures, and experts that are kept in one
tensor stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.backbones import families
from polytask.errors import UsageError

QUANTISED = ("int8", "nf4")
BLOCK = 64  # weights that share a scale in nf4
SCALES = 256  # scales that share a scale


def _matters(record: logging.LogRecord) -> bool:
    """Whether it is something else than what torchao says of kernels for other machines and of types when it is
    imported, which transformers does wherever it is installed."""
    text = record.getMessage()
    return not (text.startswith("Failed to load ") or "natively supported by torch.compile" in text)


for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).addFilter(_matters)


class Quantised(nn.Linear):
    """A linear map whose weight is kept as one of torchao's tensors, or as any other while it is changed. It reads as
    the numbers that it stands for; a copy is a plain linear map of these."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        W = self._parameters["weight"]
        assert W is not None
        return whole(W)

    def forward(self, x: Tensor) -> Tensor:
        W, b = self._parameters["weight"], self.bias
        if type(W) in (Tensor, nn.Parameter):
            return F.linear(x, W, b)  # type: ignore[arg-type]
        y: Tensor = _Product.apply(x, W, b)  # type: ignore[no-untyped-call]
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        copied = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        memo[id(self)] = copied.train(self.training)
        for name, θ in self._parameters.items():
            if θ is not None and id(θ) not in memo:
                memo[id(θ)] = nn.Parameter(whole(θ.detach()).clone(), requires_grad=False)
            copied.register_parameter(name, None if θ is None else memo[id(θ)])
        return copied


class _Product(torch.autograd.Function):
    """W x + b without keeping W."""

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, whole(W), b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.W = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor | None]:
        return g @ whole(ctx.W), None, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


def whole(W: Tensor) -> Tensor:
    """The numbers that a weight stands for, in its dtype; a weight that is not quantised as it is."""
    weight: Any = W
    if hasattr(weight, "qdata"):
        rows: Tensor = weight.qdata.to(W.dtype) * weight.scale.to(W.dtype)
        return rows
    if hasattr(weight, "quantized_data"):
        # What its `get_original_weight` does, with two weights a look-up: on a CPU in a fortieth of the time.
        T, codes = weight.nf4, torch.arange(256, device=W.device)
        pairs = torch.stack([T[codes >> 4], T[codes & 15]], -1)
        both = {2: torch.int32, 4: torch.int64}[T.itemsize]
        found = pairs.view(both).flatten().index_select(0, weight.quantized_data.int()).view(T.dtype)
        s = weight.dequantize_scalers(weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size)
        blocks: Tensor = found.view(-1, weight.block_size) * s[:, None]
        return blocks.view(W.shape)
    return W


@contextlib.contextmanager
def quantising(model: Any, precision: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Quantise a model's maps on `device` where `precision` asks for it. They are out of the model within, where the
    rest is moved, so that a GPU need not hold all of them whole.

    Raises UsageError where torchao is missing or the model has no map that can be quantised.
    """
    if precision not in QUANTISED:
        yield
        return
    made = []
    for module in _maps(model):
        if precision == "nf4" and module.weight.numel() % BLOCK:
            continue
        made.append((module, _rounded(module.weight.detach().to(device, dtype), precision)))
        module._parameters["weight"] = None
    if not made:
        raise UsageError(
            f"precision {precision}: {model.config.model_type} has no linear maps that can be quantised; take bf16 or "
            "fp32"
        )
    yield
    for module, W in made:
        module._parameters["weight"] = nn.Parameter(W, requires_grad=False)
        module.__class__ = Quantised  # in place, for whatever else in the model holds this module


def _maps(model: Any) -> list[nn.Linear]:
    """The linear maps of the blocks, each once."""
    routers = [model.get_submodule(mixture.router) for mixture in families.experts(model).values()]
    left_out = {id(module) for router in routers for module in router.modules()}
    found: dict[int, nn.Linear] = {}
    for paths in families.blocks(model).values():
        for path in paths:
            for module in model.get_submodule(path).modules():
                if type(module) is nn.Linear and id(module) not in left_out:
                    found[id(module)] = module
    return list(found.values())


def _rounded(W: Tensor, precision: str) -> Tensor:
    torchao = _torchao()
    if precision == "int8":
        rounded: Tensor = torchao.Int8Tensor.from_hp(W, granularity=torchao.PerRow())
        return rounded
    packed: Tensor = torchao.to_nf4(W, BLOCK, math.gcd(SCALES, W.numel() // BLOCK))
    return packed


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError:
        raise UsageError("precision int8 and nf4 need torchao: run `pip install 'polytask[quantised]'`") from None
    return torchao.quantization
