"""MTL-LoRA: Yang et al. 2024, arXiv 2410.09437. See `claims.short`.

The paper trains eight tasks of commonsense reasoning together on LLaMA-2, and others of understanding and relevance,
and is ahead of LoRA with no more numbers. Here five tasks are trained together on MiniLM: labels of sentences, tags of
words and a similarity. They share down- and up-projections and keep a small matrix and a mixing of their own
(`mtl_lora`), or share all of one LoRA of no fewer numbers on the same maps; heads are each task's own in both. Then two
more tasks, of sentences and of tags, learn their own part alone over the projections, which stay, or a LoRA of their
own. Nothing is picked on test splits, and rates by the mean validation score; without a validation split in training
all tasks have the last projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter
from polytask.methods import build
from polytask.recipes.adapt import Plan
from polytask.recipes.adapt import measure as score
from polytask.tasks import Task

PAPER = "Yang et al. 2024"
CLAIM = "tasks together beat one shared LoRA by 2 points; a new one's own part is within 2 of a whole LoRA"
TOGETHER = ("cr_polarity", "hate_offensive", "scicite", "ewt_upos", "sgdx_paraphrase")
NEW = ("sib200_en_topic", "snips_slots")
EACH, TEST, BATCH = 128, 200, 8
R = 8
MAPS = ("*.attn.[qkvo]",)
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mtl": ("mtl_lora", {"r": R, "n": 3, "sites": MAPS}),
    # One expert is one LoRA that all tasks have. A rank less would be fewer numbers than those above.
    "shared": ("task_experts", {"m": 1, "r": 17, "alpha": 34.0, "sites": MAPS}),
}
RATES = (1e-3, 3e-3)
CORE_RATES = (3e-2, 1e-1)  # of a part so small
LORA = {"r": R, "alpha": 16.0, "sites": MAPS}
MORE, WITHIN = 2.0, 2.0


def part(name: str) -> Task:
    given = short.task(name)
    return replace(given, train=given.train[:EACH], test=given.test[:TEST])


def settings(rate: float, seed: int) -> pt.Settings:
    return short.settings(rate, seed, batch=BATCH)


@cache
def together(way: str, rate: float, seed: int) -> tuple[Adapter, ...]:
    """The five tasks' adapters."""
    method, hyper = WAYS[way]
    tasks = [replace(part(name), validation=()) for name in TOGETHER]
    plans = [Plan(task, method, hyper, settings(rate, seed)) for task in tasks]
    return tuple(pt.adapt_many(short.base(), plans))


def numbers(made: tuple[Adapter, ...]) -> int:
    """Those of all tasks beside the heads, shared ones once."""
    shared = build(made[0].method, made[0].hyperparameters).common

    def size(one: Adapter, common: bool) -> int:
        own = {n: t for n, t in one.tensors.items() if not n.startswith(("head/", "task/"))}
        return sum(t.numel() for n, t in own.items() if (n.rpartition("/")[2] in shared) == common)

    return size(made[0], True) + sum(size(one, False) for one in made)


def joint(way: str, rate: float, seed: int) -> dict[str, Any]:
    made = together(way, rate, seed)
    held = {name: part(name) for name in TOGETHER}
    by_task = {name: one.card.scores["test"].value for name, one in zip(TOGETHER, made, strict=True)}
    return {
        "test": mean(by_task.values()),
        "validation": mean(
            score(short.base(), one, task, task.validation, short.LIMIT).value
            for one, task in zip(made, held.values(), strict=True)
        ),
        "head": mean(one.card.scores["baseline"].value for one in made),
        "by_task": by_task,
        "numbers": numbers(made),
        "seconds": sum(one.card.seconds for one in made),
    }


def fresh(one: Adapter) -> Adapter:
    """A task's adapter with its own part as it is before training, for a task that is like none in particular."""
    start = build(one.method, one.hyperparameters).start(short.base(), 0)
    return replace(one, tensors={**one.tensors, **{n: t for n, t in start.items() if n.endswith(("/L", "/w"))}})


def new(name: str, way: str, rate: float, seed: int, projections: float) -> dict[str, Any]:
    """A task after the five; `projections` is the rate that these were trained at."""
    method, hyper, begin = "lora", LORA, None
    if way == "core":
        method, hyper = "mtl_lora", {**WAYS["mtl"][1], "core": True}
        begin = fresh(together("mtl", projections, seed)[0])
    made = pt.adapt(short.base(), part(name), method, hyperparameters=hyper, settings=settings(rate, seed), begin=begin)
    scores, head = made.card.scores, sum(t.numel() for n, t in made.tensors.items() if n.startswith("head/"))
    return {
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "head": scores["baseline"].value,
        "numbers": made.card.trained_parameters - head,
        "seconds": made.card.seconds,
    }


def picked(
    rates: tuple[float, ...], rows_at: Callable[[float, int], list[dict[str, Any]]]
) -> tuple[float, list[dict[str, Any]]]:
    """The rate with the best mean validation score at the first seed, and its rows of all seeds."""
    best = max(rates, key=lambda rate: mean(row["validation"] for row in rows_at(rate, short.SEEDS[0])))
    return best, [row for seed in short.SEEDS for row in rows_at(best, seed)]


def measure(rows: Rows) -> Verdict:
    def of(found: list[dict[str, Any]], what: str = "test") -> float:
        return 100 * mean(float(row[what]) for row in found)

    found, rate = {}, {}
    for way in WAYS:

        def all_five(rate: float, seed: int, way: str = way) -> list[dict[str, Any]]:
            return [rows.get(partial(joint, way, rate, seed), way=way, rate=rate, seed=seed)]

        rate[way], found[way] = picked(RATES, all_five)
    for way, rates in (("core", CORE_RATES), ("lora", RATES)):

        def later(rate: float, seed: int, way: str = way, projections: float = rate["mtl"]) -> list[dict[str, Any]]:
            return [
                rows.get(partial(new, name, way, rate, seed, projections), task=name, way=way, rate=rate, seed=seed)
                for name in NEW
            ]

        _, found[way] = picked(rates, later)
    more, less = of(found["mtl"]) - of(found["shared"]), of(found["lora"]) - of(found["core"])
    count = {way: mine[0]["numbers"] for way, mine in found.items()}
    return Verdict(
        f"{len(TOGETHER)} tasks together x {len(short.SEEDS)} seeds: MTL-LoRA {of(found['mtl']):.1f} with "
        f"{count['mtl']:,} numbers, one LoRA {of(found['shared']):.1f} with {count['shared']:,} ({more:+.1f}), heads "
        f"alone {of(found['mtl'], 'head'):.1f}; {len(NEW)} new tasks: their own part {of(found['core']):.1f} with "
        f"{count['core']:,} numbers, a LoRA {of(found['lora']):.1f} with {count['lora']:,} ({-less:+.1f}), heads alone "
        f"{of(found['lora'], 'head'):.1f}",
        more >= MORE and less <= WITHIN,
    )
