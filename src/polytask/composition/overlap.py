"""How much sparse differences meet: what composing them by addition rests on.

    overlap = |supp a ∩ supp b| / min(|supp a|, |supp b|)
    agreement = the share of supp a ∩ supp b where sgn a = sgn b

Ansell, Ponti, Korhonen, Vulić 2021, arXiv 2110.07560, who add the sparse differences of a task and a language:
θ = θ₀ + φ_task + φ_language. Where they do not meet, each number is as its own task left it. a and b are all weights
that two adapters of the method `full` change, taken together; supp is where they are not 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from polytask.adapters import Adapter

SPARSE = 0.5  # of the numbers of a `full` difference: the share that may be changed where it counts as sparse


@dataclass(frozen=True)
class Overlap:
    """Of two adapters by name: how many numbers each changes, how many both do, and on how many of those in one
    direction."""

    first: str
    second: str
    sizes: tuple[int, int]
    both: int
    agree: int

    @property
    def share(self) -> float:
        return self.both / min(self.sizes) if all(self.sizes) else 0.0

    @property
    def agreement(self) -> float:
        """1 where they do not meet."""
        return self.agree / self.both if self.both else 1.0

    def __str__(self) -> str:
        a, b = self.sizes
        return (
            f"{self.first} ({a:,} numbers) and {self.second} ({b:,}) meet in {self.both:,}, {self.share:.1%} of the "
            f"smaller; signs agree in {self.agreement:.1%} of these"
        )


def overlap(a: Adapter, b: Adapter) -> Overlap:
    """Of what two `full` differences change."""
    mine, its = ({name: t for name, t in one.tensors.items() if name.startswith(":")} for one in (a, b))
    both = agree = 0
    for name in mine.keys() & its.keys():
        met = (mine[name] != 0) & (its[name] != 0)
        both += int(met.sum())
        agree += int((met & (mine[name].sign() == its[name].sign())).sum())
    sizes = [sum(int(t.count_nonzero()) for t in own.values()) for own in (mine, its)]
    return Overlap(a.name, b.name, (sizes[0], sizes[1]), both, agree)


def overlaps(adapters: Sequence[Adapter]) -> list[Overlap]:
    """Of each two of the adapters that are sparse."""
    return [overlap(a, b) for a, b in itertools.combinations(filter(sparse, adapters), 2)]


def sparse(one: Adapter) -> bool:
    """Whether it is a `full` difference most of whose numbers are 0."""
    own = [t for name, t in one.tensors.items() if name.startswith(":")]
    numbers = sum(t.numel() for t in own)
    return one.method == "full" and numbers > 0 and sum(int(t.count_nonzero()) for t in own) <= SPARSE * numbers
