"""DARE, then TIES without its trimming: signs are elected among what chance left.

    m_k ~ Bernoulli(density),   τ̂_k = m_k ∘ τ_k / density
    γ = sgn Σ_k w_k τ̂_k
    τ = λ · mean of w_k τ̂_k over the k with sgn(w_k τ̂_k) = γ ≠ 0,   0 where there are none

Yu, Yu, Yu, Huang, Li 2023, arXiv 2311.03099, with Yadav et al. 2023, arXiv 2306.01708. See `dare.py` for the masks and
`ties.py` for weights and elections. A number that one adapter alone kept is not divided by K, so that at a low
density the result is on average nearer to the sum of the differences than to their mean: choose λ.
"""

from __future__ import annotations

from torch import Tensor

from polytask.composition.merging.dare import DARE
from polytask.composition.merging.rule import rule
from polytask.composition.merging.ties import agreed


@rule(
    "dare-ties",
    equation="τ = λ · mean of the w_k (m_k ∘ τ_k)/(1−p) that have their sum's sign",
    paper="Yu et al. 2023, arXiv 2311.03099",
)
class DARETIES(DARE):
    """density: the share that is kept, 1 − p. scale: λ. seed: of the masks."""

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        return self.scale * agreed(τ, w)
