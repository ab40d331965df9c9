"""Surgical fine-tuning: the blocks whose weights the task's likelihood depends on most are trained, the others stay.

    F_j = (1/n) Σ_x (∂ log p(y|x) / ∂θ_j)²,   score of a block = Σ over its weights ‖F_weight‖_F

Lodha, Belapurkar, Chalkapurkar, Tao, Ghosh, Basu, Petrov, Srinivasan 2023, arXiv 2310.17041. F is taken at the frozen
weights from n single examples with their true answers, whatever the method is; the method then acts in the chosen
blocks alone. The head that gives p was fitted to frozen features; the paper's is random.
"""

from __future__ import annotations

import math

from torch import Tensor

from polytask.errors import UsageError
from polytask.methods.method import build
from polytask.methods.selectors.selector import Choice, Look, Selector, block_of, selector


@selector(
    "fisher",
    equation="blocks with the largest Σ ‖(1/n) Σ_x (∂ log p(y|x)/∂θ)²‖_F",
    paper="Lodha et al. 2023, arXiv 2310.17041",
)
class Fisher(Selector):
    """share: of the blocks that is trained. examples: n."""

    share: float = 0.25
    examples: int = 100

    def choose(self, look: Look) -> Choice:
        scores = self.scores(look)
        order = sorted(scores, key=lambda block: -scores[block])
        chosen = order[: max(1, math.ceil(self.share * len(order)))]
        kept = {
            name: tensor
            for name, tensor in look.tensors.items()
            if name.startswith("head/") or block_of(look.backbone, name.rpartition("/")[0]) in chosen
        }
        if all(name.startswith("head/") for name in kept):
            raise UsageError(f"{look.method.name} has no tensors in the blocks {', '.join(chosen)}, which were chosen")
        return Choice(look.method.only(kept), kept)

    def scores(self, look: Look) -> dict[str, float]:
        """The score of each block by its name, `3` or `enc.3`."""
        full = build("full")
        tensors = {n: t for n, t in look.tensors.items() if n.startswith("head/")}
        start = full.start(look.backbone, look.seed, writing=look.writing)
        blocks = {n: block_of(look.backbone, n.rpartition("/")[0]) for n in start}
        inner = {n: t.to(look.backbone.device) for n, t in start.items() if blocks[n]}
        F: dict[str, Tensor] = {}
        for g in look.gradients(full, tensors | inner, 1, self.examples):
            for name in inner.keys() & g.keys():
                F[name] = F[name].add_(g[name].square()) if name in F else g[name].square()
        total: dict[str, float] = {}
        for name, sums in F.items():
            total[blocks[name]] = total.get(blocks[name], 0.0) + float(sums.norm()) / self.examples
        return total
