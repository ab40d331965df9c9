"""A stack: each adapter acts on what those below it left.

    y_0 = y,   y_k = y_{k−1} + Δ_k(x, y_{k−1}),   Δ = y_K − y        at every site

A task's adapter stands on a language's (MAD-X: Pfeiffer, Vulić, Gurevych, Ruder 2020, arXiv 2005.00052), on a
domain's, or on a prompt that has taken up a task's format (ProMoT: Wang, Si, Li, Lukasik, Yu, Hsieh, Dhillon, Kumar
2022, arXiv 2211.00635), which can be exchanged or left out below it. Adapters that meet at no site, or whose changes do
not depend on y there (LoRA), stack by their sum.

A residual inside an adapter's own equation is that of y_{k−1}, as in `Stack` of the library adapters. The paper's task
adapter adds to the block's residual instead, which leaves the language adapter's output out of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params

KIND = "composition"
NAME = "stack"
PLACE = "weights and activations"
EQUATION = "y_k = y_{k−1} + Δ_k(y_{k−1})"
PAPER = "MAD-X: Pfeiffer et al. 2020, arXiv 2005.00052"


@dataclass(frozen=True)
class Stacked(Composed):
    name = NAME

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        last = y
        for change in sources.values():
            last = last + change(last)
        return last - y
