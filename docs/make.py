"""Hooks of mkdocs: a line `<!-- make: name -->` in a page becomes the table of that name, made from the code; and each
method gets the page that `pages.py` makes for it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages
from markup import cited, prose, table
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from polytask.adapters import BackboneCard, Card, HeadCard, Lineage, ScoreCard
from polytask.adapters.store import Stored
from polytask.backbones.families import FAMILIES, Attention, Stack
from polytask.composition.catalogue import catalogue
from polytask.errors import PolytaskError
from polytask.tasks import Task, TaskCard
from polytask.tasks.folders import ColumnsFile, TaskFile
from polytask.tasks.scorers import METRICS
from polytask.training import Settings

MARK = re.compile(r"^<!-- make: (.+) -->$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """Called by mkdocs before it reads the pages: those of the methods follow the overview in the menu."""
    for entry in config.nav or ():
        if "Methods" in entry:
            entry["Methods"] += pages.navigation()


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Called by mkdocs with the files it found."""
    for name in pages.names():
        files.append(File.generated(config, f"methods/{name}.md", content=pages.page(name)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page. KeyError, which stops the build, for a mark of no known table."""
    return MARK.sub(lambda found: TABLES[found[1]](), markdown)


def part_table() -> str:
    rows = [[f"[`{p.name}`](#{p.name})", p.kind, p.place, f"`{p.equation}`", cited(p.paper)] for p in catalogue()]
    return table(["name", "kind", "place", "equation", "paper"], rows)


def parts() -> str:
    said = [[f"### {part.name}", prose(importlib.import_module(part.module).__doc__)] for part in catalogue()]
    return "\n\n".join(line for part in said for line in part)


def site_table() -> str:
    """One row for each stack of blocks that differs from the others, with the families that share it."""
    shared: dict[tuple[str, Stack], list[str]] = {}
    for name, family in FAMILIES.items():
        for variant in family.variants:
            for prefix, stack in variant.items():
                shared.setdefault((prefix, dataclasses.replace(stack, embed="", head="")), []).append(name)
    rows = []
    for (prefix, stack), names in shared.items():
        kinds = {FAMILIES[name].kind for name in names}
        where = {"enc": ", `enc.`", "dec": ", `dec.`"}.get(prefix, "")
        attention = [maps(stack.attn), *([f"cross: {maps(stack.cross)}"] if stack.cross else [])]
        mlp = [f"`{path}`" for path in dict.fromkeys(filter(None, (stack.gate, stack.up, stack.down)))]
        mlp += [f"or experts: `{stack.experts.mlp}`"] if stack.experts else []
        rows.append(
            [
                ", ".join(f"`{name}`" for name in dict.fromkeys(names)) + where,
                ", ".join(sorted(kinds)),
                f"`{stack.block}`",
                "<br>".join(attention),
                ", ".join(mlp),
                f"before `{stack.norm}`" if stack.norm else "block's output",
            ]
        )
    return table(["family (`model_type`)", "kind", "block", "attn: q, k, v, o", "mlp: gate, up, down", "sum"], rows)


def maps(attention: Attention) -> str:
    found = ", ".join(f"`{p}`" for p in dict.fromkeys((attention.q, attention.k, attention.v, attention.o)))
    return found + (" (fused, by head)" if attention.by_head else " (fused)" if attention.q == attention.k else "")


def fields(model: type[Any]) -> str:
    rows = []
    for name, field in model.model_fields.items():
        kind = re.sub(r"[a-z_]+\.", "", str(field.annotation).removeprefix("<class '").removesuffix("'>"))
        kind = re.sub(r"Literal\[.*?\]", "Kind", kind)
        rows.append([f"`{name}`", f"`{kind}`", "yes" if field.is_required() else ""])
    return table(["field", "type", "required"], rows)


def metric_table() -> str:
    return table(["metric", "kinds"], [[f"`{name}`", ", ".join(kinds)] for name, kinds in METRICS.items()])


def settings_table() -> str:
    rows = [[f"`{f.name}`", f"`{f.default}`"] for f in dataclasses.fields(Settings)]
    return f"{inspect.cleandoc(Settings.__doc__ or '')}\n\n{table(['setting', 'default'], rows)}"


GOOD = "text,team\n" + "".join(f"my order number {n} is late,shipping\nrefund me for {n},billing\n" for n in range(20))
BAD: list[tuple[str, str, bytes | None, dict[str, Any]]] = [
    ("a missing file", "tikets.csv", None, {}),
    ("an empty file", "tickets.csv", b"", {}),
    ("a header and no rows", "tickets.csv", b"text,team\n", {}),
    ("a column that is not there", "tickets.csv", GOOD.encode(), {"output": "tem"}),
    ("columns that could be either", "tickets.csv", b"date,note,team,agent\n1,a,b,c\n2,d,e,f\n", {}),
    ("one single label", "tickets.csv", b"text,team\na,billing\nb,billing\n", {"kind": "classification"}),
    ("a missing cell", "tickets.csv", GOOD.encode() + b",billing\n", {}),
    ("a row that is too long", "tickets.csv", GOOD.encode() + b"hello, again,billing\n", {}),
    ("a quote that is never closed", "tickets.csv", GOOD.encode() + b'"hello,billing\n', {}),
    ("another encoding", "tickets.csv", GOOD.encode() + "caf\u00e9,billing\n".encode("latin-1"), {}),
    ("broken JSON", "tickets.jsonl", b'{"text": "a", "team": "b"}\n{"text": "c", "team": }\n', {}),
    ("an id that stands twice", "tickets.csv", b"id,text,team\n7,a,x\n8,b,y\n7,c,x\n", {}),
    ("a suffix without a reader", "tickets.xlsx", b"PK", {}),
]


def bad_input() -> str:
    """What `Task.read` says to each file of BAD, by really reading it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tickets.csv").write_text(GOOD)
        for what, name, content, options in BAD:
            path = Path(folder) / name
            if content is not None:
                path.write_bytes(content)
            try:
                Task.read(path, **options)
            except PolytaskError as error:
                rows.append([what, f"`{str(error).replace(folder + '/', '').replace('`', '')}`", str(error.status)])
            else:
                raise AssertionError(f"{what}: read without a complaint")
    return table(["what", "what it says", "exit status"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "methods": pages.method_table,
    "selectors": pages.selector_table,
    "parts": part_table,
    "part docstrings": parts,
    "sites": site_table,
    "metrics": metric_table,
    "settings": settings_table,
    "bad input": bad_input,
    "task.yaml": lambda: fields(TaskFile),
    "task.yaml columns": lambda: fields(ColumnsFile),
    "adapter.json": lambda: fields(Stored),
    "adapter.json backbone": lambda: fields(BackboneCard),
    "adapter.json head": lambda: fields(HeadCard),
    "adapter.json card": lambda: fields(Card),
    "adapter.json card.task": lambda: fields(TaskCard),
    "adapter.json score": lambda: fields(ScoreCard),
    "adapter.json lineage": lambda: fields(Lineage),
}
