"""A weighted mixture: at every site y ← y + Σ_k w_k Δ_k.

For a method whose Δ is linear in its tensors' product (LoRA) this is the sum of the differences, exactly; it is task
arithmetic (Ilharco et al. 2022, arXiv 2212.04089) without making a merged copy. The answer is read by one head: that
of the adapter named in `head`, by default the one with the largest weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polytask.errors import UsageError

KIND = "merge"
NAME = "mixture"
PLACE = "weights and activations"
EQUATION = "y ← y + Σ_k w_k Δ_k"
PAPER = "task arithmetic: Ilharco et al. 2022, arXiv 2212.04089"


@dataclass(frozen=True)
class Mixture:
    """`weights`: (adapter, weight) by id or name, in order. `head`: whose head answers."""

    weights: tuple[tuple[str, float], ...]
    head: str

    def __str__(self) -> str:
        return " + ".join(f"{weight:g}·{name}" for name, weight in self.weights)


def mix(weights: Mapping[str, float], head: str | None = None) -> Mixture:
    """`mix({"a": 0.7, "b": 0.3})`. Raises UsageError where there is nothing to mix or the head is not among them."""
    if not weights:
        raise UsageError("a mixture needs at least one adapter")
    if head is not None and head not in weights:
        raise UsageError(f"the mixture's head {head!r} is not one of its adapters: {', '.join(weights)}")
    largest = max(weights, key=lambda name: abs(weights[name]))
    return Mixture(tuple((name, float(w)) for name, w in weights.items()), head or largest)


def read_mixture(text: str) -> Mixture:
    """A mixture written `0.7*tickets + 0.3*questions`; a name alone has weight one."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        number, star, name = term.partition("*")
        if not star:
            number, name = "1", term
        try:
            if not name.strip():
                raise ValueError("no name")
            weights[name.strip()] = weights.get(name.strip(), 0.0) + float(number)
        except ValueError:
            raise UsageError(f"{term.strip()!r} in {text!r}: write a mixture as 0.7*name + 0.3*other") from None
    return mix(weights)
