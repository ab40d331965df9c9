"""TIES: trim, elect signs, and average those that agree.

    τ̂_k = τ_k where |τ_k| is among the largest `density` of its matrix, 0 elsewhere
    γ = sgn Σ_k w_k τ̂_k
    τ = λ · mean of w_k τ̂_k over the k with sgn(w_k τ̂_k) = γ ≠ 0,   0 where there are none

Yadav, Tam, Choshen, Raffel, Bansal 2023, arXiv 2306.01708; density 0.2 and λ = 1 are the paper's where there is no
validation data. τ_k [...]. Differences:
* The paper trims a model's whole vector at once; here each matrix by itself, as PEFT and mergekit do, so that no more
  than one matrix of each adapter is in memory.
* The paper has no weights. Here w_k τ_k is adapter k's task vector, so that weight 0 is the same as not being there.
  PEFT elects before it weighs and mergekit divides by the agreeing weights; with equal weights of 1 all three agree.
* Of numbers of one magnitude, where not all can be kept, the first are.
* Where the sum is exactly 0 no sign is elected. The authors' script takes the majority sign of the whole model there,
  PEFT and mergekit take plus.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from polytask.composition.merging.rule import Rule, rule


@rule(
    "ties",
    equation="τ = λ · mean of the large w_k τ_k that have their sum's sign",
    paper="Yadav et al. 2023, arXiv 2306.01708",
)
class TIES(Rule):
    """density: the share of each matrix that is kept, by magnitude. scale: λ."""

    density: float = 0.2
    scale: float = 1.0

    def keep(self, τ: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        size = τ.reshape(len(τ), -1).abs()
        k = max(1, int(self.density * size.shape[1]))
        kept = torch.empty_like(size, dtype=torch.bool)
        for own, row in zip(size, kept, strict=True):
            # A selection, where sorting takes six times as long.
            least = float(np.partition(own.cpu().numpy(), -k)[-k])
            torch.lt(own, least, out=row).logical_not_()
            if more := int(row.count_nonzero()) - k:
                row[(own == least).nonzero()[-more:, 0]] = False
        return τ.masked_fill(~kept.view_as(τ), 0.0)

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        return self.scale * agreed(τ, w)


def agreed(τ: Tensor, w: Tensor) -> Tensor:
    """The mean of those w_k τ_k that have the elected sign γ, 0 where none has."""
    τ = torch.einsum("k,k...->k...", w, τ)
    γ = τ.sum(0).sign()
    A = (τ.sign() == γ) & (γ != 0)
    return (τ * A).sum(0) / A.sum(0).clamp(min=1)
