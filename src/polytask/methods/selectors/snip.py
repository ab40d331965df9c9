"""SparseAdapter: an adapter is pruned before it is trained, by what each number does to the loss (SNIP).

    s = |p ∘ ∂L/∂p|,   M = 1 for the largest s,   p ← M ∘ p and only these are trained

He, Ding, Dong, Zhang, Tao 2022, arXiv 2210.04284; the score is of Lee, Ajanthan, Torr 2018, arXiv 1810.02340. Gradients
are summed over the training data before the product; one threshold for all matrices; biases are not pruned. Matrices
that begin as zeros get no score, so scores are taken after they were drawn from N(0, 0.02²), as the paper draws all of
its adapter; training starts from the method's own start. With a bottleneck 1 / (1 − sparsity) times as wide this is
the paper's Large-Sparse.
"""

from __future__ import annotations

import torch

from polytask.methods.method import Params
from polytask.methods.selectors.lottery import largest
from polytask.methods.selectors.selector import Choice, Look, Selector, selector


@selector("snip", equation="M = 1 for the largest |p ∘ ∂L/∂p|", paper="He et al. 2022, arXiv 2210.04284")
class Snip(Selector):
    """sparsity: share of the matrices' numbers that are taken out. batch: rows of a pass."""

    sparsity: float = 0.8
    batch: int = 32

    def choose(self, look: Look) -> Choice:
        draw = torch.Generator().manual_seed(look.seed)
        scored: Params = {}
        for name, tensor in look.tensors.items():
            head = name.startswith("head/") or tensor.ndim < 2
            drawn = torch.empty(tensor.shape).normal_(0, 0.02, generator=draw).to(tensor.device)
            scored[name] = tensor if head or bool(tensor.any()) else drawn
        matrices = [n for n, t in look.tensors.items() if t.ndim >= 2 and not n.startswith("head/")]
        total = {n: torch.zeros_like(scored[n]) for n in matrices}
        for g in look.gradients(look.method, scored, self.batch, 0):
            for name in matrices:
                total[name] += g[name]
        s = {n: (scored[n] * total[n]).abs() for n in matrices}
        M = largest(s, round((1 - self.sparsity) * sum(t.numel() for t in s.values())))
        tensors = {n: t * M[n] if n in M else t for n, t in look.tensors.items()}
        return Choice(look.method, tensors, M)
