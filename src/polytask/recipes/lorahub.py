"""LoraHub: LoRAs of other tasks become one, by weights that are searched for on a few examples, without gradients.

    Â = Σ_i w_i A_i,   B̂ = Σ_i w_i B_i,   y ← y + s · B̂ Â x        at every site of the LoRAs
    w* = argmin over w in [−1.5, 1.5]^N of L(w) + 0.05 · (1/N) Σ_i |w_i|

Huang, Liu, Lin, Pang, Du, Lin 2023, arXiv 2307.13269. L is the mean loss of the tokens of the examples' answers. Both
factors are summed, so that B̂ Â has the products of each A with each B too: it is not the weighted sum of the LoRAs, and
w and −w are the same. w = 0, the backbone alone, is scored first. The result is one ordinary LoRA.

The paper draws N = 20 LoRAs from some 200, and gives a search by nevergrad 40 scores on 5 examples. Here the search is
the Bayesian one of `polytask.recipes.blackbox`. The authors' code divides L by the number of examples once more, which
makes the penalty as many times larger; here it is as in their equation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor

import polytask
from polytask.adapters import Adapter, Lineage, ScoreCard
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.lora import LoRA
from polytask.methods.passes import Seat
from polytask.recipes import blackbox
from polytask.recipes.adapt import measure
from polytask.recipes.reading import Reading
from polytask.tasks import Task

REACH = 1.5  # the largest weight
BUDGET = 40
PENALTY = 0.05


def composed(over: Sequence[Adapter], w: Sequence[float]) -> dict[str, Tensor]:
    """Â and B̂ of every site. Raises UsageError where the adapters are not LoRAs of one shape and scale."""
    method, own = _lora(over[0])
    each = [own]
    for one in over[1:]:
        other, its = _lora(one)
        if its.keys() != own.keys() or any(its[n].shape != t.shape for n, t in own.items()):
            raise UsageError(f"lorahub: {over[0].name} and {one.name} differ in sites or rank; take LoRAs of one shape")
        if other.s != method.s:
            raise UsageError(f"lorahub: {over[0].name} and {one.name} differ in scale α/r; take LoRAs of one scale")
        each.append(its)
    return {n: torch.stack([w_i * p[n] for w_i, p in zip(w, each, strict=True)]).sum(0) for n in own}


def _lora(adapter: Adapter) -> tuple[LoRA, Mapping[str, Tensor]]:
    """The method, and A and B of every site."""
    method = build(adapter.method, adapter.hyperparameters)
    if not isinstance(method, LoRA) or method.name != "lora":
        raise UsageError(f"lorahub sums the factors of LoRAs, and {adapter.name} is by {adapter.method}; leave it out")
    return method, {n: t for n, t in adapter.tensors.items() if not n.startswith(("head/", "task/"))}


def lorahub(
    base: Backbone,
    task: Task,
    over: Sequence[Adapter],
    *,
    reading: Reading | None = None,
    budget: int = BUDGET,
    penalty: float = PENALTY,
    seed: int = 0,
    on_score: Callable[[int, float], None] | None = None,
) -> Adapter:
    """One LoRA for a task, of the LoRAs `over`, found on the task's training examples; its card has the weights.

    budget: scores, each of which costs a pass over the training examples. on_score: gets the number of each and what it
    came to, the negative of what is minimised.

    Raises:
        UsageError: the answer is not in text (there is no head without gradients), or the adapters are not LoRAs of one
            shape and scale.
        PolytaskError: there are no training examples, or an adapter belongs to another backbone.
    """
    began = time.perf_counter()
    reading = reading or Reading()
    if not reading.writes(task):
        raise UsageError(
            f"task {task.name}: lorahub is for answers in text, since a head is not found without gradients; say "
            "in_text=yes, or learn a composition such as scalearn or atlas"
        )
    if not over:
        raise UsageError("lorahub joins LoRAs: say which, with `over`")
    for one in over:
        if one.backbone.fingerprint != base.fingerprint:
            raise PolytaskError(f"adapter {one.name} belongs to {one.backbone.name}, this is {base.name}")
    examples = [e for e in task.train if e.output is not None]
    if not examples:
        raise PolytaskError(f"task {task.name}: no training examples to find the weights on")
    alone = composed(over, [0.0] * len(over))
    first = blackbox.begin(base, task, "lora", hyperparameters=over[0].hyperparameters, reading=reading, seed=seed)
    assert first.head is not None
    head, (method, _) = first.head, _lora(over[0])
    units = passes.encode(base, head, examples)

    def loss(tensors: Mapping[str, Tensor]) -> float:
        plan, seat = Plan(base, [Active.of(method, tensors)]), Seat(head, {}, torch.ones(1))
        return -float(torch.cat(passes.logprobs(plan, [seat], units, [0] * len(units))).mean())

    def objective(u: blackbox.Floats) -> float:
        w = REACH * u
        return -loss(composed(over, w.tolist())) - penalty * float(np.abs(w).mean())

    found = blackbox.search(objective, len(over), budget=budget, seed=seed, on_score=on_score)
    w = (REACH * found.point).tolist()
    made = replace(first, tensors=composed(over, w))
    before = replace(first, tensors=alone)
    scores: dict[str, ScoreCard] = {}
    for split, one, label in (
        ("validation", made, "validation"),
        ("test", made, "test"),
        ("test", before, "baseline"),
    ):
        held = [e for e in task.split(split) if e.output is not None]
        if held:
            scores[label] = measure(base, one, task, held)
    licences = {one.card.licence for one in over}
    said = " + ".join(f"{w_i:.3g}·{one.name}" for w_i, one in zip(w, over, strict=True) if w_i) or "nothing"
    card = first.card.model_copy(
        update={
            "scores": scores,
            "lineage": Lineage(
                parents=tuple(dict.fromkeys(one.id for one in over)),
                data=first.card.lineage.data,
                made_by=f"polytask {polytask.__version__}",
            ),
            "licence": "" if "" in licences else " AND ".join(sorted(licences)),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "trained_parameters": len(over),
            "seconds": round(time.perf_counter() - began, 3),
            "recipe": {
                "recipe": "lorahub",
                "weights": w,
                "budget": budget,
                "penalty": penalty,
                "seed": seed,
                "scores": list(found.scores),
            },
            "notes": (f"{said}: the factors' sums; the best of {len(found.scores)} scores",),
        }
    )
    return replace(made, card=card)
