"""PiSSA: LoRA that starts as the principal part of the weight, in the weight's place.

    W = P diag(σ) Qᵀ,   B₀ = P_r diag(σ_r / s)^½,   A₀ = diag(σ_r / s)^½ Q_rᵀ,   r the largest of the σ
    y ← (W − s B₀ A₀) x + s B A x  =  y + s (B (A − A₀) + (B − B₀) A₀) x
    x [d_in], y [d_out], A and A₀ [r, d_in], B and B₀ [d_out, r],   s = α / r   (rsLoRA: s = α / √r)

Meng, Wang, Zhang 2024, arXiv 2404.02948. A = A₀ and B = B₀ at first, so that training starts at the backbone. The paper
puts the residual W − s B₀ A₀ in W's place; here W stays whole for everyone else, and A₀ and B₀ are kept beside the
adapter and not trained. The code has the second form, a LoRA of rank 2r: B A and B₀ A₀ are as large as W, and where the
backbone computes in bf16 their rounding would drown what was learned. The SVD is exact; the paper's fast start takes an
approximate one. α = r as in the authors' adapters, which are of rank 128 on every linear map.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.errors import UsageError
from polytask.methods.lora import LoRA
from polytask.methods.method import Params, method


@method(
    "pissa",
    place="weights",
    equation="y ← y + (α/r)·(B A − B₀ A₀) x",
    paper="Meng et al. 2024, arXiv 2404.02948",
)
class PiSSA(LoRA):
    """r: rank, and how many singular values are trained. alpha: scale's numerator. dropout: on x, in this branch only.
    rslora: divide by √r instead of r."""

    reads_weights = True
    fixed = frozenset(("A0", "B0"))

    alpha: float = 8.0

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        r = self.r
        if r > min(site.reads, site.width):
            raise UsageError(f"pissa: r = {r} is more than the {min(site.reads, site.width)} of {site.name}'s weight")
        P, σ, Qt = torch.linalg.svd(frozen["W"].float().cpu(), full_matrices=False)
        root = (σ[:r] / self.s).sqrt()
        A, B = root[:, None] * Qt[:r], P[:, :r] * root
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def ready(self, p: Params, frozen: Params) -> Params:
        A, B, A0, B0 = p["A"], p["B"], p["A0"], p["B0"]
        return {"A": torch.cat([A - A0, A0]), "B": torch.cat([B, B - B0], dim=1)}

    def expects(self, made: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> Mapping[str, torch.Size]:
        return made  # A₀ and B₀ cannot be cut as A and B of a LoRA can
