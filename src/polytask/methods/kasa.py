"""KaSA: LoRA with learned singular values, on a weight without its smallest ones.

    W = P diag(σ) Qᵀ,   W_r = Σ_{i > k−r} σᵢ Pᵢ Qᵢᵀ,  k = min(d_in, d_out)
    y ← y − W_r x + s B diag(d) A x            x [d_in], y [d_out], A [r, d_in], d [r], B [d_out, r],  s = α / r
    penalty   β Σ d² + γ (‖Bᵀ B − I‖_F + ‖A Aᵀ − I‖_F)

Wang, Jiang, Park, Kim, Tang 2024, arXiv 2412.06071. The r smallest singular values are taken for noise and left out,
so training starts at the shortened weight and not at the backbone. W_r is kept beside the adapter as U = P_r diag(σ_r)
[d_out, r] and V = Q_r [d_in, r], which are not trained: the backbone stays whole for everyone else. A as LoRA's, B = 0,
d ~ N(0, 1). The penalty's norms are those of the small products, as in PEFT; the authors' script has B Bᵀ and Aᵀ A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method


@method(
    "kasa",
    place="weights",
    equation="y ← y − W_r x + (α/r)·B diag(d) A x",
    paper="Wang et al. 2024, arXiv 2412.06071",
)
class KaSA(Method):
    """r: rank, and how many singular values are left out. alpha: scale's numerator. beta, gamma: of the penalties.
    dropout: on x."""

    elsewhere = True
    reads_weights = True
    fixed = frozenset(("U", "V"))

    r: int = 8
    alpha: float = 16.0
    beta: float = 1e-4
    gamma: float = 1e-3
    dropout: float = 0.0
    sites: tuple[str, ...] = ("*.attn.q", "*.attn.v")

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        r = self.r
        if r > min(site.reads, site.width):
            raise UsageError(f"kasa: r = {r} is more than the {min(site.reads, site.width)} of {site.name}'s weight")
        P, σ, Qt = torch.linalg.svd(frozen["W"].float().cpu(), full_matrices=False)
        bound = 1 / math.sqrt(site.reads)
        return {
            "A": torch.empty(r, site.reads).uniform_(-bound, bound, generator=generator),
            "B": torch.zeros(site.width, r),
            "d": torch.randn(r, generator=generator),
            "U": (P[:, -r:] * σ[-r:]).contiguous(),
            "V": Qt[-r:].T.contiguous(),
        }

    def ready(self, p: Params, frozen: Params) -> Params:
        A, B, d, U, V = p["A"], p["B"], p["d"], p["U"], p["V"]
        return {"A": torch.cat([A, V.T]), "B": torch.cat([self.alpha / self.r * B * d, -U], dim=1)}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return (x @ p["A"].T) @ p["B"].T

    def penalty(self, p: Params) -> Tensor:
        A, B, d = p["A"], p["B"], p["d"]
        I = torch.eye(self.r, device=A.device)  # noqa: E741
        apart = torch.linalg.matrix_norm(B.T @ B - I) + torch.linalg.matrix_norm(A @ A.T - I)
        total: Tensor = self.beta * d.square().sum() + self.gamma * apart
        return total
