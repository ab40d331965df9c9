"""Heads: from last hidden states to answers, with a loss to train them and a rule to read them.

    logits = W · φ + b,   φ = pool(h)                                   a text
                          φ = [u; v; |u − v|; u ∘ v]                    a pair, each text encoded by itself
                          φ = h_t                                       a token (its word's first piece)

Pooling: mean over real tokens, the first token, the last token, or attention, φ = Σ_t softmax_t(q·h_t) h_t with a
learned q [d]. The pair features are those of InferSent (Conneau et al. 2017, arXiv 1705.02364); a similarity starts as
the cosine of the two texts. Everything here is computed in fp32.

A head whose classes are no rows of W stands in a file of its own, and `start`, `read` and `losses` hand over to it:
`perfect` (pool `masks`), `crosstune` (pool `labels`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import HeadCard
from polytask.backbones import crosstune, perfect
from polytask.errors import UsageError
from polytask.tasks import Task
from polytask.tasks.task import Output

KINDS = ("classification", "multilabel", "tagging", "regression", "similarity")  # of tasks that a head can answer
POOLS = ("mean", "first", "last", "attention")  # how tokens become one vector
SPACES = ("masks", "labels")  # what a head's classes may be instead of rows of W
PAIRS = ("separate", "joint")
IGNORED = -100  # the class number of a token that has no tag of its own
FIXED = frozenset({"c", "E"})  # tensors of a head that are kept with the others and not trained

Params = dict[str, Tensor]


def design(
    task: Task,
    *,
    pool: str = "mean",
    pair: str = "separate",
    causal: bool | str = True,
    masks: int = perfect.MASKS,
) -> HeadCard:
    """The head that a task needs. Raises UsageError for a kind that has none, and for options that there are not."""
    if task.kind not in KINDS:
        raise UsageError(f"task {task.name}: a {task.kind} task has no label head")
    if pool not in (*POOLS, *SPACES):
        raise UsageError(f"pool {pool!r}: one of {', '.join((*POOLS, *SPACES))}")
    if pair not in PAIRS:
        raise UsageError(f"pair {pair!r}: one of {', '.join(PAIRS)}")
    if isinstance(causal, str) and not re.fullmatch("[01]+", causal):
        raise UsageError(f"open blocks {causal!r}: a digit for each group of blocks, 1 where it is open, as in 0011")
    targets = () if task.kind in ("regression", "similarity") else task.targets
    if pool not in SPACES:
        return HeadCard(kind=task.kind, targets=targets, pool=pool, pair=pair if task.pair else "none", causal=causal)
    kinds = ("classification",) if pool == "masks" else ("classification", "multilabel")
    if task.kind not in kinds:
        raise UsageError(f"task {task.name}: pool {pool} is for {' and '.join(kinds)}, and this is a {task.kind} task")
    if not 1 <= masks <= 32:
        raise UsageError(f"masks = {masks}: from 1 to 32 are needed")
    pair = "joint" if task.pair else "none"
    card = HeadCard(kind=task.kind, targets=targets, pool=pool, pair=pair, causal=causal)
    return card.model_copy(update={"masks": masks}) if pool == "masks" else card


def beside(task: Task, head: HeadCard) -> HeadCard:
    """The head for a method that reads the second text of a pair. Raises UsageError where the answer is about both."""
    if head.text or head.masks or head.kind == "similarity":
        needs = "its prompt has" if head.text else "mask tokens stand behind" if head.masks else "a similarity is of"
        raise UsageError(
            f"task {task.name}: the method reads the second text beside the first, and {needs} both; take a label head "
            "over the first text, or a method such as lora"
        )
    return head.model_copy(update={"pair": "beside"})


def width(head: HeadCard, d: int) -> int:
    """The size of φ for hidden states of size d."""
    return 4 * d if head.pair == "separate" else d


def start(head: HeadCard, d: int, seed: int) -> Params:
    """W [C, width] ~ N(0, 0.02²), b [C] = 0 (C = 1 for a number), and for attention pooling q [d] = 0, the mean.
    Nothing for an answer in text."""
    if head.text:
        return {}
    if head.masks:
        return perfect.start(len(head.targets), head.masks, d, seed)
    if head.pool == "labels":
        return crosstune.start(len(head.targets), d)
    C = max(1, len(head.targets))
    W = torch.empty(C, width(head, d)).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
    if head.kind == "similarity" and head.pair == "separate":
        W.zero_()
        W[:, 3 * d :] = 1.0
    p = {"W": W, "b": torch.zeros(C)}
    if head.pool == "attention" and head.kind != "tagging":
        p["q"] = torch.zeros(d)
    return p


def features(head: HeadCard, hidden: Tensor, mask: Tensor, q: Tensor | None = None) -> Tensor:
    """φ: [R, width] from hidden states [R, T, d] (2R rows, all first texts before all second ones, for a pair that is
    encoded apart), or [R, T, d] where tokens are read one by one."""
    h = hidden.float()
    if head.kind == "tagging" or head.pool in SPACES:
        return h
    if head.pool == "first":
        v = h[:, 0]
    elif head.pool == "last":
        v = h[torch.arange(len(h), device=h.device), mask.long().sum(1) - 1]
    elif head.pool == "attention":
        assert q is not None
        weight = (h @ q).masked_fill(~mask, -torch.inf).softmax(-1)
        v = torch.einsum("rt,rtd->rd", weight, h)
    else:
        m = mask[:, :, None].float()
        v = (h * m).sum(1) / m.sum(1)
    if head.pair != "separate":
        return v
    u, v = v.chunk(2)
    if head.kind == "similarity":
        u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
    return torch.cat([u, v, (u - v).abs(), u * v], -1)


def logits(p: Params, φ: Tensor) -> Tensor:
    """[..., C] from φ [..., width]."""
    return F.linear(φ, p["W"].float(), p["b"].float())


def read(head: HeadCard, p: Params, φ: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits by the head's own equation from φ, where `mask` tells which tokens are real; with no tensors, φ itself."""
    if not p:
        return φ
    if head.pool == "labels":
        assert mask is not None
        return crosstune.logits(p, φ, mask)
    return perfect.logits(p, φ) if head.masks else logits(p, φ)


