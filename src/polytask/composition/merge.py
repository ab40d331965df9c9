"""Several adapters become one, by a rule that needs no data and no training.

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
from typing import Any

import torch
from torch import Tensor, nn

import polytask
from polytask.adapters import Adapter, Card, Lineage
from polytask.backbones import Backbone
from polytask.composition.low_rank import differences, nearest
from polytask.composition.merging.rule import Rule, build
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build as method_of
from polytask.methods.lifting import Active
from polytask.methods.lora import LoRA
from polytask.tasks import TaskCard


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


@dataclass(frozen=True)
class Source:
    """An adapter and its weight."""

    adapter: Adapter
    active: Active
    weight: float

    def __str__(self) -> str:
        return f"{self.weight:g}·{self.adapter.name}"


def merge(
    base: Backbone,
    adapters: Sequence[Adapter],
    rule: Rule | str,
    rank: int | None = None,
    *,
    weights: Sequence[float] | None = None,
    head: str | None = None,
    name: str = "merged",
) -> tuple[Adapter, Merged]:
    """One adapter of several, and how exact it is.

    `weights`: one for each adapter, 1 if not given. `rank`: of the nearest LoRA that is to stand for the result.
    `head`: the adapter, by name or id, whose head, task and profile for routing the result gets. If not given, it gets
    the head that all of them have, number for number; where they differ it has none, and does not answer by itself.

    Raises:
        UsageError: there is nothing to merge, weights or rule or head do not fit, or an adapter has no ΔW.
        PolytaskError: an adapter belongs to another backbone, or nothing is left.
    """
    rule = build(rule) if isinstance(rule, str) else rule
    given = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if not adapters:
        raise UsageError("merging needs at least one adapter")
    if len(given) != len(adapters):
        raise UsageError(f"{len(given)} weights for {len(adapters)} adapters: one for each is needed")
    if not all(map(math.isfinite, given)) or not any(given):
        raise UsageError(f"weights {', '.join(f'{w:g}' for w in given)}: numbers that are not all 0 are needed")
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
    c = rule.join(torch.eye(len(w), dtype=torch.float64), w).tolist() if rule.linear else []
    sources = [
        Source(one, Active.of(method_of(one.method, one.hyperparameters), one.tensors), weight)
        for one, weight in zip(adapters, given, strict=True)
    ]
    places = _places(base)
    for source in sources:
        _check(base, source, places)
    loras = rule.linear and all(isinstance(source.active.method, LoRA) for source in sources)
    if rank is not None and (other := _beside(sources, places)):
        raise UsageError(
            f"{other} is no linear map's weight and has no place in a LoRA of rank {rank}; merge without a rank, then "
            "as_lora(base, merged, rank, drop=True)"
        )

    tensors: dict[str, Tensor] = {}
    missed: dict[str, float] = {}
    norms: dict[str, float] = {}
    apart: dict[str, int] = {}
    shared: dict[str, int] = {}
    for path, sites in places.items():
        found = [_at(base, source, path, sites) for source in sources]
        made: dict[str, Tensor] = {}
        for at in dict.fromkeys(at for each in found for at in each):
            nothing = torch.zeros_like(next(each[at] for each in found if at in each))
            τ = torch.stack([each.get(at, nothing) for each in found])
            here = w.to(τ.device)
            kept = rule.keep(τ, [rule.draw(source.adapter.id, at) for source in sources])
            Δ = rule.join(kept, here)
            pull = torch.einsum("k,k...->k...", here, kept)
            shared[at] = int(((pull != 0).sum(0) > 1).sum())
            apart[at] = int(((pull > 0).any(0) & (pull < 0).any(0)).sum())
            norms[at] = _norm(Δ)
            if not norms[at]:
                missed[at] = 0.0
            elif rank is None and not loras:
                made[at] = Δ
                missed[at] = _norm(Δ - Δ.float())
            else:
                A, B = nearest(Δ, rank) if rank else (t.to(Δ) for t in _joined(sources, c, at))
                tensors[f"{at}/A"], tensors[f"{at}/B"] = (t.float().cpu().contiguous() for t in (A, B))
                missed[at] = _norm(Δ - B.float().double() @ A.float().double())
        tensors |= _weights(base, path, made)
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
            "rule": rule.name,
            "hyperparameters": dataclasses.asdict(rule),  # type: ignore[call-overload]
            "weights": given,
            "rank": rank,
        },
        notes=(
            f"{said}, merged by {rule}: {report}",
            f"head of {owner.name} ({owner.id})" if owner and owner.head else "no head",
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


def _places(base: Backbone) -> dict[str, list[str]]:
    """The modules of the backbone that have weights of their own, and the sites at each one's output where it is a
    linear map."""
    sites: dict[int, list[str]] = {}
    for at, site in base.sites.items():
        if site.point == "output":
            sites.setdefault(id(base.model.get_submodule(site.path)), []).append(at)
    return {path: sites.get(id(module), []) for path, module in base.base.named_modules() if module._parameters}


def _check(base: Backbone, source: Source, places: Mapping[str, list[str]]) -> None:
    """Raise UsageError where an adapter has no ΔW, as far as one site of it tells."""
    one, method, at = source.adapter, source.active.method, source.active.at
    who = f"{one.name}: {method.name}"
    if not at:
        raise UsageError(f"{who} changes nothing in the backbone, so there is no ΔW to merge")
    if method.opaque:
        raise UsageError(f"{who} keeps PEFT's own layers; export it as a LoRA, import that, and merge it")
    if method.slots:
        raise UsageError(
            f"{who} puts virtual tokens before the text, which have no ΔW to merge; mix or route it instead"
        )
    if method.swaps:
        if strange := [name for name in at if name[1:] not in places]:
            raise PolytaskError(f"adapter {one.name} ({one.id}) changes {strange[0]}, which {base.name} does not have")
        return
    known = {site for sites in places.values() for site in sites}
    if strange := [name for name in at if name not in known]:
        raise UsageError(
            f"{who} acts at {strange[0]}, which is no linear map's output, so there is no ΔW to merge; mix or route it "
            "instead"
        )
    first = next(iter(at))
    try:
        differences(base, one.name, Active(method, {first: at[first]}))
    except UsageError as error:
        raise UsageError(
            f"{who} is not linear in what it reads at {first}, so there is no ΔW to merge; mix or route it instead"
        ) from error
    _exact(base, source, {first: at[first]})


def _beside(sources: Sequence[Source], places: Mapping[str, list[str]]) -> str:
    """A weight that is changed and is no linear map's; empty where there is none."""
    for source in sources:
        if source.active.method.swaps:
            for at, p in source.active.at.items():
                for parameter, Δθ in p.items():
                    if not (parameter == "weight" and places[at[1:]]) and bool(Δθ.any()):
                        return f"{source.adapter.name}: {at[1:]}.{parameter}"
    return ""


