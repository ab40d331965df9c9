"""LoReFT: states at the ends of a prompt are moved within a low-rank subspace.

    h ← h + Rᵀ (W h + b − R h)        at the first `first` and the last `last` tokens of a prompt, and nowhere else
    h [d], R [r, d] with orthonormal rows, W [r, d], b [r]

Wu, Arora, Wang, Geiger, Jurafsky, Manning, Potts 2024, arXiv 2404.03592; r = 8, 7 tokens at either end and the output
of every block are those of its runs on commonsense. R begins as a random orthonormal matrix, W and b ~ U(±1/√d) as the
authors' code has them, so that training does not start at the backbone. Tokens that are written are not touched: they
feel it through the prompt's states.

R is kept as a matrix M of any rows, and R = Qᵀ of M ᵀ = Q T (T upper triangular with a positive diagonal), which is M
itself where its rows are orthonormal; the authors' code has torch's orthogonal parametrisation, another map onto the
same matrices. Both ends share R, W and b (their `share_weights`). In a text of fewer tokens than there are positions
each token is moved once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from polytask.backbones import Site
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method


@method(
    "loreft",
    place="activations",
    equation="h ← h + Rᵀ(W h + b − R h) at a prompt's ends",
    paper="Wu et al. 2024, arXiv 2404.03592",
)
class LoReFT(Method):
    """r: the subspace's dimension. first, last: how many tokens at a prompt's beginning and end are moved."""

    positional = True
    elsewhere = True
    precise = True

    r: int = 8
    first: int = 7
    last: int = 7
    sites: tuple[str, ...] = ("*",)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        d = site.width
        if self.r > d:
            raise UsageError(f"loreft: r = {self.r} at {site.name}, which is {d} wide; give at most {d}")
        R = nn.init.orthogonal_(torch.empty(self.r, d), generator=generator)
        bound = 1 / math.sqrt(d)
        W, b = (torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in ((self.r, d), (self.r,)))
        return {"R": R, "W": W, "b": b}

    def ready(self, p: Params, frozen: Params) -> Params:
        Q, T = torch.linalg.qr(p["R"].T)
        return p | {"R": (Q * T.diagonal().sign()).T}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        R, W, b, t, left = p["R"], p["W"], p["b"], p["at"], p["left"]
        moved = ((t >= 0) & (t < self.first)) | ((left >= 0) & (left < self.last))
        h = y.to(R.dtype)
        Δ = (h @ W.T + b - h @ R.T) @ R
        return (Δ * moved[:, None]).to(y.dtype)
