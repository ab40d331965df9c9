"""Training on answers in text: tokens per second with examples packed side by side in rows, against padded rows.

csabstruct, scitldr_summary and gsm8k as one task of 50 to 512 tokens an example, the embedded decoder, LoRA r = 8 on
query and value, batches of 16 drawn at random. Three ways to run the same batches:

    packed   polytask's: rows as long as the longest example, filled with others (passes.binned)
    padded   each example a row, the whole batch padded to its longest, as a Hugging Face collator does
    near     each example a row, a batch cut into passes of neighbours in length (passes.packs)

One turn is one epoch; tokens are those of the examples, without padding. The losses of a run, step by step, are
compared at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from bench import data
from bench.measure import Row, Window, keep, options, turns
from polytask.backbones import Backbone, load
from polytask.methods import build, passes
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Task
from polytask.training import Job, Settings
from polytask.training.learner import prepare
from polytask.training.loop import Loop

NAMES = ("csabstruct", "scitldr_summary", "gsm8k")


def mixture(n: int) -> Task:
    """n examples, as many of each task as of the others, their instructions in their inputs."""
    examples = []
    for given in data.tasks(NAMES):
        drawn = random.Random(0).sample(given.train, min(n // len(NAMES), len(given.train)))
        for e in drawn:
            output = e.output[0] if isinstance(e.output, tuple) else str(e.output)
            examples.append(Example(e.id, f"{given.instruction}\n\n{e.text}", output=output))
    random.Random(1).shuffle(examples)
    return Task("mixture", "generation", train=tuple(examples), metric="rouge_l")


def alone(lengths: Sequence[int], _owners: Sequence[Any]) -> list[list[int]]:
    return [[i] for i in range(len(lengths))]


def whole(_seats: Any, units: Sequence[Any], _which: Any, *_budget: Any, packable: bool) -> Iterator[list[int]]:
    if units:
        yield list(range(len(units)))


def near(_seats: Any, units: Sequence[Any], _which: Any, *_budget: Any, packable: bool) -> Iterator[list[int]]:
    yield from passes.packs(units)


WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    "packed": {},
    "padded": {"binned": alone, "schedule": whole},
    "near": {"binned": alone, "schedule": near},
}


def epoch(base: Backbone, job: Job, way: str, window: Window) -> tuple[float, list[float]]:
    """One epoch; its tokens, and its losses in nats per answer token."""
    learner = prepare(base, job)
    loop = Loop(base, [learner], lambda event: None, None, None)
    with ExitStack() as stack:
        for name, other in WAYS[way].items():
            stack.enter_context(patch.object(passes, name, other))
        with window:
            loop.run()
    return float(sum(len(unit.ids[0]) for unit in learner.units)), list(learner.losses)


def main() -> None:
    o = options(__doc__ or "", rounds=5, limit=400.0, examples=192)
    base = load("polytask-base")
    task = mixture(o.examples)
    head = Reading(in_text="yes").design(base, task)
    job = Job(task, build("lora", {"sites": ["*.attn.q", "*.attn.v"], "r": 8}), head, Settings(epochs=1, batch=16))
    losses: dict[str, list[float]] = {}

    def turn(way: str) -> Callable[[Window], float]:
        def run(window: Window) -> float:
            tokens, losses[way] = epoch(base, job, way, window)
            return tokens

        return run

    found = turns({way: turn(way) for way in WAYS}, rounds=o.rounds, limit=o.limit, clock=o.clock)
    speed = {way: f"{1 / found.cost(way).median:.0f}" for way in WAYS}
    apart = max(abs(a - b) for a, b in zip(losses["packed"], losses["padded"], strict=True))
    level = sum(losses["padded"]) / len(losses["padded"])
    rows = [
        Row.of(
            "packing",
            "padded to packed",
            found.ratio("padded", "packed"),
            target=1.5,
            note=f"{speed['packed']} and {speed['padded']} tokens/s; losses at most {apart:.4f} of {level:.2f} apart",
        ),
        Row.of("packing", "neighbours in length, padded, to packed", found.ratio("near", "packed"), note=speed["near"]),
    ]
    keep("packing", rows, {"packing": found}, {"dtype": str(base.dtype), "base": base.name, "losses": losses})


if __name__ == "__main__":
    main()
