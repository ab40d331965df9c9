"""Coefficients by gradient: passes of all tasks' rows through the blend that they make, and Adam.

The backbone and the adapters' differences get no gradients of their own; a step costs a pass forward and one back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polytask.backbones import Backbone
from polytask.composition.merging.fitted.blend import Blend
from polytask.composition.merging.fitted.reading import Read
from polytask.errors import PolytaskError
from polytask.methods import passes
from polytask.methods.lifting import Plan

Losses = Callable[[Read, Sequence[int], Tensor], Tensor]
"""(task, numbers of its examples, their logits) ↦ a loss for each of their terms."""


def descend(
    base: Backbone,
    blend: Blend,
    reads: Sequence[Read],
    w: Tensor,
    λ: Callable[[Tensor], Tensor],
    losses: Losses,
    *,
    lr: float,
    steps: int,
    batch: int,
    seed: int,
) -> tuple[Tensor, list[float]]:
    """w after so many steps of Adam on Σ_tasks of the mean loss of `batch` examples each, and that sum at each step;
    λ(w) [G, P] are the coefficients. Raises PolytaskError where it is no number any more."""
    w = w.to(base.device).clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=lr)
    draw = random.Random(seed)
    orders: list[list[int]] = [[] for _ in reads]
    history: list[float] = []
    for step in range(steps):
        batches = []
        for order, one in zip(orders, reads, strict=True):
            if len(order) < min(batch, len(one.units)):
                order[:] = draw.sample(range(len(one.units)), len(one.units))
            batches.append([order.pop() for _ in range(min(batch, len(one.units)))])
        adam.zero_grad()
        history.append(backward(base, blend, reads, batches, w, λ, losses))
        if not math.isfinite(history[-1]):
            raise PolytaskError(f"the loss became {history[-1]} at step {step + 1}; try a smaller lr than {lr:g}")
        adam.step()
    return w.detach().cpu(), history


def backward(
    base: Backbone,
    blend: Blend,
    reads: Sequence[Read],
    batches: Sequence[Sequence[int]],
    w: Tensor,
    λ: Callable[[Tensor], Tensor],
    losses: Losses,
) -> float:
    """Add to w's gradient that of Σ_tasks of the mean loss of these examples; the sum."""
    seats = [one.seat for one in reads]
    rows = [(s, i) for s, chosen in enumerate(batches) for i in chosen]
    units, which = [reads[s].units[i] for s, i in rows], [s for s, _ in rows]
    terms = [max(1, sum(one.terms(i) for i in chosen)) for one, chosen in zip(reads, batches, strict=True)]
    sum_ = 0.0
    for pack in passes.schedule(seats, units, which, packable=base.packable):
        plan = Plan(base, [blend.active(λ(w))])
        total = torch.zeros((), device=base.device)
        for s, members, z in passes.forward(plan, seats, [units[i] for i in pack], [which[i] for i in pack]):
            each = losses(reads[s], [rows[pack[j]][1] for j in members], z)
            total = total + each.sum() / terms[s]
        total.backward()  # type: ignore[no-untyped-call]
        sum_ += float(total.detach())
    return sum_
