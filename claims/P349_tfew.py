"""T-Few against in-context learning: Liu et al. 2022, arXiv 2205.05638.

The paper trains (IA)³ on a few examples by one recipe that is tuned on no task, and compares with showing the same
examples to a model in its prompt. Here both have the embedded decoder, in no way trained on many tasks before, and the
same 32 examples, drawn by the seed. T-Few is `polytask.recipes.tfew` with nothing set and no validation examples.
In-context learning shows as many of the 32 as fit its 512 tokens, and counts with the better of two ways of comparing
options, whole or per token. What an answer costs is the tokens of its prompt.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import takewhile
from statistics import mean
from typing import Any

import polytask as pt
from claims.claim import Rows, Verdict, data
from polytask.recipes import tfew
from polytask.tasks.scorers import score
from polytask.tasks.templates import Prompt, render

PAPER = "Liu et al. 2022"
CLAIM = "(IA)^3 by one fixed recipe beats in-context learning with the same 32 examples by 5 points and costs less"
TASKS = ("cr_polarity", "hate_offensive", "blimp_pairs")
SEEDS = (0, 1)
EXAMPLES, TEST = 32, 400


@cache
def base() -> pt.Backbone:
    return pt.load("polytask-base")


def few(name: str, seed: int) -> pt.Task:
    folder = data()
    assert folder is not None
    task = pt.Task.read(folder / name)
    drawn = random.Random(seed).sample(task.train, EXAMPLES)
    return replace(task, train=tuple(drawn), validation=(), test=task.test[:TEST], demonstrations=())


def length(said: str) -> int:
    return len(base().tokenizer(said)["input_ids"])


def trained(name: str, seed: int) -> dict[str, Any]:
    task = few(name, seed)
    settings = tfew.settings(EXAMPLES, seed=seed)
    adapter = pt.adapt(base(), task, tfew.METHOD, settings=settings, reading=tfew.READING)
    scores = adapter.card.scores
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "before": scores["baseline"].value,
        "tokens": mean(length(render(task, e).text) for e in task.test),
        "parameters": adapter.card.trained_parameters,
        "seconds": adapter.card.seconds,
    }


def shown(name: str, seed: int) -> dict[str, Any]:
    task = few(name, seed)
    options = [label.name for label in task.labels]
    room = base().max_length - max(length(f" {option}") for option in options) - 1  # a token that ends the answer
    prompts: list[list[Prompt]] = []
    for example in task.test:
        every = (render(task, example, demonstrations=k, seed=seed) for k in range(EXAMPLES + 1))
        prompts.append([*takewhile(lambda prompt: length(prompt.text) <= room, every)])
    asks = [pt.Ask(fit[-1].text) for fit in prompts]
    engine = pt.Engine(base())
    of_each = [engine.logprobs(asks, [prompts[0][0].lead + option] * len(asks)) for option in options]
    found: dict[str, Any] = {
        "tokens": mean(length(fit[-1].text) for fit in prompts),
        "shown": mean(len(fit) - 1 for fit in prompts),
    }
    for way in ("raw", "length"):
        outputs = []
        for log_p in zip(*of_each, strict=True):
            each = [float(t.sum() if way == "raw" else t.mean()) for t in log_p]
            outputs.append(options[each.index(max(each))])
        found[way] = score(task, outputs, task.test, resamples=0).value
    return found


def measure(rows: Rows) -> Verdict:
    keys = [{"task": name, "seed": seed} for name in TASKS for seed in SEEDS]
    learned = [rows.get(lambda k=k: trained(k["task"], k["seed"]), way="tfew", **k) for k in keys]
    context = [rows.get(lambda k=k: shown(k["task"], k["seed"]), way="in context", **k) for k in keys]
    T_Few = 100 * mean(row["test"] for row in learned)
    ICL = 100 * max(mean(row[way] for row in context) for way in ("raw", "length"))
    cost = mean(row["tokens"] for row in context) / mean(row["tokens"] for row in learned)
    share = 100 * learned[0]["parameters"] / base().parameters
    return Verdict(
        f"{len(TASKS)} tasks x {len(SEEDS)} seeds: T-Few {T_Few:.1f}, in context {ICL:.1f} ({T_Few - ICL:+.1f} points; "
        f"{mean(row['shown'] for row in context):.0f} of {EXAMPLES} examples fit), the decoder alone "
        f"{100 * mean(row['before'] for row in learned):.1f}; {share:.3f} % trained; a prompt in context is {cost:.1f} "
        "times as long",
        T_Few - ICL >= 5 and cost > 1,
    )
