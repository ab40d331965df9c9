"""ELREA, made: a LoRA for all of a task, clusters of its examples by their gradients, and an expert for each cluster.

See `polytask.composition.elrea` for the equations and the paper. An expert begins with the base LoRA and its head, and
is trained on with its cluster alone, for as many epochs and at the same rate; all experts at once. Its last tensors are
kept: a cluster has no validation split. So base and experts together take the steps of one LoRA of twice the epochs.

The clusters are found on up to 5,000 examples, and others go to the nearest. The adapter names the base and the
experts, which go into the library with it, and to which no input is routed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polytask
from polytask.adapters import Adapter, Lineage, ScoreCard
from polytask.adapters.expression import Ensemble, Mix, Name
from polytask.backbones import Backbone
from polytask.composition.elrea import Elrea, centroids, clusters, conflict, gradients
from polytask.errors import UsageError
from polytask.methods import build
from polytask.methods.method import values
from polytask.recipes.adapt import Plan, adapt_many, automatic, measure
from polytask.recipes.reading import Reading
from polytask.tasks import Task
from polytask.training import Event, Job, Settings
from polytask.training.learner import Learner, prepare
from polytask.training.loop import Loop

CLUSTERED = 5000  # examples that clusters are found on


@dataclass(frozen=True)
class Experts:
    """The adapter; `support` are its base and experts, in order, which go into the library with it. `sizes` [C] of the
    clusters; the mean cosine of gradients `within` a cluster and `between` two (None: there are no two examples)."""

    adapter: Adapter
    support: tuple[Adapter, ...]
    sizes: tuple[int, ...]
    within: float | None
    between: float | None

    def get(self, ref: str) -> Adapter:
        """One of its parts by id: what an `Engine` asks of a source."""
        for one in self.support:
            if one.id == ref:
                return one
        raise UsageError(f"no adapter {ref!r} here; there are {', '.join(one.name for one in self.support)}")


def split(hyperparameters: Mapping[str, Any]) -> tuple[Elrea, dict[str, Any]]:
    """Those of ELREA, and the rest, which are the LoRAs'."""
    own = {n: v for n, v in hyperparameters.items() if n in ("clusters", "features")}
    rest = {n: v for n, v in hyperparameters.items() if n not in own}
    build("lora", rest)
    return Elrea(**values(Elrea, "elrea", own)), rest


