"""Arrow: a token goes to the LoRAs whose strongest input direction it lies along.

    ΔW_n = s_n B_n A_n = U diag(σ) Vᵀ,   v_n = the first column of V        the prototype [reads] of source n at a site
    z_n = |v_nᵀ x|,   w = softmax over the k greatest of z_n / τ,   Δ = Σ_n w_n Δ_n

Ostapenko, Su, Ponti, Charlin, Le Roux, Pereira, Caccia, Sordoni 2024, arXiv 2405.11157. x [reads] is one token at one
site, and each token chooses at each site anew. Nothing is trained and no data are seen: v_n follows from A and B. It
has length one and no sign, and z is no cosine, so that a longer x decides more sharply. Defaults as in Hugging Face
PEFT, k = 3 and τ = 1.

The singular vector is computed exactly, from the r × r core of B A in fp64, where PEFT takes 15 steps of power
iteration from a random start; the two agree where the largest singular value stands apart. A source by another method
has one too, as long as it changes nothing but the weights of linear maps. One that changes nothing has v = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polytask.adapters import Adapter
from polytask.backbones import Backbone, Site
from polytask.composition.compose import sites, source
from polytask.composition.low_rank import differences
from polytask.composition.routing.token_level import TokenRouter, check, routing, rows
from polytask.errors import UsageError
from polytask.methods import build
from polytask.methods.lifting import Active
from polytask.methods.lora import LoRA
from polytask.methods.method import Params, method


@method(
    "arrow",
    place="weights",
    equation="Δ = Σ_n w_n Δ_n, w = softmax over the k greatest |v_nᵀ x| / τ",
    paper="Ostapenko et al. 2024, arXiv 2405.11157",
)
class Arrow(TokenRouter):
    """top_k: k, adapters that each token takes. temperature: τ."""

    learned = False
    top_k: int = 3
    temperature: float = 1.0

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"v": torch.zeros(len(self.over), site.reads)}

    def scores(self, p: Params, x: Tensor, here: Sequence[int]) -> Tensor:
        return (x.float() @ rows(p["v"], here).T).abs()


def arrow(
    base: Backbone,
    adapters: Sequence[Adapter],
    *,
    top_k: int = Arrow.top_k,
    temperature: float = Arrow.temperature,
    head: Adapter | None = None,
    name: str = "arrow",
) -> Adapter:
    """One adapter that routes among these, with the head and task of `head`, by default the first.

    Raises UsageError where one of them is not a change to weights of linear maps, PolytaskError where one belongs to
    another backbone.
    """
    if not adapters:
        raise UsageError("arrow routes among adapters: give some")
    check(base, [*adapters, *([head] if head else [])])
    for one in adapters:
        if one.needs:
            raise UsageError(f"{one.name} is made of other adapters or stands on some: route among those or merge")
    actives = [Active.of(build(one.method, one.hyperparameters), one.tensors) for one in adapters]
    for active in actives:
        source(((1.0, active),), Arrow)
    prototypes = [_prototypes(base, one, active) for one, active in zip(adapters, actives, strict=True)]
    tensors = {}
    for at in sites(actives):
        none = torch.zeros(base.sites[at].reads)
        tensors[f"{at}/v"] = torch.stack([each.get(at, none) for each in prototypes])
    over = tuple(one.id for one in adapters)
    method = Arrow(over, sites(actives), top_k=top_k, temperature=temperature)
    return routing(base, method, tensors, adapters, head or adapters[0], name)


def _prototypes(base: Backbone, adapter: Adapter, active: Active) -> dict[str, Tensor]:
    """v [reads] by site, fp32, with its greatest number positive."""
    found = {}
    if isinstance(active.method, LoRA):
        for at, p in active.at.items():
            ready = active.method.ready({n: t.double() for n, t in p.items()}, {})
            Q, R = torch.linalg.qr(ready["A"].T)
            found[at] = Q @ _first(torch.linalg.qr(ready["B"]).R @ R.T)
    else:
        maps, _ = differences(base, adapter.name, active)
        found = {at: _first(ΔW.double()) for at, ΔW in maps.items()}
    return {at: (v * v[v.abs().argmax()].sign()).float().cpu().contiguous() for at, v in found.items()}


def _first(M: Tensor) -> Tensor:
    """The right singular vector of M's greatest singular value; 0 where that is 0."""
    _, σ, Vt = torch.linalg.svd(M, full_matrices=False)
    v: Tensor = Vt[0] * (σ[0] > 0)
    return v
