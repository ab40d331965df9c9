"""P-Adapter's prefix: virtual tokens before the text that a small recurrent network makes from the text itself.

    X = [P; E],   P = W₂ relu(W₁ max_t h_t + b₁) + b₂,   h = BiLSTM₂(E)          P [n, d], E [T, d], h [T, d]

Newman, Choubey, Rajani 2021, arXiv 2110.07280. W₁ [d, d], W₂ [n d, d]; the network and how all begins are those of
`p_adapter`, but the text's embeddings stay as they are. The maximum is taken over the sequence's own tokens; the
authors' script counts padding in. n is our choice, that of `prefix`. On decoders P is made of the prompt alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Backbone, Site
from polytask.methods.method import Params, method
from polytask.methods.p_adapter import PAdapter, bilstm, drawn, rewriting, states, wanted


@method(
    "p_adapter_prefix",
    place="tokens",
    equation="X = [MLP(max_t BiLSTM(E)_t); E]",
    paper="Newman et al. 2021, arXiv 2110.07280",
)
class PAdapterPrefix(PAdapter):
    """n: virtual tokens."""

    n: int = 10

    @property
    def slots(self) -> int:
        return self.n

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        wanted(self, site)
        d, n = site.width, self.n
        p = {name: drawn(t.shape, d // 2, generator) for name, t in bilstm(d).named_parameters()}
        for i, width in ((1, d), (2, n * d)):
            p |= {f"W{i}": drawn((width, d), d, generator), f"b{i}": drawn((width,), d, generator)}
        return p

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        [(where, p)] = at.items()

        def before(E: list[Tensor]) -> list[Tensor]:
            """E [n + T, d] with P in place of what its first n rows hold."""
            text = [e[self.n :] for e in E]
            m = torch.stack([h.amax(0) for h in states(p, text)])
            P = F.linear(F.relu(F.linear(m, p["W1"], p["b1"])), p["W2"], p["b2"]).view(len(m), self.n, -1)
            return [torch.cat([own.to(e.dtype), e]) for own, e in zip(P, text, strict=True)]

        with rewriting(backbone, where, before, room=self.n):
            yield
