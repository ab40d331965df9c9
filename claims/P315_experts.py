"""Mixture of linguistic experts: Li et al. 2023, arXiv 2310.16240. See `claims.short`.

The paper's experts read graphs of the sentence beside its tokens; gates that do not depend on the input find in a short
search which expert a layer needs, the others are pruned, and what is left is trained. The experts here are plain, and
one that has nothing to say about a text is one that reads nothing: D = 0 in three of four, which relu keeps there, as
no gradient comes through it at 0. They can add a constant to their layer, and no more; the fourth stands at a place
that is drawn for each layer. The search is short and at the authors' rate; what gates choose at thirty times that,
which is a rate for training, is given beside. After the search each layer keeps its greatest gate, and the mixture and
the pruned adapter are both trained from where they are, with a head fitted anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from random import Random
from statistics import mean
from typing import Any

from torch import Tensor

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.methods.experts import Experts, pruned

PAPER = "Li et al. 2023"
CLAIM = "gates keep the one of four experts that reads anything in 90 % of layers; pruning costs under half a point"
MIXTURE = Experts()
SEARCH, GENTLE, HASTY = 2, 1e-4, 3e-3  # epochs of the search; the authors' rate, and thirty times that
RATES = (1e-3, 3e-3)  # of the training after it
KEPT, LOST = 0.9, 0.5


def places(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """In each layer, which of its experts reads anything."""
    found = {}
    for name, D in tensors.items():
        if name.endswith("/D"):
            [found[name.removesuffix("/D")]] = D.view(MIXTURE.experts, -1).any(-1).nonzero().flatten().tolist()
    return found


@cache
def untrained(name: str, seed: int) -> pt.Adapter:
    """Experts of which one in each layer reads."""
    tensors, draw = MIXTURE.start(short.base(), seed), Random(seed)
    for D in (t for name, t in tensors.items() if name.endswith("/D")):
        each = D.view(MIXTURE.experts, -1)
        one = draw.randrange(MIXTURE.experts)
        each[[i for i in range(MIXTURE.experts) if i != one]] = 0
    like = pt.adapt(short.base(), short.task(name), "head", settings=short.settings(1e-3, seed))
    return replace(like, method=MIXTURE.name, hyperparameters=MIXTURE.hyperparameters(), tensors=tensors)


@cache
def searched(name: str, seed: int, rate: float) -> pt.Adapter:
    """The mixture after the search; its last tensors, so that no gate stays where it began."""
    task = replace(short.task(name), validation=(), test=())
    settings = short.settings(rate, seed, epochs=SEARCH)
    return pt.adapt(short.base(), task, MIXTURE.name, settings=settings, begin=untrained(name, seed))


def cut(mixture: pt.Adapter) -> pt.Adapter:
    fewer, tensors = pruned(MIXTURE, mixture.tensors)
    return replace(mixture, method=fewer.name, hyperparameters=fewer.hyperparameters(), tensors=tensors)


def search(name: str, seed: int, rate: float) -> dict[str, Any]:
    """In how many layers the gates choose the expert that reads."""
    mixture = searched(name, seed, rate)
    reads = places(mixture.tensors)
    g = {site: (mixture.tensors[f"{site}/alpha"] / MIXTURE.tau).softmax(-1) for site in reads}
    return {
        "layers": len(reads),
        "kept": sum(int(g[site].argmax()) == place for site, place in reads.items()),
        "gate": mean(float(g[site][place]) for site, place in reads.items()),
        "seconds": mixture.card.seconds,
    }


def trained(way: str, name: str, rate: float, seed: int) -> dict[str, Any]:
    first = searched(name, seed, GENTLE)
    if way == "pruned":
        first = cut(first)
    task, settings = short.task(name), short.settings(rate, seed)
    adapter = pt.adapt(
        short.base(), task, first.method, hyperparameters=first.hyperparameters, settings=settings, begin=first
    )
    scores = adapter.card.scores
    head = sum(t.numel() for n, t in adapter.tensors.items() if n.startswith("head/"))
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "head": scores["baseline"].value,
        "parameters": adapter.card.trained_parameters - head,
        "seconds": adapter.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    found = {}
    for way in ("mixture", "pruned"):

        def row(name: str, rate: float, seed: int, way: str = way) -> dict[str, Any]:
            return rows.get(lambda: trained(way, name, rate, seed), way=way, task=name, rate=rate, seed=seed)

        _, found[way] = short.picked(RATES, row)
    keys: list[dict[str, Any]] = [
        {"task": name, "seed": seed, "rate": GENTLE} for name in short.TASKS for seed in short.SEEDS
    ]
    keys += [{"task": name, "seed": short.SEEDS[0], "rate": HASTY} for name in short.TASKS]
    gates = [rows.get(partial(search, *k.values()), way="search", **k) for k in keys]
    gentle, hasty = ([row for row in gates if row["rate"] == rate] for rate in (GENTLE, HASTY))
    kept, layers = sum(row["kept"] for row in gentle), sum(row["layers"] for row in gentle)
    score = {way: short.points(mine) for way, mine in found.items()}
    numbers = {way: mine[short.PICKED_ON][0]["parameters"] for way, mine in found.items()}
    more = score["pruned"] - score["mixture"]
    return Verdict(
        f"{len(short.TASKS)} tasks x {len(short.SEEDS)} seeds: {kept} of {layers} layers keep the expert that reads "
        f"({sum(row['kept'] for row in hasty)} of {sum(row['layers'] for row in hasty)} after a search at {HASTY:g}); "
        f"pruned {score['pruned']:.1f} with {numbers['pruned']:,} numbers, mixture {score['mixture']:.1f} with "
        f"{numbers['mixture']:,} ({more:+.1f} points), the head alone {short.points(found['mixture'], 'head'):.1f}",
        kept >= KEPT * layers and more > -LOST,
    )
