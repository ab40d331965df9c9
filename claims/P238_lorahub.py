"""LoraHub: Huang et al. 2023, arXiv 2307.13269.

The paper finds weights for 20 LoRAs on 5 examples of a task of BIG-Bench Hard, by 40 scores without gradients. Here:
the embedded decoder, eight LoRAs that choose one of three words (the last one, the animal, the first by alphabet), and
targets that choose one of five. No prompt says which task it is. 60 scores on 5 examples, against the backbone alone
and LoRAs with the same weight each; an answer is right where it is the very word.
"""

from __future__ import annotations

import json
import random
from functools import cache
from statistics import mean
from typing import Any

import polytask as pt
from claims.claim import Rows, Verdict, data
from claims.library import Known
from polytask.adapters import Adapter
from polytask.adapters.expression import Mix, Name
from polytask.composition.kept import keep
from polytask.recipes.adapt import measure as score
from polytask.recipes.lorahub import lorahub

PAPER = "Huang et al. 2023"
CLAIM = "weights of eight LoRAs found on 5 examples beat the model alone and equal weights by 5 points, in 60 scores"
SOURCES = (
    "choose_first_of_3",
    "choose_middle_of_3",
    "choose_last_of_3",
    "alphabetically_first_3",
    "alphabetically_last_3",
    "animal_v_object_3",
    "color_v_animal_3",
    "verb_v_adjective_3",
)
TARGETS = ("choose_last_of_5", "animal_v_object_5", "verb_v_adjective_5")
SEEDS = (0, 1)
TRAINED, TEST, FEW, BUDGET = 150, 60, 5, 60
LORA = {"sites": ["*.attn.[qkvo]", "*.mlp.*"]}
RATE, EPOCHS = 5e-3, 5
MORE = 5.0
READING = pt.Reading(in_text="yes")


@cache
def base() -> pt.Backbone:
    return pt.load("polytask-base")


@cache
def rows_of(name: str) -> list[pt.Example]:
    """A task's examples in an order of chance, one for each input."""
    folder = data()
    assert folder is not None
    rows = json.loads((folder / "function_vectors" / "extractive" / f"{name}.json").read_text(encoding="utf-8"))
    answers = {row["input"]: row["output"] for row in rows}
    order = sorted(answers)
    random.Random(0).shuffle(order)
    return [pt.Example(f"{name}-{i}", words, answers[words]) for i, words in enumerate(order)]


@cache
def lora(name: str) -> Adapter:
    task = pt.Task(name, "generation", tuple(rows_of(name)[:TRAINED]), metric="exact_match")
    settings = pt.Settings(lr=RATE, epochs=EPOCHS, batch=16)
    return pt.adapt(base(), task, "lora", hyperparameters=LORA, settings=settings, reading=READING)


@cache
def target(name: str, seed: int) -> pt.Task:
    """FEW examples drawn by the seed, and TEST others."""
    rows = random.Random(seed).sample(rows_of(name), FEW + TEST)
    return pt.Task(name, "generation", tuple(rows[:FEW]), test=tuple(rows[FEW:]), metric="exact_match")


def row_of(made: Adapter, task: pt.Task, known: Known) -> dict[str, Any]:
    right = score(base(), made, task, task.test, library=known)
    return {"metric": right.metric, "test": right.value}


def searched(name: str, seed: int) -> dict[str, Any]:
    task, over = target(name, seed), [lora(source) for source in SOURCES]
    made = lorahub(base(), task, over, reading=READING, budget=BUDGET, seed=seed)
    weights = dict(zip(SOURCES, made.card.recipe["weights"], strict=True))
    return row_of(made, task, Known(over)) | {"weights": weights, "seconds": made.card.seconds}


def mixed(name: str, seed: int, each: float) -> dict[str, Any]:
    """Each LoRA's own product, with one weight; with 0 the backbone is alone."""
    task, over = target(name, seed), [lora(source) for source in SOURCES]
    asked = lorahub(base(), task, over, reading=READING, budget=1)  # whose head asks for this task
    known = Known([*over, asked])
    terms = tuple((each, Name(one.id)) for one in over)
    return row_of(keep(Mix(terms), known.get, asked, name), task, known)


def measure(rows: Rows) -> Verdict:
    keys = [{"task": name, "seed": seed} for name in TARGETS for seed in SEEDS]
    ours = [rows.get(lambda k=k: searched(k["task"], k["seed"]), way="searched", **k) for k in keys]
    alone = [rows.get(lambda k=k: mixed(k["task"], k["seed"], 0.0), way="alone", **k) for k in keys]
    equal = [rows.get(lambda k=k: mixed(k["task"], k["seed"], 1 / len(SOURCES)), way="equal", **k) for k in keys]
    hub, before, same = (100 * mean(row["test"] for row in each) for each in (ours, alone, equal))
    return Verdict(
        f"{len(TARGETS)} tasks x {len(SEEDS)} seeds, {FEW} examples, {BUDGET} scores: found weights {hub:.1f}, the "
        f"model alone {before:.1f}, equal weights {same:.1f} ({hub - before:+.1f} and {hub - same:+.1f} points)",
        hub >= before + MORE and hub >= same + MORE,
    )
