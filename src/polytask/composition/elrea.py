"""ELREA: experts for examples that pull a LoRA in the same direction; an input's own pull says how much each counts.

    δ(x)   = P g / ‖P g‖,   g = ∂L(x)/∂θ            θ all numbers of the base LoRA, P [D, |θ|] a random projection
    δ̄_c    = Σ_{i ∈ c} δ(x_i), of unit length       the centroid of cluster c, by k-means over the training inputs' δ
    cos'_c = (cos(δ(x), δ̄_c) − mean) / deviation    over the C clusters
    w      = softmax(cos')
    z      = (z_base + Σ_c w_c z_c) / 2             z_c the logits of expert c: the base LoRA, trained on with cluster c

Li, Gao, Zhang, Torkamani 2025 (ICLR), arXiv 2502.00089. No answer is looked at for δ, neither in training nor later. In
the paper L is the loss of the instruction's own tokens, and so it is here where a decoder answers in text. A head has
no such loss. Of its gradient (p − y)ᵀ ∂z/∂θ, what is not of the label is ∂z/∂θ, and labels are projected at random like
θ: L(x) = rᵀ z(x), with r ~ N(0, I) drawn once, and without its mean where a softmax follows. So cos(δ(x), δ(x')) is an
estimate of the neural tangent kernel's. At the predicted label, the gradients of two classes would point in opposite
directions and clusters would be classes; the expected gradient is 0.

What differs from the paper: clusters are those of k-means on unit vectors and not of BIRCH, and 4 by default, for tasks
of hundreds of examples. P has a single ±1 in each column (feature hashing: Weinberger et al. 2009, arXiv 0902.2206), at
a row drawn by the seed, so that it costs |θ| additions and is not kept; D = 8192. Gradients are the base LoRA's at its
end, and not Adam's steps over several checkpoints. The base counts as much as all experts together. Written answers
have no mean, so there the base and the experts are mixed with the same weights. An encoder-decoder has no loss for its
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import Adapter, HeadCard
from polytask.adapters.expression import Ensemble, Expression, Mix, Name
from polytask.backbones import Backbone, text
from polytask.composition.kept import Kept
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.method import method
from polytask.methods.passes import Seat, Unit
from polytask.tasks import Example

TOGETHER = 32  # rows of a pass, each with a copy of the LoRA whose gradient is that row's own
COPIED = 1 << 24  # numbers in the copies of a pass


@method(
    "elrea",
    place="logits",
    equation="z = (z_base + Σ_c w_c z_c) / 2, w = softmax of standardised cos(δ(x), δ̄_c), δ = P ∂L/∂θ",
    paper="Li et al. 2025, arXiv 2502.00089",
)
class Elrea(Kept):
    """clusters: C. features: D. seed: of P and r. `over` has the base LoRA first, and then the experts; centroids
    [C, D] are the adapter's `task/clusters`."""

    clusters: int = 4
    features: int = 8192
    seed: int = 0

    def asked(self, w: Tensor, head: HeadCard) -> Expression:
        """What answers an input with weights w [C] of the experts."""
        base, *experts = self.over
        parts = [(1.0, Name(base)), *zip(w.tolist(), map(Name, experts), strict=True)]
        if head.text and head.text.decide == "write":
            return Mix(tuple((weight / 2, part) for weight, part in parts), base)
        return Pooled(tuple(Mix(((weight, part),)) for weight, part in parts if weight > 0), base)


class Pooled(Ensemble):
    """An ensemble whose mean is of logits."""


