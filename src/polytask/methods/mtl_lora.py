"""MTL-LoRA: tasks that are trained together share a LoRA's projections; a small matrix and the mixing are each task's.

    y ← y + s · Σ_i p_i B_i Λ A x,   p = softmax(w / τ)
    x [d_in], y [d_out];  shared: A [r, d_in], B_i [d_out, r] for i = 1 … n;  the task's: Λ [r, r], w [n];  s = α / r

Yang, Muhtar, Shen, Zhan, Liu, Wang, Sun, Deng, Sun, Zhang, Chen, Tong 2024, arXiv 2410.09437. A starts as LoRA's,
B_i = 0, Λ = I and w ~ U(±1/√n), so that training starts at the backbone. Jobs of one training whose method is this one
with equal hyperparameters share A and B, and each keeps a copy of them with its own Λ and w, so that every adapter is
whole. With `core` only Λ and w are trained: a new task on the projections of an adapter that training begins with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method(
    "mtl_lora",
    place="weights",
    equation="y ← y + (α/r)·Σ softmax(w/τ)_i B_i Λ A x",
    paper="Yang et al. 2024, arXiv 2410.09437",
)
class MTLLoRA(Method):
    """r: rank. n: up-projections. tau: τ. alpha: scale's numerator. dropout: on x. core: train Λ and w alone."""

    common = frozenset(("A", "B"))

    r: int = 8
    n: int = 3
    tau: float = 0.1
    alpha: float = 16.0
    dropout: float = 0.0
    core: bool = False
    sites: tuple[str, ...] = ("*.attn.q", "*.attn.k", "*.attn.v", "*.attn.o")

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound, mixing = 1 / math.sqrt(site.reads), 1 / math.sqrt(self.n)
        return {
            "A": torch.empty(self.r, site.reads).uniform_(-bound, bound, generator=generator),
            "B": torch.zeros(self.n, site.width, self.r),
            "L": torch.eye(self.r),
            "w": torch.empty(self.n).uniform_(-mixing, mixing, generator=generator),
        }

    def ready(self, p: Params, frozen: Params) -> Params:
        A, B, Λ, w = p["A"], p["B"], p["L"], p["w"]
        mixed = torch.einsum("n,ndr->dr", (w / self.tau).softmax(-1), B)
        return {"A": A, "B": self.alpha / self.r * mixed @ Λ}

    def trains(self, name: str) -> bool:
        return super().trains(name) and not (self.core and name.rpartition("/")[2] in self.common)

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return (x @ p["A"].T) @ p["B"].T
