"""ScaLearn: adapters are scaled and added, and only the scales are learned.

    ScaLearn:          Δ = Σ_n w_n ∘ z_n     w_n [d] of each site
    ScaLearnUniform:   Δ = Σ_n w_n z_n       w_n one number of each site
    shared             w_n the same at all sites: ScaLearn++ and ScaLearnUniform++

Frohmann, Holtermann, Masoudian, Lauscher, Rekabsaz 2023, arXiv 2310.01217. z_n = Δ_n [T, d], what adapter n changes. No
softmax and no norm: scales may be negative and need not add up to 1. w ~ N(c/N, 0.001²) with c = 2, so training starts
at twice the mean of the changes and not at the backbone. For L sites and N adapters these are N·d·L numbers, N·L, N·d
and N. An adapter that does not act at a site has scales there without effect.

Dropout is on w, and a pass draws it anew at each site. It is 0.3 for vectors, as in the paper's runs; for scalars,
where it takes away a whole adapter, the authors have runs with it and without, and 0 is the default here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Backbone, Site
from polytask.errors import UsageError
from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params, method


@method(
    "scalearn",
    place="activations",
    equation="Δ = Σ_n w_n ∘ z_n",
    paper="Frohmann et al. 2023, arXiv 2310.01217",
)
class ScaLearn(Composed):
    """c: N times the scales' first mean. shared: one w for all sites. dropout: on w."""

    elsewhere = True
    c: float = 2.0
    shared: bool = False
    dropout: float = 0.3

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"w": self._drawn(site.width, generator)}

    def _drawn(self, d: int, generator: torch.Generator) -> Tensor:
        N = len(self.over)
        return torch.empty(N, d).normal_(self.c / N, 0.001, generator=generator)

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        each = super().start(backbone, seed, writing=writing)
        if not self.shared:
            return each
        widths = sorted({w.shape[1] for w in each.values()})
        if len(widths) > 1:
            raise UsageError(
                f"{self.name}: sites of {' and '.join(map(str, widths))} features cannot share a vector; take "
                "scalearn_uniform, or shared=false"
            )
        return {"shared/w": next(iter(each.values()))}

    def sampled(self, p: Params) -> Params:
        return {"w": F.dropout(p["w"], self.dropout)}

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        w = p["w"]
        Δ = torch.zeros_like(y)
        for n, change in sources.items():
            Δ = Δ + w[n] * change(y)
        return Δ


@method(
    "scalearn_uniform",
    place="activations",
    equation="Δ = Σ_n w_n z_n",
    paper="Frohmann et al. 2023, arXiv 2310.01217",
)
class ScaLearnUniform(ScaLearn):
    """c: N times the scales' first mean. shared: one w for all sites. dropout: on w."""

    dropout: float = 0.0

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"w": self._drawn(1, generator)}
