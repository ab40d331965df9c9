"""DARE: numbers are dropped by chance and the others scaled up, so that each difference stays the same on average.

    m_k ~ Bernoulli(density),   τ̂_k = m_k ∘ τ_k / density
    τ = λ Σ_k w_k τ̂_k

Yu, Yu, Yu, Huang, Li 2023, arXiv 2311.03099; density is 1 − p, and the paper drops p = 0.9 and more of what supervised
fine-tuning changes in a large model, where numbers are small (within 0.002). τ_k [...], m_k [...]. An adapter's mask
depends on `seed`, on the adapter and on the matrix, and not on what it is merged with. mergekit scales to the same sum
of magnitudes instead of by 1 / density.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polytask.composition.merging.rule import Rule, rule


@rule("dare", equation="τ = λ Σ w_k (m_k ∘ τ_k)/(1−p), m_k ~ Bernoulli(1−p)", paper="Yu et al. 2023, arXiv 2311.03099")
class DARE(Rule):
    """density: the share that is kept, 1 − p. scale: λ. seed: of the masks."""

    density: float = 0.1
    scale: float = 1.0
    seed: int = 0

    def keep(self, τ: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        share = torch.full(τ.shape[1:], self.density, dtype=τ.dtype)
        m = torch.stack([torch.bernoulli(share, generator=draw) for draw in draws]).to(τ.device)
        return m * τ / self.density

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        return self.scale * torch.einsum("k,k...->...", w, τ)
