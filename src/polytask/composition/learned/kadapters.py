"""K-Adapters together: what heads read is made of what each of them puts out.

    H ← Σ_n f_n W_nᵀ + b,   f_n = [H_L; a_n] W_(n)ᵀ + b_(n)         the states that adapter n makes of the backbone's

Wang, Tang, Duan, Wei, Huang, Ji, Cao, Jiang, Zhou 2020, arXiv 2002.01808, who concatenate the f_n, [tokens, d] each,
before one linear map: the same. None reads what another puts out, so that adding one changes nothing for those before
it, and all are computed beside one pass of the backbone. W_n = I / N and b = 0 at first, the mean of the adapters,
where the authors' code draws them at random; N d² + d numbers are trained.

The paper goes on training the maps W_(n) of its adapters, whose heads are dropped, and the backbone; both stay as they
are here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Backbone
from polytask.errors import UsageError
from polytask.methods.composed import Composed
from polytask.methods.kadapter import KAdapter, Seen, on, standing
from polytask.methods.method import Method, Params, method


@method(
    "kadapters",
    place="activations",
    equation="H ← Σ_n f_n W_nᵀ + b, f_n what K-Adapter n makes of H",
    paper="Wang et al. 2020, arXiv 2002.01808",
)
class KAdapters(Composed):
    """No hyperparameters; `over` are adapters by kadapter."""

    opaque = True
    elsewhere = True
    made_of = KAdapter

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        if writing and backbone.kind == "encoder-decoder":
            raise UsageError(
                f"kadapters changes what heads read, and {backbone.name} writes by a decoder that would read it too"
            )
        d = backbone.hidden_size
        return {"shared/W": torch.eye(d).repeat(1, len(self.over)) / len(self.over), "shared/b": torch.zeros(d)}

    @contextlib.contextmanager
    def around(
        self,
        backbone: Backbone,
        at: Mapping[str, Params],
        sources: Sequence[tuple[Method, Mapping[str, Params]]],
    ) -> Iterator[None]:
        own = next(iter(on(backbone, at).values()))
        each = [(method, on(backbone, its)) for method, its in sources if isinstance(method, KAdapter)]
        layers = list(accumulate((len(parts) * method.inner for method, parts in each), initial=len(backbone.blocks)))

        def read(H: Mapping[str, Tensor], seen: Seen) -> Tensor:
            f = [
                method.states(parts, H, replace(seen, layer=layer), training=False)
                for (method, parts), layer in zip(each, layers, strict=False)
            ]
            return F.linear(torch.cat(f, -1), own["W"], own["b"])

        with standing(backbone, at, read):
            yield
