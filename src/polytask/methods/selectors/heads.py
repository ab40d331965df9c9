"""Attention heads that matter for a task (LoFiT's first step): the ones that a learned scale changes most.

    z ← (1 + A) ∘ z,   min L + λ ‖A‖₁,   score of a head = ‖A_head‖₂

Yin, Ye, Durrett 2024, arXiv 2406.01563. A [heads · d_head] at what the heads put out, for all heads at once, drawn from
N(0, 10⁻⁶); the K heads with the largest scores of all blocks are trained, and A is thrown away.
"""

from __future__ import annotations

import torch

from polytask.errors import UsageError
from polytask.methods.method import Params, build
from polytask.methods.selectors.selector import Choice, Look, Selector, selector


@selector("heads", equation="heads with the largest ‖A‖₂ of z ← (1 + A) ∘ z", paper="Yin et al. 2024, arXiv 2406.01563")
class Heads(Selector):
    """share: of the heads that is trained. l1: λ. epochs: of the first step, as a share of the job's."""

    share: float = 0.03
    l1: float = 5e-4
    epochs: float = 1.0

    def choose(self, look: Look) -> Choice:
        places = {n: n.rpartition("/")[0] for n in look.tensors if n.rpartition("/")[0].endswith(".heads")}
        if not places:
            raise UsageError(f"{look.method.name} has no tensors at what attention heads put out (*.attn.heads)")
        scales = build("ia3", {"sites": tuple(places.values())})
        draw = torch.Generator().manual_seed(look.seed)
        start: Params = {n: t for n, t in look.tensors.items() if n.startswith("head/")}
        for place in places.values():
            width = look.backbone.sites[place].width
            start[f"{place}/l"] = 1 + 1e-3 * torch.randn(width, generator=draw).to(look.backbone.device)
        own = [n for n in start if not n.startswith("head/")]
        learnt = look.trained(
            scales,
            start,
            self.epochs,
            lambda tensors: self.l1 * torch.stack([(tensors[n] - 1).abs().sum() for n in own]).sum(),
        )
        H = look.backbone.heads
        scores = {place: torch.unflatten(learnt[f"{place}/l"] - 1, 0, (H, -1)).norm(dim=1) for place in places.values()}
        joined = torch.cat([*scores.values()])
        K = max(1, round(self.share * len(joined)))
        chosen = torch.zeros_like(joined)
        chosen[joined.argsort(descending=True, stable=True)[:K]] = 1.0
        by_place = dict(zip(scores, torch.split(chosen, H), strict=True))
        shares, tensors = {}, dict(look.tensors)
        for name, place in places.items():
            mask = by_place[place].repeat_interleave(look.tensors[name].shape[0] // H)
            if mask.any():
                shares[name], tensors[name] = mask, tensors[name] * mask
            else:
                del tensors[name]
        return Choice(look.method.only(tensors), tensors, shares)
