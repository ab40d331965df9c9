"""aTLAS: each block of each task vector gets a coefficient of its own, and only these are learned.

    θ_j ← θ_j + Σ_n λ_nj τ_nj        and so at a site    Δ = Σ_n λ_n ∘ z_n,  λ = 0 at first

Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad 2024, arXiv 2407.02880. A block j is a site: for a LoRA
τ = s B A, and λ times what it adds is exact. Of an adapter that is no change of weights, what it adds is scaled. λ may
be negative; training starts at the backbone. N·M·K numbers for N adapters at M sites.

K > 1 splits each block at random into K groups with a coefficient each, the same groups in blocks of the same size. The
paper splits all entries of a tensor; here a site's features are split, with a row of τ each, so that nothing but what
adapters add is needed. λ is learned from few labels by the ordinary loss; the paper's objectives without labels are not
here. With K = 1 it differs from `scalearn_uniform` in where it starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Backbone, Site
from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params, method


@method(
    "atlas",
    place="weights",
    equation="θ_j ← θ_j + Σ_n λ_nj τ_nj",
    paper="Zhang et al. 2024, arXiv 2407.02880",
)
class Atlas(Composed):
    """K: groups of each block."""

    K: int = 1

    def frozen(self, backbone: Backbone, site: Site) -> Params:
        shuffled = torch.randperm(site.width, generator=torch.Generator().manual_seed(site.width))
        return {"group": (shuffled % self.K).to(backbone.device)}

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"λ": torch.zeros(len(self.over), self.K)}

    def ready(self, p: Params, frozen: Params) -> Params:
        return {"λ": p["λ"][:, frozen["group"]]}

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        λ = p["λ"]
        Δ = torch.zeros_like(y)
        for n, change in sources.items():
            Δ = Δ + λ[n] * change(y)
        return Δ
