"""Composable sparse fine-tuning (LT-SFT): Ansell et al. 2022, arXiv 2110.07560. See `claims.short`.

The paper adds a sparse difference learnt from a task in English to one learnt from plain text of another language, and
answers the task in that language; sparse ones, it finds, interfere less than dense ones. Here the language is English
with a and o exchanged; heads over MiniLM's frozen features lose 16 and 31 points in it. Differences are of all weights,
sparse ones a twelfth of them, and are added as they are. What differs: MiniLM has no masked language modelling, so the
language is learnt from unlabelled texts by telling whether a text in it says the same as an English one; and the task's
difference is trained on the backbone itself, which knows English, not above a difference of English. Sparse or dense,
the rate is picked on the English validation split, and the language's is the same. One seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from random import Random
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.composition.merging.rule import build
from polytask.recipes.adapt import measure as score

PAPER = "Ansell et al. 2022"
CLAIM = "sparse differences of a task and a language, added, beat the task's alone and the sum of dense ones"
TASKS = ("cr_polarity", "sib200_en_topic")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse": ("full@lottery", {"select.share": 0.08}),
    "dense": ("full", {}),
}
RATES = (1e-4, 3e-4)
TEXTS = 300  # of the language; pairs with as many English ones, half of them the same
SEED = short.SEEDS[0]
LIMIT = 72  # the language takes half as many tokens again
LETTERS = str.maketrans("aoAO", "oaOA")


def foreign(examples: Sequence[pt.Example]) -> list[pt.Example]:
    return [replace(e, input=str(e.input).translate(LETTERS)) for e in examples]


def language() -> pt.Task:
    """Pairs of an English text and one of the language, from texts that no task is trained on; 1 where it is the
    same."""
    draw, drawn = Random(SEED), []
    for name in TASKS:
        texts = [str(e.input) for e in short.whole(name).train[short.EXAMPLES :]]
        drawn += draw.sample(texts, min((TEXTS + short.HELD) // len(TASKS), len(texts)))
    draw.shuffle(drawn)
    pairs = []
    for i, text in enumerate(drawn):
        other = text if i % 2 else drawn[i - 1]
        pairs.append(pt.Example(str(i), text, float(i % 2), pair=other.translate(LETTERS)))
    held = min(short.HELD, len(pairs) // 4)
    return pt.Task("language", "similarity", tuple(pairs[held:]), tuple(pairs[:held]), metric="spearman")


@cache
def fit(kind: str, name: str, rate: float) -> pt.Adapter:
    """The difference of a task, or of the language where there is no name; the last one, so that there is one."""
    method, hyper = KINDS[kind]
    task = replace(short.task(name) if name else language(), validation=(), test=())
    return pt.adapt(short.base(), task, method, hyperparameters=hyper, settings=short.settings(rate, SEED, limit=LIMIT))


def scored(adapter: pt.Adapter, task: pt.Task, examples: Sequence[pt.Example]) -> float:
    found = score(short.base(), adapter, task, examples, LIMIT)
    return found.value


def learnt(kind: str, name: str, rate: float) -> dict[str, Any]:
    adapter, task = fit(kind, name, rate), short.task(name)
    return {
        "test": scored(adapter, task, task.test),
        "validation": scored(adapter, task, task.validation),
        "seconds": adapter.card.seconds,
    }


def added(kind: str, name: str, rate: float) -> dict[str, Any]:
    """What the task scores in the language, with its difference alone and with that of the language added."""
    own, other = fit(kind, name, rate), fit(kind, "", rate)
    task = short.task(name)
    both, report = pt.merge(short.base(), [own, other], build("task-arithmetic", {"scale": 1.0}), head=own.id)
    return {
        "metric": task.metric,
        "alone": scored(own, task, foreign(task.test)),
        "added": scored(both, task, foreign(task.test)),
        "conflict": report.conflict,
        "language": scored(other, language(), language().validation),
        "numbers": sum(int(t.count_nonzero()) for n, t in own.tensors.items() if n.startswith(":")),
    }


def measure(rows: Rows) -> Verdict:
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:

        def row(name: str, rate: float, kind: str = kind) -> dict[str, Any]:
            return rows.get(lambda: learnt(kind, name, rate), way="learnt", kind=kind, task=name, rate=rate)

        def added_row(name: str, rate: float, kind: str = kind) -> dict[str, Any]:
            return rows.get(lambda: added(kind, name, rate), way="added", kind=kind, task=name, rate=rate)

        best = max(RATES, key=lambda rate: row(TASKS[0], rate)["validation"])
        english = [row(name, best)["test"] for name in TASKS]
        sums = [added_row(name, best) for name in TASKS]
        found[kind] = {
            "english": 100 * mean(english),
            "alone": 100 * mean(row["alone"] for row in sums),
            "added": 100 * mean(row["added"] for row in sums),
        }
    sparse, dense = found["sparse"], found["dense"]
    gain, against = sparse["added"] - sparse["alone"], sparse["added"] - dense["added"]
    return Verdict(
        f"{len(TASKS)} tasks in English with a and o exchanged: sparse, task alone {sparse['alone']:.1f}, with the "
        f"language {sparse['added']:.1f} ({gain:+.1f} points); dense, {dense['alone']:.1f} and {dense['added']:.1f} "
        f"(sparse sum {against:+.1f} against dense); in English {sparse['english']:.1f} and {dense['english']:.1f}",
        gain > 0 and against > 0,
    )
