"""(IA)³: learned vectors rescale keys, values and the inner activations of the feed-forward network.

    y ← l ∘ y,   that is   Δ = (l − 1) ∘ y

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel 2022, arXiv 2205.05638. l [width] = 1, so that training starts at the
backbone. In a gated feed-forward network l scales the product of gate and up, which equals scaling the linear branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method

if TYPE_CHECKING:
    from polytask.methods.lifting import Columns, Group


@method("ia3", place="activations", equation="y ← l ∘ y", paper="Liu et al. 2022, arXiv 2205.05638")
class IA3(Method):
    """No hyperparameters but the sites. l stays in fp32: bf16 has no numbers between 1 and 1.0078."""

    precise = True

    sites: tuple[str, ...] = ("*.attn.k", "*.attn.v", "*.mlp.act")

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"l": torch.ones(site.width)}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return (p["l"] - 1).to(y.dtype) * y

    def mix(self, group: Group, x: Tensor, y: Tensor, c: Columns) -> Tensor:
        """Many at once: y + Σ w (l − 1) ∘ y, with one scale [width] a row, since they all scale the same y."""
        if "l − 1" not in group.joined:
            group.joined["l − 1"] = torch.stack([p["l"] for p in group.params]) - 1
        scales = c.w.to(group.joined["l − 1"].dtype) @ group.joined["l − 1"]
        return torch.addcmul(y, scales.to(y.dtype)[:, None], y)
