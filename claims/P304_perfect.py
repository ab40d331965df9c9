"""PERFECT: Karimi Mahabadi et al. 2022, arXiv 2204.01172. See `claims.short`.

The paper learns label embeddings at mask tokens and adapters from 16 examples a label, without template or words for
labels, and compares with prompts whose labels a masked language model fills in, several tokens one after the other.
Here: 32 examples in all and 32 held out, bottleneck adapters behind the feed-forward networks on all sides. MiniLM has
no language-model head and the embedded decoder no mask token, so prompts whose label is written are the decoder's, and
the backbones differ. What each way is better than an ordinary head on its own backbone, trained on the same examples,
is therefore what counts; the time to answer is that of the whole, on the processor, in turns.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from random import Random
from statistics import median
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict

PAPER = "Karimi Mahabadi et al. 2022"
CLAIM = (
    "label embeddings at masks beat prompts with written labels by 3 points with 32 examples, and are 10 times as fast"
)
EXAMPLES, EPOCHS, BATCH = 32, 15, 8
ROUNDS = 5
DECODER = "polytask-base"
# The backbone, how answers are read, and two tries of the adapters' and the head's rate. The paper's label embeddings
# have a rate 1,000 times the adapters'.
WAYS: dict[str, tuple[str, pt.Reading, tuple[tuple[float, float], ...]]] = {
    "masks": ("minilm", pt.Reading(pool="masks"), ((1e-3, 1e-2), (1e-3, 1e-1))),
    "mean": ("minilm", pt.Reading(pool="mean"), ((1e-3, 1e-3), (3e-3, 1e-3))),
    "written": (DECODER, pt.Reading(in_text="yes", decide="write"), ((2e-3, 1e-3), (6e-3, 1e-3))),
    "last": (DECODER, pt.Reading(pool="last"), ((1e-3, 1e-3), (3e-3, 1e-3))),
}


@cache
def base(name: str) -> pt.Backbone:
    return pt.load(name)


def few(name: str, seed: int) -> pt.Task:
    task = short.few(name, EXAMPLES, seed)
    held = short.whole(name).validation
    return replace(task, validation=tuple(Random(seed).sample(held, min(EXAMPLES, len(held)))))


def fit(name: str, way: str, rates: tuple[float, float], seed: int) -> pt.Adapter:
    backbone, reading, _ = WAYS[way]
    lr, head_lr = rates
    # What a prompt is cut to is left as it is: it has an instruction and labels too.
    limit = None if reading.in_text == "yes" else short.LIMIT
    settings = short.settings(lr, seed, head_lr=head_lr, epochs=EPOCHS, batch=BATCH, patience=EPOCHS, limit=limit)
    return pt.adapt(base(backbone), few(name, seed), "pfeiffer", settings=settings, reading=reading)


def run(name: str, way: str, rates: tuple[float, float], seed: int) -> dict[str, Any]:
    card = fit(name, way, rates, seed).card
    return {
        "metric": card.scores["test"].metric,
        "test": card.scores["test"].value,
        "validation": card.scores["validation"].value,
        "parameters": card.trained_parameters,
        "seconds": card.seconds,
    }


def answering(name: str, best: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Milliseconds an answer of the test split takes by masks and written, and how many times as fast masks are."""
    seconds: dict[str, list[float]] = {way: [] for way in best}
    asked = short.task(name).test
    engines = {}
    for way, rates in best.items():
        adapter = fit(name, way, rates, short.SEEDS[0])
        engine = pt.Engine(base(WAYS[way][0]), adapters=[adapter])
        engines[way] = engine, [pt.Request(e.input, adapter=adapter.id) for e in asked]
    for _ in range(1 + ROUNDS):
        for way, (engine, requests) in engines.items():
            began = time.process_time()
            engine.answer(requests, short.LIMIT)
            seconds[way].append(time.process_time() - began)
    each = {way: [1000 * s / len(asked) for s in found[1:]] for way, found in seconds.items()}  # the first warms up
    ratios = [slow / fast for slow, fast in zip(each["written"], each["masks"], strict=True)]
    return {"faster": median(ratios), **{f"ms {way}": median(found) for way, found in each.items()}}


def measure(rows: Rows) -> Verdict:
    best: dict[str, tuple[float, float]] = {}
    score = {}
    for way, (_, _, tries) in WAYS.items():

        def row(name: str, rates: tuple[float, float], seed: int, way: str = way) -> dict[str, Any]:
            return rows.get(lambda: run(name, way, rates, seed), task=name, way=way, rates=[*rates], seed=seed)

        best[way], found = short.picked(tries, row)
        score[way] = short.points(found)
    raced = {way: best[way] for way in ("masks", "written")}
    speed = rows.get(lambda: answering(short.PICKED_ON, raced), way="speed", rates=[[*r] for r in raced.values()])
    masks, written = score["masks"] - score["mean"], score["written"] - score["last"]
    return Verdict(
        f"{len(short.TASKS)} tasks x {len(short.SEEDS)} seeds, {EXAMPLES} examples: masks {score['masks']:.1f} "
        f"({masks:+.1f} to a mean-pooled head on the encoder), written {score['written']:.1f} ({written:+.1f} to a "
        f"last-token head on the decoder); an answer takes {speed['ms masks']:.2f} ms by masks and "
        f"{speed['ms written']:.2f} ms written ({speed['faster']:.1f} times)",
        masks - written >= 3 and speed["faster"] >= 10,
    )
