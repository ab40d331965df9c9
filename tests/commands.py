"""Running the command line in this process, or as a user does in one of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from polytask.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> str:
        """The one line that standard error must hold after a failure."""
        assert self.status in (1, 2), (self.status, self.err)
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("polytask: ")
        assert "Traceback" not in self.err
        return self.err.removeprefix("polytask: ").rstrip("\n")


def run(*arguments: object, stdin: bytes = b"") -> Done:
    """A command in this process."""
    out, err = io.StringIO(), io.StringIO()
    given = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "stdin", given):
        status = main([str(argument) for argument in arguments])
    return Done(status, out.getvalue(), err.getvalue())


ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "POLYTASK_DEBUG": ""}


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """A command in a process of its own, its three streams being pipes."""
    command = [sys.executable, "-m", "polytask", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ALONE, **{**pipes, **options})


def run_alone(*arguments: object, stdin: bytes = b"") -> Done:
    process = start(*arguments)
    out, err = process.communicate(stdin, timeout=120)
    return Done(process.returncode, out.decode(), err.decode())


FRUIT = ("apple", "pear", "plum", "cherry", "grape", "melon", "peach", "lemon")
TOOLS = ("hammer", "saw", "drill", "wrench", "chisel", "pliers", "screwdriver", "file")
SAYINGS = ("I bought a {}", "where is the {}", "the {} was too big", "a {} for my brother")


def write_table(path: Path) -> Path:
    """A CSV of 64 texts about fruit and tools."""
    rows = [(saying.format(word), "fruit") for word in FRUIT for saying in SAYINGS]
    rows += [(saying.format(word), "tool") for word in TOOLS for saying in SAYINGS]
    path.write_text("text,about\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return path


def write_pairs(path: Path) -> Path:
    """Pairs of texts that speak of the same thing or not."""
    words = FRUIT + TOOLS
    rows = [(f"I bought a {a}", f"the {a} is mine", "yes") for a in words]
    rows += [(f"I bought a {a}", f"the {b} is mine", "no") for a, b in zip(words, words[3:] + words[:3], strict=True)]
    lines = [json.dumps({"first": a, "second": b, "same": same}) for a, b, same in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_tags(path: Path) -> Path:
    """Sentences in which colours are marked."""
    colours = ("red", "green", "blue", "black", "white", "yellow")
    lines = []
    for i, word in enumerate(FRUIT + TOOLS):
        tokens = ["take", "the", colours[i % len(colours)], word, "home"]
        tags = ["O", "O", "B-COLOUR", "O", "O"]
        lines += [json.dumps({"tokens": tokens, "tags": tags})]
        lines += [json.dumps({"tokens": tokens[2:4], "tags": tags[2:4]})]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
