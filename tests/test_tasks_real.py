"""The real data that POLYTASK_DATA points to is read whole, and its numbers are those of its own descriptions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from polytask.errors import PolytaskError
from polytask.tasks import Task
from polytask.tasks.splits import duplicate_key

TASKS = Path(os.environ.get("POLYTASK_DATA") or "/nowhere") / "tasks"
pytestmark = pytest.mark.skipif(not TASKS.is_dir(), reason="POLYTASK_DATA names no folder with tasks/")

FOLDERS = sorted(path.parent.name for path in TASKS.glob("*/task.json"))
SUITES = [*("superni/train", "superni/test", "instruction_induction", "bbh"), *("function_vectors/abstractive",)]


@pytest.mark.parametrize("name", FOLDERS)
def test_task_folders(name: str) -> None:
    card = json.loads((TASKS / name / "task.json").read_text())
    if card["kind"] == "retrieval":
        with pytest.raises(PolytaskError, match="retrieval"):
            Task.read(TASKS / name)
        return
    task = Task.read(TASKS / name)
    assert task.card().sizes == card["sizes"]
    assert (task.name, task.instruction, task.licence) == (name, card["definition"], card["licence"])
    assert task.kind == ("multilabel" if name == "goemotions" else card["kind"])
    if task.kind in ("classification", "multilabel"):
        assert [label.name for label in task.labels] == card["labels"]
    if task.kind == "tagging":
        assert set(card["labels"]) <= set(task.targets)
    assert not any("also in train" in note for note in task.notes), "the data promise no leaks"
    for line, example in zip((TASKS / name / "test.jsonl").open(), task.test, strict=True):
        row = json.loads(line)
        assert example.id == row["id"]
        if task.kind == "tagging":
            assert (list(example.input), list(example.output or ())) == (row["tokens"], row["tags"])  # type: ignore[arg-type]
        elif not task.pair:
            assert example.input == row["input"]


@pytest.mark.parametrize("suite", SUITES)
def test_suites(suite: str) -> None:
    """Every file is read; every row is in one split; no made split shares an input with another."""
    files = sorted((TASKS / suite).glob("*.json"))
    assert len(files) >= 12
    for file in files:
        task = Task.read(file)
        value = json.loads(file.read_text())
        rows = value if isinstance(value, list) else value.get("Instances") or value["examples"]
        parts = (task.train, task.validation, task.test)
        assert sum(map(len, parts)) == len(rows), file
        keys = [{duplicate_key(e) for e in part} for part in parts]
        if suite != "instruction_induction":
            assert len(set.union(*keys)) == sum(map(len, keys)), file
        if "mmmlu" in file.name:
            assert (task.kind, [label.name for label in task.labels]) == ("classification", list("ABCD"))
        if isinstance(value, dict) and "Positive Examples" in value:
            assert len(task.demonstrations) == len(value["Positive Examples"])
            assert task.instruction == value["Definition"][0].strip()
