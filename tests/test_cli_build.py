"""A library of many tasks by one command."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from commands import run, write_table, write_tags

from polytask.errors import PolytaskError
from polytask.library import Library
from polytask.recipes.adapt import Plan


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
    assert again.json["known"] == ["things", "colours"]
    after = run("library", "build", *tasks, empty, *common[:-1])
    assert after.status == 0  # one is out of order as before, and all others are there
    assert f"in {tmp_path / 'skills'} already: things, colours; --again trains them anew" in after.err
    assert after.err.count("left out: ") == 1
    reuse = run("adapt", tasks[0], "--reuse", "--name", "new", "-l", tmp_path / "skills", "--epochs", "1", "--json")
    assert reuse.status == 0, reuse.err
    assert any(note.startswith("reuse took") for note in reuse.json["notes"])
    wrong = run("adapt", tasks[0], "--reuse", "--method", "ia3", "-l", tmp_path / "skills")
    assert "leave out --method" in wrong.error


def test_what_is_trained_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has all fruit before all tools: its first eight rows would be of one label. A name stands for one task,
    and what the backbone cannot learn is not among those that are trained together."""
    seen: list[Plan] = []

    def refuse(_: object, plans: list[Plan], **__: object) -> None:
        seen.extend(plans)
        raise PolytaskError("not now")

    monkeypatch.setattr(importlib.import_module("polytask.recipes.adapt"), "adapt_many", refuse)
    (tmp_path / "more").mkdir()
    tasks = [write_table(tmp_path / "things.csv"), write_table(tmp_path / "more" / "things.csv")]
    story = tmp_path / "story.csv"
    story.write_text("input,output\n" + "".join(f"number {i},it was {i} of them\n" for i in range(40)))
    common = ["-l", tmp_path / "skills", "--examples", "8", "--base", "minilm"]
    done = run("library", "build", *tasks, story, write_tags(tmp_path / "colours.jsonl"), *common)
    assert done.status == 1
    assert [plan.task.name for plan in seen] == ["things", "colours", "things", "colours"]  # at once, then each alone
    assert "left out: story: task story is answered in text, and minilm cannot write" in done.err
    assert len(seen[0].task.train) == 8
    assert {example.output for example in seen[0].task.train} == {"fruit", "tool"}
    assert "left out: things: not now" in done.err
    assert f"left out: {tasks[1]}: another of these tasks is called things too; rename one" in done.err


def test_nothing_learned_is_a_failure(tmp_path: Path) -> None:
    done = run("library", "build", tmp_path / "none.csv", "-l", tmp_path / "skills")
    assert done.status == 1
    assert "none of 1 tasks was learned" in done.err
