"""MeteoRA: Xu et al. 2024, arXiv 2405.13053. See `claims.library`.

The paper embeds all LoRAs in a decoder, trains gates that choose among them token by token, and comes near to each LoRA
on its own task without being told which task it is; in texts of several problems it switches. Here eight LoRAs on the
embedded encoder and one set of gates for all of their tasks. The gates see no task; each task's head, trained along
with them, reads. Switching is looked at on pairs of test texts, one put behind the other: the share of tokens that take
the adapter of their own text.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from statistics import mean
from typing import Any

from claims import library, short
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter
from polytask.composition.routing.token_level import trace
from polytask.recipes.adapt import Plan, adapt_many
from polytask.recipes.adapt import measure as measured

PAPER = "Xu et al. 2024"
CLAIM = "gates over eight LoRAs come within a point of each task's own LoRA, and switch within a text"
EACH = 150  # examples of each task that gates and heads see
EPOCHS, RATE = 6, 2e-3
PAIRS = 10  # of texts, for each two tasks that stand side by side in the list
OWN = 0.7  # the share of tokens that take their own adapter which counts as switching


class Shelf:
    def get(self, ref: str) -> Adapter:
        return next(one for one in skills() if one.id == ref)


def skills() -> list[Adapter]:
    return [library.skill(name, "lora") for name in library.SKILLS]


def gates() -> list[Adapter]:
    """One adapter for each task; their gates are the same."""

    def plan(name: str, one: Adapter) -> Plan:
        task = replace(short.task(name), validation=(), test=())
        settings = short.settings(RATE, 0, epochs=EPOCHS)
        few = replace(task, train=task.train[:EACH])
        return Plan(few, "meteora", {"owner": one.id}, settings, over=skills())

    names = [f"meteora-{name}-{EACH}x{EPOCHS}-{RATE:g}" for name in library.SKILLS]
    made: dict[str, Adapter] = {}

    def make(name: str) -> Adapter:
        if not made:
            plans = [plan(n, one) for n, one in zip(library.SKILLS, skills(), strict=True)]
            made.update(zip(names, adapt_many(short.base(), plans), strict=True))
        return made[name]

    return [library.kept(name, lambda n=name: make(n)) for name in names]


def score(name: str, adapter: Adapter) -> dict[str, Any]:
    task = short.task(name)
    found = measured(short.base(), adapter, task, task.test, short.LIMIT, Shelf())
    return {"metric": found.metric, "test": found.value}


def switching(first: str, second: str) -> dict[str, Any]:
    """The share of tokens of texts of the two tasks, one behind the other, that take their own task's adapter."""
    routed = gates()[0]
    owners = [one.id for one in skills()]
    shares = []
    for one, other in zip(*(short.task(name).test[:PAIRS] for name in (first, second)), strict=True):
        [head] = short.base().tokenize([one.text])
        found = trace(short.base(), routed, Shelf().get, f"{one.text} {other.text}")
        at = len(head) - 1  # without what ends a text
        wanted = [owners[library.SKILLS.index(first if i < at else second)] for i in range(len(found.took))]
        shares.append(mean(a == b for a, b in zip(found.took, wanted, strict=True)))
    return {"own": mean(shares)}


def measure(rows: Rows) -> Verdict:
    own = [
        rows.get(lambda n=n, i=i: score(n, skills()[i]), way="own", task=n)["test"]
        for i, n in enumerate(library.SKILLS)
    ]
    gated = [
        rows.get(lambda n=n, i=i: score(n, gates()[i]), way="gates", task=n, examples=EACH)["test"]
        for i, n in enumerate(library.SKILLS)
    ]
    shares = [
        rows.get(lambda a=a, b=b: switching(a, b), way="switching", task=f"{a} {b}")["own"]
        for a, b in pairwise(library.SKILLS)
    ]
    off, share = 100 * (mean(gated) - mean(own)), mean(shares)
    return Verdict(
        f"{len(own)} tasks: own LoRA {100 * mean(own):.1f}, all, gated, {100 * mean(gated):.1f} ({off:+.1f} points); "
        f"in two texts of different tasks {share:.0%} of the tokens take their own text's adapter",
        off >= -1 and share >= OWN,
    )
