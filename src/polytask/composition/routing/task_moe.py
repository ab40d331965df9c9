"""Task-level mixture of experts over a library: a task takes one adapter in each layer, and learns nothing but which.

    Δ = Δ_e,  e = argmax z_l  at the sites of layer l                z [L, N] the task's route over N adapters
    while training  Δ = Σ_n g_n Δ_n,  g = one-hot(argmax) of softmax((z_l + G) / τ), the softmax's slope

G and τ as in `polytask.methods.task_experts`. Ye, Zha, Ren 2022, arXiv 2205.12701: their way to a new task of a few
examples, where experts stay as they are. L N numbers; where the adapter that is taken does not act, nothing changes.
The route does not depend on the input, and can be read (`route`).

Experts may be any adapters that act at sites: those of single tasks, those of clusters of tasks, or what tasks learned
together by `task_experts`, of which `experts` makes LoRAs. The paper's way without any example, which reads the route
from the description of a task, is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import Adapter
from polytask.backbones import Backbone, Site
from polytask.errors import UsageError
from polytask.methods import build
from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params, method
from polytask.methods.task_experts import TaskExperts, cooled, drawn, layer


@method(
    "task_moe",
    place="weights",
    equation="Δ = Δ_e, e = argmax z_l of the task",
    paper="Ye et al. 2022, arXiv 2205.12701",
)
class TaskMoE(Composed):
    """tau: τ at first. cold: τ at least."""

    elsewhere = True
    tau: float = 2.0
    cold: float = 0.1

    def annealed(self, share: float) -> Self:
        return replace(self, tau=cooled(self.tau, self.cold, share))  # type: ignore[call-arg]

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        own = super().start(backbone, seed, writing=writing)
        return {"shared/z": drawn(backbone, len(self.over), seed)} | own

    def frozen(self, backbone: Backbone, site: Site) -> Params:
        return {"layer": layer(backbone, site)}

    def sampled(self, p: Params) -> Params:
        return {"g": F.gumbel_softmax(p["z"], self.tau, hard=True)}

    def ready(self, p: Params, frozen: Params) -> Params:
        g = p["g"] if "g" in p else F.one_hot(p["z"].argmax(-1), p["z"].shape[1]).to(p["z"].dtype)
        return {"g": g[frozen["layer"].long()]}

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        return sources.weighted(p["g"][[*sources]], y)


def route(adapter: Adapter) -> tuple[int, ...]:
    """Which expert a task takes in each layer: its number in `over`, or among those of `task_experts`."""
    if adapter.method not in ("task_moe", "task_experts"):
        raise UsageError(f"adapter {adapter.name} is by {adapter.method}, which has no route; give one by task_moe")
    return tuple(adapter.tensors["shared/z"].argmax(-1).tolist())


def experts(adapter: Adapter) -> list[Adapter]:
    """The experts of an adapter by `task_experts` as LoRAs, without a head, for `task_moe` to route over.

    Raises UsageError where it is by another method.
    """
    method = build(adapter.method, adapter.hyperparameters)
    if not isinstance(method, TaskExperts):
        raise UsageError(f"adapter {adapter.name} is by {adapter.method} and has no experts; give one by task_experts")
    lora = build("lora", {"r": method.r, "alpha": method.alpha, "sites": method.sites}).hyperparameters()
    own = [n for n in adapter.tensors if n.endswith(("/A", "/B"))]
    return [
        replace(
            adapter,
            method="lora",
            hyperparameters=lora,
            tensors={n: adapter.tensors[n][e].clone() for n in own},
            card=adapter.card.model_copy(
                update={
                    "name": f"{adapter.name}-expert-{e}",
                    "scores": {},  # they were measured on the adapter itself
                    "lineage": adapter.card.lineage.model_copy(update={"parents": (adapter.id,)}),
                    "notes": (f"expert {e} of {adapter.id}",),
                }
            ),
            head=None,
        )
        for e in range(method.m)
    ]
