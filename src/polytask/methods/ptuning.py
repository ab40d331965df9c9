"""P-tuning: the virtual tokens before the text come out of a small network.

    X = [P; E(x)],   P = W₃ f(W₂ f(W₁ Z + b₁) + b₂) + b₃,   f = ReLU

Liu, Zheng, Du, Ding, Qian, Yang, Tang 2021, arXiv 2103.10385, whose network is an LSTM and two maps; the three maps are
PEFT's, its default. Z [n, d] ~ N(0, 1); W and b as torch's linear maps begin. The network is kept, so that training can
go on; its result can be kept as a `prompt`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Site
from polytask.methods.method import Method, Params, method
from polytask.methods.prompt import placed


@method("ptuning", place="tokens", equation="X = [MLP(Z); E(x)]", paper="Liu et al. 2021, arXiv 2103.10385")
class PTuning(Method):
    """n: virtual tokens. hidden: width of the network (0: that of the model)."""

    elsewhere = True

    n: int = 20
    hidden: int = 0
    sites: tuple[str, ...] = ("tokens",)

    @property
    def slots(self) -> int:
        return self.n

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        d, h = site.width, self.hidden or site.width
        p = {"Z": torch.randn(self.n, d, generator=generator)}
        for i, (reads, width) in enumerate(((d, h), (h, h), (h, d)), 1):
            bound = 1 / math.sqrt(reads)
            p[f"W{i}"] = torch.empty(width, reads).uniform_(-bound, bound, generator=generator)
            p[f"b{i}"] = torch.empty(width).uniform_(-bound, bound, generator=generator)
        return p

    def ready(self, p: Params, frozen: Params) -> Params:
        h = F.relu(F.linear(p["Z"], p["W1"], p["b1"]))
        return {"P": F.linear(F.relu(F.linear(h, p["W2"], p["b2"])), p["W3"], p["b3"])}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return placed(p["P"], x, y)
