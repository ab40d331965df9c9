"""Routing token by token: what its methods share, and which adapter took which token.

    w = softmax over the k greatest of z_n / τ, 0 for the others      z [T, N] a method's scores, at each site anew
    Δ = Σ_n w_n Δ_n

Scores are in fp32 whatever the backbone computes in, as which k are the greatest turns on small differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch
from torch import Tensor

import polytask
from polytask.adapters import Adapter, Card, Lineage
from polytask.adapters.expression import Name
from polytask.backbones import Backbone
from polytask.composition.compose import Composer
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build
from polytask.methods.composed import Composed, Sources
from polytask.methods.lifting import Active, Plan, planned
from polytask.methods.method import Params


@dataclass(frozen=True)
class TokenRouter(Composed):
    """top_k: k. temperature: τ."""

    precise = True
    top_k: int = 2
    temperature: float = 1.0

    def scores(self, p: Params, x: Tensor, here: Sequence[int]) -> Tensor:
        """z [T, n], fp32, of the sources `here`, from what the site reads x [T, reads]."""
        raise NotImplementedError(type(self).__name__)

    def taken(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [T, k] and the places [T, k] of the sources that each token takes."""
        top, which = z.topk(min(self.top_k, z.shape[1]))
        return (top / self.temperature).softmax(-1), which

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        return sources.chosen(*self.taken(self.scores(p, x, [*sources])), y)


def rows(t: Tensor, here: Sequence[int]) -> Tensor:
    """Those of the sources that act at a site, of t [N, ...], fp32."""
    return (t if len(here) == len(t) else t[list(here)]).float()


def check(base: Backbone, adapters: Sequence[Adapter]) -> None:
    """Raise PolytaskError where one belongs to another backbone."""
    for one in adapters:
        if one.backbone.fingerprint != base.fingerprint:
            raise PolytaskError(
                f"adapter {one.name} ({one.id}) belongs to other weights than those of {base.name}; load its own"
            )


def routing(
    base: Backbone,
    method: TokenRouter,
    tensors: Mapping[str, Tensor],
    made_from: Sequence[Adapter],
    reader: Adapter,
    name: str,
) -> Adapter:
    """An adapter by a router that is not trained, made from these adapters, with the head and task of `reader`."""
    licences = {one.card.licence for one in made_from}
    card = Card(
        name=name,
        task=reader.card.task,
        lineage=Lineage(parents=tuple(one.id for one in made_from), made_by=f"polytask {polytask.__version__}"),
        licence="" if "" in licences else " AND ".join(sorted(licences)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe={"recipe": method.name},
        notes=(f"routes each token among {', '.join(one.name for one in made_from)}; read by {reader.name}",),
    )
    kept = {n: t for n, t in reader.tensors.items() if n.startswith(("head/", "task/"))}
    return Adapter(method.name, method.hyperparameters(), {**tensors, **kept}, base.card(), card, reader.head)


@dataclass(frozen=True)
class Trace:
    """Which adapter each token of a text took. `weights`: by site, w [T, N], N adapters in the order of `over`."""

    tokens: tuple[str, ...]
    over: tuple[str, ...]
    weights: Mapping[str, Tensor]

    @property
    def mean(self) -> Tensor:
        """w [T, N], the mean over sites."""
        return torch.stack([*self.weights.values()]).mean(0)

    @property
    def took(self) -> tuple[str, ...]:
        """For each token the id of the adapter with the greatest mean weight."""
        return tuple(self.over[n] for n in self.mean.argmax(-1).tolist())

    @property
    def switches(self) -> tuple[int, ...]:
        """The tokens that took another adapter than the one before."""
        took = self.took
        return tuple(t for t in range(1, len(took)) if took[t] != took[t - 1])

    def __str__(self) -> str:
        return " ".join(f"{token}[{self.over.index(one)}]" for token, one in zip(self.tokens, self.took, strict=True))


@dataclass(frozen=True)
class _Watched(Composed):
    """A router whose weights are kept in `seen`, by the number that a site's tensors have."""

    precise = True
    router: TokenRouter = field(default_factory=TokenRouter)
    seen: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def ready(self, p: Params, frozen: Params) -> Params:
        return self.router.ready(p, frozen) | {"number": p["number"]}

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        here = [*sources]
        w, which = self.router.taken(self.router.scores(p, x, here))
        each = w.new_zeros(len(w), len(here)).scatter(1, which, w)
        self.seen[int(p["number"])] = w.new_zeros(len(w), len(self.router.over)).index_copy(
            1, torch.tensor(here, device=w.device), each
        )
        return sources.chosen(w, which, y)


@torch.no_grad()
def trace(base: Backbone, adapter: Adapter, get: Callable[[str], Adapter], text: str) -> Trace:
    """Which adapter each token of a text takes at each site.

    `get` gives by id the adapters that it is made of. Raises UsageError where it does not route by token.
    """
    method = build(adapter.method, adapter.hyperparameters)
    if not isinstance(method, TokenRouter):
        raise UsageError(
            f"{adapter.name}: {adapter.method} does not choose token by token, so there is nothing to trace"
        )
    sites = [site for site in adapter.sites if site in base.sites]
    numbers = {f"{site}/number": torch.tensor(float(i)) for i, site in enumerate(sites)}
    watched = _Watched(method.over, method.sites, router=method)
    numbered = replace(adapter, tensors={**adapter.tensors, **numbers})

    def active(one: Adapter) -> Active:
        return Active.of(watched if one is numbered else build(one.method, one.hyperparameters), one.tensors)

    composer = Composer(lambda ref: numbered if ref == adapter.id else get(ref), active)
    order, weights = planned([composer.terms(Name(adapter.id))])
    [ids] = base.tokenize([text])
    causal = adapter.head.causal if adapter.head else True
    Plan(base, order).hidden(base.collate([ids]), weights.to(base.device), causal=causal)
    found = {site: watched.seen[i][: len(ids)].cpu() for i, site in enumerate(sites)}
    return Trace(tuple(base.tokenizer.convert_ids_to_tokens(ids)), method.over, found)
