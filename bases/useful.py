"""What the decoder is good for: five suites as text, before and after a LoRA, against two baselines that learn nothing.

    python -m bases.useful --data $POLYTASK_DATA --base polytask-base      # rows in bases/results/useful.jsonl

copy: the input is the answer. nearest: the answer of the training example whose input is nearest (cosine of MiniLM's
mean embeddings). zero-shot: the decoder alone, asked in superni with two demonstrations of the training split. lora:
after LoRA of rank 8 on query, key, value and output maps, on at most `examples` of the training split. Scores are the
suites' own metrics on the first TEST examples of their test splits; instruction_induction is the mean of its tasks,
each with its own adapter. Rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import polytask as pt
from polytask.backbones import text
from polytask.inference import Engine, Request
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import passes
from polytask.methods.lifting import Plan
from polytask.recipes.reading import Reading
from polytask.tasks.scorers import score
from polytask.tasks.task import Output
from polytask.tasks.templates import parse, render

SUITES = ("snips_slots", "sgd_state", "tldr_command", "scan_simple", "instruction_induction")
TEST, TRAIN, EPOCHS = 200, 1000, 6
FEW = 100  # training examples of each of several tasks
LORA = {"r": 8, "alpha": 16, "sites": ("*.attn.q", "*.attn.k", "*.attn.v", "*.attn.o")}
RESULTS = Path(__file__).parent / "results/useful.jsonl"


def tasks(data: Path, suite: str) -> list[pt.Task]:
    """The suite's tasks, cut to what is measured."""
    folder = data / "tasks" / suite
    paths = sorted(folder.glob("*.json")) if suite == "instruction_induction" else [folder]
    found = [pt.Task.read(path) for path in paths]
    most = TRAIN if len(found) == 1 else FEW
    return [replace(t, train=t.train[:most], validation=t.validation[:100], test=t.test[:TEST]) for t in found]


def nearest(encoder: pt.Backbone, task: pt.Task) -> list[Output]:
    """For each test example, the output of the training example with the nearest input."""
    held, known = (
        torch.nn.functional.normalize(passes.embed(encoder, [e.text for e in part]), dim=-1)
        for part in (task.test, task.train)
    )
    outputs = [e.output for e in task.train]
    found = [outputs[i] for i in (held @ known.T).argmax(-1).tolist()]
    if task.kind != "tagging":
        return [one[0] if isinstance(one, tuple) else str(one) for one in found]
    return [fitted(one, len(e.input)) for one, e in zip(found, task.test, strict=True) if isinstance(one, tuple)]


def fitted(tags: Sequence[str], length: int) -> tuple[str, ...]:
    """Tags of another text: as many as this one has words."""
    return (*tags[:length], *["O"] * (length - len(tags)))


def copied(task: pt.Task) -> list[Output]:
    """The input as the answer."""
    return [parse(task, e.text, e) for e in task.test]


def zero_shot(base: pt.Backbone, task: pt.Task) -> list[Output]:
    """What the decoder alone answers after two demonstrations, which stand in the instruction as superni shows them."""
    shown = task.demonstrations[:2] or task.train[:2]
    told = replace(task, demonstrations=shown)
    prompts = [render(told, e, "superni", demonstrations=2) for e in task.test]
    head = text.design(task, "superni", decide="write", limit=1024)
    asked = text.encode(base, text.with_room(head, 128), [replace(p, answer=None) for p in prompts])
    rule = Sampling(max_tokens=128, stop=("\n\n",))
    written = generate(Plan(base, []), [Prompt(a.ids, None, rule, a.lead) for a in asked])
    return [parse(task, w.text, e) for w, e in zip(written, task.test, strict=True)]


def adapted(base: pt.Backbone, task: pt.Task) -> tuple[list[Output], float]:
    """What it answers after LoRA, and the share of its parameters that was trained."""
    settings = pt.Settings(epochs=EPOCHS if len(task.train) >= TRAIN else 10, lr=5e-3, batch=16)
    skill = pt.adapt(
        base, replace(task, test=()), "lora", hyperparameters=LORA, settings=settings, reading=Reading(in_text="yes")
    )
    engine = Engine(base, adapters=[skill])
    answers = engine.answer([Request(e.input, e.pair, skill.id) for e in task.test])
    return [a.output for a in answers if a.output is not None], skill.card.trained_parameters / base.parameters


def measure(data: Path, base: pt.Backbone, encoder: pt.Backbone, suite: str) -> dict[str, Any]:
    """One row of the table."""
    sums: dict[str, float] = {}
    share = 0.0
    found = tasks(data, suite)
    for task in found:
        outputs, share = adapted(base, task)
        given = {"copy": copied(task), "nearest": nearest(encoder, task), "zero-shot": zero_shot(base, task)}
        for name, answers in (given | {"lora": outputs}).items():
            got = score(task, answers, task.test, resamples=0)
            sums[name] = sums.get(name, 0.0) + got.value / len(found)
            if "token_f1" in got.others:  # exact match says little where answers are long
                sums[f"{name} f1"] = sums.get(f"{name} f1", 0.0) + got.others["token_f1"] / len(found)
    metric = found[0].metric
    tests = sum(len(t.test) for t in found)
    examples = max(len(t.train) for t in found)
    said = {"suite": suite, "metric": metric, "examples": examples, "tests": tests}
    return {**said, **sums, "trained": share, "base": base.fingerprint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("POLYTASK_DATA"), help="default: $POLYTASK_DATA")
    parser.add_argument("--base", default="polytask-base")
    parser.add_argument("--suites", default=",".join(SUITES))
    args = parser.parse_args()
    if args.data is None:
        parser.error("set POLYTASK_DATA or give --data")
    base, encoder = pt.load(args.base), pt.load("minilm")
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = [row for line in lines if (row := json.loads(line))["base"] == base.fingerprint]
    for suite in args.suites.split(","):
        if not any(row["suite"] == suite for row in rows):
            rows.append(measure(args.data, base, encoder, suite))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print("| suite | metric | examples | copy | nearest | zero-shot | lora | trained |\n|" + " --- |" * 8)
    for row in rows:
        scores = " | ".join(f"{row[name]:.3f}" for name in ("copy", "nearest", "zero-shot", "lora"))
        print(f"| {row['suite']} | {row['metric']} | {row['examples']:,} | {scores} | {row['trained']:.2%} |")
        if "lora f1" in row:
            scores = " | ".join(f"{row[f'{name} f1']:.3f}" for name in ("copy", "nearest", "zero-shot", "lora"))
            print(f"| | token F1 | | {scores} | |")


if __name__ == "__main__":
    main()
