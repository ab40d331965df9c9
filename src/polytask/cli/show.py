"""How results look: tables on a terminal or in a pipe, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from polytask.tasks.task import Output

PIPE_WIDTH = 140  # columns of a table that is not printed on a terminal


def write_json(value: Any, *, indent: int | None = None) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=indent))


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def write(*parts: Any) -> None:
    """Tables and lines on standard output. Lines are taken as they are, without markup."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)


def score(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def size(bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if bytes >= factor:
            return f"{bytes / factor:.1f} {unit}"
    return f"{bytes} B"


def share(part: int, whole: int) -> str:
    """A percentage with two significant digits."""
    return f"{100 * part / whole:.2g} %" if whole else ""


def percent(probability: float | None) -> str:
    return "" if probability is None else f"{probability:.0%}"


def answer(output: Output | None, tokens: Sequence[str] | None = None) -> str:
    """An output in one line; of tags, the spans."""
    if output is None:
        return "none of these"
    if isinstance(output, float):
        return f"{output:.3f}"
    if isinstance(output, str):
        return output
    if tokens is None:
        return ", ".join(output)
    return "  ".join(f"{label}: {' '.join(words)}" for label, words in spans(output, tokens)) or "nothing to mark"


def spans(tags: Sequence[str], tokens: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(label, words) of each span of BIO tags, an I- without its B- opening one; of plain tags, each word's."""
    found: list[tuple[str, list[str]]] = []
    before = "O"
    for tag, token in zip(tags, tokens, strict=True):
        if tag.startswith("I-") and before[2:] == tag[2:] and before != "O":
            found[-1][1].append(token)
        elif tag != "O":
            found.append((tag[2:] if tag.startswith(("B-", "I-")) else tag, [token]))
        before = tag
    return found
