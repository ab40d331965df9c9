"""Expressions on the command line: asked for, kept, and adapters trained on top of others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from commands import run, write_table

from polytask.library import Library


@pytest.fixture(scope="module", autouse=True)
def one_backbone() -> Iterator[None]:
    import polytask.backbones

    real = polytask.backbones.load
    polytask.backbones.load = cache(real)
    yield
    polytask.backbones.load = real


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with two adapters of one task."""
    folder = tmp_path_factory.mktemp("work")
    table = write_table(folder / "things.csv")
    for name, method in (("one", "lora"), ("two", "bottleneck")):
        done = run("adapt", table, "-n", name, "-m", method, "--epochs", "1", "-l", folder / "skills", "--json")
        assert done.status == 0, done.err
    return folder / "skills"


@pytest.fixture
def skills(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "skills"))


def asked(library: Path, adapter: str, *, stdin: bytes = b"a green apple\n") -> list[dict]:
    done = run("predict", "-l", library, "--adapter", adapter, "--json", stdin=stdin)
    assert done.status == 0, done.err
    return done.lines


@pytest.mark.parametrize("said", ["0.7*one + 0.3*two", "stack(one, two)", "ensemble(one, two)", "one - 0.5*two"])
def test_a_kept_expression_answers_as_the_expression_does(skills, said):
    done = run("compose", said, "--name", "both", "-l", skills, "--json")
    assert done.status == 0, done.err
    kept = Library(skills, create=False)
    entry = kept.entry("both")
    assert (done.json["adapter"], done.json["name"], done.json["version"]) == (entry.id, "both", 1)
    assert set(done.json["parents"]) == {kept.entry(name).id for name in ("one", "two")}
    for by_name, by_expression in zip(asked(skills, "both"), asked(skills, said), strict=True):
        same = ("output", "probability")
        assert [by_name[k] for k in same] == [by_expression[k] for k in same]
    assert run("compose", said, "-n", "both", "-l", skills).out.startswith(f"both@1 ({entry.id}) is in {skills}")


def test_routers_are_kept_and_trained_above(skills, tmp_path):
    table = write_table(tmp_path / "again.csv")
    common = ["-l", skills, "--epochs", "1", "--json"]
    assert run("adapt", table, "-n", "three", "-m", "lora", "--seed", "1", *common).status == 0
    done = run("compose", "arrow(one, three, head=three)", "-n", "any", "-l", skills, "--json")
    assert done.status == 0, done.err
    kept = Library(skills, create=False)
    made = kept.get("any")
    assert (made.method, made.needs) == ("arrow", (kept.entry("one").id, kept.entry("three").id))
    assert done.json["head"] == kept.entry("three").id
    assert asked(skills, "any")[0]["output"] is not None
    done = run("adapt", table, "-n", "top", "-m", "head", "--above", "any", "-l", skills, "--json")
    assert done.status == 0, done.err
    assert kept.get("top").above == (made.id,)
    for name in ("one", "three"):
        done = run("adapt", table, "-n", f"{name}-gate", "-m", "phatgoose_gate", "--over", name, *common)
        assert done.status == 0, done.err
    assert run("compose", "phatgoose(one-gate, three-gate)", "-n", "gated", "-l", skills).status == 0
    assert kept.get("gated").method == "phatgoose"


def test_what_others_are_made_of_stays(skills):
    made = run("compose", "one + two", "-n", "both", "-l", skills, "--json").json["adapter"]
    for verb in (["rm"], ["forget", "--yes"]):
        refused = run("library", verb[0], "one", *verb[1:], "-l", skills)
        assert refused.status == 2
        assert made in refused.err
        assert refused.error
    assert run("library", "rm", "both", "-l", skills).status == 0
    assert run("library", "rm", "one", "-l", skills).status == 0


def test_several_answers_to_one_input(skills):
    [row] = asked(skills, "parallel(one, two)")
    assert [part["name"] for part in row["parts"]] == ["one", "two"]
    assert row["output"] is None
    shown = run("predict", "-l", skills, "--adapter", "parallel(one, two)", stdin=b"a green apple\n").out
    assert [line.split("\t")[2] for line in shown.splitlines()] == ["one", "two"]


def test_an_adapter_on_top_of_another(skills, tmp_path):
    table = write_table(tmp_path / "again.csv")
    common = ["-m", "bottleneck", "--epochs", "1", "-l", skills, "--json"]
    done = run("adapt", table, "-n", "top", "--above", "two", *common)
    assert done.status == 0, done.err
    kept = Library(skills, create=False)
    assert kept.get("top").above == (kept.entry("two").id,)
    [by_itself], [stacked] = asked(skills, "top"), asked(skills, "stack(two, top)")
    assert (by_itself["output"], by_itself["probability"]) == (stacked["output"], stacked["probability"])
    assert asked(skills, "bare(top)")[0]["name"] == "top"
    assert run("library", "rm", "two", "-l", skills).status == 2


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("one + nobody", "nobody"),
        ("stack(one", "is missing"),
        ("0.5*ensemble(one, two)", "gives answers"),
        ("what(one, two)", "there is no what"),
        ("arrow(one)", "at least two"),
        ("arrow(one, 2*two)", "under a name first"),
        ("one + arrow(one, two)", "polytask compose"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(skills, said, why):
    for command in (["compose", said, "--name", "x"], ["predict", "--adapter", said]):
        done = run(*command, "-l", skills, stdin=b"text\n")
        assert done.status == 2, done.err
        assert why in done.err
        assert done.error
    assert [entry.name for entry in Library(skills, create=False).list()] == ["one", "two"]
