"""TaRot: Singh et al. 2024, arXiv 2410.04277.

The paper turns what the heads in the first blocks put out, by angles that Bayesian optimisation finds from 10 to 20
labelled prompts, and reports average gains of 24 % over the model alone and 11 % over the model with examples in its
prompt. Here: the embedded decoder, 16 examples; its first four of eight blocks, four angles a head, 48 scores (the
paper: 125); against the model alone and with half of the examples shown. On all sides the answer is the most likely
label, and nothing else is tuned.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.recipes import blackbox
from polytask.recipes.adapt import measure as score
from polytask.tasks.scorers import score as scored
from polytask.tasks.templates import render

PAPER = "Singh et al. 2024"
CLAIM = "heads turned by angles that are found without gradients beat the model alone and examples in its prompt"
TASKS = ("cr_polarity", "hate_offensive", "blimp_pairs")
EXAMPLES, SHOWN, TEST = 16, 8, 150
BUDGET = 48
ROTATION = {"shared": 8, "sites": tuple(f"{i}.attn.heads" for i in range(4))}
READING = pt.Reading(in_text="yes", decide="likelihood")


@cache
def base() -> pt.Backbone:
    return pt.load("polytask-base")


def few(name: str, seed: int) -> pt.Task:
    task = short.few(name, EXAMPLES, seed)
    return replace(task, validation=(), test=task.test[:TEST])


def alone(name: str) -> dict[str, Any]:
    task = few(name, short.SEEDS[0])
    start = blackbox.begin(base(), task, hyperparameters=ROTATION, reading=READING)
    return {"metric": task.metric, "test": score(base(), start, task, task.test).value}


def turned(name: str, seed: int) -> dict[str, Any]:
    task, engine = few(name, seed), pt.Engine(base())
    start = blackbox.begin(base(), task, hyperparameters=ROTATION, reading=READING, seed=seed)
    found = blackbox.fit(start, blackbox.probability(engine, task.train), budget=BUDGET, seed=seed)
    right: list[float] = found.card.recipe["scores"]
    return {
        "metric": task.metric,
        "test": score(base(), found, task, task.test).value,
        "before": right[0],
        "after": max(right),
        "numbers": found.card.trained_parameters,
        "seconds": found.card.seconds,
    }


def shown(name: str, seed: int) -> dict[str, Any]:
    task = few(name, seed)
    options = [label.name for label in task.labels]
    tokens = base().tokenizer
    room = base().max_length - max(len(tokens(f" {option}")["input_ids"]) for option in options) - 1  # and an end token
    prompts = []
    for example in task.test:
        longest = (render(task, example, demonstrations=k, seed=seed) for k in range(SHOWN, -1, -1))
        prompts.append(next(p for p in longest if len(tokens(p.text)["input_ids"]) <= room))
    asks = [pt.Ask(prompt.text) for prompt in prompts]
    engine = pt.Engine(base())
    said = [engine.logprobs(asks, [prompt.lead + option for prompt in prompts]) for option in options]
    outputs = []
    for log_p in zip(*said, strict=True):
        each = [float(t.sum()) for t in log_p]
        outputs.append(options[each.index(max(each))])
    return {"metric": task.metric, "test": scored(task, outputs, task.test, resamples=0).value}


def measure(rows: Rows) -> Verdict:
    keys = [(name, seed) for name in TASKS for seed in short.SEEDS]
    angles = [rows.get(lambda k=k: turned(*k), way="turned", task=k[0], seed=k[1]) for k in keys]
    context = [rows.get(lambda k=k: shown(*k), way="shown", task=k[0], seed=k[1]) for k in keys]
    plain = [rows.get(lambda n=name: alone(n), way="alone", task=name) for name in TASKS]
    rotation, prompt, before = (100 * mean(row["test"] for row in found) for found in (angles, context, plain))
    return Verdict(
        f"{len(TASKS)} tasks x {len(short.SEEDS)} seeds, {EXAMPLES} examples: turned by {angles[0]['numbers']} angles "
        f"{rotation:.1f}, alone {before:.1f} ({rotation - before:+.1f} points), {SHOWN} examples shown {prompt:.1f} "
        f"({rotation - prompt:+.1f}); the right label's probability on the {EXAMPLES} rose from "
        f"{mean(row['before'] for row in angles):.2f} to {mean(row['after'] for row in angles):.2f}",
        rotation > before and rotation > prompt,
    )
