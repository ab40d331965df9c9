"""MeteoRA: a trained gate at each site sends every token to the LoRAs that it needs.

    z = G x,   w = softmax over the k greatest of z / τ,   Δ = Σ_n w_n Δ_n        G [N, reads]
    loss + c · Σ over sites and tokens of −log softmax(z)_owner

Xu, Lai, Huang 2024, arXiv 2405.13053. The adapters are frozen, as in the paper (its code trains them too), and only the
gates are trained. `owner` is the adapter that belongs to the task: the second term teaches gates to know each task's
tokens. Without an owner there is the ordinary loss alone, which learns to use adapters for a task of none of them.

Gates of many tasks are trained as one training of many jobs, one for each task, with its own `owner` and all adapters:
jobs that differ in nothing else share G. So the loop needs no owner for each row: `join` adds the second term's
gradient, c (softmax(z) − 1_owner) for each real token, to what flows back to z. It is a sum and not the paper's mean
over gates and tokens times 50, since a call sees only some of a batch; c = 0.01 comes to about as much for a batch of
some hundred tokens and a dozen sites. In the printed loss it is not included.

k = 2 and τ = 1 as in the paper's code, G ~ U(±1/√reads) like a linear map's. N · reads numbers a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from polytask.backbones import Backbone, Site
from polytask.composition.routing.token_level import TokenRouter, rows
from polytask.errors import UsageError
from polytask.methods.composed import Sources
from polytask.methods.method import Params, method


@method(
    "meteora",
    place="weights",
    equation="Δ = Σ_n w_n Δ_n, w = softmax over the k greatest of G x / τ",
    paper="Xu et al. 2024, arXiv 2405.13053",
)
class MeteoRA(TokenRouter):
    """top_k: k. temperature: τ. gate: c. owner: the id of the task's own adapter, none if empty; by default the one of
    `over` that learned a task of the same name, if there is one."""

    elsewhere = True
    owned = True
    positional = True
    fixed = frozenset(("owner",))
    common = frozenset(("G",))

    top_k: int = 2
    temperature: float = 1.0
    gate: float = 0.01
    owner: str = field(default="", compare=False)  # or jobs of different owners would share nothing

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        if self.owner and self.owner not in self.over:
            raise UsageError(f"meteora: the owner {self.owner} is none of the adapters in `over`")
        owner = self.over.index(self.owner) if self.owner else -1
        return super().start(backbone, seed, writing=writing) | {"shared/owner": torch.tensor(owner)}

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound = site.reads**-0.5
        return {"G": torch.empty(len(self.over), site.reads).uniform_(-bound, bound, generator=generator)}

    def scores(self, p: Params, x: Tensor, here: Sequence[int]) -> Tensor:
        return x.float() @ rows(p["G"], here).T

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        z = self.scores(p, x, [*sources])
        if torch.is_grad_enabled():
            owned = (torch.tensor([*sources], device=z.device) == p["owner"]).to(z.dtype)
            real = (p["at"] >= 0).to(z.dtype)[:, None] * owned.sum()  # 0 where the owner does not act
            z = _Beside.apply(z, self.gate * real * (z.softmax(-1) - owned).detach())  # type: ignore[no-untyped-call]
        return sources.chosen(*self.taken(z), y)


class _Beside(torch.autograd.Function):
    """z, to whose gradient a slope is added."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, slope: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *above: Any) -> Any:
        return above[0] + ctx.saved_tensors[0], None
