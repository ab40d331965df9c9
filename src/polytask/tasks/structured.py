"""Lists in one line of text: "a; b", and named values: "city: San Jose; date: 5th of March" (or "city = San Jose").

A part's own semicolons and backslashes are written `\\;` and `\\\\`, and a name's own `:` and `=` likewise, so that
what `escape` and "; ".join wrote, `parts` and `pair` read back. A backslash before any other character is itself.
"""

from __future__ import annotations

import re

_PART = re.compile(r"(?:\\.|[^;\n])+")
_PAIR = re.compile(r"((?:\\.|[^:=\\]|\\$)*)[:=](.*)", re.DOTALL)


def escape(text: str, more: str = "") -> str:
    """`text` on one line, with a backslash before each backslash, semicolon and character of `more`."""
    return re.sub(f"[\\\\;{more}]", r"\\\g<0>", " ".join(text.split()))


def unescape(text: str) -> str:
    return re.sub(r"\\([\\;:=#])", r"\1", text)


def parts(text: str) -> list[str]:
    """The parts between semicolons or line ends, still escaped; empty ones are left out."""
    return [part for part in map(str.strip, _PART.findall(text)) if part]


def pair(part: str) -> tuple[str, str]:
    """The name before the first `:` or `=` and the value after it, still escaped; no name where there is neither."""
    found = _PAIR.fullmatch(part)
    return (found[1].strip(), found[2].strip()) if found else ("", part)
