"""Lottery-ticket sparse fine-tuning (LT-SFT): the numbers that training moves most are trained again, alone.

    1. θ₁ from training everything;   2. M = 1 for the K largest |θ₁ − θ₀|;   3. from θ₀ again: θ ← θ + M ∘ Δ

Ansell, Ponti, Korhonen, Vulić 2022, arXiv 2110.07560. K is taken over all weights together; norms stay as they are, and
the head starts anew with the rest. λ weighs the mean |θ − θ₀| in both trainings (0.1 for languages, 0 for tasks in the
paper). Sparse differences of a task and a language are added as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.methods.method import Params
from polytask.methods.selectors.selector import Choice, Look, Selector, selector


@selector("lottery", equation="M = 1 for the K largest |θ₁ − θ₀|", paper="Ansell et al. 2022, arXiv 2110.07560")
class Lottery(Selector):
    """share: K over the number of weights. epochs: of the first training, as a share of the job's. l1: λ."""

    share: float = 0.01
    epochs: float = 1.0
    l1: float = 0.0

    def choose(self, look: Look) -> Choice:
        modules = dict(look.backbone.base.named_modules())
        start = {
            name: tensor
            for name, tensor in look.tensors.items()
            if not name.startswith(":") or "norm" not in type(modules[name[1:].rpartition("/")[0]]).__name__.lower()
        }
        own = [n for n in start if not n.startswith("head/")]
        N = sum(start[n].numel() for n in own)

        def penalty(tensors: Params) -> Tensor:
            return self.l1 / N * torch.stack([(tensors[n] - start[n]).abs().sum() for n in own]).sum()

        learnt = look.trained(look.method, start, self.epochs, penalty if self.l1 else None)
        moved = {n: (learnt[n] - start[n]).abs() for n in own}
        return Choice(look.method.only(start), start, largest(moved, round(self.share * N)))


def largest(scores: Params, K: int) -> Params:
    """1 at the K largest scores over all tensors together, else 0; ties go to the first."""
    joined = torch.cat([s.flatten() for s in scores.values()])
    K = min(max(1, K), len(joined))
    flat = torch.zeros_like(joined)
    flat[joined.argsort(descending=True, stable=True)[:K]] = 1.0
    parts = torch.split(flat, [s.numel() for s in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
