"""The frozen-features baseline: a linear head fitted on features that are computed once.

    min over W, b of  mean_i loss(W φ_i + b, y_i) + λ ‖W − W₀‖²

A convex problem (logistic or least squares), solved by L-BFGS on standardised features; λ is chosen on the validation
split. It is the `head` method, the baseline in every table, and where the other methods start (first the probe, then
the features: Kumar et al. 2022, arXiv 2202.10054). A head that reads tokens one by one is no convex problem, and goes
down by AdamW instead: `descend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polytask.adapters import HeadCard
from polytask.backbones import heads
from polytask.training.settings import WIDTH

PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)
ROWS_TO_CHOOSE = 20_000  # rows on which λ is chosen; the last fit sees all
# Of `descend`: the rate that did best on validation splits of four tasks with 16 examples a class, on 384 features;
# steps are so many or five epochs, and patience is in epochs.
RATE, BATCH, STEPS, PATIENCE = 3e-4, 32, 300, 8

Params = dict[str, Tensor]


def fit(
    head: HeadCard,
    φ: Tensor,
    y: Tensor,
    first: Params,
    score: Callable[[Params], float],
    *,
    weights: Tensor | None = None,
    penalties: Sequence[float] = PENALTIES,
    steps: int = 60,
) -> Params:
    """The head's W and b for features φ [N, width] and targets y; other tensors of `first` are kept.

    `score` says how good a head is on the validation split (larger is better). φ is standardised in place.
    """
    keep = y != heads.IGNORED if head.kind == "tagging" else None
    if keep is not None and not bool(keep.all()):
        φ, y = φ[keep], y[keep]
    μ, σ = φ.mean(0), φ.std(0, correction=0).clamp(min=1e-6)  # one example deviates by 0, not by NaN
    φ -= μ
    φ /= σ
    W0 = first["W"] * σ
    few = slice(None)
    if len(φ) > ROWS_TO_CHOOSE:
        few = slice(0, None, -(-len(φ) // ROWS_TO_CHOOSE))

    def plain(W: Tensor, b: Tensor) -> Params:
        return {**first, "W": (W / σ).contiguous(), "b": b - (W / σ) @ μ}

    W, b = W0.clone(), first["b"] + first["W"] @ μ
    best, chosen = -float("inf"), (penalties[0], W, b)
    for λ in penalties:
        W, b = _minimise(head, φ[few], y[few], W0, W, b, λ, weights, steps)
        found = score(plain(W, b))
        if found > best:
            best, chosen = found, (λ, W, b)
    λ, W, b = chosen
    if few != slice(None):
        W, b = _minimise(head, φ, y, W0, W, b, λ, weights, steps // 3)
    return plain(W, b)


def _minimise(
    head: HeadCard, φ: Tensor, y: Tensor, W0: Tensor, W: Tensor, b: Tensor, λ: float, weights: Tensor | None, steps: int
) -> tuple[Tensor, Tensor]:
    W, b = W.clone().requires_grad_(), b.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([W, b], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = heads.losses(head, φ @ W.T + b, y, weights).mean() + λ * (W - W0).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return W.detach(), b.detach()


def descend(
    head: HeadCard,
    φ: Sequence[Tensor],
    y: Tensor,
    first: Params,
    score: Callable[[Params], float] | None,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Params:
    """The tensors of a head that reads the token states φ [T, d] of each example, with targets y: the best by `score`
    of the start and of each epoch's end, or the last ones where there is no score."""
    p = {name: t.clone().requires_grad_(name not in heads.FIXED) for name, t in first.items()}
    rate = RATE * min(1.0, WIDTH / φ[0].shape[-1])
    optimiser = torch.optim.AdamW([t for t in p.values() if t.requires_grad], lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    epochs = max(5, round(STEPS * BATCH / len(φ)))

    def now() -> Params:
        return {name: t.detach().clone() for name, t in p.items()}

    best, chosen, stale = score(now()) if score else 0.0, now(), 0
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - epoch / epochs)
        order = torch.randperm(len(φ), generator=generator).tolist()
        for rows in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            z = tokenwise(head, p, [φ[i] for i in rows])
            optimiser.zero_grad()
            heads.losses(head, z, y[rows], weights).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        found = score(now()) if score else 0.0
        if found > best or not score:
            best, chosen, stale = found, now(), 0
        else:
            stale += 1
        if stale == PATIENCE:
            break
    return chosen


def tokenwise(head: HeadCard, p: Params, φ: Sequence[Tensor]) -> Tensor:
    """Logits [N, C] of a head that reads token states, from those of each example [T, d]."""
    lengths = torch.tensor([len(states) for states in φ])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return heads.read(head, p, torch.nn.utils.rnn.pad_sequence(list(φ), batch_first=True), mask.to(φ[0].device))
