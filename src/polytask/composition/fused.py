"""Fusion of parameters: LoRAs as one, whose A and B are the means of theirs.

    A = Σ_n A_n / N,   B = Σ_n B_n / N,   y ← y + s B A x

Zhao et al. 2024, arXiv 2402.09997, call this fusion, and the mean of differences a mixture. B A = Σ_nm B_n A_m / N² has
cross terms, and depends on how each B_n A_n happens to be split. The LoRAs have the same r, α and sites. The means are
taken where they are used, so that no merged copy is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from polytask.errors import UsageError
from polytask.methods.composed import Composed, Sources
from polytask.methods.lifting import Active, Terms
from polytask.methods.lora import LoRA
from polytask.methods.method import Params

KIND = "composition"
NAME = "fuse"
PLACE = "weights"
EQUATION = "y ← y + s (Σ_n B_n / N) (Σ_n A_n / N) x"
PAPER = "Zhao et al. 2024, arXiv 2402.09997"


@dataclass(frozen=True)
class Fused(Composed):
    name = NAME

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        return sources.averaged(y)


def fuse(parts: Sequence[Terms]) -> Terms:
    """LoRAs as one. Raises UsageError where their parameters are not of one shape."""
    shapes = []
    for part in parts:
        [(weight, active), *more] = part
        if more or weight != 1.0 or type(active.method) is not LoRA:
            raise UsageError("fuse: the parameters of plain LoRAs are averaged, and one of these is something else")
        shapes.append((active.method, {at: {n: t.shape for n, t in p.items()} for at, p in active.at.items()}))
    if any(shape != shapes[0] for shape in shapes):
        raise UsageError("fuse: LoRAs with the same r, alpha and sites are needed; mix those that differ")
    return ((1.0, Active.of(Fused(), {}, [active for [(_, active)] in parts])),)
