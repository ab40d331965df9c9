"""The command line as a whole: help, speed, exit statuses, and every wrong input told in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ALONE, run, run_alone, start, write_table

import polytask

COMMANDS = (
    *("demo", "adapt", "predict", "compare", "merge", "methods", "library"),
    *("library list", "library search", "library show", "library export", "library import"),
    *("library rm", "library restore", "library forget", "library verify"),
)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from polytask.cli import main; main(['--help']); "
        "heavy = {'torch', 'transformers', 'sklearn', 'polars', 'numpy', 'sqlalchemy', 'scipy', 'pydantic'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    subprocess.run([sys.executable, "-c", code], env=ALONE, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.status == 0
    assert f"Usage: polytask {command}" in done.out
    assert f"polytask {command}" in done.out.split("Options")[0].split("Usage:")[1].partition("\n")[2]  # an example
    assert done.err == ""
    assert max(map(len, done.out.splitlines())) <= 80


def test_without_a_command_it_shows_help() -> None:
    done = run()
    assert done.status == 0
    for command in ("demo", "adapt", "predict", "compare", "library", "methods"):
        assert re.search(rf"│ {command} ", done.out)


def test_version() -> None:
    assert run("--version").out == f"polytask {polytask.__version__}\n"


def test_methods_lists_everything_with_its_paper() -> None:
    parts = run("methods", "--json").json
    assert all(set(part) == {"name", "kind", "place", "equation", "paper"} for part in parts)
    assert all(all(part.values()) for part in parts)
    kinds = {part["name"]: part["kind"] for part in parts}
    assert {"head", "lora", "bottleneck", "ia3", "full"} <= {n for n, kind in kinds.items() if kind == "method"}
    assert kinds["nearest-task"] == "router"
    assert (kinds["mix"], kinds["stack"]) == ("composition", "composition")
    places = {part["place"] for part in parts if part["kind"] == "method"}
    assert places <= {"weights", "activations", "tokens", "logits"}
    table = run("methods").out
    assert "2106.09685" in table


def test_a_module_of_the_composition_folder_lists_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import polytask.composition.routing as folder

    said = 'KIND, NAME, PLACE = "router", "coin", "token"\nEQUATION, PAPER = "p = 1/2", "nobody"\n'
    (tmp_path / "coin.py").write_text(said)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    coin = next(part for part in run("methods", "--json").json if part["name"] == "coin")
    assert coin == {"name": "coin", "kind": "router", "place": "token", "equation": "p = 1/2", "paper": "nobody"}
    monkeypatch.delitem(sys.modules, "polytask.composition.routing.coin")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["adopt"], ["adopt", "polytask --help"]),
        (["adapt"], ["TASK", "polytask adapt --help"]),
        (["adapt", "x.csv", "--epoch", "3"], ["--epoch", "--epochs"]),
        (["adapt", "x.csv", "--epochs", "three"], ["--epochs", "integer"]),
        (["library", "lst"], ["lst", "polytask library --help"]),
        (["library", "show"], ["ADAPTER"]),
        (["compare", "x.csv", "--methods", ","], ["--methods"]),
        (["compare", "x.csv", "--seeds", "0"], ["--seeds"]),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], says: list[str]) -> None:
    done = run(*arguments)
    assert done.status == 2
    assert done.out == ""
    for words in says:
        assert words in done.error


ROWS = "".join(f"text {n} about {'ab'[n % 2]},{'ab'[n % 2]}\n" for n in range(40))
WRONG_DATA = {
    "empty.csv": (b"", 1, ["empty.csv", "empty"]),
    "header.csv": (b"text,label\n", 1, ["header.csv", "no rows"]),
    "latin.csv": (b"text,label\ncaf\xe9,a\nb,b\n", 1, ["latin.csv", "line 2", "UTF-8"]),
    "one.csv": (b"text,label\n" + b"some text,a\n" * 20, 1, ["'a'", "two or more"]),
    "missing.csv": (f"text,label\n,a\n{ROWS}".encode(), 1, ["missing.csv", "2", "missing"]),
    "broken.jsonl": (b'{"text": "x", "label": "a"}\n{"text": "y", "label"\n', 1, ["broken.jsonl, line 2", "JSON"]),
    "ids.csv": (b"id,text,label\n" + b"7,x,a\n7,y,b\n" * 10, 1, ["'7'", "id"]),
    "large.csv": (b"text,label\n" + b"x" * (17 << 20) + b",a\n" + ROWS.encode(), 1, ["large.csv", "16 MB"]),
    "columns.csv": (b"a,b,c,d\n1,2,3,4\n" * 3, 2, ["columns.csv", "input", "'a', 'b', 'c', 'd'"]),
    "notes.docx": (b"PK", 2, ["notes.docx", ".docx"]),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    content, status, says = WRONG_DATA[name]
    (tmp_path / name).write_bytes(content)
    done = run("adapt", tmp_path / name, "--library", tmp_path / "skills", "--json")
    assert (done.status, done.out) == (status, "")
    for words in says:
        assert words in done.error
    assert os.listdir(tmp_path) == [name]  # no library, nothing half-written


WRONG_OPTIONS = {
    "a column that is not there": (["--input", "txet"], ["'txet'", "did you mean 'text'"]),
    "an output that is not there": (["--output", "abuot"], ["'abuot'", "did you mean 'about'"]),
    "a kind": (["--kind", "classfication"], ["did you mean 'classification'"]),
    "a metric": (["--metric", "acuracy"], ["accuracy"]),
    "a method": (["--method", "lorra"], ["'lorra'", "lora"]),
    "a hyperparameter": (["--method", "lora", "--set", "rank=3"], ["'rank'", "alpha"]),
    "a hyperparameter's value": (["--method", "lora", "--set", "r=many"], ["'many'", "int"]),
    "a hyperparameter without a value": (["--set", "r"], ["--set", "NAME=VALUE"]),
    "epochs": (["--epochs", "0"], ["epochs = 0"]),
    "a rate": (["--lr", "-1"], ["lr = -1"]),
    "a precision": (["--precision", "fp8"], ["'fp8'", "bf16"]),
    "a pooling": (["--pool", "median"], ["'median'", "attention"]),
    "a pair mode": (["--pair-mode", "both"], ["'both'", "joint"]),
    "a backbone": (["--base", "./nowhere"], ["./nowhere", "config.json"]),
    "an encoder that cannot write": (
        ["--kind", "generation", "--base", "minilm"],
        ["minilm", "cannot write", "--base"],
    ),
    "head and text": (["--head", "--kind", "generation"], ["generation", "--kind"]),
    "a template": (["--text", "--template", "poem"], ["poem", "superni"]),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_name_what_is_not_there(tmp_path: Path, case: str) -> None:
    arguments, says = WRONG_OPTIONS[case]
    done = run("adapt", write_table(tmp_path / "things.csv"), *arguments, "--library", tmp_path / "skills", "--json")
    assert (done.status, done.out) == (2, "")
    for words in says:
        assert words in done.error
    assert not list(tmp_path.glob("skills/adapters/*"))


def test_a_missing_file_is_told_with_what_is_near(tmp_path: Path) -> None:
    write_table(tmp_path / "things.csv")
    done = run("adapt", tmp_path / "thing.csv")
    assert done.status == 2
    assert "did you mean 'things.csv'" in done.error


def test_an_error_has_a_traceback_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTASK_DEBUG", "1")
    done = run("adapt", tmp_path / "nothing.csv")
    assert done.status == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("polytask: ")


def test_what_nobody_expected_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("polytask.methods.methods", broken)
    done = run("methods")
    assert done.status == 1
    assert "RuntimeError: first second" in done.error


def test_a_disk_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "/here")

    monkeypatch.setattr("polytask.methods.methods", full)
    done = run("methods")
    assert done.status == 1
    assert done.error == "/here: No space left on device"


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polytask.methods.methods", interrupted)
    done = run("methods")
    assert (done.status, done.error) == (1, "stopped")


def test_a_reader_that_leaves_is_no_error() -> None:
    process = start("methods", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_the_command_is_installed_under_its_name() -> None:
    done = run_alone("methods", "--json")
    assert done.status == 0
    assert done.err == ""
    assert "lora" in {part["name"] for part in json.loads(done.out)}
