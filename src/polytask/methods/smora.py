"""SMoRA: a LoRA whose ranks are experts, of which each token gets k.

    p = σ(R x),   I = the k largest of p,   g_i = k p_i / Σ_{j ∈ I} p_j  for i in I, else 0
    y ← y + (α / k) · B (g ∘ A x)         x [d_in], y [d_out], A [r, d_in], B [d_out, r], R [r, d_in]

With experts of b ranks, R is [r / b, d_in], and the k / b experts taken bring all their ranks. The mean of g over the
ranks taken is 1, so that k = r and R = 0 is a LoRA, and that a single expert (k = b) has the gate 1 whatever R is: then
R learns nothing.

Zhao, Zhou, Zhang, Zhu, Shen, Li, Yang, Wang, Su, Kuang, Wei, Wu, Cheng 2025, arXiv 2501.15103. A and R ~ U(±1/√d_in),
B = 0, so that training starts at the backbone. k = 8 as in the released configuration.

The paper adds to p a bias of each rank that no gradient trains: a pass raises it by 1e-5 where fewer tokens than the
mean took the rank, and lowers it where more did. That is a state between steps, which methods do not have, and it is
left out: a thousand steps at that rate move a score by at most 0.01.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method


@method(
    "smora",
    place="weights",
    equation="y ← y + (α/k)·B (g ∘ A x), g = top k of σ(R x)",
    paper="Zhao et al. 2025, arXiv 2501.15103",
)
class SMoRA(Method):
    """r: ranks. k: how many of them a token gets. block: ranks to an expert, b; it divides r and k. alpha: scale's
    numerator. dropout: on x."""

    r: int = 64
    k: int = 8
    block: int = 1
    alpha: float = 16.0
    dropout: float = 0.0
    sites: tuple[str, ...] = ("*.attn.q", "*.attn.v")

    def __post_init__(self) -> None:
        if not 0 < self.block <= self.k <= self.r or self.r % self.block or self.k % self.block:
            raise UsageError(
                f"smora: block = {self.block}, k = {self.k}, r = {self.r}: k is at most r, and block divides both"
            )

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound = 1 / math.sqrt(site.reads)
        return {
            "A": torch.empty(self.r, site.reads).uniform_(-bound, bound, generator=generator),
            "B": torch.zeros(site.width, self.r),
            "R": torch.empty(self.r // self.block, site.reads).uniform_(-bound, bound, generator=generator),
        }

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        A, B, R = p["A"], p["B"], p["R"]
        scores = torch.sigmoid(x @ R.T)
        taken, I = scores.topk(self.k // self.block, dim=-1)  # noqa: E741
        g = torch.zeros_like(scores).scatter(-1, I, taken / taken.mean(dim=-1, keepdim=True))
        h = (x @ A.T).reshape(*g.shape, self.block) * g[..., None]
        return self.alpha / self.k * h.flatten(-2) @ B.T
