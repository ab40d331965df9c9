"""Compacter: bottleneck adapters whose maps are sums of Kronecker products, one factor of which has rank one.

    h ← h + U f(D h + b_D) + b_U,   D = Σᵢ kron(Cᵢ, sᵢ tᵢᵀ),   U = Σᵢ kron(Cᵢ', sᵢ' tᵢ'ᵀ),   i = 1 … n
    h [d], D [m, d], U [d, m], C [n, n, n], s [n, m/n], t [n, d/n], f = gelu

Karimi Mahabadi, Henderson, Ruder 2021, arXiv 2106.04647. D[a·m/n + p, b·d/n + q] = Σᵢ Cᵢ[a, b] sᵢ[p] tᵢ[q]. Each map
has a C of its own, as in T-Few's runs of it; the paper shares one among all layers. C ~ N(0, 0.01²), s and t as
Xavier's, biases 0. C' = 0 where the paper draws it like C: it starts near the identity, this starts at it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Site
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method


@method(
    "compacter",
    place="activations",
    equation="h ← h + U f(D h + b_D) + b_U, D and U = Σᵢ kron(Cᵢ, sᵢ tᵢᵀ)",
    paper="Karimi Mahabadi et al. 2021, arXiv 2106.04647",
)
class Compacter(Method):
    """reduction: d / m. n: how many products are summed, and the size of C; it divides d and m."""

    reduction: int = 16
    n: int = 4
    sites: tuple[str, ...] = ("*.attn.o", "*.mlp.down")

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        d, n = site.width, self.n
        m = max(n, d // self.reduction // n * n)
        if d % n:
            raise UsageError(f"compacter: n = {n} does not divide the {d} features of {site.name}")

        def xavier(rows: int, columns: int, length: int) -> Tensor:
            std = math.sqrt(2 / (rows + columns))
            return std * torch.randn(n, length, generator=generator)

        return {
            "C_D": 0.01 * torch.randn(n, n, n, generator=generator),
            "s_D": xavier(m // n, 1, m // n),
            "t_D": xavier(1, d // n, d // n),
            "b_D": torch.zeros(m),
            "C_U": torch.zeros(n, n, n),
            "s_U": xavier(d // n, 1, d // n),
            "t_U": xavier(1, m // n, m // n),
            "b_U": torch.zeros(d),
        }

    def ready(self, p: Params, frozen: Params) -> Params:
        D, U = (kronecker(p[f"C_{k}"], p[f"s_{k}"], p[f"t_{k}"]) for k in "DU")
        return {"D": D, "b_D": p["b_D"], "U": U, "b_U": p["b_U"]}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        D, b_D, U, b_U = p["D"], p["b_D"], p["U"], p["b_U"]
        return F.gelu(y @ D.T + b_D) @ U.T + b_U


def kronecker(C: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Σᵢ kron(Cᵢ, sᵢ tᵢᵀ) [n·P, n·Q] from C [n, n, n], s [n, P], t [n, Q]."""
    (n, P), Q = s.shape, t.shape[1]
    st = s[:, :, None] * t[:, None, :]
    H = C.flatten(1).T @ st.flatten(1)  # [n·n, P·Q]
    return H.view(n, n, P, Q).transpose(1, 2).reshape(n * P, n * Q)
