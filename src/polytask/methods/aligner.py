"""Aligner: one learned token that every block attends to, through a gate for each head.

    head_i = softmax(q K_iᵀ / √d_h) V_i + g_i · softmax(q (W_K t)_iᵀ / √d_h) (W_V t)_i,   the last softmax is 1
    y ← y + W_o (g ∘ W_V t)          t [d] shared by all blocks, g [heads] of each block

Zhou, Wu, Zhu, Terzopoulos 2023, arXiv 2312.05503, with one token: then the added attention is over a single key, and
what it gives is the same for every query, so it is computed once for a batch. t passes the block's own frozen W_V,
each key-value head for all of its queries. g = 0 at first, t ~ N(0, 0.02²): training starts at the backbone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polytask.backbones import Backbone, Site
from polytask.methods.method import Method, Params, method


@method(
    "aligner",
    place="tokens",
    equation="y ← y + W_o (g ∘ W_V t), t one for all blocks",
    paper="Zhou et al. 2023, arXiv 2312.05503",
)
class Aligner(Method):
    """No hyperparameters but the sites."""

    sites: tuple[str, ...] = ("*.attn.o",)

    def frozen(self, backbone: Backbone, site: Site) -> Params:
        value = backbone.linear(backbone.sites[site.name.removesuffix("o") + "v"])
        return {
            "W_o": backbone.linear(site)["W"],
            "W_V": value["W"],
            "b_V": value["b"].expand(len(value["W"])),
            "heads": torch.empty(backbone.heads, 0),
        }

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        own = super().start(backbone, seed, writing=writing)
        return {"shared/t": torch.empty(backbone.hidden_size).normal_(0, 0.02, generator=draw)} | own

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"g": torch.zeros(len(frozen["heads"]))}

    def ready(self, p: Params, frozen: Params) -> Params:
        t, g = p["t"], p["g"]
        H, W_o = len(g), frozen["W_o"].to(t.dtype)
        v: Any = frozen["W_V"].to(t.dtype) @ t + frozen["b_V"].to(t.dtype)
        v = v.reshape(-1, W_o.shape[1] // H)  # [key-value heads, d_h]
        v = v.repeat_interleave(H // len(v), dim=0)
        return {"Δ": W_o @ (g[:, None] * v).flatten()}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return p["Δ"].expand_as(y)
