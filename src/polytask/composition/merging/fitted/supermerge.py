"""SUPERMERGE: coefficients by gradient, on a few labelled examples of all tasks; many adapters merge as a tree.

    θ(j) = θ₀(j) + Σ_i tanh(w_ij) τ_i(j),   w ← argmin Σ_k mean_{(x, y) of task k} loss(f_k(x; θ), y)

Yang, Zhang, Sathe 2024, arXiv 2412.10416. j is a layer, here each linear map and each other weight that is changed; f_k
is the merged model with task k's own frozen head. |tanh| < 1, so that no difference is made larger, and one may be
taken away. Of the start, the rate and the steps the paper's text says too little: here training starts at the average,
tanh(w) = 1/n, with Adam.

With `tree` = g, groups of g are merged by the examples of their own tasks, and what comes out is merged in turn until
one is left, so that no more than g differences are in memory; a coefficient is then the product of those on the way.
The examples are the validation split's, so its scores say less afterwards; the test split stays unseen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polytask.backbones import Backbone, heads
from polytask.composition.differences import Weighed, places
from polytask.composition.merging.fitted.blend import Blend
from polytask.composition.merging.fitted.coefficients import Coefficients
from polytask.composition.merging.fitted.descent import descend
from polytask.composition.merging.fitted.fitted import Fitted, fitted
from polytask.composition.merging.fitted.reading import Read, read
from polytask.composition.merging.rule import Rule
from polytask.errors import UsageError
from polytask.tasks import Task


@fitted(
    "supermerge",
    equation="τ = Σ tanh(w_k) τ_k at each place, w ← argmin of the tasks' losses on labelled examples",
    paper="Yang et al. 2024, arXiv 2412.10416",
)
class SuperMerge(Fitted):
    """tree: how many are merged at a time, 0 for all. lr: Adam's. steps: of each merge. batch: examples of each task in
    a step. examples: of each task at most. split: where they are from. seed: draws them."""

    tree: int = 0
    lr: float = 1e-2
    steps: int = 100
    batch: int = 16
    examples: int = 50
    split: str = "validation"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tree == 1 or self.tree < 0:
            raise UsageError(f"supermerge.tree = {self.tree}: at least 2 at a time, or 0 for all at once")

    def fit(self, base: Backbone, sources: Sequence[Weighed], tasks: Sequence[Task]) -> Rule:
        if len(sources) < 2:
            raise UsageError("supermerge needs at least two adapters")
        at = places(base, sources)
        reads = read(self, base, sources, tasks, self.examples, labelled=True)
        c = torch.ones(len(sources), len(at))
        nodes = [[k] for k in range(len(sources))]
        said = []
        while len(nodes) > 1:
            n = self.tree or len(nodes)
            lots = [nodes[i : i + n] for i in range(0, len(nodes), n)]
            nodes = []
            for lot in lots:
                members = [k for node in lot for k in node]
                nodes.append(members)
                if len(lot) == 1:
                    continue
                groups = [[(sources[k], sources[k].weight * c[k]) for k in node] for node in lot]
                w, history = descend(
                    base,
                    Blend(base, groups, at),
                    [reads[k] for k in members],
                    torch.full((len(lot), len(at)), math.atanh(1 / len(lot))),
                    torch.tanh,
                    losses,
                    lr=self.lr,
                    steps=self.steps,
                    batch=self.batch,
                    seed=self.seed,
                )
                said.append(f"{history[0]:.3f} at first and {history[-1]:.3f} in the end")
                for node, λ in zip(lot, w.tanh(), strict=True):
                    c[node] *= λ
        examples = sum(len(one.units) for one in reads)
        return Coefficients(
            sources, dict(zip(at, c.T, strict=True)), f"the loss on {examples} examples, {'; '.join(said)}"
        )


def losses(one: Read, members: Sequence[int], z: Tensor) -> Tensor:
    """The head's own losses on logits z."""
    y = torch.cat([one.targets[i] for i in members]).to(z.device)
    if one.head.reads == "words":
        z, y = z[y != heads.IGNORED], y[y != heads.IGNORED]
    return heads.losses(one.head, z, y)
