"""Whom a fusion attends to: how much weight each of its adapters gets at each site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from polytask.adapters import Adapter
from polytask.backbones import Backbone
from polytask.composition.compose import Composer
from polytask.composition.learned.fusion import Fusion
from polytask.errors import UsageError
from polytask.methods import build, passes
from polytask.methods.composed import Sources
from polytask.methods.lifting import Active, Plan, planned
from polytask.methods.method import Method, Params
from polytask.tasks import Example


@dataclass(frozen=True)
class Attention:
    """`over`: the names of the fusion's adapters. `sites`: for each, the mean of s over all tokens of all inputs, at
    each site; 0 where it does not act."""

    over: tuple[str, ...]
    sites: Mapping[str, tuple[float, ...]]

    @property
    def whole(self) -> dict[str, float]:
        """The mean over sites, by name, the largest first."""
        means = [sum(column) / len(column) for column in zip(*self.sites.values(), strict=True)]
        return dict(sorted(zip(self.over, means, strict=True), key=lambda pair: -pair[1]))

    def __str__(self) -> str:
        return ", ".join(f"{name} {weight:.2f}" for name, weight in self.whole.items())


@dataclass(frozen=True)
class _Watched(Fusion):
    """A fusion that tells its weights: (the site's number, the adapters that act there, s [N, T]). A site's own tensors
    say its number by the length of one that has no numbers in it, which no precision can round."""

    told: list[tuple[int, tuple[int, ...], Tensor]] = field(default_factory=list, compare=False)

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        self.told.append((len(p["number"]), tuple(sources), self.attention(p, x, y, sources).T))
        return super().join(p, x, y, sources)


@torch.no_grad()
def attention(
    base: Backbone, adapter: Adapter, examples: Sequence[Example], get: Callable[[str], Adapter], limit: int = 256
) -> Attention:
    """The weights of an adapter by `fusion`, on the inputs of examples as its head reads them (prompts with their
    answers, where those are in text). `get` gives the adapters that it is made of by their ids.

    Raises UsageError where the adapter is no fusion, or there are no examples.
    """
    method = build(adapter.method, adapter.hyperparameters)
    if not isinstance(method, Fusion):
        raise UsageError(f"adapter {adapter.name} ({adapter.method}) attends to no others: it is no fusion")
    if not examples or adapter.head is None:
        raise UsageError(f"adapter {adapter.name}: inputs, and a head that says how they are read, are needed")
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    watched = _Watched(**fields)

    def active(one: Adapter) -> Active:
        own: Method = watched if one is numbered else build(one.method, one.hyperparameters)
        return Active.of(own, one.tensors)

    numbers = {f"{site}/number": torch.empty(i, 0) for i, site in enumerate(adapter.sites)}
    numbered = replace(adapter, tensors=dict(adapter.tensors) | numbers)
    order, weights = planned([Composer(get, active).of(numbered)])
    plan = Plan(base, order)
    writing = {at for at in adapter.sites if at.startswith("dec.") and not at.endswith((".cross.k", ".cross.v"))}
    totals = torch.zeros(len(adapter.sites), len(method.over), dtype=torch.float64)
    counts = torch.zeros(len(adapter.sites), 1, dtype=torch.float64)
    for unit in passes.encode(base, adapter.head, examples, limit):
        for ids in unit.ids:
            batch = base.collate([ids])
            if unit.written is not None:
                batch = replace(batch, written=torch.tensor([unit.written], device=base.device))
            plan.hidden(batch, weights.to(base.device), causal=adapter.head.causal)
            for i, sources, s in watched.told:
                s = s if adapter.sites[i] in writing else s[:, : len(ids)]  # what comes after is padding
                totals[i, list(sources)] += s.sum(1, dtype=torch.float64).cpu()
                counts[i] += s.shape[1]
            watched.told.clear()
    means = totals / counts
    read = [i for i in range(len(means)) if counts[i]]
    return Attention(
        tuple(get(id).name for id in method.over),
        {adapter.sites[i]: tuple(means[i].tolist()) for i in read},
    )
