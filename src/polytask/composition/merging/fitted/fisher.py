"""Fisher merging: each number is averaged by how much each task's likelihood depends on it.

    F_k = (1/n) Σ_x (∂ log p_k(ŷ|x) / ∂θ)²,  ŷ ~ p_k(·|x)        at θ₀ + τ_k
    τ = Σ_k a_k F_k ∘ τ_k / Σ_k a_k F_k,      a_k = w_k / ‖F_k‖

Matena, Raffel 2021, arXiv 2111.09832. F_k is as large as the weights that any of the adapters changes, and is taken of
those weights and not of factors. As in the authors' script F_k is divided by its norm, and is no less than a floor, so
that where no task's likelihood depends on a number it is averaged plainly. Their floor is 1e-6 itself, which lies above
all of F for a model that is sure of its answers and makes the result the mean; here it is that share of F_k's mean.
Theirs floors the first model alone, which is the task that the others are to help; here no task is before the others.
They take the expectation over all labels; here one label is drawn for each example from the model's own answers, which
is the same on average and costs one pass back.
Of tags a tag is drawn for each word, of answers in text a token where the true ones stand before it; a number has
variance ½ around what is answered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import HeadCard
from polytask.backbones import Backbone
from polytask.composition.differences import Weighed, at_module, modules, norm, places
from polytask.composition.merging.fitted.blend import Blend
from polytask.composition.merging.fitted.fitted import Fitted, fitted
from polytask.composition.merging.fitted.reading import Read, read
from polytask.composition.merging.rule import Rule
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.tasks import Task


@fitted(
    "fisher",
    equation="τ = Σ a_k F_k ∘ τ_k / Σ a_k F_k, F_k the squared gradients of log p_k",
    paper="Matena & Raffel 2021, arXiv 2111.09832",
)
class Fisher(Fitted):
    """examples: n of each task. floor: the least F, as a share of its mean. split: where the examples are from. seed:
    draws them and labels."""

    examples: int = 256
    floor: float = 1e-6
    split: str = "train"
    seed: int = 0

    def fit(self, base: Backbone, sources: Sequence[Weighed], tasks: Sequence[Task]) -> Rule:
        at = places(base, sources)
        in_text = any(source.adapter.head is not None and source.adapter.head.text for source in sources)
        reads = read(self, base, sources, tasks, self.examples, labelled=in_text)
        found: dict[str, list[Tensor]] = {place: [] for place in at}
        for source, one in zip(sources, reads, strict=True):
            blend = Blend(base, [[(source, torch.ones(len(at)))]], at, whole=True)
            F = self._squares(base, blend.active(torch.ones(1, len(at))), one)
            mean = sum(float(t.sum()) for t in F.values()) / sum(t.numel() for t in F.values())
            F = {name: t.clamp(min=self.floor * mean) if mean else torch.ones_like(t) for name, t in F.items()}
            length = math.hypot(*map(norm, F.values()))
            parted = Weighed(source.adapter, Active.of(build("full"), F), 1.0)
            for path, sites in modules(base).items():
                for place, t in at_module(base, parted, path, sites).items():
                    if place in found:
                        found[place].append((t / length).float())
        return Informed({place: torch.stack(F_k) for place, F_k in found.items()})

    def _squares(self, base: Backbone, active: Active, one: Read) -> dict[str, Tensor]:
        """F at the weights that this adapter makes, by the tensors' names."""
        leaves = {f"{at}/{n}": t.detach().to(base.device) for at, p in active.at.items() for n, t in p.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        F = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        draw = torch.Generator().manual_seed(self.seed)
        plan = Plan(base, [Active.of(active.method, leaves)])
        for unit in one.units:
            for _, _, z in passes.forward(plan, [one.seat], [unit], [0]):
                surprise(one.head, z, draw).backward()  # type: ignore[no-untyped-call]
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    F[name] += leaf.grad.square()
                    leaf.grad = None
        return {name: t.cpu() / len(one.units) for name, t in F.items()}


def surprise(head: HeadCard, z: Tensor, draw: torch.Generator) -> Tensor:
    """−log p(ŷ) of an answer that is drawn from logits z [n, C] themselves."""
    seen = z.detach().float().cpu()
    if head.text is None and head.kind in ("regression", "similarity"):
        return (z - (seen + torch.randn(seen.shape, generator=draw) / 2**0.5).to(z.device)).square().sum()
    if head.text is None and head.kind == "multilabel":
        ŷ = torch.bernoulli(seen.sigmoid(), generator=draw).to(z)
        return F.binary_cross_entropy_with_logits(z, ŷ, reduction="sum")
    drawn = torch.multinomial(seen.softmax(-1), 1, generator=draw)[:, 0]
    return F.cross_entropy(z, drawn.to(z.device), reduction="sum")


class Informed(Rule):
    """`F`: by place, [K, ...]."""

    def __init__(self, F: Mapping[str, Tensor]) -> None:
        self.F = F

    def at(self, where: str) -> Rule:
        return InformedHere(self.F[where])


class InformedHere(Rule):
    """The rule at one place."""

    def __init__(self, F: Tensor) -> None:
        self.F = F

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        F = torch.einsum("k,k...->k...", w, self.F.to(τ))
        return (F * τ).sum(0) / F.sum(0)
