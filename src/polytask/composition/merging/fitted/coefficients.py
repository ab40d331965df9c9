"""The rule that coefficients make, once they are found.

Δ = Σ_k λ_k w_k τ_k        λ [K] of its own at each place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polytask.composition.differences import Weighed
from polytask.composition.merging.rule import Rule


class Coefficients(Rule):
    """`λ`: by place, [K]. `how`: how they were found, in words."""

    linear = True

    def __init__(self, sources: Sequence[Weighed], λ: Mapping[str, Tensor], how: str) -> None:
        self.sources, self.λ, self.how = sources, λ, how

    def at(self, where: str) -> Rule:
        return Scaled(self.λ[where])

    def found(self) -> dict[str, Any]:
        each = {at: λ.tolist() for at, λ in self.λ.items()}
        return {
            "coefficients": {
                source.adapter.id: {at: round(λ[k], 6) for at, λ in each.items()}
                for k, source in enumerate(self.sources)
            }
        }

    def told(self) -> tuple[str, ...]:
        whole = torch.stack([*self.λ.values()])
        said = []
        for source, λ in zip(self.sources, whole.T, strict=True):
            spread = f" ({float(λ.min()):.3f} to {float(λ.max()):.3f})" if bool((λ != λ[0]).any()) else ""
            said.append(f"{source.adapter.name} {float(λ.mean()):.3f}{spread}")
        return (f"coefficients by {self.how}: {', '.join(said)}",)


class Scaled(Rule):
    """The rule at one place."""

    linear = True

    def __init__(self, λ: Tensor) -> None:
        self.λ = λ

    def keep(self, τ: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        return torch.einsum("k,k...->k...", self.λ.to(τ), τ)

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("k,k...->...", w, τ)
