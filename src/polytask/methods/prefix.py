"""Prefix tuning: in every block there are learned keys and values before those of the text.

    head = softmax(q [P_K; K]ᵀ / √d_h) [P_V; V]          P_K, P_V [n, heads · d_h] of each block

Li, Liang 2021, arXiv 2101.00190; without their reparametrisation, as in P-tuning v2 (Liu, Ji, Fu, Tam, Du, Yang, Tang
2021, arXiv 2110.07602), which trains a head with it. P ~ N(0, 0.02²): a prefix takes its share of the attention from
the first step on, whatever it is. In a model with rotary positions prefix j is a key at position j, and the text's
positions begin at n; PEFT keeps the same key as it is after the rotation. Keys that the model norms (Qwen 3, Gemma 3,
OLMo 2) are normed here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method
from polytask.methods.prompt import placed


@method(
    "prefix",
    place="tokens",
    equation="softmax(q [P_K; K]ᵀ / √d) [P_V; V]",
    paper="Li, Liang 2021, arXiv 2101.00190",
)
class Prefix(Method):
    """n: keys and values before the text."""

    elsewhere = True

    n: int = 10
    sites: tuple[str, ...] = ("*.attn.k", "*.attn.v")

    @property
    def slots(self) -> int:
        return self.n

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"P": torch.empty(self.n, site.width).normal_(0, 0.02, generator=generator)}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return placed(p["P"], x, y)
