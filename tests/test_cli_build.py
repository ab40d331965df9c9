"""A library of many tasks by one command."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
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


def test_gates_over_what_is_there_are_shared_by_all_tasks(tmp_path: Path) -> None:
    """However few are trained together; each task's own adapter is the gates' owner for it and keeps its name."""
    tasks = [write_table(tmp_path / "things.csv"), tmp_path / "others.csv"]
    tasks[1].write_text(tasks[0].read_text().replace(",fruit", ",food"))
    common = ["-l", tmp_path / "skills", "--epochs", "1", "--examples", "16", "--json"]
    assert run("library", "build", *tasks, "--set", "r=2", *common).status == 0
    gates = ["--method", "meteora", "--over", "things,others", "--together", "1"]
    done = run("library", "build", *tasks, *gates, *common)
    assert done.status == 0, done.err
    assert [row["name"] for row in done.json["made"]] == ["things.meteora", "others.meteora"]
    kept = Library(tmp_path / "skills", create=False)
    made = [kept.get(f"{name}.meteora") for name in ("things", "others")]
    assert [one.hyperparameters["owner"] for one in made] == [kept.get("things").id, kept.get("others").id]
    assert kept.get("things").method == "lora"
    shared = [n for n in made[0].tensors if n.endswith("/G")]
    assert shared
    assert all(torch.equal(made[0].tensors[n], made[1].tensors[n]) for n in shared)
    said = run("predict", "--adapter", "things.meteora", "-l", tmp_path / "skills", "--json", stdin=b"saw")
    assert said.status == 0, said.err
    assert run("library", "build", *tasks, *gates, *common).json["known"] == ["things", "others"]
    more = write_table(tmp_path / "more.csv")
    assert run("library", "build", *tasks, more, *gates, *common).error == (
        "things, others: there already, and meteora learns G for all tasks at once; --again trains all of them anew"
    )


def test_what_is_kept_under_another_name_does_not_stop_the_others(tmp_path: Path) -> None:
    tasks = [write_table(tmp_path / name) for name in ("first.csv", "second.csv")] + [
        write_tags(tmp_path / "tags.jsonl")
    ]
    done = run("library", "build", *tasks, "-l", tmp_path / "skills", "--method", "head", "--json")
    assert done.status == 0, done.err
    assert [row["name"] for row in done.json["made"]] == ["first", "tags"]
    assert "kept already as first" in done.json["failed"]["second"]


def test_tasks_that_share_fail_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def refuse(_: object, plans: list[Plan], **__: object) -> None:
        seen.append(len(plans))
        raise PolytaskError("not now")

    monkeypatch.setattr(importlib.import_module("polytask.recipes.adapt"), "adapt_many", refuse)
    tasks = [write_table(tmp_path / f"{name}.csv") for name in "abc"]
    done = run("library", "build", *tasks, "--method", "mtl_lora", "--together", "2", "-l", tmp_path / "skills")
    assert (done.status, seen) == (1, [3])
    assert [line for line in done.err.splitlines() if line.startswith("left out")] == [
        f"left out: {name}: not now" for name in "abc"
    ]
