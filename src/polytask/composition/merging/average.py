"""Averaging: the weighted mean of the differences.

    τ = Σ_k w_k τ_k / Σ_k w_k

The plain mean of fine-tuned weights that everything else is compared with; by that name and as a way to keep accuracy,
model soups: Wortsman, Ilharco, Gadre, Roelofs, Gontijo-Lopes, Morcos, Namkoong, Farhadi, Carmon, Kornblith, Schmidt
2022, arXiv 2203.05482, there of models of one task. τ_k [...], w_k numbers. Scaling all weights changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.composition.merging.rule import Rule, rule
from polytask.errors import UsageError


@rule("average", equation="τ = Σ w_k τ_k / Σ w_k", paper="model soups: Wortsman et al. 2022, arXiv 2203.05482")
class Average(Rule):
    """No hyperparameters."""

    linear = True

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        if w.sum().abs() < 1e-9:
            raise UsageError("average: the weights add up to 0, so there is no mean; take task-arithmetic")
        return torch.einsum("k,k...->...", w / w.sum(), τ)