def pooled(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k w_k z_k / Σ_k w_k of logits in one shape."""
    return torch.einsum("k,k...->...", torch.tensor(weights) / sum(weights), torch.stack([*logits]))


def asked(
    backbone: Backbone, adapter: Adapter, base: Adapter, examples: Sequence[Example], limit: int = 256
) -> list[Expression]:
    """What answers each example, where an adapter by ELREA over `base` is asked. Raises PolytaskError where its
    centroids are damaged."""
    its = Elrea.of(adapter.hyperparameters)
    centroids = adapter.tensors.get("task/clusters")
    if centroids is None or centroids.shape != (len(its.over) - 1, its.features) or base.head is None:
        raise PolytaskError(f"adapter {adapter.name} ({adapter.id}): its centroids are damaged; train it anew")
    δ = gradients(backbone, base, examples, its.features, its.seed, limit)
    return [its.asked(w, base.head) for w in weights(δ, centroids)]


def gradients(
    backbone: Backbone, adapter: Adapter, examples: Sequence[Example], features: int, seed: int = 0, limit: int = 256
) -> Tensor:
    """δ [N, features] of examples, whose outputs are not looked at, fp32, on the CPU.

    Raises UsageError for answers in text of an encoder-decoder.
    """
    head = adapter.head
    assert head is not None
    its = build(adapter.method, adapter.hyperparameters)
    own = {n: t for n, t in sorted(adapter.tensors.items()) if not n.startswith(("head/", "task/"))}
    params = {
        n.removeprefix("head/"): t.to(backbone.device) for n, t in adapter.tensors.items() if n.startswith("head/")
    }
    units = _prompts(backbone, head, examples) if head.text else passes.encode(backbone, head, examples, limit)
    size = sum(t.numel() for t in own.values())
    rows, signs = _projection(size, features, seed)
    most = max(1, min(TOGETHER, COPIED // max(1, size)))
    found = torch.zeros(len(units), features)
    for pack in passes.packs(units):
        for part in (pack[i : i + most] for i in range(0, len(pack), most)):
            copies = [{n: t.detach().clone().requires_grad_() for n, t in own.items()} for _ in part]
            plan = Plan(backbone, [Active.of(its, copy) for copy in copies])
            seats = [Seat(head, params, one) for one in torch.eye(len(part))]
            mine = [units[i] for i in part]
            with torch.enable_grad():
                terms = [
                    _loss(head, mine[i], z, seed) for i, _, z in passes.forward(plan, seats, mine, range(len(part)))
                ]
                flat = [t for copy in copies for t in copy.values()]
                slopes = torch.autograd.grad(torch.stack(terms).sum(), flat, allow_unused=True)
            each = [torch.zeros_like(t) if g is None else g for g, t in zip(slopes, flat, strict=True)]
            for n, i in enumerate(part):
                g = torch.cat([t.flatten() for t in each[n * len(own) : (n + 1) * len(own)]]).float().cpu()
                found[i].index_add_(0, rows, signs * g)
    return F.normalize(found, dim=-1)


def _prompts(backbone: Backbone, head: HeadCard, examples: Sequence[Example]) -> list[Unit]:
    """Prompts each of whose tokens is to be predicted from those before it."""
    if backbone.kind == "encoder-decoder":
        raise UsageError(
            f"elrea reads the loss of a prompt's tokens, which {backbone.name} does not predict; take a decoder, or a "
            "task that a head answers"
        )
    asked = text.encode(backbone, head, [text.ask(head, replace(e, output=None)) for e in examples])
    return passes.answered(backbone, [text.Asked(one.ids[:1], [*one.ids[1:]] or [*one.ids]) for one in asked])


def _loss(head: HeadCard, unit: Unit, z: Tensor, seed: int) -> Tensor:
    """L of one input from its logits z [1, C], or [positions, C]."""
    if head.text:
        return F.cross_entropy(z, torch.tensor(unit.target, device=z.device), reduction="sum")
    r = torch.randn(z.shape[-1], generator=torch.Generator().manual_seed(seed))
    if head.kind in ("classification", "tagging"):
        r = r - r.mean()
    return (z * r.to(z)).sum()


@lru_cache(maxsize=2)
def _projection(size: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """The row of the ±1 of each column of P, and its sign."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(features, (size,), generator=draw)
    return rows, torch.randint(2, (size,), generator=draw) * 2.0 - 1.0


def clusters(δ: Tensor, count: int, seed: int = 0) -> Tensor:
    """The cluster [N] of each row of δ [N, D], by k-means. Raises UsageError where there are fewer rows than
    clusters."""
    from sklearn.cluster import KMeans

    if not 1 <= count <= len(δ):
        raise UsageError(f"elrea: {count} clusters of {len(δ)} examples: at least one each is needed; give fewer")
    return torch.from_numpy(KMeans(count, n_init=10, random_state=seed).fit_predict(δ.numpy())).long()


def centroids(δ: Tensor, which: Tensor) -> Tensor:
    """δ̄ [C, D] of the clusters `which` [N] of δ [N, D]."""
    sums = torch.zeros(int(which.max()) + 1, δ.shape[1]).index_add_(0, which, δ)
    return F.normalize(sums, dim=-1)


def weights(δ: Tensor, centroids: Tensor) -> Tensor:
    """w [N, C] for δ [N, D] and centroids [C, D]; 1 / C each where all cosines are the same."""
    cos = F.normalize(δ, dim=-1) @ F.normalize(centroids, dim=-1).T
    apart = cos - cos.mean(-1, keepdim=True)
    return (apart / cos.std(-1, correction=0, keepdim=True).clamp(min=1e-12)).softmax(-1)


def conflict(δ: Tensor, which: Tensor) -> tuple[float | None, float | None]:
    """The mean cosine of two inputs of one cluster, and of two of different ones; None where there are no two."""
    counts = torch.bincount(which).double()
    sums = torch.zeros(len(counts), δ.shape[1], dtype=torch.float64).index_add_(0, which, δ.double())
    alone = float(δ.double().square().sum())
    every, same = len(δ) * (len(δ) - 1), float((counts * (counts - 1)).sum())
    within = float(sums.square().sum()) - alone
    total = float(sums.sum(0).square().sum()) - alone
    return within / same if same else None, (total - within) / (every - same) if every > same else None
