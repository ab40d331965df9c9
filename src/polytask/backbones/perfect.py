"""PERFECT: label embeddings at mask tokens, in place of a template and a verbalizer.

    x [MASK]₁ … [MASK]_M                                     M mask tokens behind the input; h_m what is read at mask m
    t_mk = L_km · h_m                                        to train
    loss = 1/M Σ_m 1/K Σ_{k≠y} max(0, 1 − t_my + t_mk)
    c_km = mean of h_m over the training examples of class k
    s_k = max_m exp(−‖ĉ_km − ĥ_m‖²),  v̂ = v / ‖v‖             to answer: the class of the greatest s_k

Karimi Mahabadi, Zettlemoyer, Henderson, Saeidi, Mathias, Stoyanov, Yazdani 2022, arXiv 2204.01172. h [M, d] are last
hidden states, which the paper takes without the language-model head's own layer, so any encoder with a mask token will
do. L [K, M, d] ~ N(0, (10⁻⁴)²) as in the paper: no word of the vocabulary stands for a label. c [K, M, d] is not
trained; it is taken anew before each validation. 1/K is that of torch's multi-class hinge, which the authors' code
calls.

The paper trains bottleneck adapters behind the feed-forward networks, and layer norms, along with L; here any method
may go with it (`pfeiffer` is the paper's but for the norms). Of a pair, the masks stand behind the first text, where
the paper puts them; our encoders keep their separator between the texts, which the paper leaves out. The probability of
an answer is s_k / Σ_j s_j, which is flat: mask states of one model lie close together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASKS = 2  # the paper's study has 1, 2, 5 and 10

Params = dict[str, Tensor]


def start(K: int, M: int, d: int, seed: int) -> Params:
    """L and c before training; classes whose c is zero are never answered."""
    L = torch.empty(K, M, d).normal_(0, 1e-4, generator=torch.Generator().manual_seed(seed))
    return {"L": L, "c": torch.zeros(K, M, d)}


def logits(p: Params, h: Tensor) -> Tensor:
    """From h [R, M, d]: log s [R, K], or t [R, M, K] where there is no c, which is so in training."""
    if "c" not in p:
        return torch.einsum("rmd,kmd->rmk", h, p["L"])
    ĉ, ĥ = F.normalize(p["c"], dim=-1), F.normalize(h, dim=-1)
    log_s = -(ĉ - ĥ[:, None]).square().sum(-1).amin(-1)
    return log_s.masked_fill((p["c"] == 0).all(-1).all(-1), -torch.inf)


def losses(t: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """One loss a row [R], from t [R, M, K] and class numbers y [R]; `weights` [K] weigh the classes."""
    R, M, K = t.shape
    each = F.multi_margin_loss(t.reshape(R * M, K), y.repeat_interleave(M), weight=weights, reduction="none")
    return each.reshape(R, M).mean(-1)


def prototypes(h: Tensor, y: Tensor, K: int) -> Tensor:
    """c [K, M, d] from h [N, M, d] and class numbers y [N]; zeros for a class without examples."""
    total = h.new_zeros(K, *h.shape[1:]).index_add(0, y, h)
    return total / y.bincount(minlength=K).clamp(min=1)[:, None, None]
