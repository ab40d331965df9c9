"""Elastic LoRA: ranks inside each other, trained at once, so that each site can be cut to one of them afterwards.

    y ← y + s · B[:, :ρ] A[:ρ] x,   s = α / r   (rsLoRA: s = α / √r)         A [r, in], B [out, r]
    ρ drawn from r and `nested`, all alike, for each site and pass in training; ρ = r otherwise

Muñoz, Yuan, Jain 2024 (Shears), arXiv 2404.10934; their survey of 2025, arXiv 2501.16372, has LoNAS and SQFT too. s is
that of the largest rank whatever ρ is, so that a cut computes what it was trained to. A and B start as LoRA's, at the
backbone. Ranks, α, dropout and sites are those of the authors' LLaMA runs, where q, k and v of a block share a ρ; here
each site draws its own. What a pass leaves out gets no gradient from it, and still moves by AdamW's momentum and decay.
The authors also prune the frozen weights, which is another step.

`recipes/elastic.py` cuts, and searches for each site's rank under a budget.
"""

from __future__ import annotations

import torch

from polytask.errors import UsageError
from polytask.methods.lora import LoRA
from polytask.methods.method import Params, method


@method(
    "elastic",
    place="weights",
    equation="y ← y + (α/r)·B[:, :ρ] A[:ρ] x, ρ drawn in training",
    paper="Muñoz et al. 2024, arXiv 2404.10934",
)
class Elastic(LoRA):
    """r: largest rank. nested: the smaller ones. alpha: scale's numerator. dropout: on x, in this branch only.
    rslora: divide by √r instead of r."""

    r: int = 32
    nested: tuple[int, ...] = (24, 16)
    alpha: float = 64.0
    dropout: float = 0.1
    sites: tuple[str, ...] = ("*.attn.[qkv]", "*.mlp.up", "*.mlp.down")

    def __post_init__(self) -> None:
        for ρ in self.nested:
            if not 0 < ρ < self.r:
                raise UsageError(f"elastic: {ρ} in nested is no smaller rank than r = {self.r}")

    @property
    def ranks(self) -> tuple[int, ...]:
        """All of them, the largest first."""
        return tuple(sorted({self.r, *self.nested}, reverse=True))

    def sampled(self, p: Params) -> Params:
        A, B = p["A"], p["B"]
        ρ = self.ranks[int(torch.randint(len(self.ranks), ()))]
        # A mask and no slice, so that adapters of one batch have one shape whatever each of them drew.
        return {"A": A, "B": B * (torch.arange(self.r, device=B.device) < ρ)}