def _at(base: Backbone, source: Source, path: str, sites: Sequence[str]) -> dict[str, Tensor]:
    """An adapter's differences to one module's weights, by site, and by `:<module path>/<parameter>` where they are no
    linear map's weight."""
    at = source.active.at
    if not source.active.method.swaps:
        return _exact(base, source, {site: at[site] for site in sites if site in at})
    p = at.get(f":{path}", {})
    maps = _exact(base, source, {f":{path}": {"weight": p["weight"]}}) if sites and "weight" in p else {}
    rest = {n: Δθ for n, Δθ in p.items() if not (sites and n == "weight")}
    return maps | {f":{path}/{n}": Δθ.to(_device(base), torch.float64) for n, Δθ in rest.items()}


def _exact(base: Backbone, source: Source, at: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """ΔW by site, in fp64. Raises UsageError where something else changes too."""
    maps, rest = differences(base, source.adapter.name, Active(source.active.method, at))
    maps = {site: ΔW.to(_device(base), torch.float64) for site, ΔW in maps.items()}
    lost = math.hypot(*rest.values())
    if lost > 1e-9 * math.hypot(lost, *map(_norm, maps.values())):
        most = max(rest, key=lambda name: rest[name])
        raise UsageError(
            f"{source.adapter.name}: {source.active.method.name} changes {most}, which is in no ΔW; mix or route it"
        )
    return maps


def _joined(sources: Sequence[Source], c: Sequence[float], at: str) -> tuple[Tensor, Tensor]:
    """A [Σr, in] and B [out, Σr] with B A = Σ_k c_k s_k B_k A_k."""
    As, Bs = [], []
    for source, c_k in zip(sources, c, strict=True):
        method, p = source.active.method, source.active.at.get(at)
        if p and c_k:
            assert isinstance(method, LoRA)
            ready = method.ready({n: t.double() for n, t in p.items()}, {})
            As.append(ready["A"])
            Bs.append(c_k * method.s * ready["B"])
    return torch.cat(As), torch.cat(Bs, dim=1)


def _weights(base: Backbone, path: str, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `full` keeps of one module: the sites' differences as its weight's, and all others as they are."""
    module: Any = base.base.get_submodule(path)
    upright = isinstance(module, nn.Linear)  # else a Conv1D, whose weight is [in, out]
    whole: Tensor | None = None
    others: dict[str, Tensor] = {}
    for at, Δ in made.items():
        if at.startswith(":"):
            others[at] = Δ.float().cpu().contiguous()
            continue
        part = base.sites[at].part
        if whole is None:
            shape = module.weight.shape if upright else module.weight.T.shape
            whole = Δ.new_zeros(shape)
        whole = Δ if part is None else part.put(whole.T, Δ.T).T
    if whole is None:
        return others
    return {f":{path}/weight": (whole if upright else whole.T).float().cpu().contiguous(), **others}


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def _device(base: Backbone) -> torch.device:
    return base.device if base.device.type == "cuda" else torch.device("cpu")
