"""A library of many tasks by one command."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from commands import run, write_table, write_tags

from polytask.library import Library


@pytest.fixture(scope="module", autouse=True)
def one_backbone() -> Iterator[None]:
    import polytask.backbones

    real = polytask.backbones.load
    polytask.backbones.load = cache(real)
    yield
    polytask.backbones.load = real


def test_many_tasks_become_adapters_and_are_not_trained_twice(tmp_path: Path) -> None:
    tasks = [write_table(tmp_path / "things.csv"), write_tags(tmp_path / "colours.jsonl")]
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    common = ["-l", tmp_path / "skills", "--set", "r=2", "--epochs", "1", "--examples", "16", "--json"]
    done = run("library", "build", *tasks, empty, *common)
    assert done.status == 0, done.err
    assert [row["name"] for row in done.json["made"]] == ["things", "colours"]
    assert list(done.json["failed"]) == [str(empty)]
    kept = Library(tmp_path / "skills", create=False)
    assert {entry.name: entry.method for entry in kept.list()} == {"things": "lora", "colours": "lora"}
    assert kept.get("things").card.task.sizes["train"] == 16
    assert not (tmp_path / "skills" / ".training").exists()
    again = run("library", "build", *tasks, *common)
    assert again.json["made"] == []
    reuse = run("adapt", tasks[0], "--reuse", "--name", "new", "-l", tmp_path / "skills", "--epochs", "1", "--json")
    assert reuse.status == 0, reuse.err
    assert any(note.startswith("reuse took") for note in reuse.json["notes"])
    wrong = run("adapt", tasks[0], "--reuse", "--method", "ia3", "-l", tmp_path / "skills")
    assert "leave out --method" in wrong.error


def test_nothing_learned_is_a_failure(tmp_path: Path) -> None:
    done = run("library", "build", tmp_path / "none.csv", "-l", tmp_path / "skills")
    assert done.status == 1
    assert "none of 1 tasks was learned" in done.err
