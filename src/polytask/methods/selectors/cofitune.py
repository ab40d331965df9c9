"""CoFiTune: the feed-forward maps of the lower middle are trained, and the less of a unit the more the model needs it.

    coarse:   up and down of blocks n with first · N < n ≤ last · N, counted from 1, of the N blocks
    fine:     θ_j ← θ_j + (1 − I_j) Δθ_j   for the weights of each unit j that such a map puts out
    I = |tanh((I' − mean I') / std I')|   over the units of a map,   I'_j = ∂ KL(p₂ ‖ p₁) / ∂v_j at v = 1,   y ← v ∘ y

Zhang, Wu, Li, Yang, Zhao, Jiang, Tan 2024, arXiv 2404.10306. p₁ and p₂ are what the model answers in two passes over
the same training examples that differ by dropout alone. The paper searches blocks and maps over a tree; defaults are
what it found, 8 to 15 of the 32 blocks of a 7B model. The gate of a gated network stays.

Where this differs: 1 − I is the share of every step that is taken. The paper multiplies the gradient, and Adam divides
a constant factor out again. Dropout is ours, on what each attention and feed-forward network puts out (as in Vaswani et
al. 2017, arXiv 1706.03762), because most decoders have none to turn on, and I' would be zero. p is over the task's
answers, by its head or, of answers in text, over their next token; the paper's is over the next token everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.backbones import Backbone, families
from polytask.errors import UsageError
from polytask.methods.method import Params, build
from polytask.methods.selectors.selector import Choice, Look, Selector, selector


@selector(
    "cofitune",
    equation="θ ← θ + (1 − I) Δθ in up and down of the lower middle blocks",
    paper="Zhang et al. 2024, arXiv 2404.10306",
)
class CoFiTune(Selector):
    """first, last: the range of blocks, as shares of their number. dropout: the chance that a number is dropped in the
    passes that find I. rows: examples of a pass. passes: pairs of them (0: over all training examples)."""

    first: float = 0.25
    last: float = 0.5
    dropout: float = 0.1
    rows: int = 16
    passes: int = 0

    def choose(self, look: Look) -> Choice:
        if not 0 < self.dropout < 1:
            raise UsageError(f"cofitune.dropout = {self.dropout}: a number between 0 and 1 is needed")
        backbone = look.backbone
        paths = {name: f":{site.path}" for name, site in families.sites(backbone.base).items()}
        own = {name: [n for n in look.tensors if n.rpartition("/")[0] == paths[name]] for name in self.middle(look)}
        own = {name: names for name, names in own.items() if names}
        if not own:
            raise UsageError(
                f"{look.method.name} has no weights of up and down in the blocks from {self.first:g} to {self.last:g} "
                f"of {backbone.name}: take `full`, or another range"
            )
        tensors = {n: t for n, t in look.tensors.items() if n.startswith("head/")}
        shares = {}
        for name, importance in self.importance(look, [*own]).items():
            site = backbone.sites[name]
            rows = isinstance(backbone.model.get_submodule(site.path), nn.Linear)  # Conv1D has units as columns
            for n in own[name]:
                tensor = tensors[n] = look.tensors[n]
                units = tensor.new_zeros(tensor.shape[0 if rows else -1])
                share = 1 - importance if site.part is None else site.part.put(units, 1 - importance)
                shares[n] = (share[:, None] if rows and tensor.ndim == 2 else share).expand_as(tensor)
        return Choice(look.method.only(tensors), tensors, shares)

    def middle(self, look: Look) -> list[str]:
        """The sites up and down of the blocks in the range, as far as an answer depends on them."""
        found = []
        for tower, blocks in families.blocks(look.backbone.model).items():
            N = len(blocks)
            for i in range(N):
                if self.first * N < i + 1 <= self.last * N:
                    block = f"{tower}.{i}" if tower else str(i)
                    found += [f"{block}.mlp.up", f"{block}.mlp.down"]
        return [name for name in found if name in look.backbone.sites_for(writing=look.writing)]

    def importance(self, look: Look, places: list[str]) -> Params:
        """I [width] of each of these sites."""
        scaled = build("ia3", {"sites": tuple(places)})
        start = scaled.start(look.backbone, look.seed, writing=look.writing)
        v = {n: t.to(look.backbone.device).requires_grad_() for n, t in start.items()}
        slope = {n: torch.zeros_like(t) for n, t in v.items()}
        head = {n: t for n, t in look.tensors.items() if n.startswith("head/")}
        with dropping(look.backbone, self.dropout, look.seed):
            for one, two in look.outputs(scaled, head | v, self.rows, self.passes, 2):
                if one.shape[-1] == 1:
                    raise UsageError("cofitune compares probabilities of answers, and this task's answers have none")
                KL = F.kl_div(one.log_softmax(-1), two.softmax(-1), reduction="batchmean")
                for n, g in zip(v, torch.autograd.grad(KL, [*v.values()]), strict=True):
                    slope[n] += g
        return {n.rpartition("/")[0]: normalised(t) for n, t in slope.items()}


def normalised(slope: Tensor) -> Tensor:
    """I from I'; none where all are alike."""
    return torch.tanh((slope - slope.mean()) / slope.std().clamp(min=torch.finfo(slope.dtype).tiny)).abs()


@contextlib.contextmanager
def dropping(backbone: Backbone, p: float, seed: int) -> Iterator[None]:
    """Dropout on what every sublayer puts out, in the passes within."""
    draw = torch.Generator().manual_seed(seed)

    def drop(_module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor:
        kept = (torch.rand(y.shape, generator=draw) >= p).to(y.device)
        return y * kept / (1 - p)

    sublayers = [site.path for site in backbone.sites.values() if site.point == "across"]
    handles = [backbone.model.get_submodule(path).register_forward_hook(drop) for path in sublayers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
