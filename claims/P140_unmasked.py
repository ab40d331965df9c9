"""Removing the causal mask in some blocks: Dukić & Šnajder 2024, arXiv 2401.14556.

The paper tags words with decoders of 7 billion parameters whose blocks stand in four groups, tries with which of the
groups open the model does best on the validation split, and beats encoders; at 68 million parameters it sees no gain.
Here: the embedded decoder with its 8 million, two groups, all four patterns of them, LoRA on query and value as in
`claims.P113_label_heads`, and its rate, the better one of two there with the mask and without. Each seed takes the
pattern that does best on the validation split. The claim is the least that a search has to give: it loses nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from claims.P113_label_heads import LORA, base

PAPER = "Dukić & Šnajder 2024"
CLAIM = "the pattern of open blocks that validation picks is never more than a point below all causal"
TASK = "snips_slots"
PATTERNS = {"00": "all causal", "01": "upper half open", "10": "lower half open", "11": "all open"}
CAUSAL = "00"
RATE = 2e-3
SEEDS = (0, 1, 2)
EXAMPLES, HELD, TEST, EPOCHS = 400, 250, 695, 6
MOST = 1.0  # points below


def run(pattern: str, seed: int) -> dict[str, Any]:
    given = short.whole(TASK)
    task = replace(given, train=given.train[:EXAMPLES], validation=given.validation[:HELD], test=given.test[:TEST])
    adapter = pt.adapt(
        base(),
        task,
        "lora",
        hyperparameters=LORA,
        settings=pt.Settings(lr=RATE, seed=seed, epochs=EPOCHS, batch=16, patience=EPOCHS),
        reading=pt.Reading(causal=pattern),
    )
    scores = adapter.card.scores
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "seconds": adapter.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    found = {
        (pattern, seed): rows.get(partial(run, pattern, seed), pattern=pattern, seed=seed)
        for seed in SEEDS
        for pattern in PATTERNS
    }
    taken = [max(PATTERNS, key=lambda pattern: found[pattern, seed]["validation"]) for seed in SEEDS]
    gains = [
        100 * (found[pattern, seed]["test"] - found[CAUSAL, seed]["test"])
        for seed, pattern in zip(SEEDS, taken, strict=True)
    ]
    means = ", ".join(
        f"{said} {100 * mean(found[pattern, seed]['test'] for seed in SEEDS):.1f}" for pattern, said in PATTERNS.items()
    )
    chosen = ", ".join(f"{PATTERNS[pattern]} ({gain:+.1f})" for pattern, gain in zip(taken, gains, strict=True))
    return Verdict(
        f"{TASK} x {len(SEEDS)} seeds: {means}; picked, against all causal: {chosen} points",
        min(gains) >= -MOST,
    )
