"""What every page has around its content: one file that needs no other, for light and dark screens and phones."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_suffix(".html")


def shell(title: str, body: str, version: str) -> str:
    """The whole page; `body` is HTML, `version` of the polytask that made what it shows."""
    said = {"title": escape(title), "version": escape(version), "body": body.strip("\n")}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(said)
