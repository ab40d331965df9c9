"""BitFit: only biases are trained.

    y ← y + b

Ben Zaken, Goldberg, Ravfogel 2021, arXiv 2106.10199. y [width] is what a linear map puts out, b [width] = 0 is the
difference to its frozen bias, or to none where the map has none (Llama's). The biases of layer norms stay frozen here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method("bitfit", place="weights", equation="y ← y + b", paper="Ben Zaken et al. 2021, arXiv 2106.10199")
class BitFit(Method):
    """No hyperparameters but the sites."""

    sites: tuple[str, ...] = ("*.attn.[qkvo]", "*.mlp.up", "*.mlp.down")

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"b": torch.zeros(site.width)}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return p["b"].expand_as(y)
