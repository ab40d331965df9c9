"""Small tasks and training jobs, and what it means that two trainings came to the same."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiny
import torch

from polytask.backbones import heads
from polytask.methods import build
from polytask.tasks import Example, Label, Task
from polytask.training import Job, Learned, Settings

TOKENS = tiny.words(*"abcdefgh")
LORA = {"sites": ["*.attn.[qkvo]", "*.mlp.*"]}


def task_of(kind: str = "classification", n: int = 48, *, length: int = 12, seed: int = 0, held: int = 32, **more: Any):
    """Which of a, b, c and d stands among other words: as a label, labels, a number, tags, or whether two agree."""
    draw = random.Random(seed)
    labels = {"classification": "abcd", "multilabel": "abcd", "tagging": "X", "regression": "", "similarity": ""}[kind]

    def text(key: str) -> list[str]:
        words = [draw.choice("efgh") for _ in range(draw.randint(length // 2, length))]
        words[draw.randrange(len(words))] = key
        return words

    def row(i: int) -> Example:
        key = draw.choice("abcd")
        words = text(key)
        if kind == "tagging":
            return Example(str(i), tuple(words), tuple("B-X" if word in "abcd" else "O" for word in words))
        if kind == "similarity":
            other = draw.choice("abcd")
            return Example(str(i), " ".join(words), float(key == other), " ".join(text(other)))
        if kind == "multilabel":
            second = draw.choice("abcd")
            return Example(str(i), " ".join([*words, second]), tuple(sorted({key, second})))
        output: str | float = key if kind == "classification" else float("abcd".index(key))
        return Example(str(i), " ".join(words), output)

    train_rows, held_rows = (tuple(row(i) for i in range(k)) for k in (n, held))
    return Task(f"{kind}-{seed}", kind, train_rows, held_rows, labels=tuple(map(Label, labels)), **more)  # type: ignore


def job_of(
    task: Task, method: str = "lora", hyper: dict[str, Any] | None = None, pool: str = "mean", **more: Any
) -> Job:
    pair = more.pop("pair", "separate")
    causal = more.pop("causal", True)
    settings = Settings(**{"epochs": 3, "batch": 16, "lr": 5e-3, "patience": 99, **more})
    return Job(task, build(method, hyper or {}), heads.design(task, pool=pool, pair=pair, causal=causal), settings)


def same(a: Learned, b: Learned) -> None:
    """Bit for bit, but for the clock. (Without a validation split the last tensors are kept: those are compared.)"""
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name
    assert (a.validation, a.probe, a.examples) == (b.validation, b.probe, b.examples)
    assert timeless(a) == timeless(b)


def timeless(learned: Learned) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in learned.history]


def environment(**more: str) -> dict[str, str]:
    """For a child process, which finds this folder's modules."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def write_tasks(folder: Path, names: Iterable[str], n: int = 40) -> None:
    """A folder for each name with a little task, as the real ones of claims have; its test split is its validation."""
    for seed, name in enumerate(names):
        own = folder / name
        own.mkdir(parents=True)
        made = task_of(n=n, length=6, seed=seed, held=12)
        said = {"name": name, "kind": "classification", "labels": [*"abcd"], "metric": "accuracy"}
        (own / "task.json").write_text(json.dumps(said))
        for split, rows in (("train", made.train), ("validation", made.validation), ("test", made.validation)):
            lines = [json.dumps({"id": f"{split}-{e.id}", "input": e.input, "output": e.output}) for e in rows]
            (own / f"{split}.jsonl").write_text("\n".join(lines))
