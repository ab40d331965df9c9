"""A weighted mixture: at every site y ← y + Σ_k w_k Δ_k(y).

For a method whose Δ is linear in its tensors' product (LoRA) this is the sum of the differences, exactly; it is task
arithmetic (Ilharco et al. 2022, arXiv 2212.04089) without making a merged copy, and a negative weight takes away what
an adapter taught. The runtime sums plain adapters by itself; this is the same as an equation, for mixtures inside of
something else.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params

KIND = "composition"
NAME = "mix"
PLACE = "weights and activations"
EQUATION = "y ← y + Σ_k w_k Δ_k"
PAPER = "task arithmetic: Ilharco et al. 2022, arXiv 2212.04089"


@dataclass(frozen=True)
class Mixed(Composed):
    """weights: w, one for each source."""

    name = NAME
    weights: tuple[float, ...] = ()

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        return sources.weighted(y.new_tensor([self.weights[k] for k in sources]), y)
