"""BAM: Zhang et al. 2024, arXiv 2408.08274.

The paper makes copies of one model, trains each on plain text of its own domain, and joins them: their feed-forward
networks become experts, and their attention too, where other upcycling averages it; then all of it is trained. Here:
the embedded decoder, and LoRAs on all linear maps from texts of three domains, which are inputs of tasks: a text's
first words are given, and the loss is that of the others. They are joined by `bam`, or by `bam` in feed-forward
networks alone above the exact mean of the LoRAs' attention. Both are trained for equally many steps on new texts of all
three, which do not say where they are from; the rate is picked by validation. The experts are the same for all seeds.
What differs: only routers are trained, so that attention experts add theirs to the numbers that are; and the model had
such texts as prompts before, each token a tenth of an answer's. A perplexity is exp of the mean loss of a domain's
tokens, and the mean is over domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from statistics import mean
from typing import Any

import torch

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict
from claims.library import Known
from polytask.tasks.templates import render

PAPER = "Zhang et al. 2024"
CLAIM = "experts in attention beside those in feed-forward networks give a lower perplexity than averaged attention"
DOMAINS = ("hate_offensive", "scicite", "gsm8k")  # tweets, papers, sums in words
TEXTS, MIXED, HELD, TEST = 240, 120, 40, 100  # of each domain: for its expert, for the routers, to look at
GIVEN, WORDS = 3, 32
ATTENTION, REST = "*.attn.[qkvo]", "*.mlp.[gud]*"
LORA = {"r": 16, "alpha": 32.0, "sites": (ATTENTION, REST)}
LORA_RATE, RATES = 5e-3, (1e-2, 3e-2)
EPOCHS, ROUNDS = 3, 2  # of an expert, of routers
WAYS = ("attention too", "feed-forward only")


@cache
def base() -> pt.Backbone:
    return pt.load("polytask-base")


def texts(name: str, split: str, begin: int, n: int) -> list[pt.Example]:
    found = []
    for e in short.whole(name).split(split)[begin : begin + n]:
        words = e.text.split()[:WORDS]
        if len(words) > GIVEN:
            found.append(pt.Example(f"{name}/{e.id}", " ".join(words[:GIVEN]), " ".join(words[GIVEN:])))
    return found


def task(examples: Sequence[pt.Example]) -> pt.Task:
    return pt.Task("texts", "generation", tuple(examples))


@cache
def experts() -> tuple[pt.Adapter, ...]:
    def made(name: str) -> pt.Adapter:
        settings = short.settings(LORA_RATE, short.SEEDS[0], epochs=EPOCHS, limit=None)
        return pt.adapt(base(), task(texts(name, "train", 0, TEXTS)), "lora", hyperparameters=LORA, settings=settings)

    return tuple(map(made, DOMAINS))


def part(adapter: pt.Adapter, sites: str) -> pt.Adapter:
    """What a LoRA does at some of its sites."""
    own = {n: t for n, t in adapter.tensors.items() if fnmatchcase(n, f"{sites}/*")}
    return replace(adapter, hyperparameters={**adapter.hyperparameters, "sites": [sites]}, tensors=own)


@cache
def averaged() -> pt.Adapter:
    return pt.merge(base(), [part(one, ATTENTION) for one in experts()], "average", name="attention")[0]


def joined(way: str, rate: float, seed: int) -> pt.Adapter:
    """A mixture of the experts, trained on texts that they have not seen."""
    examples = [e for name in DOMAINS for e in texts(name, "train", TEXTS, MIXED)]  # training shuffles them
    settings = short.settings(rate, seed, epochs=ROUNDS, limit=None)
    if way == "attention too":
        return pt.adapt(base(), task(examples), "bam", settings=settings, over=experts())
    feed = [part(one, REST) for one in experts()]
    return pt.adapt(base(), task(examples), "bam", settings=settings, over=feed, above=[averaged()])


def loss(who: pt.Adapter | pt.Expression | None, name: str, split: str, n: int) -> float:
    """Nats a token of a domain's held-out texts."""
    known = [*experts(), *(part(one, REST) for one in experts()), averaged()]
    own = [who] if isinstance(who, pt.Adapter) else []
    engine = pt.Engine(base(), Known(known), own)
    prompts = [render(task([]), e) for e in texts(name, split, 0, n)]
    asked = who.id if isinstance(who, pt.Adapter) else who
    log_p = engine.logprobs([pt.Ask(p.text, asked) for p in prompts], [p.target for p in prompts])
    return -float(torch.cat(log_p).mean())


def run(way: str, rate: float, seed: int) -> dict[str, Any]:
    made = joined(way, rate, seed)
    return {
        "validation": mean(loss(made, name, "validation", HELD) for name in DOMAINS),
        "test": {name: loss(made, name, "test", TEST) for name in DOMAINS},
        "parameters": made.card.trained_parameters,
        "seconds": made.card.seconds,
    }


def before() -> dict[str, Any]:
    """The decoder alone, the experts' mean, and each expert on its own domain."""
    third = pt.mix({one.id: 1 / len(DOMAINS) for one in experts()})
    return {
        "alone": {name: loss(None, name, "test", TEST) for name in DOMAINS},
        "mean": {name: loss(third, name, "test", TEST) for name in DOMAINS},
        "own": {name: loss(one, name, "test", TEST) for name, one in zip(DOMAINS, experts(), strict=True)},
    }


def perplexity(nats: dict[str, float]) -> float:
    return mean(map(math.exp, nats.values()))


def measure(rows: Rows) -> Verdict:
    found, numbers = {}, {}
    for way in WAYS:

        def row(rate: float, seed: int, way: str = way) -> dict[str, Any]:
            return rows.get(lambda: run(way, rate, seed), way=way, rate=rate, seed=seed)

        best = min(RATES, key=lambda rate: float(row(rate, short.SEEDS[0])["validation"]))
        mine = [row(best, seed) for seed in short.SEEDS]
        found[way], numbers[way] = mean(perplexity(one["test"]) for one in mine), mine[0]["parameters"]
    known = {what: perplexity(nats) for what, nats in rows.get(before, way="before").items() if what != "way"}
    both, one = (found[way] for way in WAYS)
    return Verdict(
        f"{len(DOMAINS)} domains x {len(short.SEEDS)} seeds: perplexity {both:.1f} with attention experts "
        f"({numbers[WAYS[0]]:,} numbers of routers), {one:.1f} with averaged attention ({numbers[WAYS[1]]:,}); the "
        f"decoder alone {known['alone']:.1f}, the experts' mean {known['mean']:.1f}, each on its own domain "
        f"{known['own']:.1f}",
        both < one,
    )
