"""Half fine-tuning: Hui et al. 2024, arXiv 2404.18466. See `claims.short`.

The paper fine-tunes large decoders over a sequence of rounds, each from where the last one ended, with another half of
each block's matrices in each. Here: three tasks one after the other on MiniLM, `full@half` against `full`, the weights
of the blocks (the embeddings, half of MiniLM, would be trained by both). After each round what it learnt is added to
the backbone, and its head is kept; forgotten is what a task scored after its own round, less what its head scores on
the backbone after the last one. Rates are picked by the mean validation score of all tasks at the end. Times are
processor time of epochs, after the first one of each round.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from polytask.methods import build
from polytask.recipes.adapt import measure as score

PAPER = "Hui et al. 2024"
CLAIM = "training half of the matrices in each round forgets less and takes about 30 % less time"
WAYS = ("full", "full@half")
RATES = (1e-4, 3e-4)
EPOCHS = 3
SAVED = 0.25  # of the time, which is about 30 %


def after(base: pt.Backbone, adapter: pt.Adapter) -> pt.Backbone:
    """The backbone with an adapter's differences in its weights, rounded as they are when the adapter is used."""
    model = copy.deepcopy(base.model)
    body: Any = getattr(model, "base_model", model)
    for name, Δθ in adapter.tensors.items():
        if name.startswith(":"):
            path, _, parameter = name[1:].rpartition("/")
            θ = body.get_submodule(path).get_parameter(parameter)
            θ.data = (θ.data.float() + Δθ).to(θ.dtype)
    return pt.Backbone(model, base.tokenizer, base.name, precision="bf16" if base.dtype.itemsize == 2 else "fp32")


def reader(adapter: pt.Adapter, base: pt.Backbone) -> pt.Adapter:
    """An adapter's head alone, on another backbone."""
    head = {n: t for n, t in adapter.tensors.items() if n.startswith("head/")}
    bare = build("head").hyperparameters()
    return replace(adapter, method="head", hyperparameters=bare, tensors=head, backbone=base.card())


def run(way: str, rate: float, seed: int) -> dict[str, Any]:
    base = short.base()
    learnt: dict[str, pt.Adapter] = {}
    first: dict[str, float] = {}
    seconds = 0.0
    for i, name in enumerate(short.TASKS):
        task = short.task(name)
        ends: list[float] = []

        def on_event(event: Any, ends: list[float] = ends) -> None:
            if event.kind == "score":
                ends.append(time.process_time())

        # Without a validation split the last step is kept, so that no round ends where it began.
        adapter = pt.adapt(
            base,
            replace(task, validation=(), test=()),
            way,
            hyperparameters={"weights": short.BLOCKS},
            settings=short.settings(rate, len(short.TASKS) * seed + i, epochs=EPOCHS),
            on_event=on_event,
        )
        seconds += (ends[-1] - ends[0]) / (len(ends) - 1)
        base, learnt[name] = after(base, adapter), adapter
        first[name] = score(base, reader(adapter, base), task, task.test, short.LIMIT).value

    def last(name: str, split: str) -> float:
        task = short.task(name)
        found = score(base, reader(learnt[name], base), task, task.split(split), short.LIMIT)
        return found.value

    end = {name: last(name, "test") for name in short.TASKS}
    return {
        "first": first,
        "test": end,
        "forgotten": mean(first[name] - end[name] for name in short.TASKS[:-1]),
        "validation": mean(last(name, "validation") for name in short.TASKS),
        "seconds": seconds,
    }


def measure(rows: Rows) -> Verdict:
    end, forgotten, seconds = {}, {}, {}
    for way in WAYS:

        def row(rate: float, seed: int, way: str = way) -> dict[str, Any]:
            return rows.get(lambda: run(way, rate, seed), way=way, rate=rate, seed=seed)

        best = max(RATES, key=lambda rate: row(rate, short.SEEDS[0])["validation"])
        mine = [row(best, seed) for seed in short.SEEDS]
        end[way] = 100 * mean(mean(r["test"].values()) for r in mine)
        forgotten[way] = 100 * mean(r["forgotten"] for r in mine)
        seconds[way] = mean(r["seconds"] for r in mine)
    saved = 1 - seconds["full@half"] / seconds["full"]
    return Verdict(
        f"{len(short.TASKS)} rounds x {len(short.SEEDS)} seeds: half forgets {forgotten['full@half']:.1f} points of an "
        f"earlier task and ends at {end['full@half']:.1f}, all forgets {forgotten['full']:.1f} and ends at "
        f"{end['full']:.1f}; half takes {100 * saved:.0f} % less time",
        forgotten["full@half"] < forgotten["full"] and end["full@half"] > end["full"] and saved >= SAVED,
    )
