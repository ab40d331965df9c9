"""Expert-specialised fine-tuning (ESFT): in a mixture of experts, only those that the task's tokens are sent to.

    g_i = (1/N) Σ_x (1/T_x) Σ_t g_it   (gate),      r_i = (1/N) Σ_x (1/T_x) Σ_t 1(g_it > 0) / K   (token)
    of each block the experts with the largest scores, until their sum is p or more

Wang, Chen, Dai, Xu, Li, Wu 2024, arXiv 2407.01906. g_it is the weight with which token t goes to expert i, 0 where it
is not among its K; x are single training examples, where the paper has texts joined to 4096 tokens. Router, attention
and embeddings stay. The r of a block sum to one, so that p = 0.2 is a share; the g do so only in models that scale the
weights of the K (Mixtral; the paper's do not), and want a p of their own: the paper has 0.1.

A block's experts are slices of one tensor [experts, ...]. Those that were not chosen stay zero, but take memory for
gradients and moments while others are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polytask.backbones import families
from polytask.errors import UsageError
from polytask.methods.selectors.selector import Choice, Look, Selector, selector


@selector(
    "esft",
    equation="experts with the largest (1/N) Σ_x (1/T) Σ_t 1(g_it > 0) / K, up to a sum of p",
    paper="Wang et al. 2024, arXiv 2407.01906",
)
class ESFT(Selector):
    """score: `token` (r) or `gate` (g). p: the sum of scores to reach in each block. rows: examples of a pass. passes:
    how many (0: over all training examples)."""

    score: str = "token"
    p: float = 0.2
    rows: int = 32
    passes: int = 0

    def choose(self, look: Look) -> Choice:
        if self.score not in ("token", "gate"):
            raise UsageError(f"esft.score = {self.score!r}: one of token, gate")
        tensors = {n: t for n, t in look.tensors.items() if n.startswith("head/")}
        mixtures = families.experts(look.backbone.base)
        if not mixtures:
            raise UsageError(f"{look.backbone.name} is not a mixture of experts, so esft has nothing to choose from")
        shares = {}
        for block, score in self.scores(look, mixtures).items():
            mask = torch.zeros(len(score)).index_fill(0, reached(score, self.p), 1.0)
            for name, tensor in look.tensors.items():
                if name.rpartition("/")[0] == f":{mixtures[block].maps}":
                    shares[name] = mask.to(tensor.device).reshape(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor)
                    tensors[name] = tensor
        if not shares:
            raise UsageError(f"{look.method.name} has no weights of experts: take `full`, with them")
        return Choice(look.method.only(tensors), tensors, shares)

    def scores(self, look: Look, mixtures: Mapping[str, families.Experts]) -> dict[str, Tensor]:
        """The score of each expert [experts], by block."""
        routed: dict[str, Tensor] = {}

        def note(block: str) -> Callable[..., None]:
            def hook(_router: nn.Module, _args: tuple[Any, ...], out: tuple[Tensor, Tensor, Tensor]) -> None:
                z, g, which = (t.cpu() for t in out)
                each = g.double() if self.score == "gate" else torch.full_like(g, 1 / g.shape[1], dtype=torch.double)
                routed[block] = torch.zeros_like(z, dtype=torch.double).scatter_(1, which, each)

            return hook

        base = look.backbone.base
        handles = [base.get_submodule(at.router).register_forward_hook(note(b)) for b, at in mixtures.items()]
        total = dict.fromkeys(mixtures, torch.zeros((), dtype=torch.double))
        N = 0
        try:
            for batch in look.read(self.rows, self.passes):
                mask = batch.mask.cpu()
                for block, g in routed.items():
                    real = g.view(*mask.shape, -1) * mask[..., None]
                    total[block] = total[block] + (real.sum(1) / mask.sum(1, keepdim=True)).sum(0)
                N += len(mask)
        finally:
            for handle in handles:
                handle.remove()
        return {block: sums / N for block, sums in total.items()}


def reached(score: Tensor, p: float) -> Tensor:
    """The experts with the largest scores, just so many that the sum is p or more; all where it never is."""
    order = score.argsort(descending=True, stable=True)
    return order[: int((score[order].cumsum(0) < p).sum()) + 1]
