"""RegMean: the linear map whose outputs are nearest to every task's own, on that task's inputs.

    G_k = X_kᵀ X_k / n_k,   G̃_k = α G_k + (1 − α) diag(G_k)
    τ = (Σ_k w_k τ_k G̃_k) (Σ_k w_k G̃_k)⁻¹        the least Σ_k w_k ‖X_k (τ − τ_k)ᵀ‖² / n_k where α = 1

Jin, Ren, Preotiuc-Pietro, Cheng 2022, arXiv 2212.09849. X_k [n_k, in] are the inputs of the map over the tokens of task
k's examples in the model θ₀ + τ_k, τ_k [out, in]; no label is read. Weights that are no linear map's are averaged, as
in the paper. α = 0.9 is what the paper takes for most models (0.1 for T5). Padding is no input. Directions that no
input has stay as they are in the backbone: the inverse is Moore and Penrose's. G_k takes `in`² numbers for each map and
adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polytask.backbones import Backbone
from polytask.composition.differences import Weighed, places
from polytask.composition.merging.fitted.fitted import Fitted, fitted
from polytask.composition.merging.fitted.reading import Read, read
from polytask.composition.merging.rule import Rule
from polytask.errors import UsageError
from polytask.methods import passes
from polytask.methods.lifting import Active, Plan
from polytask.tasks import Task


@fitted(
    "regmean",
    equation="τ = (Σ w_k τ_k G̃_k)(Σ w_k G̃_k)⁻¹, G̃_k of the inputs' products X_kᵀ X_k",
    paper="Jin et al. 2022, arXiv 2212.09849",
)
class RegMean(Fitted):
    """alpha: what of products of two different inputs is kept. examples: of each task at most. split: where they are
    from. seed: draws them."""

    alpha: float = 0.9
    examples: int = 256
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"regmean.alpha = {self.alpha:g}: a number from 0 to 1 is needed")

    def fit(self, base: Backbone, sources: Sequence[Weighed], tasks: Sequence[Task]) -> Rule:
        at = places(base, sources)
        maps = {base.sites[place].path for place in at if place in base.sites}
        reads = read(self, base, sources, tasks, self.examples, labelled=False)
        G = [products(base, source.active, one, maps) for source, one in zip(sources, reads, strict=True)]
        return Regressed(
            {
                place: shrunk(torch.stack([own[base.sites[place].path] for own in G]), self.alpha)
                for place in at
                if place in base.sites
            }
        )


@torch.no_grad()
def products(base: Backbone, active: Active, one: Read, paths: set[str]) -> dict[str, Tensor]:
    """X^T X / n [in, in] of what the linear maps at these paths read in a task's examples, with its adapter."""
    plan = Plan(base, [active])
    G: dict[str, Tensor] = {}
    n: dict[str, int] = {}
    masks: list[Tensor] = []

    def seen(path: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            x = args[0]
            mask = next((mask for mask in masks if mask.shape == x.shape[:-1]), None)
            x = (x.flatten(0, -2) if mask is None else x[mask]).double()
            G[path] = G.get(path, 0) + (x.T @ x).cpu()
            n[path] = n.get(path, 0) + len(x)

        return hook

    handles = [base.model.get_submodule(path).register_forward_pre_hook(seen(path)) for path in paths]
    try:
        for pack in passes.packs(one.units):
            for side in range(len(one.units[pack[0]].ids)):
                batch = base.collate([one.units[i].ids[side] for i in pack])
                masks[:] = [batch.mask]
                if one.units[pack[0]].written is not None:
                    written = base.collate([one.units[i].written or [] for i in pack])
                    batch = replace(batch, written=written.ids)
                    masks.insert(0, written.mask)
                plan.hidden(batch, causal=one.head.causal)
    finally:
        for handle in handles:
            handle.remove()
    return {path: t / n[path] for path, t in G.items()}


def shrunk(G: Tensor, α: float) -> Tensor:
    """G̃ of G [K, in, in]."""
    return α * G + (1 - α) * torch.diag_embed(torch.diagonal(G, dim1=-2, dim2=-1))


class Regressed(Rule):
    """`G`: G̃ by site, [K, in, in]."""

    def __init__(self, G: Mapping[str, Tensor]) -> None:
        self.G = G

    def at(self, where: str) -> Rule:
        return RegressedHere(self.G.get(where))


class RegressedHere(Rule):
    """The rule at one place; the mean where there is no G̃."""

    def __init__(self, G: Tensor | None) -> None:
        self.G = G

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        if self.G is None:
            return torch.einsum("k,k...->...", w / w.sum(), τ)
        G = torch.einsum("k,kij->kij", w, self.G.to(τ))
        merged: Tensor = torch.einsum("koi,kij->oj", τ, G) @ torch.linalg.pinv(G.sum(0), hermitian=True)
        return merged
