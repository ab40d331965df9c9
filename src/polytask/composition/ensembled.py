"""An ensemble at the output: the weighted mean of what several adapters' heads put out.

    p = Σ_k w_k p_k / Σ_k w_k          p_k = softmax(z_k), of each tag for tags; σ(z_k) of each label for several labels
    y = Σ_k w_k y_k / Σ_k w_k          for numbers

Unlike a mixture it costs a pass for each adapter, and asks nothing of how they were trained: methods, sites and ranks
may differ, only the answers have to be the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polytask.adapters import HeadCard
from polytask.errors import UsageError

KIND = "composition"
NAME = "ensemble"
PLACE = "logits"
EQUATION = "p = Σ_k w_k p_k"
PAPER = "linear opinion pool: Stone 1961"


def refuse_unlike(cards: Sequence[HeadCard], names: Sequence[str]) -> None:
    """Raise UsageError where heads do not answer with the same things."""
    for card, name in zip(cards, names, strict=True):
        if card.text and card.text.decide == "write":
            raise UsageError(f"ensemble: {name} writes its answers, which have no mean; mix or merge it instead")
        if (card.kind, card.targets, card.text is None) != (cards[0].kind, cards[0].targets, cards[0].text is None):
            raise UsageError(
                f"ensemble: {names[0]} answers by {_said(cards[0])}, {name} by {_said(card)}; use adapters of one task"
            )


def _said(card: HeadCard) -> str:
    return f"{card.kind} into {', '.join(card.targets[:3])}" if card.targets else card.kind


def ensembled(head: HeadCard, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Logits of the mean, in the shape of each part's: [C], [words, C] of tags, [options] of options' log p."""
    z = torch.stack([*logits])
    w = torch.tensor(weights) / sum(weights)
    if head.kind in ("regression", "similarity"):
        return torch.einsum("k,k...->...", w, z)
    if head.kind == "multilabel":
        return torch.einsum("k,k...->...", w, z.sigmoid()).logit()
    return torch.einsum("k,k...->...", w, z.softmax(-1)).log()
