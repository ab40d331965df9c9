"""Sites: the named places of a backbone where a method may act.

A site has a value `y` that a method may change (y ← y + Δ) and a value `x` that it may read. Where these are is the
site's *point*:

| point    | y (changed)                            | x (read)            | examples                              |
|----------|----------------------------------------|---------------------|---------------------------------------|
| `output` | the module's output                    | the module's input  | `3.attn.q`, `3.mlp.up`, `3.attn.o`    |
| `stream` | the module's output                    | the same            | `tokens`, `embed`, `3` (a block)      |
| `across` | the output of a sublayer               | its input           | `3.attn`, `3.mlp`                     |
| `input`  | the module's first input               | the same            | `3.attn.heads`, `3.mlp.act`           |
| `sum`    | the residual sum that a norm reads     | norm(y)             | `3.sum` of a model that norms after   |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Point = Literal["output", "stream", "across", "input", "sum"]


@dataclass(frozen=True, slots=True)
class Part:
    """Which features of a fused projection a site stands for.

    The last axis of the fused output is `groups` equal groups, and in each group the site has the features from
    `start` to `stop`. groups=1 is a plain slice (GPT-2, Phi-3); GPT-NeoX keeps q, k and v side by side in each head,
    so its groups are the heads.
    """

    start: int
    stop: int
    groups: int = 1

    def take(self, y: Tensor) -> Tensor:
        """[..., groups * G] → [..., groups * (stop - start)]"""
        if self.groups == 1:
            return y[..., self.start : self.stop]
        return torch.unflatten(y, -1, (self.groups, -1))[..., self.start : self.stop].flatten(-2)

    def put(self, y: Tensor, new: Tensor) -> Tensor:
        """y with the site's features replaced by `new`, as a new tensor."""
        grouped = torch.unflatten(y, -1, (self.groups, -1))
        fresh = torch.unflatten(new, -1, (self.groups, -1))
        return grouped.slice_scatter(fresh, dim=-1, start=self.start, end=self.stop).flatten(-2)


@dataclass(frozen=True, slots=True)
class Site:
    """A named place: module `path` of the Hugging Face model, the point, and the sizes of the last axes of x and y."""

    name: str
    path: str
    point: Point
    reads: int
    width: int
    part: Part | None = None
    source: str = ""  # of `across`: the module whose first input is x
