"""DistillNearest and DistillWeighted: Borup, Phoo, Hariharan 2023, arXiv 2304.12314. See `claims.library`.

The paper distils image models of several domains into one small network on targets with few labels, weighted by how
alike the tasks are, and finds it ahead of fine-tuning and of other ways to use inputs without labels. Here the sources
are LoRAs of seven other tasks on the embedded encoder, the student is one more LoRA, and a target has 32 labels and
the other inputs of its first 300 rows without. LoRA on the labels alone gets as many steps as a student.
"""

from __future__ import annotations

from dataclasses import replace

import polytask as pt
from claims import library, short
from claims.claim import Rows, Verdict
from claims.library import Row
from polytask.recipes.distil import distil

PAPER = "Borup et al. 2023"
CLAIM = "a student of adapters weighted by PARC beats one of all alike and few-shot LoRA by two points"
LABELS, POINTS = 32, 2.0
POWERS = {"weighted": 9.0, "all alike": 0.0}
RATES = (1e-3, 2e-3)
EPOCHS = 3  # of a student


def student(name: str, seed: int, rate: float, power: float) -> Row:
    few = library.target(name, LABELS, seed)
    known = {e.id for e in few.train}
    others = tuple(replace(e, output=None) for e in short.task(name).train if e.id not in known)
    made = distil(
        short.base(),
        replace(few, train=(*few.train, *others)),
        library.others(name, "lora"),
        hyperparameters={"power": power},
        settings=short.settings(rate, seed, epochs=EPOCHS, patience=EPOCHS),
    )
    return library.row_of(made) | {"weights": list(made.card.recipe["weights"].values())}


def alone(name: str, seed: int, rate: float) -> Row:
    few = library.target(name, LABELS, seed)
    rows = len({e.id for e in (*few.train, *short.task(name).train)})
    epochs = round(EPOCHS * rows / len(few.train))
    made = pt.adapt(short.base(), few, "lora", settings=short.settings(rate, seed, epochs=epochs, patience=epochs))
    return library.row_of(made)


def measure(rows: Rows) -> Verdict:
    few = library.every(rows, RATES, alone, way="few-shot LoRA")
    ways = {
        way: library.every(rows, RATES, lambda n, s, r, p=power: student(n, s, r, p), way=way)
        for way, power in POWERS.items()
    }
    own = library.points(few)
    found = {way: library.points(each) for way, each in ways.items()}
    said = ", ".join(f"{way} {points:.1f}" for way, points in found.items())
    return Verdict(
        f"{len(library.TARGETS)} targets x {len(library.SEEDS)} seeds, {LABELS} labels, {len(library.SKILLS) - 1} "
        f"teachers: students of {said}; LoRA on the labels {own:.1f}, a head alone {library.points(few, 'head'):.1f}",
        found["weighted"] >= max(own, found["all alike"]) + POINTS,
    )
