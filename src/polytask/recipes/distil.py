"""Distilling several adapters into one: what they make of inputs that nobody labelled teaches a single new adapter.

    e_s = Spearman(1 − corr(φ_s(x_i), φ_s(x_j)), 1 − corr(y_i, y_j))   over pairs i < j of labelled examples (PARC)
    α_s = max(0, e_s)^p / Σ_r max(0, e_r)^p                            p = 0: all alike; p = ∞: the nearest alone
    L   = λ mean_{labelled} CE(y, student) + (1 − λ) mean_{all} Σ_s α_s CE(teacher_s, student)

Borup, Phoo, Hariharan 2023, arXiv 2304.12314 (DistillNearest, DistillWeighted); PARC: Bolya, Mittapalli, Hoffman 2021,
arXiv 2111.06977. φ_s(x) [width] is what a head reads of the frozen backbone with the adapter s, standardised over the
examples, y one-hot. teacher_s is a linear head on φ_s, fitted to the labelled examples: softmax(z_s / T). The student
is one adapter with its head, and all that answers afterwards.

CE is linear in what it compares with, so that L is the mean over all N examples, of which n are labelled, of
−Σ_c t_c log p_c with t = λ (N/n) [y] + (1 − λ) Σ_s α_s teacher_s: this t is the `soft` of `polytask.training.Job`.

What differs from the paper: sources are adapters of one backbone and not networks, and the student begins at the
backbone. Features are not reduced to 32 dimensions, in which as few examples as here would all be equally far from each
other once they are standardised. Where no e_s is above 0, all count alike. p, λ and T are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from polytask.adapters import Adapter, HeadCard
from polytask.adapters.expression import Name
from polytask.backbones import Backbone, heads
from polytask.errors import PolytaskError, UsageError
from polytask.inference.roster import Source
from polytask.methods import passes
from polytask.methods.method import values
from polytask.recipes.adapt import Plan, adapt_many
from polytask.recipes.reading import Reading
from polytask.tasks import Task
from polytask.training import Event, Settings, probe


@dataclass(frozen=True)
class Distil:
    """student: its method, by name. power: p. labels: λ. temperature: T."""

    student: str = "lora"
    power: float = 9.0
    labels: float = 0.5
    temperature: float = 0.3


def parc(φ: Tensor, y: Sequence[int]) -> float:
    """e of features φ [n, width] for labels y [n]; 0 where all features or all labels are alike."""
    i, j = np.triu_indices(len(y), 1)
    Z = ((φ - φ.mean(0)) / φ.std(0, correction=0).clamp(min=1e-6)).double().numpy()
    Y = np.eye(max(y) + 1)[list(y)]
    if len(set(y)) < 2 or (Z.std(1) == 0).any():
        return 0.0
    dφ, dY = (1 - np.asarray(np.corrcoef(each))[i, j] for each in (Z, Y))
    e = float(spearmanr(dφ, dY).statistic)
    return 0.0 if np.isnan(e) else e


def weigh(e: Sequence[float], power: float) -> Tensor:
    """α of sources with scores e."""
    good = torch.tensor(e, dtype=torch.float64).clamp(min=0)
    if not bool(good.any()):
        good += 1
    raised = (good / good.max()) ** power
    return (raised / raised.sum()).float()


def distil(
    base: Backbone,
    task: Task,
    over: Sequence[Adapter],
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    reading: Reading | None = None,
    library: Source | None = None,
    folder: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Adapter:
    """One adapter for a task, taught by the adapters `over` on its training examples, with an output or without.

    `hyperparameters` are those of `Distil` and of the student's method together. `library` has what the adapters are
    made of, `folder` keeps checkpoints. Teachers' penalties are chosen on the validation split, the largest without
    one.

    Raises UsageError for a task that is not answered by one of several labels and a head, PolytaskError where no
    training example has an output.
    """
    own, student = split(hyperparameters or {})
    settings, reading = settings or Settings(), reading or Reading()
    if not over:
        raise UsageError("distil is taught by adapters: say which, with `over` (--over A,B,...)")
    if task.kind != "classification" or reading.writes(task) or reading.pool in heads.SPACES:
        raise UsageError(f"task {task.name}: distil is for one label of a text, answered by a linear head")
    labelled = [e for e in task.train if e.output is not None]
    if not labelled:
        raise PolytaskError(f"task {task.name}: no training example has an output to weigh the adapters by")
    every = (*labelled, *(e for e in task.train if e.output is None))
    head = reading.design(base, task, settings.limit)
    held = [e for e in task.validation if e.output is not None]
    units = passes.encode(base, head, [*every, *held], settings.tokens)
    first = heads.start(head, base.hidden_size, settings.seed)
    N, n = len(every), len(labelled)
    y, held_y = (torch.tensor([heads.encode(head, e.output) for e in part]) for part in (labelled, held))
    composer = Plan(task, over=over, library=library).composer()
    e: list[float] = []
    teachers: list[Tensor] = []
    for one in over:
        if one.backbone.fingerprint != base.fingerprint:
            raise UsageError(f"adapter {one.name} was trained on {one.backbone.name}, this is {base.name}")
        φ = torch.stack(passes.features(base, head, units, first.get("q"), terms=composer.terms(Name(one.id)))).cpu()
        e.append(parc(φ[:n], y.tolist()))
        teachers.append((_taught(head, first, φ, y, held_y) / own.temperature).softmax(-1)[:N])
    α = weigh(e, own.power)
    t = (1 - own.labels) * torch.einsum("s,snc->nc", α, torch.stack(teachers))
    t[range(n), y] += own.labels * N / n

    plan = Plan(replace(task, train=every), own.student, student, settings, reading, library=library, soft=t)
    [made] = adapt_many(base, [plan], folder=folder, on_event=on_event)
    ranked = sorted(zip(over, e, α.tolist(), strict=True), key=lambda each: -each[2])
    said = " + ".join(f"{a:.2f}·{one.name} (PARC {score:.2f})" for one, score, a in ranked if a >= 0.005)
    hyper = dataclasses.asdict(own) | {"power": str(own.power)}  # JSON has no infinity
    teaching = [one for one, _, a in ranked if a > 0]
    licences = {one.card.licence for one in teaching} | {task.licence}
    card = made.card.model_copy(
        update={
            "lineage": made.card.lineage.model_copy(update={"parents": tuple(one.id for one in teaching)}),
            "licence": "" if "" in licences else " AND ".join(sorted(licences)),
            "recipe": made.card.recipe
            | {"recipe": "distil", "distil": hyper}
            | {"parc": {one.id: score for one, score, _ in ranked}, "weights": {one.id: a for one, _, a in ranked}},
            "notes": (*made.card.notes, f"distilled on {N} inputs, {n} of them with labels, from {said}"),
        }
    )
    return replace(made, card=card)


def _taught(head: HeadCard, first: dict[str, Tensor], φ: Tensor, y: Tensor, held_y: Tensor) -> Tensor:
    """z [N, C] of all features φ, by a linear head fitted to the first of them, which have the labels y; the last have
    the labels held_y of the validation split, and tell how far it may go."""
    held = φ[len(φ) - len(held_y) :]

    def score(p: dict[str, Tensor]) -> float:
        return -float(heads.losses(head, heads.read(head, p, held), held_y).mean()) if len(held) else 0.0

    penalties = probe.PENALTIES if len(held) else probe.PENALTIES[:1]
    return heads.read(head, probe.fit(head, φ[: len(y)].clone(), y, first, score, penalties=penalties), φ)


def split(hyperparameters: Mapping[str, Any]) -> tuple[Distil, dict[str, Any]]:
    """Those of `Distil`, and the rest, which are the student's."""
    names = {field.name for field in dataclasses.fields(Distil)}
    own: Distil = Distil(**values(Distil, "distil", {n: v for n, v in hyperparameters.items() if n in names}))
    for name, good, wanted in (
        ("power", own.power >= 0, "0 or more"),
        ("labels", 0 <= own.labels <= 1, "from 0 to 1"),
        ("temperature", own.temperature > 0, "above 0"),
    ):
        if not good:
            raise UsageError(f"distil.{name} = {getattr(own, name)}: a number {wanted} is needed")
    if own.student in ("race", "auto"):
        raise UsageError(f"distil.student = {own.student}: name a method")
    return own, {n: v for n, v in hyperparameters.items() if n not in names}
