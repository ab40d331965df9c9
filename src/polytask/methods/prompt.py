"""Prompt tuning: learned vectors stand before the text as if they were tokens.

    X = [P; E(x)]          P [n, d] virtual tokens, E(x) [T, d] the embeddings of the text

Lester, Al-Rfou, Constant 2021, arXiv 2104.08691. P begins as the embeddings of n tokens drawn from the vocabulary. The
virtual tokens have the first n positions. In an encoder-decoder they stand before what the encoder reads. The paper's
n is 100 for models of 11 billion parameters and large data; PEFT's examples have 8 to 20.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method("prompt", place="tokens", equation="X = [P; E(x)]", paper="Lester et al. 2021, arXiv 2104.08691")
class Prompt(Method):
    """n: virtual tokens."""

    elsewhere = True
    reads_weights = True

    n: int = 20
    sites: tuple[str, ...] = ("tokens",)

    @property
    def slots(self) -> int:
        return self.n

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        drawn = torch.randint(len(frozen["E"]), (self.n,), generator=generator)
        return {"P": frozen["E"].cpu()[drawn].float()}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return placed(p["P"], x, y)


def placed(P: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """P_j − y at virtual token j, 0 at the text: P [n, width], x [T] what stands where, y [T, width]."""
    virtual = (x >= 0) & (x < len(P))
    return torch.where(virtual[:, None], P[x.clamp(0, len(P) - 1)] - y, torch.zeros_like(y))
