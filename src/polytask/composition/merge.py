"""Several adapters become one, by a rule: of their differences alone, or fitted to the tasks' data (`merging.fitted`).

    Δ = rule(τ_1, ..., τ_K; w)        at each site, and for `full` at each weight
    error = ‖Δ − Δ'‖_F / ‖Δ‖_F        Δ' what the merged adapter holds

τ_k is adapter k's exact ΔW there (`low_rank.differences`), 0 where it has none, and whatever its rank the rule sees all
of it: the sum of two LoRAs is B₁ A₁ + B₂ A₂ and not (B₁ + B₂)(A₁ + A₂). What comes out is kept as

* a LoRA, its factors those of the adapters one after the other: by a linear rule of LoRAs; exact, its rank the sum;
* the nearest LoRA of a chosen rank: see `low_rank.nearest`;
* a `full` difference otherwise.

Modules are merged one after the other, in fp64: memory holds the result, and a few copies of one module's weights for
each adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

import polytask
from polytask.adapters import Adapter, Card, Lineage
from polytask.backbones import Backbone
from polytask.composition.differences import Weighed, at_module, beside, check, factors, modules, norm, whole_weights
from polytask.composition.low_rank import nearest
from polytask.composition.merging.fitted import Fitted
from polytask.composition.merging.rule import Rule, build
from polytask.composition.overlap import overlaps
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build as method_of
from polytask.methods.lifting import Active
from polytask.methods.lora import LoRA
from polytask.tasks import Task, TaskCard


@dataclass(frozen=True)
class Merged:
    """How a merge went. `sites`: ‖Δ − Δ'‖_F / ‖Δ‖_F at each site, or weight that is none's. `whole`: the same of all
    together. `conflicts`: of the numbers there that two or more adapters change, weighted and as the rule keeps them,
    the share in which they pull apart. `conflict`: the same of all together."""

    sites: Mapping[str, float]
    whole: float
    conflicts: Mapping[str, float]
    conflict: float

    def __str__(self) -> str:
        worst = max(self.sites, key=lambda site: self.sites[site])
        off = f"off by {self.whole:.2%} in all, by {self.sites[worst]:.2%} at most ({worst})"
        return f"{off if self.whole > 1e-6 else 'exact'}; signs in conflict: {self.conflict:.1%}"


def merge(
    base: Backbone,
    adapters: Sequence[Adapter],
    rule: Rule | Fitted | str,
    rank: int | None = None,
    *,
    tasks: Sequence[Task] = (),
    weights: Sequence[float] | None = None,
    head: str | None = None,
    name: str = "merged",
) -> tuple[Adapter, Merged]:
    """One adapter of several, and how exact it is.

    `tasks`: one for each adapter, where the rule is fitted to data. `weights`: one for each adapter, 1 if not given.
    `rank`: of the nearest LoRA that is to stand for the result. `head`: the adapter, by name or id, whose head, task
    and profile for routing the result gets. If not given, it gets the head that all of them have, number for number;
    where they differ it has none, and does not answer by itself.

    Raises:
        UsageError: there is nothing to merge, weights or rule or head do not fit, or an adapter has no ΔW.
        PolytaskError: an adapter belongs to another backbone, or nothing is left.
    """
    rule = build(rule) if isinstance(rule, str) else rule
    fitted = isinstance(rule, Fitted)
    given = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if not adapters:
        raise UsageError("merging needs at least one adapter")
    if len(given) != len(adapters):
        raise UsageError(f"{len(given)} weights for {len(adapters)} adapters: one for each is needed")
    if not all(map(math.isfinite, given)) or not any(given):
        raise UsageError(f"weights {', '.join(f'{w:g}' for w in given)}: numbers that are not all 0 are needed")
    if fitted and len(tasks) != len(adapters):
        raise UsageError(
            f"{rule.name} is fitted to data: {len(tasks)} tasks for {len(adapters)} adapters, one for each is needed"
        )
    if tasks and not fitted:
        raise UsageError(f"{rule.name} reads no data; leave out the tasks")
    if rank is not None and rank < 1:
        raise UsageError(f"rank = {rank}: at least 1 is needed")
    for one in adapters:
        if one.backbone.fingerprint != base.fingerprint:
            raise PolytaskError(
                f"adapter {one.name} ({one.id}) belongs to other weights than those of {base.name}; only adapters of "
                "one backbone can be merged"
            )
    owner = _owner(adapters, head)
    w = torch.tensor(given, dtype=torch.float64)
    sources = [
        Weighed(one, Active.of(method_of(one.method, one.hyperparameters), one.tensors), weight)
        for one, weight in zip(adapters, given, strict=True)
    ]
    places = modules(base)
    for source in sources:
        check(base, source, places)
    if rank is not None and (other := beside(sources, places)):
        raise UsageError(
            f"{other} is no linear map's weight and has no place in a LoRA of rank {rank}; merge without a rank, then "
            "as_lora(base, merged, rank, drop=True)"
        )
    found_by = rule
    if isinstance(rule, Fitted):
        rule = rule.fit(base, sources, tasks)
    loras = rule.linear and all(isinstance(source.active.method, LoRA) for source in sources)

    tensors: dict[str, Tensor] = {}
    missed: dict[str, float] = {}
    norms: dict[str, float] = {}
    apart: dict[str, int] = {}
    shared: dict[str, int] = {}
    for path, sites in places.items():
        found = [at_module(base, source, path, sites) for source in sources]
        made: dict[str, Tensor] = {}
        for at in dict.fromkeys(at for each in found for at in each):
            nothing = torch.zeros_like(next(each[at] for each in found if at in each))
            τ = torch.stack([each.get(at, nothing) for each in found])
            here = w.to(τ.device)
            local = rule.at(at)
            kept = local.keep(τ, [rule.draw(source.adapter.id, at) for source in sources])
            Δ = local.join(kept, here)
            pull = torch.einsum("k,k...->k...", here, kept)
            shared[at] = int(((pull != 0).sum(0) > 1).sum())
            apart[at] = int(((pull > 0).any(0) & (pull < 0).any(0)).sum())
            norms[at] = norm(Δ)
            if not norms[at]:
                missed[at] = 0.0
            elif rank is None and not loras:
                made[at] = Δ
                missed[at] = norm(Δ - Δ.float())
            else:
                A, B = nearest(Δ, rank) if rank else (t.to(Δ) for t in factors(sources, local.coefficients(w), at))
                tensors[f"{at}/A"], tensors[f"{at}/B"] = (t.float().cpu().contiguous() for t in (A, B))
                missed[at] = norm(Δ - B.float().double() @ A.float().double())
        tensors |= whole_weights(base, path, made)
    if not tensors:
        raise PolytaskError(f"nothing is left of {' + '.join(map(str, sources))}: they are untrained, or cancel out")
    report = Merged(
        {at: missed[at] / norms[at] if norms[at] else 0.0 for at in missed},
        math.hypot(*missed.values()) / math.hypot(*norms.values()),
        {at: apart[at] / shared[at] if shared[at] else 0.0 for at in apart},
        sum(apart.values()) / max(1, sum(shared.values())),
    )

    if rank is None and not loras:
        names = [f"{at[1:]}.{parameter}" for at, _, parameter in (n.rpartition("/") for n in tensors)]
        method = method_of("full", {"weights": names})
    else:
        r = max(len(t) for n, t in tensors.items() if n.endswith("/A"))
        on = [n.removesuffix("/A") for n in tensors if n.endswith("/A")]
        method = method_of("lora", {"r": r, "alpha": float(r), "sites": on})
    said = " + ".join(map(str, sources))
    licences = {one.card.licence for one in adapters}
    card = Card(
        name=name,
        task=owner.card.task
        if owner
        else TaskCard(name=name, kind=adapters[0].card.task.kind, source=f"merged from {said}"),
        lineage=Lineage(
            parents=tuple(dict.fromkeys(one.id for one in adapters)), made_by=f"polytask {polytask.__version__}"
        ),
        licence="" if "" in licences else " AND ".join(sorted(licences)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe={
            "recipe": "merge",
            "rule": found_by.name,
            "hyperparameters": dataclasses.asdict(found_by),  # type: ignore[call-overload]
            "weights": given,
            "rank": rank,
        }
        | rule.found(),
        notes=(
            f"{said}, merged by {found_by}: {report}",
            f"head of {owner.name} ({owner.id})" if owner and owner.head else "no head",
            *rule.told(),
            *map(str, overlaps(adapters)),
        ),
    )
    if owner:
        tensors |= {n: t for n, t in owner.tensors.items() if n.rpartition("/")[0] in ("head", "task")}
    head_card = owner.head if owner else None
    made_by = method.hyperparameters()
    return Adapter(method.name, made_by, tensors, adapters[0].backbone, card, head_card), report


def _owner(adapters: Sequence[Adapter], head: str | None) -> Adapter | None:
    """Whose head the result gets."""
    if head is not None:
        for one in adapters:
            if head in (one.name, one.id):
                if one.head is None:
                    raise UsageError(f"adapter {one.name} has no head to give")
                return one
        raise UsageError(f"head of {head!r}: none of the adapters; they are {', '.join(a.name for a in adapters)}")
    first, *others = adapters
    own = first.at("head")
    for one in others:
        its = one.at("head")
        if one.head != first.head or own.keys() != its.keys() or not all(torch.equal(own[n], its[n]) for n in own):
            return None
    return first
