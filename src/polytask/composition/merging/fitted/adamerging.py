"""AdaMerging: coefficients that make the merged model sure of its answers, on inputs without labels.

    θ^l = θ₀^l + Σ_k λ_k^l τ_k^l,   λ ← argmin Σ_k mean_{x of task k} H(softmax(f_k(x; θ))),   H(p) = −Σ_c p_c log p_c

Yang, Wang, Shen, Liu, Guo, Wang, Tao 2023, arXiv 2310.02575. f_k is the merged model with task k's own frozen head, l a
layer: each named tensor in the authors' script, and here each linear map, and each other weight that is changed. λ is
kept in [0, 1] and starts at 0.3 as theirs; Adam at 1e-3 for 500 steps, `batch` inputs of each task in each.
With `per` = task there is one λ_k for all places (their task-wise form).

The paper takes the test inputs; here it is the validation split's unless `split` says otherwise. Of tags it is the
mean over words; of several labels, the sum of each one's; of an answer in text, the next token's, over the whole
vocabulary, where the prompt ends. Entropy also falls where one class is answered to everything: look at the scores.
AdaMerging++, which trims and elects signs first, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Backbone
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
    "adamerging",
    equation="τ = Σ λ_k τ_k at each place, λ ← argmin of the answers' entropy on unlabelled inputs",
    paper="Yang et al. 2023, arXiv 2310.02575",
)
class AdaMerging(Fitted):
    """per: what has a coefficient of its own, a `place` or a whole `task`. start: λ at first. lr: Adam's. batch: inputs
    of each task in a step. examples: inputs of each task at most. split: where they are from. seed: draws them."""

    per: str = "place"
    start: float = 0.3
    lr: float = 1e-3
    steps: int = 500
    batch: int = 16
    examples: int = 1000
    split: str = "validation"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("place", "task"):
            raise UsageError(f"adamerging.per = {self.per!r}: place or task is needed")
        if not 0 <= self.start <= 1:
            raise UsageError(f"adamerging.start = {self.start:g}: a number from 0 to 1 is needed")

    def fit(self, base: Backbone, sources: Sequence[Weighed], tasks: Sequence[Task]) -> Rule:
        for source in sources:
            head = source.adapter.head
            if head is not None and head.kind in ("regression", "similarity") and not head.text:
                raise UsageError(f"adamerging: {source.adapter.name} answers with a number, which has no entropy")
        at = places(base, sources)
        reads = read(self, base, sources, tasks, self.examples, labelled=False)
        blend = Blend(base, [[(source, torch.full((len(at),), source.weight))] for source in sources], at)

        def λ(w: Tensor) -> Tensor:
            return w.clamp(0, 1).expand(-1, len(at))

        w = torch.full((len(sources), len(at) if self.per == "place" else 1), self.start)
        w, history = descend(
            base, blend, reads, w, λ, entropy, lr=self.lr, steps=self.steps, batch=self.batch, seed=self.seed
        )
        n = sum(len(one.units) for one in reads)
        how = f"entropy on {n} inputs, {history[0]:.3f} at first and {history[-1]:.3f} in the end"
        return Coefficients(sources, dict(zip(at, λ(w).T, strict=True)), how)


def entropy(one: Read, members: Sequence[int], z: Tensor) -> Tensor:
    """H of each row of logits z [n, C]."""
    if one.head.kind == "multilabel" and not one.head.text:
        return -(z.sigmoid() * F.logsigmoid(z) + (-z).sigmoid() * F.logsigmoid(-z)).sum(-1)
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
