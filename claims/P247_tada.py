"""TADA: Held, Ziems, Yang 2023, arXiv 2305.16651. See `claims.library`.

The paper rewrites English by the grammar of dialects, aligns what a frozen encoder makes of both, and has adapters that
were taught on standard English answer GLUE in the dialects. Here the dialect is made up: spelling by ear, no articles,
two changed endings and a few words of its own, by rule. One adapter is aligned on texts of the tasks that are no
targets, without any label; the targets' own LoRAs, which know nothing of it, then stand on it. What is recovered is
the share of the accuracy that the dialect costs them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Any

import polytask as pt
from claims import library, short
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter
from polytask.inference import Engine, Request
from polytask.recipes.tada import tada
from polytask.tasks import Example

PAPER = "Held et al. 2023"
CLAIM = "one adapter aligned without labels recovers half of what a dialect costs three tasks' adapters"
SHARE = 0.5
EACH = 300  # texts of each task to align on
RATES = (2e-3, 5e-3)
EPOCHS = 5
SOUNDS = (
    (r"\b(the|a|an) ", ""),
    (r"\b(is|are|am|was|were)\b", "be"),
    (r"\bnot\b|n't\b", " nah"),
    (r"\bvery\b", "well"),
    (r"\bmy\b", "me"),
    (r"\byou\b", "ya"),
    (r"tion\b", "shun"),
    (r"ing\b", "in"),
    (r"er\b", "a"),
    (r"ight", "oit"),
    (r"ph", "f"),
    (r"\bh", ""),
    (r"th\b", "f"),
    (r"th", "d"),
    (r"ck|c(?=[aourlt])", "k"),
    (r"ou", "aow"),
    (r"ee|ea", "ay"),
)


def dialect(text: str) -> str:
    """The text as it is written there."""
    text = text.lower()
    for standard, own in SOUNDS:
        text = re.sub(standard, own, text)
    return " ".join(text.split())


@cache
def pairs() -> pt.Task:
    """Texts of the other tasks, the last tenth to validate."""
    names = [name for name in library.SKILLS if name not in library.TARGETS]
    texts = [e.text for row in zip(*(short.task(name).train[:EACH] for name in names), strict=True) for e in row]
    made = tuple(Example(str(i), dialect(text), text) for i, text in enumerate(texts))
    cut = len(made) * 9 // 10
    return pt.Task("dialect", "generation", made[:cut], made[cut:])


def aligned(seed: int, rate: float) -> Adapter:
    said = f"tada-{EACH}x{EPOCHS}-{rate:g}-{seed}"
    settings = short.settings(rate, seed, epochs=EPOCHS, patience=EPOCHS)
    return library.kept(said, lambda: tada(short.base(), pairs(), settings=settings))


def row(seed: int, rate: float) -> dict[str, Any]:
    """Accuracy of each target's adapter on standard texts, on the dialect, and there above the aligned one."""
    below = aligned(seed, rate)
    found: dict[str, Any] = {"validation": below.card.scores["validation"].value}
    for name in library.TARGETS:
        own, test = library.skill(name, "lora"), short.task(name).test
        engine = Engine(short.base(), adapters=[below, own])
        written = [replace(e, input=dialect(e.text)) for e in test]
        for way, examples, who in (
            ("standard", test, own.id),
            ("dialect", written, own.id),
            ("stacked", written, pt.stack(below.id, own.id)),
        ):
            answers = engine.answer([Request(e.text, adapter=who) for e in examples], short.LIMIT)
            found[f"{way} {name}"] = mean(a.output == e.output for a, e in zip(answers, examples, strict=True))
    return found


def measure(rows: Rows) -> Verdict:
    seed = library.SEEDS[0]
    rate = max(RATES, key=lambda r: float(rows.get(lambda: row(seed, r), seed=seed, rate=r)["validation"]))
    found = [rows.get(lambda s=s: row(s, rate), seed=s, rate=rate) for s in library.SEEDS]
    standard, written, stacked = (
        100 * mean(each[f"{way} {name}"] for each in found for name in library.TARGETS)
        for way in ("standard", "dialect", "stacked")
    )
    recovered = (stacked - written) / (standard - written) if standard > written else 0.0
    return Verdict(
        f"{len(library.TARGETS)} tasks x {len(library.SEEDS)} seeds, {len(pairs().train)} pairs of other tasks' texts: "
        f"standard {standard:.1f}, dialect {written:.1f}, above the aligned adapter {stacked:.1f}: {recovered:.0%} of "
        f"the loss; {mean(each['validation'] for each in found):.0%} of the squared distance closed",
        recovered >= SHARE,
    )
