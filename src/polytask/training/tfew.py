"""T-Few's objective: of several answers to one input, the right one is made likely and the wrong ones unlikely.

    L    = L_LM + L_UL + L_LN
    L_LM = −(1/T) Σ_t log p(y_t | x, y_<t)                                  the right answer
    L_UL = −Σ_n Σ_t log(1 − p(ŷⁿ_t | x, ŷⁿ_<t) + ε) / Σ_n Tⁿ                every token of the wrong ones
    L_LN = −log [ exp β(y) / (exp β(y) + Σ_n exp β(ŷⁿ)) ],   β(y) = (1/T) Σ_t log p(y_t | x, y_<t)

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel 2022, arXiv 2205.05638; the unlikelihood loss is that of Welleck et al.
2020, arXiv 1908.04319. The answer y has T tokens, the n-th wrong one ŷⁿ has Tⁿ; the token that ends an answer counts. β
is what options are compared by afterwards. ε = 0.01 is not in the paper but in the authors' code: without it one token
of probability 1 makes the loss infinite. Their code takes L_LM and L_UL over all tokens of a batch; here, as in the
paper, each input has its own L, and a batch the mean of these, so that long answers do not count more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ε = 0.01


def loss(options: Sequence[Tensor]) -> Tensor:
    """L of one input from log p of each token of each option [tokens], the right one first."""
    β = torch.stack([log_p.mean() for log_p in options])
    L_LM = -β[0]
    L_LN = -β.log_softmax(0)[0]
    if len(options) == 1:
        return L_LM
    L_UL = -(1 - torch.cat([*options[1:]]).exp() + ε).log().mean()
    return L_LM + L_UL + L_LN


def losses(z: Tensor, targets: Sequence[Sequence[int]], inputs: Sequence[int]) -> Tensor:
    """L of each input, from logits z [tokens, vocabulary] of the options' tokens, one option after another: option i
    has the tokens `targets[i]` and answers `inputs[i]`, whose right option comes before its wrong ones."""
    y = torch.tensor([token for target in targets for token in target], device=z.device)
    log_p = z.float().log_softmax(-1).gather(1, y[:, None])[:, 0]
    options: dict[int, list[Tensor]] = {}
    for i, part in zip(inputs, torch.split(log_p, [len(target) for target in targets]), strict=True):
        options.setdefault(i, []).append(part)
    return torch.stack([loss(own) for own in options.values()])
