"""An elastic adapter is cut to a rank for each site: the ranks that answer a validation split best under a budget.

    ρ* = argmax over ρ of score(ρ),   Σ_sites ρ_s (in_s + out_s) ≤ budget,   ρ_s among the ranks it was trained at

The middle rank everywhere comes first: Muñoz, Yuan, Jain 2024, arXiv 2404.10934, take that one as it is, and search on
where more is wanted. Here the other ranks come next, each everywhere, so that no single rank within the budget does
better on that split. Then the best so far is changed at one site, to the next larger or smaller rank, or at two, up at
one and down at the other, and what scores better takes its place, until nothing near it is better or the tries are used
up. Of two that score alike the smaller is better. A score costs a forward pass over the split, and no training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import polytask
from polytask.adapters import Adapter, Lineage
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build
from polytask.methods.elastic import Elastic
from polytask.methods.lora import LoRA
from polytask.recipes.adapt import measure
from polytask.tasks import Task

Ranks = Mapping[str, int]


@dataclass(frozen=True)
class Tried:
    """A rank for each site, how many numbers it keeps, and what it scored."""

    ranks: Ranks
    numbers: int
    score: float

    @property
    def worth(self) -> tuple[float, int]:
        """What the best one has most of."""
        return self.score, -self.numbers


def search(
    prices: Ranks,
    choices: Sequence[int],
    score: Callable[[Ranks], float],
    budget: int,
    *,
    tries: int = 50,
    seed: int = 0,
) -> list[Tried]:
    """What was tried, in order; the best of them is the one of the greatest `worth`.

    prices: numbers that a rank costs at each site. choices: the ranks there are. score: what is to be large. budget:
    most numbers. tries: most scores, without those of one rank everywhere. seed: of the order in which neighbours come.

    Raises UsageError where the smallest rank everywhere is over the budget.
    """
    order = sorted(set(choices))
    sites = tuple(prices)
    tried: dict[tuple[int, ...], Tried] = {}

    def numbers(at: tuple[int, ...]) -> int:
        return sum(order[i] * price for i, price in zip(at, prices.values(), strict=True))

    def scored(at: tuple[int, ...]) -> Tried:
        ranks = {site: order[i] for site, i in zip(sites, at, strict=True)}
        tried[at] = Tried(ranks, numbers(at), score(ranks))
        return tried[at]

    alike = [(i,) * len(sites) for i in range(len(order))]
    least = numbers(alike[0])
    if least > budget:
        raise UsageError(f"rank {order[0]} at every site is {least} numbers, more than the budget of {budget}")
    alike.sort(key=lambda at: abs(at[0] - len(order) // 2))
    best = max((at for at in alike if numbers(at) <= budget), key=lambda at: scored(at).worth)
    draw = random.Random(seed)
    for _ in range(tries):
        near = [at for at in _near(best, len(order)) if at not in tried and numbers(at) <= budget]
        if not near:
            break
        best = max(best, draw.choice(near), key=lambda at: (tried.get(at) or scored(at)).worth)
    return list(tried.values())


def _near(at: tuple[int, ...], choices: int) -> Iterator[tuple[int, ...]]:
    """One site a step up or down, or two sites, one up and one down."""
    steps = [(site, step) for site in range(len(at)) for step in (1, -1) if 0 <= at[site] + step < choices]
    for site, step in steps:
        moved = (*at[:site], at[site] + step, *at[site + 1 :])
        yield moved
        for other, back in steps:
            if step == 1 and back == -1 and other != site:
                yield (*moved[:other], moved[other] - 1, *moved[other + 1 :])


def _elastic(adapter: Adapter) -> Elastic:
    method = build(adapter.method, adapter.hyperparameters)
    if not isinstance(method, Elastic):
        raise UsageError(f"adapter {adapter.name} is of method {adapter.method}; only an elastic one can be cut")
    return method


def cut(adapter: Adapter, ranks: Ranks) -> Adapter:
    """An elastic adapter at one of its ranks for each site: an ordinary LoRA of the same scale, without scores.

    Raises UsageError where the adapter is not elastic, or has not that site or rank.
    """
    method = _elastic(adapter)
    for site in dict.fromkeys((*adapter.sites, *ranks)):
        if site not in adapter.sites or ranks.get(site) not in method.ranks:
            raise UsageError(
                f"adapter {adapter.name}: rank {ranks.get(site)} at {site}; its ranks are "
                f"{', '.join(map(str, method.ranks))}, at {len(adapter.sites)} sites such as {adapter.sites[0]}"
            )
    tensors = dict(adapter.tensors)
    for site, ρ in ranks.items():
        tensors[f"{site}/A"] = tensors[f"{site}/A"][:ρ].clone()
        tensors[f"{site}/B"] = tensors[f"{site}/B"][:, :ρ].clone()
    r = max(ranks.values())
    alpha = method.s * (math.sqrt(r) if method.rslora else r)
    kept = {name: value for name, value in method.hyperparameters().items() if name != "nested"}
    lora = LoRA.of(kept | {"r": r, "alpha": alpha})
    card = adapter.card.model_copy(
        update={
            "lineage": Lineage(
                parents=(adapter.id,), data=adapter.card.lineage.data, made_by=f"polytask {polytask.__version__}"
            ),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "scores": {},
            "trained_parameters": sum(t.numel() for n, t in tensors.items() if not n.startswith("task/")),
            "recipe": {"recipe": "cut", "ranks": dict(ranks)},
        }
    )
    return replace(adapter, method=lora.name, hyperparameters=lora.hyperparameters(), tensors=tensors, card=card)


def shrink(
    base: Backbone,
    task: Task,
    adapter: Adapter,
    budget: float,
    *,
    tries: int = 50,
    seed: int = 0,
    limit: int = 256,
) -> Adapter:
    """The cut of an elastic adapter that answers the task's validation split best, with scores, and a note that says
    what was given up.

    budget: most numbers, as a share of those at the largest rank. tries, seed: of `search`. limit: tokens a text is cut
    to.

    Raises UsageError as `cut` and `search` do, PolytaskError where there is no validation split.
    """
    held = [e for e in task.validation if e.output is not None]
    if not held:
        raise PolytaskError(f"task {task.name}: no validation examples to choose ranks on")
    method = _elastic(adapter)
    prices = {site: adapter.at(site)["A"].shape[1] + adapter.at(site)["B"].shape[0] for site in adapter.sites}
    whole = method.r * sum(prices.values())

    def score(ranks: Ranks) -> float:
        return measure(base, cut(adapter, ranks), task, held, limit).value

    tried = search(prices, method.ranks, score, int(budget * whole), tries=tries, seed=seed)
    best = max(tried, key=lambda one: one.worth)
    found = cut(adapter, best.ranks)
    before = measure(base, adapter, task, held, limit)
    scores = {label: card for label, card in adapter.card.scores.items() if label == "baseline"}
    for split in ("validation", "test"):
        examples = [e for e in task.split(split) if e.output is not None]
        if examples:
            scores[split] = measure(base, found, task, examples, limit)
    note = (
        f"{best.numbers} of {whole} numbers are left: {before.metric} on validation {best.score:.3f}, "
        f"with all {before.value:.3f}; best of {len(tried)} cuts"
    )
    card = found.card.model_copy(update={"scores": scores, "notes": (*adapter.card.notes, note)})
    return replace(found, card=card)
