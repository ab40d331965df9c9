"""MAD-X's invertible adapter: an additive coupling of the two halves of each token's embedding.

    e = [e₁; e₂],   o₁ = e₁ + F(e₂),   o₂ = e₂ + G(o₁)           F(x) = U relu(D x + b_D) + b_U, G alike
    inverse:  e₂ = o₂ − G(o₁),  e₁ = o₁ − F(e₂)

Pfeiffer, Vulić, Gurevych, Ruder 2020, arXiv 2005.00052; the coupling is NICE's (Dinh, Krueger, Bengio 2014, arXiv
1410.8516). A language's own embeddings without new ones: forward behind the embeddings, and inverse before an output
embedding that is the same, where the answer is written: what is read is said in one space. e [d], e₁ [⌊d/2⌋]; F's D [m,
d₂] and U [d₁, m] with m = d₂ / reduction, 192 for d = 768; G's the other way round. D ~ N(0, 0.02²), biases 0, as in
AdapterHub's library. U = 0 where the library draws it like D: it starts near the identity, this starts at it.

A mixture's inverse is y + Σ_k w_k (inverse_k(y) − y), which is exact for one adapter with weight 1. Where the model
scales its last states (T5), the inverse is taken before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method(
    "invertible",
    place="activations",
    equation="o₁ = e₁ + F(e₂), o₂ = e₂ + G(o₁)",
    paper="Pfeiffer et al. 2020, arXiv 2005.00052",
)
class Invertible(Method):
    """reduction: the features that F or G reads over the width of its bottleneck."""

    reduction: int = 2
    sites: tuple[str, ...] = ("embed",)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        d1 = site.width // 2
        d2 = site.width - d1
        p: Params = {}
        for name, reads, width in (("F", d2, d1), ("G", d1, d2)):
            m = max(1, reads // self.reduction)
            p[f"D_{name}"] = 0.02 * torch.randn(m, reads, generator=generator)
            p[f"b_D{name}"] = torch.zeros(m)
            p[f"U_{name}"] = torch.zeros(width, m)
            p[f"b_U{name}"] = torch.zeros(width)
        return p

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        d1 = y.shape[-1] // 2
        e1, e2 = y[..., :d1], y[..., d1:]
        f = coupled(p, "F", e2)
        return torch.cat([f, coupled(p, "G", e1 + f)], -1)

    def before_words(self) -> Method:
        return Inverse()

    def inverse(self, p: Params, o: Tensor) -> Tensor:
        """The e [..., d] that this site's tensors make o [..., d] of."""
        return o + Inverse().delta(p, o, o)


@dataclass(frozen=True)
class Inverse(Method):
    """Of an `Invertible`, by its tensors."""

    name = "inverse"

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        d1 = y.shape[-1] // 2
        o1, o2 = y[..., :d1], y[..., d1:]
        g = coupled(p, "G", o1)
        return torch.cat([-coupled(p, "F", o2 - g), -g], -1)


def coupled(p: Params, name: str, half: Tensor) -> Tensor:
    """F or G of one half."""
    return F.relu(half @ p[f"D_{name}"].T + p[f"b_D{name}"]) @ p[f"U_{name}"].T + p[f"b_U{name}"]
