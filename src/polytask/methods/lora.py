"""LoRA: a low-rank difference beside a frozen linear map.

    y ← y + s · B A x,   s = α / r   (rsLoRA: s = α / √r)

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen 2021, arXiv 2106.09685; the √r scale is Kalajdzievski 2023,
arXiv 2312.03732. A [r, in] ~ U(±1/√in), B [out, r] = 0, so that training starts at the backbone.
Defaults: r = 8, α = 16 on the query and value projections, as in the paper's RoBERTa runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method

if TYPE_CHECKING:
    from polytask.methods.lifting import Columns, Group

WIDE = 128  # summed rank up to which one wide LoRA with a weight per row and rank is faster than a product per row


@method(
    "lora",
    place="weights",
    equation="y ← y + (α/r)·B A x",
    paper="Hu et al. 2021, arXiv 2106.09685",
)
class LoRA(Method):
    """r: rank. alpha: scale's numerator. dropout: on x, in this branch only. rslora: divide by √r instead of r."""

    rows = ("A",)

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    sites: tuple[str, ...] = ("*.attn.q", "*.attn.v")

    @property
    def s(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound = 1 / math.sqrt(site.reads)
        A = torch.empty(self.r, site.reads).uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": torch.zeros(site.width, self.r)}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        A, B = p["A"], p["B"]
        return self.s * (x @ A.T) @ B.T

    def down(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return x @ p["A"].T

    def up(self, p: Params) -> tuple[Tensor, None]:
        return self.s * p["B"].T, None

    def expects(self, made: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> Mapping[str, torch.Size]:
        """A site may have a rank of its own below r, as one that was cut to it has; the scale is that of r."""
        shapes = dict(made)
        for name in made:
            site, _, parameter = name.rpartition("/")
            ρ = next(iter(given[name].shape), 0)
            if parameter == "A" and 0 < ρ < self.r:
                shapes[name] = torch.Size((ρ, made[name][1]))
                shapes[f"{site}/B"] = torch.Size((made[f"{site}/B"][0], ρ))
        return shapes

    def joins(self, other: Method, mine: Params, its: Params) -> bool:
        return isinstance(other, LoRA) and self.dropout == other.dropout

    def mix(self, group: Group, x: Tensor, y: Tensor, c: Columns) -> Tensor:
        """Many LoRAs at once: y + B (m_i ∘ A x_i) with A and B joined along the rank and m_i [Σr] row i's weights.

        Where the joined rank is large and each row has one adapter, its own A and B are gathered instead.
        """
        ranks = [p["A"].shape[0] for p in group.params]
        if c.whole and len(c.used) == 1:
            g = c.used[0]
            A, B = group.params[g]["A"], group.methods[g].s * group.params[g]["B"]
            h = x.flatten(0, -2) @ A.T
            if not c.plain:
                h = h * c.scale.repeat_interleave(y.shape[1]).to(h.dtype)[:, None]
            return torch.addmm(y.flatten(0, -2), h, B.T).view_as(y)
        if not (c.whole and len(set(ranks)) == 1 and sum(ranks) > WIDE):
            A, B, m = self.low_rank(group, c)
            h = x @ A.T if m is None else (x @ A.T) * m
            return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.T).view_as(y)
        A, B = _joined(group, "stacked", lambda: (torch.stack([p["A"] for p in group.params]), _stack(group)))
        h = torch.bmm(x, A[c.which].mT)
        if not c.plain:
            h = h * c.scale.to(h.dtype)[:, None, None]
        return torch.baddbmm(y, h, B[c.which])

    def low_rank(self, group: Group, c: Columns) -> tuple[Tensor, Tensor, Tensor | None]:
        """All A's and B's of the group joined along the rank, with each row's weights."""
        A, B = _joined(group, "wide", lambda: (_rows(group), _columns(group)))
        if len(group.params) == 1 and c.whole and c.plain:
            return A, B, None
        ranks = [p["A"].shape[0] for p in group.params]
        return A, B, c.kept(("rank", *ranks, A.dtype), lambda: _by_rank(c.w, ranks, A.dtype))


def _by_rank(w: Tensor, ranks: list[int], dtype: torch.dtype) -> Tensor:
    """Each adapter's weight for each of its ranks: [R, 1, Σr] from w [R, G]."""
    return w.to(dtype).repeat_interleave(torch.tensor(ranks, device=w.device), dim=1)[:, None, :]


def _rows(group: Group) -> Tensor:
    return torch.cat([p["A"] for p in group.params])


def _columns(group: Group) -> Tensor:
    return torch.cat([m.s * p["B"] for m, p in zip(group.methods, group.params, strict=True)], dim=1)  # type: ignore[attr-defined]


def _stack(group: Group) -> Tensor:
    return torch.stack([m.s * p["B"].T for m, p in zip(group.methods, group.params, strict=True)])  # type: ignore[attr-defined]


def _joined(group: Group, kind: str, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if kind not in group.joined:
        group.joined[kind] = make()
    found: tuple[Tensor, Tensor] = group.joined[kind]
    return found
