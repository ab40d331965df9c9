"""FLARE: a LoRA whose bottleneck also takes in what the backbone makes of a parallel text, such as a translation.

    y ← y + s · B φ(A x_S, A x_T),   s = α / r
    φ(s, t) = relu(s) + relu(t) (`add_relu`),  s + t (`add`)  or  s ∘ t (`mul`)       y ← y + s · B t  without x_S

x_T [T, in]: what the map reads of the text itself; x_S [T, in]: what the same map reads of the parallel text, in a pass
of the frozen backbone without gradients; A [r, in] is one for both. Borchert, Vulić, Moens, De Weerdt 2025, arXiv
2501.06892. A ~ U(±1/√in) and B = 0, as LoRA's; r = 8, α = 16 on query and value projections and `add_relu` are the
authors'. r (in + out) numbers a map, as many as LoRA's: neither the input nor the attention gets longer.

Token t of the text meets token t of the parallel one, without alignment. Where that has ended, A x_S counts as 0; where
a text comes without one, the adapter is the LoRA of its A and B, as in the authors' code, which is not what it was
trained as: with `add_relu` B then meets numbers below 0 that it never saw.

The parallel text is the second one of a task of pairs, which a head then does not read. The authors' source states are
the residual stream before the block; here they are what the map itself reads of it, behind the same norm, which is the
same in models that norm after. The variants of φ that mix tokens (products of matrices, attention) are left out. The
authors train a LoRA on English first and merge it, which is a training of its own here (`merge`); and their source
states while an answer is written are those of a second text that is written too, so answers in text have no parallel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Backbone, Batch, Site
from polytask.errors import UsageError
from polytask.methods.lifting import attached
from polytask.methods.method import Method, Params, method

Φ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_relu": lambda s, t: F.relu(s) + F.relu(t),
    "add": torch.add,
    "mul": torch.mul,
}


@method(
    "flare",
    place="weights",
    equation="y ← y + (α/r)·B φ(A x_S, A x_T)",
    paper="Borchert et al. 2025, arXiv 2501.06892",
)
class FLARE(Method):
    """r: rank. alpha: scale's numerator. phi: φ, one of add_relu, add, mul. dropout: on x_S and x_T, in this branch
    only."""

    opaque = True
    beside = True

    r: int = 8
    alpha: float = 16.0
    phi: str = "add_relu"
    dropout: float = 0.0
    sites: tuple[str, ...] = ("*.attn.q", "*.attn.v")

    def __post_init__(self) -> None:
        if self.phi not in Φ:
            raise UsageError(f"flare.phi = {self.phi!r}: one of {', '.join(Φ)}")

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound = 1 / math.sqrt(site.reads)
        A = torch.empty(self.r, site.reads).uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": torch.zeros(site.width, self.r)}

    def delta(self, p: Params, x: Tensor, y: Tensor, x_S: Tensor | None = None) -> Tensor:
        """Δ [..., T, width] from what is read of the text, x [..., T, reads], and of the parallel one, if there is."""
        A, B = p["A"], p["B"]
        t = x @ A.T
        h = t if x_S is None else Φ[self.phi](x_S @ A.T, t)
        return self.alpha / self.r * h @ B.T

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        fused = _Fused(self, backbone, training)
        handles = []
        try:
            for name, p in at.items():
                own = {n: t.to(backbone.device, backbone.dtype) for n, t in p.items()}
                handles += attached(backbone, name, partial(fused.change, name, own))
            vars(backbone)["hidden"] = fused.hidden
            yield
        finally:
            vars(backbone).pop("hidden", None)
            for handle in handles:
                handle.remove()


class _Fused:
    """The passes of a backbone with an adapter's tensors. `x_S` [R, T', reads] has what sites read of the parallel
    texts, until it is used; `there` [R] bool says which rows have one."""

    def __init__(self, m: FLARE, backbone: Backbone, training: bool) -> None:
        self.m, self.plain, self.training = m, backbone.hidden, training
        self.x_S: dict[str, Tensor] = {}
        self.there = torch.empty(0)
        self.source: Tensor | None = None  # which tokens are real, while the parallel texts are read

    def hidden(self, batch: Batch, *, causal: bool | str = True) -> Tensor:
        """In place of `Backbone.hidden`."""
        self.x_S.clear()
        if batch.beside is not None:
            self.source = batch.beside.mask
            self.there = self.source.any(1)
            try:
                with torch.no_grad():
                    self.plain(batch.beside, causal=causal)
            finally:
                self.source = None
        return self.plain(batch, causal=causal)

    def change(self, site: str, p: Params, x: Tensor, y: Tensor) -> Tensor:
        """A site's value. Where its module also projects relative positions (`Backbone.rowless`), it does so after it
        has met the texts, and these have nothing parallel."""
        if self.source is not None:
            if site not in self.x_S:
                self.x_S[site] = x.masked_fill(~self.source[:, :, None], 0)
            return y
        m, T = self.m, x.shape[1]
        x = F.dropout(x, m.dropout, self.training)
        x_S = self.x_S.pop(site, None)
        if x_S is None:
            return y + m.delta(p, x, y)
        x_S = F.dropout(F.pad(x_S, (0, 0, 0, T - x_S.shape[1])), m.dropout, self.training)
        Δ = m.delta(p, x, y, x_S)
        return y + (Δ if bool(self.there.all()) else torch.where(self.there[:, None, None], Δ, m.delta(p, x, y)))