def elrea(
    base: Backbone,
    task: Task,
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    reading: Reading | None = None,
    partition: Callable[[Tensor, int, int], Tensor] = clusters,
    folder: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    tell: Callable[[str], None] = lambda said: None,
) -> Experts:
    """A LoRA and experts for clusters of a task's examples.

    hyperparameters: `clusters`, `features`, and those of LoRA, which acts on every linear map if they name no sites.
    partition: gives each of n gradients [n, D] one of C clusters by a seed. on_event: tells of the base's training.
    `folder` keeps checkpoints, and training goes on from those it finds there.

    Raises UsageError for fewer examples than clusters, or answers in text of an encoder-decoder.
    """
    began = time.perf_counter()
    settings, reading = settings or Settings(), reading or Reading()
    its, given = split(hyperparameters or {})
    if its.clusters > len(task.train):
        raise UsageError(f"elrea: {its.clusters} clusters of {len(task.train)} examples; give fewer")
    plan = automatic(base, Plan(task, "lora", given, settings, reading))
    [first] = adapt_many(base, [plan], folder=folder and folder / "base", on_event=on_event)
    profile = {n: t for n, t in first.tensors.items() if n.startswith("task/")}
    root = _part(first, "base", {n: t for n, t in first.tensors.items() if n not in profile}, ())

    limit = settings.tokens
    draw = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(task.train), generator=draw)
    seen = sorted(order[:CLUSTERED].tolist())
    which = torch.zeros(len(task.train), dtype=torch.long)
    δ = gradients(base, root, [task.train[i] for i in seen], its.features, settings.seed, limit)
    of_seen = torch.unique(partition(δ, its.clusters, settings.seed), return_inverse=True)[1]
    δ_c = centroids(δ, of_seen)
    which[seen] = of_seen
    for part in torch.split(order[CLUSTERED:], 512):
        more = gradients(base, root, [task.train[i] for i in part.tolist()], its.features, settings.seed, limit)
        which[part] = (more @ δ_c.T).argmax(-1)
    within, between = conflict(δ, of_seen)
    sizes = tuple(torch.bincount(which, minlength=len(δ_c)).tolist())
    shown = f"{len(sizes)} clusters of {', '.join(map(str, sizes))} examples; cosine of gradients within them "
    shown += ", between them ".join("-" if value is None else f"{value:.2f}" for value in (within, between))
    tell(shown)

    parts = [replace(task, name=f"{task.name}.{c + 1}", train=_those(task, which == c)) for c in range(len(sizes))]
    learners = [_begun(base, replace(part, validation=(), test=()), root, plan.settings) for part in parts]
    Loop(base, learners, lambda event: None, folder and folder / "experts", None).run()
    experts = [
        _part(
            root, str(c + 1), {n: t.detach().float().cpu().contiguous() for n, t in one.best_tensors.items()}, (root,)
        )
        for c, one in enumerate(learners)
    ]

    support = (root, *experts)
    said = Ensemble((Name(root.id), *(Mix(((1 / len(experts), Name(one.id)),)) for one in experts)), root.id)
    over = tuple(one.id for one in support)
    own = Elrea.of(
        {
            "over": over,
            "expression": str(said),
            "clusters": len(experts),
            "features": its.features,
            "seed": settings.seed,
        }
    )
    tensors = {n: t for n, t in root.tensors.items() if n.startswith("head/")} | profile | {"task/clusters": δ_c}
    adapter = Adapter(own.name, own.hyperparameters(), tensors, first.backbone, first.card, first.head)
    made = Experts(adapter, support, sizes, within, between)
    scores: dict[str, ScoreCard] = {n: s for n, s in first.card.scores.items() if n == "baseline"}
    for name in ("validation", "test"):
        examples = [e for e in task.split(name) if e.output is not None]
        if examples:
            scores[name] = measure(base, adapter, task, examples, limit, made)
    alone = "; ".join(f"{name} {first.card.scores[name].value:.3f}" for name in scores if name != "baseline")
    recipe = {"recipe": "elrea", "sizes": list(sizes), "within": within, "between": between}
    card = first.card.model_copy(
        update={
            "scores": scores,
            "lineage": first.card.lineage.model_copy(update={"parents": over}),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "trained_parameters": sum(one.card.trained_parameters for one in support),
            "seconds": round(time.perf_counter() - began, 3),
            "recipe": recipe | {"settings": first.card.recipe["settings"]},
            "notes": (*first.card.notes, shown, *([f"the base LoRA alone: {alone}"] if alone else [])),
        }
    )
    return replace(made, adapter=replace(adapter, card=card))


def _those(task: Task, chosen: Tensor) -> tuple[Any, ...]:
    return tuple(example for example, taken in zip(task.train, chosen.tolist(), strict=True) if taken)


def _begun(base: Backbone, task: Task, root: Adapter, settings: Settings) -> Learner:
    """A cluster's examples, to be learnt from where the base LoRA with its head stands."""
    assert root.head is not None
    method = build(root.method, root.hyperparameters)
    learner = prepare(base, Job(task, method, root.head, settings, begin=root))
    head = {n: t.clone().to(base.device) for n, t in root.tensors.items() if n.startswith("head/")}
    learner.tensors |= head
    learner.best = -math.inf
    return learner


def _part(first: Adapter, name: str, tensors: Mapping[str, Tensor], parents: Sequence[Adapter]) -> Adapter:
    """The base LoRA or an expert, with a card of its own."""
    card = first.card.model_copy(
        update={
            "name": f"{first.card.task.name}.{name}",
            "scores": {} if parents else first.card.scores,
            "lineage": Lineage(
                parents=tuple(one.id for one in parents),
                data=first.card.lineage.data,
                made_by=f"polytask {polytask.__version__}",
            ),
            "notes": (),
        }
    )
    return dataclasses.replace(first, tensors=dict(tensors), card=card)
