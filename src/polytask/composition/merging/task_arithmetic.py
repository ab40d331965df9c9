"""Task arithmetic: task vectors are added, and taken away by a negative weight.

    τ = λ Σ_k w_k τ_k

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi 2022, arXiv 2212.04089. τ_k = θ_k − θ₀ [...]; the
paper has w_k = 1 and chooses λ on validation data. 0.3 is what later papers start from where eight tasks are merged.
With λ = 1/K it is averaging.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.composition.merging.rule import Rule, rule


@rule("task-arithmetic", equation="τ = λ Σ w_k τ_k", paper="Ilharco et al. 2022, arXiv 2212.04089")
class TaskArithmetic(Rule):
    """scale: λ."""

    linear = True

    scale: float = 0.3

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        return self.scale * torch.einsum("k,k...->...", w, τ)
