"""What a library is worth for a new task with few examples: `adapt --reuse` against training from nothing.

    POLYTASK_DATA=... python -m bench.reuse

An adapter (LoRA, what `auto` trains, on at most EXAMPLES) for each of the suites in SUITES with MiniLM. Each of TARGETS
is then taken as new, with all other adapters as the library: n examples, drawn by the seed so that labels are as even
as can be, no validation split; scores on at most TEST test examples, in the task's own metric. `scratch` is the same
LoRA from nothing, `head` a head on the backbone's states. Rows stand in bench/results/reuse.jsonl and are not measured
again.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import polytask as pt
from polytask.adapters import Adapter
from polytask.recipes.adapt import Plan, adapt_many, automatic
from polytask.recipes.reuse import reuse

SUITES = (
    *("banking77_intent", "blimp_pairs", "btc_ner", "clinc150_intent", "cr_polarity", "csabstruct", "ewt_upos"),
    *("goemotions", "hate_offensive", "scicite", "sgd_intent", "sib200_en_topic", "skillspan_skill", "snips_slots"),
)
TARGETS = ("cr_polarity", "hate_offensive", "scicite", "csabstruct", "sib200_en_topic", "sgd_intent")
SIZES, SEEDS = (8, 32), (0, 1)
EXAMPLES, TEST, EPOCHS = 400, 1000, 5
RESULTS = Path(__file__).parent / "results/reuse.jsonl"


def task_of(data: Path, name: str) -> pt.Task:
    task = pt.Task.read(data / "tasks" / name)
    return replace(task, train=task.train[:EXAMPLES], validation=task.validation[:100], test=task.test[:TEST])


def few(task: pt.Task, n: int, seed: int) -> pt.Task:
    """n examples, one of each label in turn."""
    by_label: dict[str, list[Any]] = defaultdict(list)
    for example in random.Random(seed).sample(list(task.train), len(task.train)):
        by_label[str(example.output)].append(example)
    turns = [row[i] for i in range(n) for row in by_label.values() if i < len(row)]
    return replace(task, train=tuple(turns[:n]), validation=())


def library(base: pt.Backbone, data: Path) -> dict[str, Adapter]:
    """An adapter for each suite, kept in a temporary folder between runs."""
    folder = Path(tempfile.gettempdir()) / f"polytask-reuse-{base.fingerprint[:8]}-{base.precision}"
    found = {}
    for name in SUITES:
        if not (folder / name).exists():
            plan = automatic(base, Plan(replace(task_of(data, name), test=()), settings=pt.Settings(epochs=EPOCHS)))
            [made] = adapt_many(base, [plan])
            made.save(folder / name)
        found[name] = Adapter.load(folder / name)
    return found


def measure(
    base: pt.Backbone, known: dict[str, Adapter], task: pt.Task, name: str, n: int, seed: int
) -> dict[str, Any]:
    new = few(task, n, seed)
    settings = pt.Settings(seed=seed)
    plan = automatic(base, Plan(new, settings=settings))
    scratch = pt.adapt(base, new, "lora", hyperparameters=plan.hyperparameters, settings=plan.settings)
    others = [one for suite, one in known.items() if suite != name]
    used = reuse(base, new, others, settings=settings)
    score = {
        "scratch": scratch.card.scores["test"].value,
        "head": scratch.card.scores["baseline"].value,
        "reuse": used.adapter.card.scores["test"].value,
    }
    return {
        "task": name,
        "n": n,
        "seed": seed,
        **score,
        "taken": used.taken,
        "seconds": sum(w.seconds for w in used.ways),
    }


def main() -> None:
    data = Path(os.environ["POLYTASK_DATA"])
    base = pt.load("minilm")
    known = library(base, data)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for n in SIZES:
        for name in TARGETS:
            for seed in SEEDS:
                if not any((row["task"], row["n"], row["seed"]) == (name, n, seed) for row in rows):
                    rows.append(measure(base, known, task_of(data, name), name, n, seed))
                    print(rows[-1], flush=True)
                    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print("| task | " + " | ".join(f"n = {n}: head | scratch | reuse" for n in SIZES) + " |")
    print("| --- |" + " --- |" * 3 * len(SIZES))
    for name in (*TARGETS, "mean"):
        cells = []
        for n in SIZES:
            own = [row for row in rows if row["n"] == n and name in (row["task"], "mean")]
            cells += [f"{100 * mean(row[way] for row in own):.1f}" for way in ("head", "scratch", "reuse")]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
