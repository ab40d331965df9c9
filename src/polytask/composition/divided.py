"""A split: each adapter acts on its own part of a text.

    Δ(y)_t = Δ_k(y)_t   for at_{k−1} ≤ t < at_k,   with at_0 = 0 and at_K = ∞

t is a token's number in its text; what is written after a prompt belongs to the last part. As `Split` of the library
adapters: Poth, Sterz, Paul, Purkayastha, Engländer, Imhof, Vulić, Ruder, Gurevych, Pfeiffer 2023, arXiv 2311.11077.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params

KIND = "composition"
NAME = "split"
PLACE = "weights and activations"
EQUATION = "Δ_t = Δ_k for at_{k−1} ≤ t < at_k"
PAPER = "adapters: Poth et al. 2023, arXiv 2311.11077"


@dataclass(frozen=True)
class Divided(Composed):
    """at: where the second and later parts begin, in tokens."""

    name = NAME
    positional = True
    at: tuple[int, ...] = ()

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        t = p["at"]
        bounds = (0, *self.at)
        Δ = y.new_zeros(y.shape)
        for k, change in sources.items():
            own = t >= bounds[k]
            if k < len(self.at):
                own = own & (t < self.at[k])
            Δ = Δ + change(y) * own[:, None].to(y.dtype)
        return Δ
