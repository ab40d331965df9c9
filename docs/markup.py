"""What the code says, as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection

ARXIV = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
CODE = re.compile(r"(`[^`]+`)")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A bar ends a cell, but within backticks it is a bar."""
    lines = [header, ["---"] * len(header), *rows]
    outside = re.compile(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)")
    return "\n".join("| " + " | ".join(outside.sub(r"\\|", cell) for cell in line) + " |" for line in lines)


def cited(text: str) -> str:
    """With a link where arXiv or GitHub is named."""
    text = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"(?<![/\w])github\.com/[\w/-]+", r"[\g<0>](https://\g<0>)", text)


def linked(text: str, names: Collection[str], folder: str = "") -> str:
    """With a link where a page is named in backticks; the pages are in `folder`."""

    def link(found: re.Match[str]) -> str:
        name = found[0].strip("`")
        return f"[{found[0]}]({folder}{name}.md)" if name in names else found[0]

    return CODE.sub(link, text)


def prose(text: str | None, names: Collection[str] = ()) -> str:
    """A docstring: what is indented in it, its equations, stands as it is, and nothing else is taken for markup."""
    parts = []
    for part in re.split(r"\n\s*\n", inspect.cleandoc(text or "")):
        if part.startswith("    "):
            parts.append(f"```text\n{inspect.cleandoc(part)}\n```")
        else:
            words = CODE.split(part)
            words[::2] = [re.sub(r"[\\*_<>\[\]#]", r"\\\g<0>", plain) for plain in words[::2]]
            parts.append(linked(cited("".join(words)), names))
    return "\n\n".join(parts)