def taught(p: Params) -> Params:
    """The tensors that training reads: without prototypes, which are for answering."""
    return {name: t for name, t in p.items() if name != "c"}


def encode(head: HeadCard, output: Output | None) -> Any:
    """An example's output as the loss wants it: a class number, a 0/1 list, a list of tag numbers, or a float."""
    if head.kind in ("regression", "similarity"):
        return float(output)  # type: ignore[arg-type]
    if head.kind == "multilabel":
        chosen = set(output)  # type: ignore[arg-type]
        return [float(target in chosen) for target in head.targets]
    number = {target: i for i, target in enumerate(head.targets)}
    if head.kind == "tagging":
        return [number.get(tag, IGNORED) for tag in output]  # type: ignore[union-attr]
    return number[output]  # type: ignore[index]


def losses(head: HeadCard, z: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """One loss per row [R] from logits z [R, C] (tags and answers: z [N, C] and y [N] of N tokens) and targets y.

    Cross-entropy, or its binary form summed over labels for multilabel, or the squared error; a hinge for mask tokens.
    `weights` [C] weigh the classes. For one label of a text, y may say how much each class counts [R, C].
    """
    if head.masks:
        return perfect.losses(z, y, weights)
    if head.text:
        return F.cross_entropy(z, y, reduction="none")
    if head.kind == "multilabel":
        each = F.binary_cross_entropy_with_logits(z, y, reduction="none", pos_weight=weights)
        return each.sum(-1)
    if head.kind in ("regression", "similarity"):
        return (z[..., 0] - y).square()
    return F.cross_entropy(z, y, weight=weights, reduction="none")


def decode(head: HeadCard, z: Tensor) -> tuple[list[Output], list[float | None]]:
    """Outputs and how probable the model holds them, from logits [R, C] (tagging: [words, C] of one row's words).

    Multilabel: every label above one half, and the most probable one where none is; its probability is the least of
    those given. Numbers have no probability.
    """
    if head.kind in ("regression", "similarity"):
        return [float(v) for v in z[:, 0]], [None] * len(z)
    if head.kind == "multilabel":
        rows: list[Output] = []
        sure: list[float | None] = []
        for p in z.sigmoid():
            chosen = [i for i, v in enumerate(p.tolist()) if v >= 0.5] or [int(p.argmax())]
            rows.append(tuple(head.targets[i] for i in chosen))
            sure.append(float(p[chosen].min()))
        return rows, sure
    best = z.softmax(-1).max(-1)
    return [head.targets[i] for i in best.indices.tolist()], [float(v) for v in best.values]


def class_weights(head: HeadCard, outputs: Sequence[Output]) -> Tensor:
    """n / (C n_c) for each class c with n_c of n examples, as scikit-learn's `balanced`; 1 for a class with none."""
    counts = torch.zeros(len(head.targets))
    number = {target: i for i, target in enumerate(head.targets)}
    n = 0
    for output in outputs:
        for value in [output] if isinstance(output, str) else output:  # type: ignore[union-attr]
            if value in number:
                counts[number[value]] += 1
                n += 1
    return torch.where(counts > 0, n / (len(counts) * counts.clamp(min=1)), torch.ones(()))
