"""LoFiT: an offset on what each attention head puts out.

    z ← z + v          z [width] the heads' outputs side by side, before the output projection; v [width]

Yin, Ye, Durrett 2024, arXiv 2406.01563: the second of its two stages. The first one, the selector `heads`, ranks all
heads, and only the few best have an offset. It acts at every token. Where queries share keys and values, a head is a
query's. v = 0 where the authors' script draws it from N(0, 0.001²): it starts near the backbone, this starts at it.
Equal to a bias W_o v of the output projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method("lofit", place="activations", equation="z ← z + v", paper="Yin et al. 2024, arXiv 2406.01563")
class LoFiT(Method):
    """No hyperparameters but the sites."""

    selector = "heads"

    sites: tuple[str, ...] = ("*.attn.heads",)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"v": torch.zeros(site.width)}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return p["v"].expand_as(y)
