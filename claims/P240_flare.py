"""FLARE: Borchert, Vulić, Moens, De Weerdt 2025, arXiv 2501.06892.

The paper adapts large decoders to texts of other languages with their English translations at hand and compares LoRA
on the target texts, which FLARE beats by up to 4.9 points of exact match. Here the other language is a remapped one:
each word of the tasks' texts stands for another one of them, the same throughout, so that a text is as long as ever and
its words mislead. Its translation is the original. LoRA reads the target text alone, both texts one behind the other,
or FLARE reads the target text with the translation beside it. The authors' first stage, a LoRA on English that is
merged, is left out for all three. That a translation is as good as the original helps both that read it, and reading
it alone is measured too: where it is perfect, nothing but it is needed.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import cache, partial
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Task

PAPER = "Borchert et al. 2025"
CLAIM = "fusing translations in LoRA's bottleneck beats LoRA on target texts by 3 points, and both texts in a row"
RATES = (1e-3, 3e-3)
MORE = 3.0
WORD = re.compile(r"[^\W\d_]+")


@cache
def dictionary(name: str) -> dict[str, str]:
    """Each word of the task's texts, and the one that stands for it."""
    task = short.task(name)
    texts = (str(e.input) for e in (*task.train, *task.validation, *task.test))
    words = sorted({word.lower() for text in texts for word in WORD.findall(text)})
    return dict(zip(words, random.Random(0).sample(words, len(words)), strict=True))


def foreign(name: str, said: str) -> str:
    return WORD.sub(lambda found: dictionary(name)[found[0].lower()], said)


def task(name: str, way: str) -> Task:
    """Target texts alone, with their translations, or the translations alone."""

    def row(e: Example) -> Example:
        said = str(e.input)
        if way == "translation":
            return e
        return replace(e, input=foreign(name, said), pair=None if way == "target" else said)

    given = short.task(name)
    changed: dict[str, Any] = {split: tuple(map(row, given.split(split))) for split in ("train", "validation", "test")}
    return replace(given, **changed, demonstrations=(), negatives=())


def run(way: str, name: str, rate: float, seed: int) -> dict[str, Any]:
    made = pt.adapt(
        short.base(),
        task(name, way),
        "flare" if way == "flare" else "lora",
        settings=short.settings(rate, seed, limit=2 * short.LIMIT if way == "in a row" else short.LIMIT),
        reading=Reading(pair="joint"),
    )
    read = task(name, way).test
    rows = short.base().tokenize(
        [str(e.input) for e in read], [str(e.pair) for e in read] if way == "in a row" else None, 2 * short.LIMIT
    )
    head = sum(t.numel() for n, t in made.tensors.items() if n.startswith("head/"))
    return {
        "test": made.card.scores["test"].value,
        "validation": made.card.scores["validation"].value,
        "parameters": made.card.trained_parameters - head,
        "tokens": mean(map(len, rows)),
        "seconds": made.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    score: dict[str, float] = {}
    long: dict[str, float] = {}
    for way in ("target", "flare", "in a row", "translation"):

        def row(name: str, rate: float, seed: int, way: str = way) -> dict[str, Any]:
            return rows.get(partial(run, way, name, rate, seed), way=way, task=name, rate=rate, seed=seed)

        _, found = short.picked(RATES, row)
        score[way] = short.points(found)
        long[way] = mean(row["tokens"] for each in found.values() for row in each)
    more, further = score["flare"] - score["target"], score["flare"] - score["in a row"]
    return Verdict(
        f"{len(short.TASKS)} remapped tasks x {len(short.SEEDS)} seeds: FLARE {score['flare']:.1f}, LoRA on target "
        f"texts {score['target']:.1f} ({more:+.1f}), on both in a row {score['in a row']:.1f} ({further:+.1f}), on "
        f"translations alone {score['translation']:.1f}; {long['flare']:.0f} tokens a text in its place, "
        f"{long['in a row']:.0f} in a row",
        more >= MORE and further > 0,
    )
