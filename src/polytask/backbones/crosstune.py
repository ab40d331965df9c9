"""CrossTune's head: the labels' descriptions attend to the input's token states.

    a_ct = softmax_t( (Q u_c)·(K ĥ_t) / √(d/n) )            in each of n heads, over the input's tokens t
    z_c = O [Σ_t a_ct V ĥ_t]                                 what label c finds in the input
    logit_c = z_c · u_c / √d + b_c

Luo, Zhang, Zhang, Li 2024, arXiv 2403.12468. ĥ_t = √d h_t/‖h_t‖ are the token states [d], u_c = √d e_c/‖e_c‖ with e_c
the mean of the frozen backbone's states over the label's name and description. E = (e_c) [C, d] is kept with the
adapter and not trained; Q, K, V, O [d, d] and b [C] are. No gradient goes through the backbone.

The paper says that the labels' descriptions and the input's features meet in multi-head cross-attention, and not what
stands around it. What is ours: labels ask and tokens answer; a label's logit is how much what it finds is like it;
n = 4; and Q = K = V = O = I at first, so that an untrained head gives the label whose description is nearest to the
tokens that it attends to. The paper's second half, examples written by another model and a switch that leaves out bad
ones, is a step of the data's and not of the head's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

HEADS = 4

Params = dict[str, Tensor]


def start(C: int, d: int) -> Params:
    """Q, K, V, O [d, d] = I, b [C] = 0, and E [C, d] = 0, to be filled in."""
    return {"E": torch.zeros(C, d), **{name: torch.eye(d) for name in "QKVO"}, "b": torch.zeros(C)}


def logits(p: Params, h: Tensor, mask: Tensor) -> Tensor:
    """[R, C] from token states h [R, T, d] and which of them are real [R, T]."""
    d = h.shape[-1]
    n = HEADS if d % HEADS == 0 else 1
    ĥ, u = (math.sqrt(d) * F.normalize(t, dim=-1) for t in (h, p["E"]))
    Q, K, V = (p[name].reshape(n, d // n, d) for name in "QKV")
    # q·Kĥ = (Kᵀq)·ĥ and Σ a Vĥ = V Σ aĥ: there are fewer labels than tokens, so the labels are multiplied.
    asked = torch.einsum("ce,nke,nkd->cnd", u, Q, K)
    score = torch.einsum("cnd,rtd->rcnt", asked, ĥ) / math.sqrt(d / n)
    a = score.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
    found = torch.einsum("rcnt,rtd,nkd->rcnk", a, ĥ, V).flatten(-2)
    z = F.linear(found, p["O"])
    return torch.einsum("rcd,cd->rc", z, u) / math.sqrt(d) + p["b"]
