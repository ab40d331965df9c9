"""Arrow and MBC: Ostapenko et al. 2024, arXiv 2405.11157. See `claims.library`.

The paper routes among LoRAs of other tasks for tasks that nobody trained, and clusters tasks by their LoRAs so that
each cluster trains one. A frozen encoder answers nothing without a head, so here the head alone is fitted on 64
examples of a target, on states that the others' LoRAs have changed: routed token by token (Arrow), averaged, or not
changed at all. Four tasks are the library and three others the targets. A cluster trains one LoRA on examples of all
its tasks, each label named by its task; MBC's clusters are compared with the other ways to put the tasks into as many
of equal sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from typing import Any

import polytask as pt
from claims import library, short
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter
from polytask.composition.clustering import clusters
from polytask.composition.kept import keep
from polytask.composition.routing.arrow import arrow
from polytask.tasks import Label

PAPER = "Ostapenko et al. 2024"
CLAIM = "for unseen tasks Arrow beats the mean of the library and the backbone, and MBC's clusters beat others"
SOURCES = ("banking77_intent", "clinc150_intent", "scicite", "csabstruct")
FEW = 64
K = 2  # clusters
EACH = 150  # examples of each task that a cluster's LoRA sees

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Shelf:
    adapters: Sequence[Adapter]

    def get(self, ref: str) -> Adapter:
        return next(one for one in self.adapters if ref in (one.id, one.name))


def routed(adapters: Sequence[Adapter]) -> Adapter:
    return arrow(short.base(), adapters) if len(adapters) > 1 else adapters[0]


def averaged(adapters: Sequence[Adapter]) -> Adapter:
    said = pt.mix({one.id: 1 / len(adapters) for one in adapters})
    return keep(said, Shelf(adapters).get, adapters[0], "mean")


def joint(group: Sequence[str]) -> Adapter:
    """One LoRA for several tasks, as one task whose labels are named by theirs."""
    parts = [short.task(name) for name in group]
    made = replace(
        parts[0],
        name="+".join(group),
        instruction="",
        labels=tuple(Label(f"{part.name}: {label.name}", label.description) for part in parts for label in part.labels),
        train=tuple(
            replace(e, id=f"{part.name}/{e.id}", output=f"{part.name}: {e.output}")
            for part in parts
            for e in part.train[:EACH]
        ),
        validation=(),
        test=(),
        demonstrations=(),
    )
    settings = short.settings(library.RATE, 0)
    said = f"lora-{made.name}-{EACH}x{short.EPOCHS}-{library.RATE:g}"
    return library.kept(said, lambda: pt.adapt(short.base(), made, "lora", settings=settings))


def found() -> Groups:
    adapters = [library.skill(name, "lora") for name in SOURCES]
    names = {one.id: name for one, name in zip(adapters, SOURCES, strict=True)}
    return tuple(tuple(names[id] for id in group) for group in clusters(adapters, K))


def others(groups: Groups) -> list[Groups]:
    """All other ways to form clusters of these sizes."""
    sizes = [len(group) for group in groups]
    ways: dict[frozenset[frozenset[str]], Groups] = {}
    for order in permutations(SOURCES):
        at = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        way = tuple(tuple(sorted(order[a:b])) for a, b in pairwise(at))
        ways.setdefault(frozenset(map(frozenset, way)), way)
    ways.pop(frozenset(map(frozenset, groups)))
    return list(ways.values())


def on(name: str, seed: int, below: Sequence[Adapter], known: Sequence[Adapter]) -> dict[str, Any]:
    task = library.target(name, FEW, seed)
    return library.run(task, "head", {}, 1e-3, seed, above=below, library=Shelf(known))


def points(rows: Rows, way: str, adapters: Sequence[Adapter], below: Sequence[Adapter]) -> float:
    """The mean test score over targets and seeds of a head above the adapters."""
    return library.points(
        [
            rows.get(lambda n=name, s=seed: on(n, s, below, adapters), way=way, task=name, seed=seed, examples=FEW)
            for name in library.TARGETS
            for seed in library.SEEDS
        ]
    )


def measure(rows: Rows) -> Verdict:
    adapters = [library.skill(name, "lora") for name in SOURCES]
    alone = points(rows, "backbone", [], [])
    mean = points(rows, "mean", adapters, [averaged(adapters)])
    arrow_ = points(rows, "arrow", adapters, [routed(adapters)])

    def clustered(groups: Groups) -> float:
        each = [joint(group) if len(group) > 1 else library.skill(group[0], "lora") for group in groups]
        return points(rows, "arrow over " + " | ".join(" ".join(g) for g in groups), each, [routed(each)])

    groups = found()
    mbc, rest = clustered(groups), [clustered(way) for way in others(groups)]
    chance = sum(rest) / len(rest)
    return Verdict(
        f"{len(library.TARGETS)} targets x {len(library.SEEDS)} seeds, {FEW} examples for the head: Arrow over "
        f"{len(SOURCES)} LoRAs {arrow_:.1f}, their mean {mean:.1f}, backbone {alone:.1f}; Arrow over MBC's clusters "
        f"({' | '.join(' + '.join(group) for group in groups)}) {mbc:.1f}, over {len(rest)} other ways to form them "
        f"{chance:.1f}",
        arrow_ > mean and arrow_ > alone and mbc > chance,
    )
