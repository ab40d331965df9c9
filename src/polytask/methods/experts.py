"""Mixture of linguistic experts: parallel adapters whose gates say which one a layer needs, and then that one alone.

    h ← h + Σ_e g_e A_e(x),   A_e(x) = s (U_e relu(D_e x + b_De) + b_Ue),   e = 1 … E
    g = softmax((α + G) / τ) while training, G_e = −log(−log u_e), u_e ~ U(0, 1);   g = softmax(α / τ) after it

x [d] the feed-forward network's input, h [d] its output, D [E·m, d] and U [d, E·m] the experts' maps side by side,
α [E] a layer's gates, which do not depend on the input.

Li, Murray, Carenini 2023, arXiv 2310.16240. All experts and gates are trained for a few steps (1,000 of 64 sequences at
a constant rate of 1e-4 in the authors' script, τ = 1 throughout); then `pruned` keeps a layer's greatest gate, which
leaves an ordinary `parallel` adapter, and training goes on. E = 4, m = d / 12 (64 of 768) and s = 4 are the script's. D
as torch's linear maps start, U, biases and α = 0: training starts at the backbone.

Different from the paper: three of its four experts read a graph of the sentence (semantic, syntactic, neighbours) where
a site has none, so that all are plain here, and differ by their draw; its experts have a layer norm of their own, which
`parallel` has not; it draws gates for each sequence, here for each pass; its script judges the first phase by the
greatest gate alone, and trains the chosen experts anew after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones import Site
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, build, method


@method(
    "experts",
    place="activations",
    equation="h ← h + Σ g_e s (U_e relu(D_e x + b_De) + b_Ue), g = softmax(α/τ)",
    paper="Li et al. 2023, arXiv 2310.16240",
)
class Experts(Method):
    """experts: E. reduction: d / m, the sublayer's width over that of one expert's bottleneck. scale: s. tau: τ."""

    experts: int = 4
    reduction: int = 12
    scale: float = 4.0
    tau: float = 1.0
    sites: tuple[str, ...] = ("*.mlp",)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        E, d = self.experts, site.width
        m = max(1, d // self.reduction)
        bound = 1 / math.sqrt(site.reads)
        return {
            "D": torch.empty(E * m, site.reads).uniform_(-bound, bound, generator=generator),
            "b_D": torch.zeros(E * m),
            "U": torch.zeros(d, E * m),
            "b_U": torch.zeros(E, d),
            "alpha": torch.zeros(E),
        }

    def sampled(self, p: Params) -> Params:
        α = p["alpha"]
        return {**p, "alpha": α - torch.empty_like(α).exponential_().log()}  # −log u is drawn from Exp(1)

    def ready(self, p: Params, frozen: Params) -> Params:
        """One wide bottleneck, since the gates do not depend on the input."""
        g = (p["alpha"] / self.tau).softmax(-1)
        wide = g.repeat_interleave(len(p["D"]) // self.experts)
        return {"D": p["D"], "b_D": p["b_D"], "U": self.scale * wide * p["U"], "b_U": self.scale * g @ p["b_U"]}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        D, b_D, U, b_U = p["D"], p["b_D"], p["U"], p["b_U"]
        return F.relu(x @ D.T + b_D) @ U.T + b_U


def pruned(mixture: Experts, tensors: Mapping[str, Tensor], keep: int = 1) -> tuple[Method, dict[str, Tensor]]:
    """The method and tensors of each layer's `keep` experts with the greatest gates; of one, a `parallel` adapter.

    Tensors of the head and the task stay as they are. Raises UsageError where there are not so many experts.
    """
    E = mixture.experts
    if not 1 <= keep <= E:
        raise UsageError(f"keep = {keep}: there are {E} experts at each site, so give a number from 1 to {E}")
    hyperparameters = mixture.hyperparameters() | {"experts": keep}
    if keep == 1:
        hyperparameters = {name: hyperparameters[name] for name in ("reduction", "scale", "sites")}
    fewer = build("parallel" if keep == 1 else "experts", hyperparameters)
    found = dict(tensors)
    for site in [name.removesuffix("/alpha") for name in tensors if name.endswith("/alpha")]:
        α = tensors[f"{site}/alpha"]
        best = α.argsort(descending=True, stable=True)[:keep].sort().values
        m = len(tensors[f"{site}/D"]) // E
        rows = (best[:, None] * m + torch.arange(m, device=α.device)).flatten()
        found |= {f"{site}/{name}": tensors[f"{site}/{name}"][rows].clone() for name in ("D", "b_D")}
        found[f"{site}/U"] = tensors[f"{site}/U"][:, rows].clone()
        b_U = tensors[f"{site}/b_U"][best]
        found[f"{site}/b_U"] = b_U[0].clone() if keep == 1 else b_U
        found[f"{site}/alpha"] = α[best]
        if keep == 1:
            del found[f"{site}/alpha"]
    return fewer, found
