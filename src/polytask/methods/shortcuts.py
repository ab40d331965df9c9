"""Layer-wise attention shortcuts: what is read last attends to the states of all depths.

    a_t = softmax_l((W_q n(H_t)) · (W_k n(h_tl)) / √m),   H_t ← H_t + W_o Σ_l a_tl W_v n(h_tl)
    H_t [d] the last state of token t, h_tl [d] what block l put out, n(x) = (x − mean) / deviation over features

Verma, Pilanci 2024, arXiv 2409.10870, who train models from nothing whose last layer attends to features of chosen
depths, across tokens too. On a frozen model each token attends to its own depths, so that a text is written with the
usual cache; W_q, W_k, W_v [m, d] ~ U(±1/√d), and W_o [d, m] = 0, so that training starts at the backbone. A head that
reads H then has all depths to choose from, token by token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Backbone, Site
from polytask.errors import UsageError
from polytask.methods.kadapter import reading
from polytask.methods.method import Method, Params, method


@method(
    "shortcuts",
    place="activations",
    equation="H ← H + W_o Σ_l softmax_l(W_q H · W_k h_l) W_v h_l",
    paper="Verma & Pilanci 2024, arXiv 2409.10870",
)
class Shortcuts(Method):
    """m: width of queries, keys and values. sites: the states to attend to, outputs of blocks."""

    opaque = True

    m: int = 64
    sites: tuple[str, ...] = ("*",)

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        if writing and backbone.kind == "encoder-decoder":
            raise UsageError(
                f"shortcuts change what heads read, and {backbone.name} writes by a decoder that would read it too; "
                "take another method for an answer in text"
            )
        tensors = super().start(backbone, seed)
        if wrong := [n for n in tensors if not n.rpartition("/")[0].rpartition(".")[2].isdigit()]:
            raise UsageError(f"shortcuts attend to what blocks put out, and {wrong[0].rpartition('/')[0]} is none")
        draw = torch.Generator().manual_seed(seed)
        d, bound = backbone.hidden_size, 1 / math.sqrt(backbone.hidden_size)
        W_q = torch.empty(self.m, d).uniform_(-bound, bound, generator=draw)
        return {"shared/W_q": W_q, "shared/W_o": torch.zeros(d, self.m)} | tensors

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        bound = 1 / math.sqrt(site.width)
        shape = (self.m, site.width)
        return {name: torch.empty(shape).uniform_(-bound, bound, generator=generator) for name in ("W_k", "W_v")}

    def only(self, tensors: Mapping[str, Tensor]) -> Self:
        if "shared/W_q" not in tensors:
            raise UsageError("shortcuts join depths, none of which acts alone; take a selector of single numbers")
        return super().only(tensors)

    def joined(self, at: Mapping[str, Params], H: Tensor, h: Mapping[str, Tensor]) -> Tensor:
        """H [R, T, d] with what it takes from the states h of each depth."""

        def n(x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:])

        shared = at[next(iter(at))]
        q = n(H) @ shared["W_q"].T
        seen = {site: n(states) for site, states in h.items()}
        k, v = (torch.stack([seen[site] @ p[name].T for site, p in at.items()]) for name in ("W_k", "W_v"))
        a = (torch.einsum("rtm,lrtm->lrt", q, k) / math.sqrt(self.m)).softmax(0)
        return H + torch.einsum("lrt,lrtm->rtm", a, v) @ shared["W_o"].T

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        own = {
            name: {n: t.to(backbone.device, backbone.dtype) for n, t in at[name].items()}
            for name in backbone.sites
            if name in at
        }
        with reading(backbone, own) as h:

            def beside(_module: Any, _args: Any, out: Any) -> Any:
                out.last_hidden_state = self.joined(own, out.last_hidden_state, h)
                h.clear()
                return out

            handle = backbone.reader.register_forward_hook(beside)
            try:
                yield
            finally:
                handle.remove()
