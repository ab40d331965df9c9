"""AdapterFusion: at each site every token attends to what the adapters do.

    s = softmax_n((Q h + b_Q)ᵀ (K z_n + b_K))        z_n = Δ_n [T, d], the adapters' changes without their residual
    Δ = Σ_n s_n V z_n                                Q, K, V [d, d]

Pfeiffer, Kamath, Rücklé, Cho, Gurevych 2020, arXiv 2005.00247. The adapters are trained before, each for itself, and do
not change. s is over the adapters that act at the site; there is no 1/√d. h is what the paper's adapters read: the
normed residual sum x at a sum, the site's value y elsewhere.

V begins as the identity with 1e-6 beside the diagonal, Q and K ~ N(0, 0.02²), the biases at 0: so Δ is near the mean of
the changes at first, and not at the backbone. The loss gets 0.01 ‖I − V‖² for each site. 3 d² + 2 d numbers a site,
however many adapters there are; b_K moves all of a token's scores alike, which softmax does not see.

qᵀ K z_n is computed as (Kᵀ q)ᵀ z_n and Σ s_n V z_n as V Σ s_n z_n, so that the d² products are three whatever N is. The
reference drops scores at the model's attention dropout; here the frozen part has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params, method


@method(
    "fusion",
    place="activations",
    equation="Δ = Σ_n s_n V z_n, s = softmax_n((Q h)ᵀ K z_n)",
    paper="Pfeiffer et al. 2020, arXiv 2005.00247",
)
class Fusion(Composed):
    """regularisation: of ‖I − V‖² in the loss."""

    elsewhere = True
    regularisation: float = 0.01

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        d = site.width
        Q, K = (torch.empty(d, d).normal_(0, 0.02, generator=generator) for _ in "QK")
        V = torch.full((d, d), 1e-6).fill_diagonal_(1.0)
        reads = "Q_x" if site.point == "sum" else "Q_y"
        return {reads: Q, "b_Q": torch.zeros(d), "K": K, "b_K": torch.zeros(d), "V": V}

    def attention(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        """s [T, n], fp32."""
        Qh = x @ p["Q_x"].T if "Q_x" in p else y @ p["Q_y"].T
        q = Qh + p["b_Q"]
        scores = sources.along(q @ p["K"], y) + (q @ p["b_K"])[:, None]
        return scores.float().softmax(-1)

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        return sources.weighted(self.attention(p, x, y, sources), y) @ p["V"].T

    def penalty(self, p: Params) -> Tensor:
        V = p["V"]
        return self.regularisation * (torch.eye(len(V), device=V.device) - V).square().sum()
