"""Training LoRA (r = 8, α = 16, query and value) on MiniLM: examples per second against PEFT + Hugging Face Trainer.

    a   polytask's loop
    b1  PEFT + Trainer, fp32, every text padded to 128 tokens beforehand
    b2  PEFT + Trainer, fp32, each batch padded to its longest text (the Trainer's collator)
    c   b2 with bf16 autocast

One turn is one epoch over the same texts in batches of 32. Start-up, tokenising and the probe are outside; `--scores`
measures whole runs, with them inside, and the scores that they end with.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from typing import Any

import torch

from bench import data, peer
from bench.measure import Quartiles, Row, Samples, Window, keep, options, turns
from polytask.backbones import Backbone, heads, load
from polytask.methods import build
from polytask.recipes.adapt import predict
from polytask.tasks import Task
from polytask.training import Job, Settings, train
from polytask.training.learner import prepare
from polytask.training.loop import Loop

PEER_RATES = (5e-4, 2e-3, 5e-3)  # the peer's learning rate is the one of these that does best on validation


def epoch(base: Backbone, job: Job, window: Window) -> float:
    """One epoch of polytask's loop."""
    learner = prepare(base, job)
    loop = Loop(base, [learner], lambda event: None, None, None)
    with window:
        loop.run()
    return float(len(job.task.train))


def speed(base: Backbone, task: Task, o: argparse.Namespace) -> Samples:
    job = Job(task, build("lora"), heads.design(task), Settings(epochs=1))
    texts = [e.text for e in task.train]
    labels = [task.targets.index(str(e.output)) for e in task.train]
    static, dynamic = peer.rows(texts, labels, pad_to=128), peer.rows(texts, labels, pad_to=None)
    model = peer.lora_model(len(task.targets))

    def other(rows: list[dict[str, Any]], bf16: bool) -> Any:
        def turn(window: Window) -> float:
            with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints its summary
                peer.trainer(model, rows, bf16=bf16, window=window).train()
            return float(len(rows))

        return turn

    variants = {
        "a": lambda window: epoch(base, job, window),
        "b1": other(static, False),
        "b2": other(dynamic, False),
        "c": other(dynamic, True),
    }
    return turns(variants, rounds=o.rounds, limit=o.limit, clock=o.clock)


def scores(base: Backbone, task: Task, epochs: int, seeds: int) -> list[dict[str, Any]]:
    """Whole runs to the end with equal epochs: test scores and wall seconds (tokenising and the probe inside)."""
    number = {name: i for i, name in enumerate(task.targets)}
    split = {s: ([e.text for e in task.split(s)], [number[str(e.output)] for e in task.split(s)]) for s in
             ("train", "validation", "test")}  # fmt: skip
    rate, best = PEER_RATES[0], -1.0
    for candidate in PEER_RATES:
        found, _ = _peer_run(split, len(number), epochs, candidate, 0, "validation", bf16=True)
        rate, best = (candidate, found) if found > best else (rate, best)
    runs = []
    for seed in range(seeds):
        began = time.perf_counter()
        job = Job(task, build("lora"), heads.design(task), Settings(epochs=epochs, patience=epochs, seed=seed))
        learned = train(base, [job])[0]
        seconds = time.perf_counter() - began
        run = {"seed": seed, "variant": "a", "score": _score(base, task, job, learned), "seconds": seconds,
               "probe": learned.probe}  # fmt: skip
        runs.append(run)
        for variant, bf16 in (("b2", False), ("c", True)):
            found, seconds = _peer_run(split, len(number), epochs, rate, seed, "test", bf16=bf16)
            runs.append({"seed": seed, "variant": variant, "score": found, "seconds": seconds, "lr": rate})
        for run in runs[-3:]:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in run.items()}, flush=True)
    return runs


def _score(base: Backbone, task: Task, job: Job, learned: Any) -> float:
    from polytask.adapters import Adapter, Card

    tensors = {n: t.detach().float().contiguous() for n, t in learned.tensors.items()}
    card = Card(name=task.name, task=task.card())
    adapter = Adapter("lora", job.method.hyperparameters(), tensors, base.card(), card, job.head)
    outputs = predict(base, adapter, task.test)
    return sum(o == e.output for o, e in zip(outputs, task.test, strict=True)) / len(outputs)


def _peer_run(
    split: dict[str, tuple[list[str], list[int]]],
    labels: int,
    epochs: int,
    lr: float,
    seed: int,
    on: str,
    *,
    bf16: bool,
) -> tuple[float, float]:
    began = time.perf_counter()
    rows = peer.rows(*split["train"], pad_to=None)
    trainer = peer.trainer(peer.lora_model(labels, seed=seed), rows, bf16=bf16, epochs=epochs, lr=lr, seed=seed)
    trainer.train()
    seconds = time.perf_counter() - began
    found = trainer.predict(peer.rows(*split[on], pad_to=None)).predictions.argmax(-1)
    return float((torch.as_tensor(found) == torch.tensor(split[on][1])).float().mean()), seconds


def main() -> None:
    o = options(__doc__ or "", rounds=7, limit=240.0, examples=640, tasks="banking77_intent,scicite", scores=False,
                epochs=8, scored=1500, seeds=2)  # fmt: skip
    base = load("minilm")
    if o.scores:
        task = data.part(data.task("banking77_intent"), o.scored, held=True, test=500)
        runs = scores(base, task, o.epochs, o.seeds)
        rows = []
        for what, unit in (("score", "accuracy"), ("seconds", "s")):
            for variant in ("a", "b2", "c"):
                values = [r[what] for r in runs if r["variant"] == variant]
                rows.append(
                    Row.of("train", f"{what} of {variant}, {o.epochs} epochs", Quartiles.of(values, len(values)), unit)
                )
        keep("train_scores", rows, {}, {"runs": runs})
        return
    rows, kept = [], {}
    for name in o.tasks.split(","):
        task = data.part(data.task(name), o.examples)
        kept[task.name] = found = speed(base, task, o)
        rows += [
            Row.of("train", f"{task.name}: polytask to {said}", found.ratio(variant, "a"), target=target,
                   note=f"{1 / found.cost(variant).median:.0f} and {1 / found.cost('a').median:.0f} examples/s")
            for variant, said, target in (
                ("b1", "PEFT fp32, padded to 128", 4.0),
                ("b2", "PEFT fp32, padded by batch", 4.0),
                ("c", "PEFT bf16, padded by batch", 2.0),
            )
        ]  # fmt: skip
    keep("train", rows, kept, {"dtype": str(base.dtype)})


if __name__ == "__main__":
    main()
