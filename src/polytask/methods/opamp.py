"""OpAmp attention: two attention maps, whose difference is amplified and whose mean is kept.

    M_i = softmax(E_qi(X W_q) E_ki(X W_k)ᵀ / √d_h + mask),   E(z) = z + W_u gelu(W_d z),   i = 1, 2
    head = (A_d (M₁ − M₂) + A_c (M₁ + M₂) / 2) V

Wu, Ming, Zheng, He, Yu 2025, arXiv 2502.12502. z is the queries or keys of all heads side by side, W_d [m, |z|], W_u
[|z|, m], so an adapter mixes heads; A_d / A_c is the common-mode rejection ratio. W_d ~ U(−1/√|z|, 1/√|z|) and W_u = 0:
both maps are the backbone's at first, and with A_c = 1 so is what becomes of them. The combined map's rows sum to A_c,
but single weights may be negative. Defaults are those of the authors' code, which adapts every second or third block of
its large models and trains LoRA on all linear maps beside; here it is every block (`sites`: one such as 6.attn.[qk] for
each chosen block) and nothing else.

E stands where the paper puts it, on what the projections put out. The code puts it behind the rotation to positions:
there it mixes features that were turned by different angles, so that a score no longer depends on distance alone, and
it has to be computed anew for all earlier keys whenever a token is written. Norms of q and k (Qwen 3) come behind E.

Each map is the model's own attention with its own queries and keys: relative positions and score caps stay as they
are, and where query and key maps also project relative positions (DeBERTa-v3), E acts on those too. While a text is
written each map has its own keys in the cache, so an adapted attention takes twice the time and the memory.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Backbone, Site, families
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method


@method(
    "opamp",
    place="activations",
    equation="head = (A_d (M₁ − M₂) + A_c (M₁ + M₂) / 2) V",
    paper="Wu et al. 2025, arXiv 2502.12502",
)
class OpAmp(Method):
    """m: width of the adapters' bottleneck. A_d: gain of the maps' difference. A_c: gain of their mean. dropout: on z,
    in the adapters' branch."""

    opaque = True

    m: int = 64
    A_d: float = 10.0
    A_c: float = 1.0
    dropout: float = 0.1
    sites: tuple[str, ...] = ("*.attn.[qk]",)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        if site.name.rpartition(".")[2] not in ("q", "k"):
            raise UsageError(
                f"opamp acts on queries and keys, and {site.name} is neither: name sites as in *.attn.[qk]"
            )
        bound = 1 / math.sqrt(site.width)
        p: Params = {}
        for i in (1, 2):
            p[f"W_d{i}"] = torch.empty(self.m, site.width).uniform_(-bound, bound, generator=generator)
            p[f"W_u{i}"] = torch.zeros(site.width, self.m)
        return p

    def E(self, p: Params, i: int, z: Tensor, *, training: bool = False) -> Tensor:
        """E_i(z) [..., |z|] with the tensors of a site."""
        return z + F.gelu(F.dropout(z, self.dropout, training) @ p[f"W_d{i}"].T) @ p[f"W_u{i}"].T

    def amplified(self, first: Tensor, second: Tensor) -> Tensor:
        """The maps M₁ and M₂ as one; or what they make of V, in which it is linear."""
        return self.A_d * (first - second) + self.A_c * (first + second) / 2

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        blocks = families.blocks(backbone.model)
        adapted: Counter[str] = Counter()
        with contextlib.ExitStack() as attentions:
            for place in dict.fromkeys(name.rpartition(".")[0] for name in backbone.sites if name in at):
                tower = place.partition(".")[0] if len(blocks) > 1 else ""
                cache = tower + place.rpartition(".")[2]  # self- and cross-attention have caches of their own
                own = {
                    name: {n: t.to(backbone.device, backbone.dtype) for n, t in at[name].items()}
                    for name in (f"{place}.q", f"{place}.k")
                    if name in at
                }
                beside = len(blocks[tower]) + adapted[cache]  # the first layer of the cache that no block uses
                adapted[cache] += 1
                attentions.enter_context(_Attention(self, backbone, place, own, beside, training).twice())
            yield


class _Attention:
    """One attention of the backbone, which is run for each map; `i` says for which. `beside` is the layer of the cache
    where the second one's keys and values are kept."""

    def __init__(
        self, method: OpAmp, backbone: Backbone, place: str, at: Mapping[str, Params], beside: int, training: bool
    ) -> None:
        self.method, self.at, self.beside, self.training = method, at, beside, training
        self.sites = [backbone.sites[f"{place}.{letter}"] for letter in "qkv"]
        o = backbone.sites[f"{place}.o"].path
        paths = [path.split(".") for path in (o, *(site.path for site in self.sites))]
        shared = itertools.takewhile(lambda names: len({*names}) == 1, zip(*paths, strict=False))
        find: Any = backbone.model.get_submodule
        self.module: Any = find(".".join(name for name, *_ in shared))
        self.maps: dict[str, Any] = {site.path: find(site.path) for site in self.sites}
        self.o: Any = find(o)
        self.counted: list[Any] = [m for m in self.module.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        self.i = 1
        self.projected: list[Tensor] = []
        self.heads: list[Tensor] = []

    @contextlib.contextmanager
    def twice(self) -> Iterator[None]:
        """Have it run this way."""
        changed = [self.module, self.o, *self.maps.values()]
        own = {path: linear.forward for path, linear in self.maps.items()}
        run, put_out = self.module.forward, self.o.forward

        def project(path: str, x: Tensor) -> Tensor:
            if self.i == 1:
                self.projected.append(own[path](x))
                y = self.projected[-1]
            else:
                y = self.projected.pop(0)  # of the same call in the first run
            for site in self.sites:
                if site.path == path and (p := self.at.get(site.name)) is not None:
                    z = y if site.part is None else site.part.take(y)
                    z = self.method.E(p, self.i, z, training=self.training)
                    y = z if site.part is None else site.part.put(y, z)
            return y

        def combine(heads: Tensor) -> Tensor:
            if self.i == 1:
                self.heads = [heads]
                raise _Attended
            out: Tensor = put_out(self.method.amplified(self.heads.pop(), heads))
            return out

        def forward(*args: Any, **kwargs: Any) -> Any:
            layers = [m.layer_idx for m in self.counted]
            self.i, self.projected = 1, []
            with contextlib.suppress(_Attended):
                run(*args, **kwargs)
            self.i = 2
            try:
                for m in self.counted:
                    m.layer_idx = self.beside
                return run(*args, **kwargs)
            finally:
                for m, layer in zip(self.counted, layers, strict=True):
                    m.layer_idx = layer

        self.module.forward, self.o.forward = forward, combine
        for path, linear in self.maps.items():
            linear.forward = lambda x, path=path: project(path, x)
        try:
            yield
        finally:
            for m in changed:
                del m.forward


class _Attended(Exception):
    """The first map has met the values."""
