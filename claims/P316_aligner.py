"""Aligner: Zhou et al. 2023, arXiv 2312.05503. See `claims.short`.

The paper has one token for all blocks and a gate for each head, on decoders of 7 billion parameters and more, and
compares with LoRA in following instructions. Here: labels of sentences, one token against LoRA on query and value,
and against a prompt of two tokens, which trains more numbers than Aligner. The head is trained with each of them;
what the head alone gets on frozen features is given beside, and comparable is who gains at least half of what LoRA
gains over it: where little is to be gained, a distance in points says nothing.
"""

from __future__ import annotations

from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict

PAPER = "Zhou et al. 2023"
CLAIM = "one token for all blocks is comparable to LoRA with at most a hundredth of its numbers"
WAYS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "aligner": ({}, (1e-2, 3e-2)),
    "lora": ({}, (1e-3, 3e-3)),
    "prompt": ({"n": 2}, (1e-2, 3e-2)),
}
COMPARABLE = 0.5  # of LoRA's gain over the head alone


def run(name: str, method: str, rate: float, seed: int) -> dict[str, Any]:
    hyper, _ = WAYS[method]
    task = short.task(name)
    adapter = pt.adapt(short.base(), task, method, hyperparameters=hyper, settings=short.settings(rate, seed))
    scores = adapter.card.scores
    head = sum(t.numel() for n, t in adapter.tensors.items() if n.startswith("head/"))
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "head": scores["baseline"].value,
        "parameters": adapter.card.trained_parameters - head,
        "seconds": adapter.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    found, numbers = {}, {}
    for method, (_, rates) in WAYS.items():

        def row(name: str, rate: float, seed: int, method: str = method) -> dict[str, Any]:
            return rows.get(lambda: run(name, method, rate, seed), task=name, method=method, rate=rate, seed=seed)

        _, found[method] = short.picked(rates, row)
        numbers[method] = found[method][short.PICKED_ON][0]["parameters"]
    score = {method: short.points(mine) for method, mine in found.items()}
    share = numbers["aligner"] / numbers["lora"]
    head = short.points(found["aligner"], "head")
    return Verdict(
        f"{len(short.TASKS)} tasks x {len(short.SEEDS)} seeds: Aligner {score['aligner']:.1f} with "
        f"{numbers['aligner']:,} numbers ({100 * share:.1f} % of LoRA's), LoRA {score['lora']:.1f} with "
        f"{numbers['lora']:,}, a prompt {score['prompt']:.1f} with {numbers['prompt']:,}, the head alone "
        f"{head:.1f}",
        score["aligner"] - head >= COMPARABLE * (score["lora"] - head) and share <= 0.01,
    )
