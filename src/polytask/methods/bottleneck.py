"""Bottleneck adapters: a small two-layer network on what a sublayer puts out.

    Houlsby:   h ← h + U f(D h + b_D) + b_U           h [d], D [m, d], U [d, m], f = gelu
    Pfeiffer:  s ← s + U f(D z + b_D) + b_U, z = LN(s)   s the residual sum that the block's last norm reads, f = relu

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly 2019, arXiv 1902.00751: twice a
block, after the attention's and the feed-forward's output projection, before the residual is added. Their layer norms
are trained too; here they stay frozen, as in AdapterHub's library, so that rows with different adapters share them.
Pfeiffer, Kamath, Rücklé, Cho, Gurevych 2020, arXiv 2005.00247: once a block. In a block that norms before its
sublayers there is no norm to read through, and z = s is the block's output.

D ~ N(0, 0.01²) cut at two deviations, as in the paper. U = 0 where the paper draws it like D: it starts near the
identity, this starts at it. m = d / reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method(
    "bottleneck",
    place="activations",
    equation="h ← h + U f(D h + b_D) + b_U",
    paper="Houlsby et al. 2019, arXiv 1902.00751",
)
class Bottleneck(Method):
    """reduction: d / m, the width of the sublayer's output over the width of the bottleneck."""

    rows = ("D", "b_D")

    reduction: int = 16
    sites: tuple[str, ...] = ("*.attn.o", "*.mlp.down")

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        d = site.width
        m = max(1, d // self.reduction)
        D = nn.init.trunc_normal_(torch.empty(m, d), std=0.01, a=-0.02, b=0.02, generator=generator)
        return {"D": D, "b_D": torch.zeros(m), "U": torch.zeros(d, m), "b_U": torch.zeros(d)}

    def down(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.gelu(y @ p["D"].T + p["b_D"])

    def up(self, p: Params) -> tuple[Tensor, Tensor]:
        return p["U"].T, p["b_U"]

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        U, b_U = self.up(p)
        return self.down(p, x, y) @ U + b_U


@method(
    "pfeiffer",
    place="activations",
    equation="s ← s + U f(D LN(s) + b_D) + b_U",
    paper="Pfeiffer et al. 2020, arXiv 2005.00247",
)
class Pfeiffer(Bottleneck):
    """reduction: d / m. x is the normed residual sum, y the sum itself."""

    reduction: int = 16
    sites: tuple[str, ...] = ("*.sum",)

    def down(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(x @ p["D"].T + p["b_D"])
