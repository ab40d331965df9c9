"""What `auto` and `race` find, against training every method: score and cost on eight tasks with MiniLM.

    POLYTASK_DATA=... python -m bench.auto

For each of TASKS every method that fits is trained once at its own rate for EPOCHS epochs, as `polytask compare
--methods all --epochs 4` does it. The best of them is the one with the best validation score, which is what a user
would keep; its test score is compared with that of `auto` and of `race`, which train as they do by default, for as many
epochs as the validation score asks for. The best test score of all is printed too: it is a maximum over some forty
methods on the same examples, and so too high. Cost is seconds of training over the seconds of all methods; since the
machine may have been quicker then, both are counted in trainings of the comparison's LoRA, which is trained once more
beside `auto`. Rows stand in bench/results/auto.jsonl and are not measured again.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import polytask as pt
from polytask.recipes.compare import compare, schedule

TASKS = (
    *("banking77_intent", "blimp_pairs", "cr_polarity", "csabstruct"),
    *("hate_offensive", "scicite", "sgd_intent", "sib200_en_topic"),
)
WAYS = ("auto", "race")
TRAIN, VALIDATION, TEST, EPOCHS = 128, 100, 300, 4
COLUMNS = ("its test", "best test of all", "auto", "cost", "race", "cost", "whole test: best", "auto")
SHOWN = "{:.1f} | {:.1f} | {:.1f} | {:.3f} | {:.1f} | {:.3f} | {:.1f} | {:.1f} |"
RESULTS = Path(__file__).parent / "results/auto.jsonl"


def task_of(data: Path, name: str) -> pt.Task:
    """The task with few examples; what its validation split lacks comes from the end of its training split."""
    task = pt.Task.read(data / "tasks" / name)
    validation = (*task.validation, *task.train[TRAIN:])[:VALIDATION]
    return replace(task, train=task.train[:TRAIN], validation=validation, test=task.test[:TEST])


def compared(base: pt.Backbone, task: pt.Task, name: str) -> dict[str, list[float]]:
    """Each method's validation score, test score and seconds."""
    settings = pt.Settings(epochs=EPOCHS)
    said = f"polytask-auto-{base.fingerprint[:8]}-{base.precision}-{TRAIN}x{EPOCHS}"  # all that trials depend on
    folder = Path(tempfile.gettempdir()) / said / name
    found = compare(
        base,
        task,
        schedule(base, task, None, settings=settings),
        folder=folder,
        on_trial=lambda at, trial, new: print(
            f"  {name} {trial if isinstance(trial, str) else trial.method}", flush=True
        ),
    )
    return {t.method: [t.validation, t.scores["test"].value, t.seconds] for t in found.trials}


def chosen(base: pt.Backbone, task: pt.Task, way: str) -> list[Any]:
    """The same of what `auto` or `race` makes, the method that it took, and the seconds of LoRA now."""
    made = pt.adapt(base, task, way)
    scores = made.card.scores
    lora = pt.adapt(base, replace(task, test=()), "lora", settings=pt.Settings(epochs=EPOCHS))
    return [scores["validation"].value, scores["test"].value, made.card.seconds, made.method, lora.card.seconds]


def best(row: dict[str, Any]) -> str:
    """The method with the best validation score."""
    return max(row["methods"], key=lambda method: row["methods"][method][0])


def whole(base: pt.Backbone, data: Path, row: dict[str, Any]) -> dict[str, list[float]]:
    """Validation and whole-test scores of the best method and of `auto`, each trained as before."""
    task = replace(task_of(data, row["task"]), test=pt.Task.read(data / "tasks" / row["task"]).test)
    found = {}
    for way, method, settings in (("best", best(row), pt.Settings(epochs=EPOCHS)), ("auto", "auto", None)):
        scores = pt.adapt(base, task, method, settings=settings).card.scores
        found[way] = [scores["validation"].value, scores["test"].value]
    return found


def main() -> None:
    data = Path(os.environ["POLYTASK_DATA"])
    base = pt.load("minilm")
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for name in TASKS:
        task = task_of(data, name)
        row: dict[str, Any] = next((row for row in rows if row["task"] == name), {"task": name})
        if len(row) == 1:
            rows.append(row)
        for part in ("methods", *WAYS, "whole"):
            if part not in row:
                if part == "whole":
                    row[part] = whole(base, data, row)
                else:
                    row[part] = compared(base, task, name) if part == "methods" else chosen(base, task, part)
                RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"| task | best method | {' | '.join(COLUMNS)} |")
    print(f"| --- | --- |{' ---: |' * len(COLUMNS)}")
    lines = []
    for row in rows:
        loras = sum(took for _, _, took in row["methods"].values()) / row["methods"]["lora"][2]
        lines.append(
            (
                100 * row["methods"][best(row)][1],
                100 * max(test for _, test, _ in row["methods"].values()),
                *(x for way in WAYS for x in (100 * row[way][1], row[way][2] / row[way][4] / loras)),
                *(100 * row["whole"][way][1] for way in ("best", "auto")),
            )
        )
        print(f"| {row['task']} | {best(row)} | " + SHOWN.format(*lines[-1]))
    means = [mean(column) for column in zip(*lines, strict=True)]
    print("| mean | | " + SHOWN.format(*means))


if __name__ == "__main__":
    main()
