"""Skill grafting: Panigrahi et al. 2023, arXiv 2302.06600. See `claims.short`.

The paper takes a hundredth of a percent of the differences that fine-tuning made in models of some 100 million
parameters, and finds more than 95 % of its accuracy kept and the calibration error 40 to 90 % lower. Here: a hundredth
of the weights in MiniLM's blocks; embeddings stay, as in the authors' runs. A graft is made of the training that it is
compared with, at the rate that was picked for that, and after its last epoch, where fine-tuning keeps its best one. A
graft has a trained head too; so the head alone, on frozen features, is given beside, and a graft that is not above it
does not count. The calibration error has ten bins of equal width.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import polytask as pt
from claims import short
from claims.claim import Rows, Verdict

PAPER = "Panigrahi et al. 2023"
CLAIM = "a graft of 1 % of the weights keeps 95 % of what fine-tuning scores, and is better calibrated"
RATES = (1e-4, 3e-4)
WAYS: dict[str, dict[str, Any]] = {"full": {}, "full@graft": {"select.share": 0.01, "select.steps": 2}}
BINS = 10


def calibration_error(sure: list[float], right: list[bool]) -> float:
    """Σ over bins of the share of answers in it times |accuracy − mean probability| there."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for p, hit in zip(sure, right, strict=True):
        bins.setdefault(min(int(p * BINS), BINS - 1), []).append((p, hit))
    return sum(abs(sum(hit - p for p, hit in found)) for found in bins.values()) / len(sure)


def run(name: str, way: str, rate: float, seed: int) -> dict[str, Any]:
    task, base = short.task(name), short.base()
    hyper = {"weights": short.BLOCKS, **WAYS[way]}
    adapter = pt.adapt(base, task, way, hyperparameters=hyper, settings=short.settings(rate, seed))
    asked = [pt.Request(e.input, adapter=adapter.id) for e in task.test]
    answers = pt.Engine(base, adapters=[adapter]).answer(asked, short.LIMIT)
    scores = adapter.card.scores
    body = {n: t for n, t in adapter.tensors.items() if n.startswith(":")}
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "head": scores["baseline"].value,
        "error": calibration_error(
            [a.probability or 0.0 for a in answers],
            [a.output == e.output for a, e in zip(answers, task.test, strict=True)],
        ),
        "numbers": sum(int(t.count_nonzero()) for t in body.values()),
        "seconds": adapter.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    def row(way: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        return rows.get(lambda: run(name, way, rate, seed), task=name, way=way, rate=rate, seed=seed)

    rate, full = short.picked(RATES, lambda *key: row("full", *key))
    graft = {name: [row("full@graft", name, rate, seed) for seed in short.SEEDS] for name in short.TASKS}
    all_, few, head = short.points(full), short.points(graft), short.points(full, "head")
    error, less = short.points(full, "error"), short.points(graft, "error")
    numbers = mean(row["numbers"] for mine in graft.values() for row in mine)
    return Verdict(
        f"{len(short.TASKS)} tasks x {len(short.SEEDS)} seeds: grafts of {numbers:,.0f} numbers {few:.1f}, fine-tuning "
        f"{all_:.1f} ({100 * few / all_:.1f} % kept), the head alone {head:.1f}; calibration error {less:.1f} against "
        f"{error:.1f} points",
        few >= 0.95 * all_ and few > head and less < error,
    )
