"""Task-level mixture of experts: tasks trained together share LoRAs of which each task takes one in each layer.

    y ← y + s · B_e A_e x,  e = argmax z_l  at the sites of layer l                                    s = α / r
    while training  y ← y + s · Σ_e g_e B_e A_e x,  g = one-hot(argmax) of softmax((z_l + G) / τ), the softmax's slope

z_l [m] a task's logits in layer l, G_e = −log(−log u_e), u_e ~ U(0, 1); A [m, r, in] and B [m, out, r] are all tasks'.
τ falls from 2 to 0.1 as 2 exp(−9 t), t the share of training that is done. Ye, Zha, Ren 2022, arXiv 2205.12701. The
choice does not depend on the input: an adapter costs what a LoRA costs, and a task's route can be read from z.

The authors' experts are copies of whole layers, m = 3, all trained. Here the backbone is frozen and experts are LoRAs,
A drawn as LoRA's and B = 0, so training starts at the backbone. Their z_l comes from a learned task embedding by a
small network of each layer; with nothing else in it that is a table of logits, which is learned here, z ~ N(0, 0.01²).
Their τ = max(2 exp(−3e-4 n), 0.1) at step n of 30,000 is this schedule over the same share of training. Noise is drawn
anew for each site and pass, so that sites of a layer may differ while it counts.

Jobs of one training whose method is this one with equal hyperparameters share A and B, and each keeps a copy of them
with its own z. With `route` only z is trained: a new task on the experts of an adapter that training begins with. To
keep experts once for all tasks, and to route over any adapters, see `polytask.composition.routing.task_moe`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Backbone, Site
from polytask.methods.method import Method, Params, method

FALL = 9.0  # of −log τ over a training


@method(
    "task_experts",
    place="weights",
    equation="y ← y + (α/r)·B_e A_e x, e = argmax z_l of the task",
    paper="Ye et al. 2022, arXiv 2205.12701",
)
class TaskExperts(Method):
    """m: experts. r: rank of each. alpha: scale's numerator. dropout: on x. tau: τ at first. cold: τ at least.
    route: train z alone."""

    common = frozenset(("A", "B"))

    m: int = 3
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    tau: float = 2.0
    cold: float = 0.1
    route: bool = False
    sites: tuple[str, ...] = ("*.attn.q", "*.attn.v")

    def annealed(self, share: float) -> Self:
        return dataclasses.replace(self, tau=cooled(self.tau, self.cold, share))  # type: ignore[type-var]

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        return {"shared/z": drawn(backbone, self.m, seed)} | super().start(backbone, seed, writing=writing)

    def frozen(self, backbone: Backbone, site: Site) -> Params:
        return {"layer": layer(backbone, site)}

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound = 1 / math.sqrt(site.reads)
        A = torch.empty(self.m, self.r, site.reads).uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": torch.zeros(self.m, site.width, self.r)}

    def sampled(self, p: Params) -> Params:
        return {**p, "g": F.gumbel_softmax(p["z"], self.tau, hard=True)}

    def ready(self, p: Params, frozen: Params) -> Params:
        """One wide LoRA in training, that of the expert that is taken in use."""
        A, B, l = p["A"], self.alpha / self.r * p["B"], frozen["layer"].long()  # noqa: E741
        if "g" not in p:
            e = p["z"][l].argmax()
            return {"A": A[e], "B": B[e]}
        return {"A": A.flatten(0, 1), "B": torch.einsum("m,mor->omr", p["g"][l], B).flatten(1)}

    def trains(self, name: str) -> bool:
        return super().trains(name) and not (self.route and name.rpartition("/")[2] in self.common)

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return (x @ p["A"].T) @ p["B"].T


def cooled(τ: float, cold: float, share: float) -> float:
    """τ when a share of training is done, from 0 to 1."""
    return max(τ * math.exp(-FALL * share), cold)


def drawn(backbone: Backbone, m: int, seed: int) -> Tensor:
    """z [layers, m] at first."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(len(_layers(backbone)), m).normal_(0, 0.01, generator=generator)


def layer(backbone: Backbone, site: Site) -> Tensor:
    """The row of z for a site; what stands before the blocks goes with the first."""
    found = _LAYER.match(site.name)
    return torch.tensor(_layers(backbone).index(found[0]) if found else 0, device=backbone.device)


_LAYER = re.compile(r"(\w+\.)?\d+(?=\.|$)")


def _layers(backbone: Backbone) -> list[str]:
    return [*dict.fromkeys(found[0] for name in backbone.sites if (found := _LAYER.match(name)))]
