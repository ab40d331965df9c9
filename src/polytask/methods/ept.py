"""Efficient prompt tuning (EPT): a short prompt, and two small matrices that change the text's own embeddings.

    X = [P′; E(x) + A B],   P_f = P + softmax(P (A B)ᵀ / √d) A B,   P′ = Σ_k g_k P_f W_k,   g = softmax(W_g mean(P_f))

P [s, d], A [n, ρ], B [ρ, d], W_k [d, d] = I + U_k V_k with rank ρ, W_g [K, d]. Lan, Yang, Liu, Guo, Jiang, Zhao, Wang
2024, arXiv 2405.11464. Row t of A B is added to token t of the text, as far as there are rows. The abstract has the
four parts; how they are joined is our reading of it. P begins as tokens drawn from the vocabulary, B, U and W_g as 0,
so that training starts at prompt tuning with s tokens. W_k of full rank would be more numbers than a long prompt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method


@method(
    "ept",
    place="tokens",
    equation="X = [Σ g_k (P + softmax(P (AB)ᵀ/√d) AB) W_k; E(x) + A B]",
    paper="Lan et al. 2024, arXiv 2405.11464",
)
class EPT(Method):
    """s: virtual tokens. n: tokens of the text that are changed. rank: ρ. spaces: K."""

    elsewhere = True
    reads_weights = True

    s: int = 10
    n: int = 128
    rank: int = 4
    spaces: int = 4
    sites: tuple[str, ...] = ("tokens",)

    @property
    def slots(self) -> int:
        return self.s

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        d = site.width
        drawn = torch.randint(len(frozen["E"]), (self.s,), generator=generator)
        return {
            "P": frozen["E"].cpu()[drawn].float(),
            "A": torch.empty(self.n, self.rank).normal_(0, 0.02, generator=generator),
            "B": torch.zeros(self.rank, d),
            "U": torch.zeros(self.spaces, d, self.rank),
            "V": torch.empty(self.spaces, self.rank, d).normal_(0, 0.02, generator=generator),
            "W_g": torch.zeros(self.spaces, d),
        }

    def ready(self, p: Params, frozen: Params) -> Params:
        P, AB = p["P"], p["A"] @ p["B"]
        P_f = P + (P @ AB.T / math.sqrt(P.shape[1])).softmax(-1) @ AB
        g = (p["W_g"] @ P_f.mean(0)).softmax(-1)
        moved = P_f + P_f @ p["U"] @ p["V"]  # [K, s, d]
        return {"P": torch.einsum("k,ksd->sd", g, moved), "AB": AB}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        P, AB = p["P"], p["AB"]
        t = -1 - x
        text = AB[t.clamp(0, len(AB) - 1)] * ((t >= 0) & (t < len(AB)))[:, None]
        virtual = ((x >= 0) & (x < len(P)))[:, None]
        return torch.where(virtual, P[x.clamp(0, len(P) - 1)] - y, text)
