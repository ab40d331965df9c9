"""Model Breadcrumbs: without the largest numbers and without the many small ones.

    m_k = 1 where |τ_k| is below the largest `drop_top` of its matrix and among the next `density`, 0 elsewhere
    τ = λ Σ_k w_k (m_k ∘ τ_k)

Davari, Belilovsky 2023, arXiv 2312.06795. τ_k [...], m_k [...]. The paper calls λ α, and masks layer by layer between
two percentiles of magnitude; here as there what is left is not scaled up. Defaults are those from which the authors'
search starts. Their script takes the largest of each row of a matrix; here it is those of the whole matrix, as in
mergekit, so that a row in which a task changed little does not take part like the others. With drop_top = 0 it is
pruning by magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polytask.composition.merging.rule import Rule, rule
from polytask.errors import UsageError


@rule(
    "breadcrumbs",
    equation="τ = λ Σ w_k (m_k ∘ τ_k), m_k the middle magnitudes",
    paper="Davari & Belilovsky 2023, arXiv 2312.06795",
)
class Breadcrumbs(Rule):
    """density: the share of each matrix that is kept. drop_top: the share that is larger and left out. scale: λ."""

    density: float = 0.15
    drop_top: float = 0.006
    scale: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_top <= 1 - self.density:
            raise UsageError(f"breadcrumbs.drop_top = {self.drop_top:g}: a share of at most 1 − density is needed")

    def keep(self, τ: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        flat = τ.reshape(len(τ), -1)
        n = flat.shape[1]
        kept, above = max(1, int(self.density * n)), int(self.drop_top * n)
        middle = flat.abs().topk(above + kept).indices[:, above:]
        return torch.zeros_like(flat).scatter(1, middle, flat.gather(1, middle)).view_as(τ)

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        return self.scale * torch.einsum("k,k...->...", w, τ)
