"""DoRA: a weight's directions are changed by LoRA, the lengths of its rows are learned apart.

    W' = diag(m / ‖V‖) V,   V = W + s B A,   y = W' x + b
    Δ = (m/‖V‖ − 1) ∘ (y − b) + (m/‖V‖) ∘ s B A x          x [d_in], y [d_out], A [r, d_in], B [d_out, r], m [d_out]

‖V‖ [d_out] are the norms of V's rows, and gradients take them for constants, as in section 4.3 of the paper. m = ‖W‖
and B = 0 at first, A as LoRA's, so that training starts at the backbone. s = α / r.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen 2024, arXiv 2402.09353.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method(
    "dora",
    place="weights",
    equation="y ← m ∘ (W + s B A) x / ‖W + s B A‖ + b",
    paper="Liu et al. 2024, arXiv 2402.09353",
)
class DoRA(Method):
    """r: rank. alpha: scale's numerator. dropout: on x, in the low-rank branch. rslora: divide by √r instead of r."""

    reads_weights = True

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    sites: tuple[str, ...] = ("*.attn.q", "*.attn.v")

    @property
    def s(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound = 1 / math.sqrt(site.reads)
        A = torch.empty(self.r, site.reads).uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": torch.zeros(site.width, self.r), "m": frozen["W"].float().norm(dim=1).cpu()}

    def ready(self, p: Params, frozen: Params) -> Params:
        A, B, m = p["A"], p["B"], p["m"]
        V = frozen["W"].to(A.dtype) + self.s * (B @ A)
        g = m / V.detach().norm(dim=1)
        return {"A": A, "gB": self.s * g[:, None] * B, "g − 1": g - 1, "b": frozen["b"]}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        A, gB, b = p["A"], p["gB"], p["b"]
        return p["g − 1"] * (y - b) + (x @ A.T) @ gB.T
