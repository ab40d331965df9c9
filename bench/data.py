"""Real texts to measure on: folders under `POLYTASK_DATA`, and the demo tasks that ship where there are none."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from pathlib import Path

import polytask
from polytask.tasks import Task

DEMO = ("tickets", "calendar", "questions")


def task(name: str) -> Task:
    """The task of that name from `POLYTASK_DATA/tasks`, or a demo task in its place."""
    folder = Path(os.environ.get("POLYTASK_DATA", "")) / "tasks" / name
    if "POLYTASK_DATA" in os.environ and folder.is_dir():
        return Task.read(folder)
    stand_in = name if name in DEMO else DEMO[0]
    print(
        f"no {name} (set POLYTASK_DATA to the folder with tasks/{name}): using the demo task {stand_in}",
        file=sys.stderr,
    )
    return Task.read(Path(polytask.__file__).parent / "demo" / stand_in)


def tasks(names: tuple[str, ...]) -> list[Task]:
    """Several tasks; where there are no data, the demo tasks in turn under names of their own."""
    if (Path(os.environ.get("POLYTASK_DATA", "")) / "tasks" / names[0]).is_dir() and "POLYTASK_DATA" in os.environ:
        return [task(name) for name in names]
    shipped = [task(name) for name in DEMO]
    return [dataclasses.replace(shipped[i % 3], name=f"{shipped[i % 3].name}-{i}") for i in range(len(names))]


def part(given: Task, n: int, *, held: bool = False, test: int = 0, seed: int = 0) -> Task:
    """A task with n training examples (drawn, repeated where there are fewer), its validation split only where `held`,
    and `test` test examples."""
    drawn = random.Random(seed).sample(given.train, min(n, len(given.train)))
    drawn = [drawn[i % len(drawn)] for i in range(n)]
    return dataclasses.replace(
        given, train=tuple(drawn), validation=given.validation if held else (), test=given.test[:test]
    )
