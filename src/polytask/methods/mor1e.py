"""MoR1E: rank-1 experts, weighed for each token by a router and for each text by which clusters of inputs it is near.

    y ← y + σ(κ b) · Σ_i g_i (A_i · x) B_i
    g = 32 σ(κ o) softmax(R x) + 4 (1 − σ(κ o)) s,   s_i = c_i · e,   e = mean(h) / ‖mean(h)‖         i = 1 … r

x [d_in], A and R [r, d_in], B [d_out, r]; b and o one number each, of every map. e [d]: the text as the frozen backbone
embeds it, by the mean of its last states in a pass of its own; c_i [d], of norm 1: the centres of r clusters of the
training inputs (k-means), which are kept and not trained. So the prior s needs no names of tasks, and is a text's own
for all tokens and maps. Liu, Zhang, Yang, Keutzer, Du, Du, Zhang 2024, arXiv 2404.08985, by the authors' code.

A ~ U(±1/√d_in), B = R = 0 and b = o = 0: training starts at the backbone, with the router and the prior at half. r = 32
on all linear maps, and the factors 32 and 4, are theirs. r (2 d_in + d_out) + 2 numbers a map.

The authors' κ is 100 at a rate of 5e-5: a step of Adam moves κ o by 0.005. The rate here is LoRA's, 2e-3, and κ = 2.5
gives the same steps. They embed inputs by another model (nomic-embed-text). Here that is the backbone itself, so each
text is read twice, and answers in text are left out. With fewer inputs than clusters the others have no centre, and
s = 0. Where a map also projects relative positions, those stay the backbone's.
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


@method(
    "mor1e",
    place="weights",
    equation="y ← y + σ(κ b) Σ g_i (A_i · x) B_i, g of softmax(R x) and of the text's clusters",
    paper="Liu et al. 2024, arXiv 2404.08985",
)
class MoR1E(Method):
    """r: experts, and clusters. router: what the router's softmax counts. prior: what the clusters count; 0 leaves the
    router alone. steep: κ. dropout: on x, before A."""

    opaque = True
    fixed = frozenset(("C",))

    r: int = 32
    router: float = 32.0
    prior: float = 4.0
    steep: float = 2.5
    dropout: float = 0.0
    sites: tuple[str, ...] = ("*.attn.[qkvo]", "*.mlp.[gud]*")

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        if writing:
            raise UsageError("mor1e reads whole inputs before it acts: have the task answered by a head")
        C = torch.zeros(self.r, backbone.hidden_size)
        return {"shared/C": C} | super().start(backbone, seed, writing=writing)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound = 1 / math.sqrt(site.reads)
        return {
            "A": torch.empty(self.r, site.reads).uniform_(-bound, bound, generator=generator),
            "B": torch.zeros(site.width, self.r),
            "R": torch.zeros(self.r, site.reads),
            "o": torch.zeros(1),
            "b": torch.zeros(1),
        }

    def shown(self, own: Mapping[str, Tensor], inputs: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The clusters' centres."""
        from sklearn.cluster import KMeans

        e = F.normalize(inputs(), dim=-1)
        k = min(self.r, len(torch.unique(e, dim=0)))
        centres = KMeans(k, n_init=3, random_state=0).fit(e.numpy()).cluster_centers_
        C = torch.zeros_like(own["shared/C"])
        C[:k] = F.normalize(torch.from_numpy(centres).float(), dim=-1)
        return {**own, "shared/C": C}

    def delta(self, p: Params, x: Tensor, y: Tensor, s: Tensor | None = None) -> Tensor:
        """Δ [..., T, width] from x [..., T, reads] and the text's s [..., 1, r], if there is any."""
        A, B, R, κ = p["A"], p["B"], p["R"], self.steep
        w = torch.sigmoid(κ * p["o"])
        g = self.router * w * (x @ R.T).softmax(-1)
        if s is not None:
            g = g + self.prior * (1 - w) * s
        return torch.sigmoid(κ * p["b"]) * (g * (x @ A.T)) @ B.T

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        weighed = _Weighed(self, backbone, training)
        handles = []
        try:
            for name, p in at.items():
                own = {n: t.to(backbone.device, backbone.dtype) for n, t in p.items() if n != "C"}
                handles += attached(backbone, name, partial(weighed.change, name, own))
                weighed.sites.append(name)
                weighed.C = p["C"]
            vars(backbone)["hidden"] = weighed.hidden
            yield
        finally:
            vars(backbone).pop("hidden", None)
            for handle in handles:
                handle.remove()


class _Weighed:
    """The passes of a backbone with an adapter's tensors. `s` [R, 1, r] is that of the pass that runs; `left` are the
    sites that it has not met."""

    def __init__(self, m: MoR1E, backbone: Backbone, training: bool) -> None:
        self.m, self.plain, self.training = m, backbone.hidden, training
        self.dtype = backbone.dtype
        self.sites: list[str] = []
        self.left: set[str] = set()
        self.C = torch.empty(0)
        self.s: Tensor | None = None

    def hidden(self, batch: Batch, *, causal: bool | str = True) -> Tensor:
        """In place of `Backbone.hidden`."""
        self.left, self.s = set(), None
        if self.m.prior:
            with torch.no_grad():
                real = batch.mask[:, :, None]
                h = self.plain(batch, causal=causal).to(self.C.dtype).masked_fill(~real, 0)
            e = F.normalize(h.sum(1) / real.sum(1), dim=-1)
            self.s = (e @ self.C.T)[:, None, :].to(self.dtype)
        self.left = {*self.sites}
        return self.plain(batch, causal=causal)

    def change(self, site: str, p: Params, x: Tensor, y: Tensor) -> Tensor:
        if site not in self.left:
            return y
        self.left.discard(site)
        return y + self.m.delta(p, F.dropout(x, self.m.dropout, self.training), y, self.s)
