"""Eight adapters of eight tasks trained at once over one frozen pass, against one after the other.

LoRA on MiniLM, the same examples in the same batches, so that each task's losses are the same; one turn is one epoch of
all eight. `--scores` trains to the end both ways and compares validation scores.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench import data
from bench.measure import Row, Samples, Window, keep, options, turns
from claims.tasks import EIGHT
from polytask.backbones import Backbone, heads, load
from polytask.methods import build
from polytask.training import Job, Settings, train
from polytask.training.learner import prepare
from polytask.training.loop import Event, Loop


def made(batch: int, examples: int, epochs: int = 1, *, held: bool = False) -> list[Job]:
    jobs = []
    for given in data.tasks(EIGHT):
        task = data.part(given, examples, held=held)
        jobs.append(Job(task, build("lora"), heads.design(task), Settings(epochs=epochs, batch=batch, patience=epochs)))
    return jobs


def epoch(base: Backbone, jobs: list[Job], window: Window, losses: dict[str, list[float]]) -> float:
    """One epoch of all jobs at once; `losses` gets each task's, step by step."""

    def heard(event: Event) -> None:
        if event.kind == "step":
            losses.setdefault(jobs[event.job].task.name, []).append(event.loss)

    learners = [prepare(base, job) for job in jobs]
    loop = Loop(base, learners, heard, None, None)
    with window:
        loop.run()
    return float(sum(len(job.task.train) for job in jobs))


def speed(base: Backbone, batch: int, o: argparse.Namespace) -> tuple[Samples, float]:
    """Samples, and the largest difference of a step's loss between the two ways, relative to the loss."""
    jobs = made(batch, o.examples)
    seen: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})

    def together(window: Window) -> float:
        seen[0].clear()
        return epoch(base, jobs, window, seen[0])

    def apart(window: Window) -> float:
        seen[1].clear()
        units = seconds = cpu = others = 0.0
        for job in jobs:
            one = Window()
            units += epoch(base, [job], one, seen[1])
            seconds, cpu, others = seconds + one.seconds, cpu + one.cpu, others + one.others * one.seconds
        window.seconds, window.cpu, window.others = seconds, cpu, others / seconds
        return units

    samples = turns({"together": together, "apart": apart}, rounds=o.rounds, limit=o.limit, clock=o.clock)
    both = [(a, b) for name in seen[0] for a, b in zip(seen[0][name], seen[1][name], strict=True)]
    return samples, max(abs(a - b) / max(abs(b), 1e-6) for a, b in both)


def main() -> None:
    o = options(__doc__ or "", rounds=7, limit=200.0, examples=256, scores=False, epochs=6)
    base = load("minilm")
    if o.scores:
        jobs = made(32, o.examples, o.epochs, held=True)
        at_once = train(base, jobs)
        alone = [train(base, [job])[0] for job in jobs]
        runs = [
            {"task": j.task.name, "together": a.validation, "apart": b.validation, "probe": a.probe}
            for j, a, b in zip(jobs, at_once, alone, strict=True)
        ]
        mean = sum(r["together"] - r["apart"] for r in runs) / len(runs)
        spread = sorted(r["together"] - r["apart"] for r in runs)
        row = Row("together", "validation score, together less apart", mean, spread[0], spread[-1], "", None)
        keep("together_scores", [row], {}, {"runs": runs})
        return
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    for batch in (32, 8):
        found, difference = speed(base, batch, o)
        kept[f"batch {batch}"] = found
        note = f"{1 / found.cost('together').median:.0f} and {1 / found.cost('apart').median:.0f} examples/s"
        what = f"8 tasks at once to one after the other, batch {batch}"
        rows.append(Row.of("together", what, found.ratio("apart", "together"), target=1.5, note=note))
        rows.append(Row("together", f"largest difference of a step's loss, batch {batch}", 100 * difference, 0, 0, "%"))
    keep("together", rows, kept, {"dtype": str(base.dtype)})


if __name__ == "__main__":
    main()
