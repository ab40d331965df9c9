"""PHATGOOSE: each adapter learns, after its training, which tokens are its own.

    a gate for one LoRA:    Δ = σ(vᵀ x) Δ_n                             v [reads] at each site, 0 at first
    many of them:           z_n = v̄_nᵀ x̄ / √reads,   w = softmax over the k greatest of z,   Δ = Σ_n w_n Δ_n

Muqeeth, Liu, Liu, Raffel 2024, arXiv 2402.05859. The gate is trained on the adapter's own task with all else frozen,
and knows no other adapter: so one more adapter needs its own gate and nothing else. To route, gates and tokens are
standardised over their features (ū = (u − mean) / √(variance + 1e-5)), and the sigmoid is left out. k = 2. A gate is
as many numbers as its site reads, and was trained for 100 steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import Adapter
from polytask.backbones import Backbone, Site
from polytask.composition.routing.token_level import TokenRouter, check, routing, rows
from polytask.errors import UsageError
from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params, method


@method(
    "phatgoose_gate",
    place="weights",
    equation="Δ = σ(vᵀ x) Δ_n",
    paper="Muqeeth et al. 2024, arXiv 2402.05859",
)
class Gate(Composed):
    """No hyperparameters; `over` is one adapter."""

    elsewhere = True

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        if len(self.over) != 1:
            raise UsageError(f"phatgoose_gate: a gate is for one adapter, not for {len(self.over)}")
        return super().start(backbone, seed, writing=writing)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"v": torch.zeros(site.reads)}

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        return sources.weighted((x @ p["v"]).sigmoid()[:, None], y)


@method(
    "phatgoose",
    place="weights",
    equation="Δ = Σ_n w_n Δ_n, w = softmax over the k greatest v̄_nᵀ x̄ / √reads",
    paper="Muqeeth et al. 2024, arXiv 2402.05859",
)
class Phatgoose(TokenRouter):
    """top_k: k. temperature: what scores are divided by before the softmax, 1 in the paper."""

    learned = False
    top_k: int = 2
    temperature: float = 1.0

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"v": torch.zeros(len(self.over), site.reads)}

    def ready(self, p: Params, frozen: Params) -> Params:
        v = p["v"]
        return {"v": F.layer_norm(v.float(), v.shape[-1:])}

    def scores(self, p: Params, x: Tensor, here: Sequence[int]) -> Tensor:
        z: Tensor = F.layer_norm(x.float(), x.shape[-1:]) @ rows(p["v"], here).T / x.shape[-1] ** 0.5
        return z


def phatgoose(
    base: Backbone,
    gates: Sequence[Adapter],
    *,
    top_k: int = Phatgoose.top_k,
    temperature: float = Phatgoose.temperature,
    head: Adapter | None = None,
    name: str = "phatgoose",
) -> Adapter:
    """One adapter that routes among those that the gates are for, with the head and task of `head`, by default of the
    first gate. Raises UsageError where one is no gate, PolytaskError where one belongs to another backbone."""
    if not gates:
        raise UsageError("phatgoose routes among adapters: give their gates")
    check(base, [*gates, *([head] if head else [])])
    for one in gates:
        if one.method != Gate.name:
            raise UsageError(f"{one.name} is by {one.method}: train its gate with phatgoose_gate, and give that")
    at = tuple(dict.fromkeys(site for one in gates for site in one.sites))
    tensors = {
        f"{site}/v": torch.stack([one.at(site).get("v", torch.zeros(base.sites[site].reads)) for one in gates])
        for site in at
    }
    over = tuple(str(one.hyperparameters["over"][0]) for one in gates)
    method = Phatgoose(over, at, top_k=top_k, temperature=temperature)
    return routing(base, method, tensors, gates, head or gates[0], name)
