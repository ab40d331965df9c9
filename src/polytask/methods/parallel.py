"""Parallel adapters: a bottleneck beside the feed-forward network, which reads what the network reads.

    h ← h + s (U f(D x + b_D) + b_U)       x [d] the sublayer's input, h [d] its output, D [m, d], U [d, m], f = relu

He, Zhou, Ma, Berg-Kirkpatrick, Neubig 2021, arXiv 2110.04366 (the scaled parallel adapter; with a short prefix it is
their MAM adapter). Where a block norms before its sublayers x is normed, as the network's own input is. s = 4 and
m = d / 2 as in the paper (512 of 1,024). D as torch's linear maps start, b_D = 0, U = 0, b_U = 0: training starts at
the backbone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method(
    "parallel",
    place="activations",
    equation="h ← h + s (U f(D x + b_D) + b_U)",
    paper="He et al. 2021, arXiv 2110.04366",
)
class Parallel(Method):
    """reduction: d / m, the width of the sublayer over that of the bottleneck. scale: s."""

    reduction: int = 2
    scale: float = 4.0
    sites: tuple[str, ...] = ("*.mlp",)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        m = max(1, site.width // self.reduction)
        bound = 1 / math.sqrt(site.reads)
        D = torch.empty(m, site.reads).uniform_(-bound, bound, generator=generator)
        return {"D": D, "b_D": torch.zeros(m), "U": torch.zeros(site.width, m), "b_U": torch.zeros(site.width)}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        D, b_D, U, b_U = p["D"], p["b_D"], p["U"], p["b_U"]
        return self.scale * F.relu(x @ D.T + b_D) @ U.T + self.scale * b_U
