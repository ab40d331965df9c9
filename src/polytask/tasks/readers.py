"""One door for every source of a task. The format is known by the path, the suffix and the keys."""

from __future__ import annotations

from pathlib import Path

from polytask.errors import UsageError
from polytask.tasks.columns import choose
from polytask.tasks.draft import Draft, assemble
from polytask.tasks.folders import from_folder
from polytask.tasks.hub import from_hub
from polytask.tasks.instructions import from_document, from_instructions
from polytask.tasks.tables import check_file, from_json, read_json, read_table
from polytask.tasks.task import Kind, Task


def read(
    source: str | Path,
    *,
    input: str | None = None,
    output: str | None = None,
    pair: str | None = None,
    kind: Kind | None = None,
    name: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    unlabelled: bool = False,
) -> Task:
    """Read a task from a file, a folder or a hub id.

    `source` is one of
    - a CSV, TSV, JSONL, JSON (list of objects) or Parquet file;
    - a folder with `task.yaml` (or `task.json`) and data files, or with only train.csv, test.jsonl, ...;
    - a Super-NaturalInstructions, BIG-bench, Alpaca or ShareGPT file;
    - `hf:name` or `hf:name/config`, or `hf:` and a folder that `datasets` wrote.

    `input`, `output` and `pair` name columns; `kind`, `name` and `metric` go before what the source says. What is not
    given is guessed where only one guess is possible, and `notes` of the task says so. Missing splits are made with
    `seed` (see `polytask.tasks.splits`). `unlabelled`: rows of train whose output is empty are kept as examples without
    one, after those that have one, instead of being refused.

    Raises UsageError for a path, column, kind or metric that is not there, PolytaskError for data that cannot be used,
    with file, line and field.
    """
    names = {"input": input, "output": output, "pair": pair}
    if str(source).startswith("hf:"):
        draft = from_hub(str(source), names)
    else:
        path = Path(source)
        check_file(path)
        if path.name in ("task.yaml", "task.json"):
            path = path.parent
        draft = from_folder(path, names) if path.is_dir() else _from_file(path, names)
    return assemble(draft, kind=kind, name=name, metric=metric, seed=seed, unlabelled=unlabelled)


def _from_file(path: Path, names: dict[str, str | None]) -> Draft:
    asked = [what for what, name in names.items() if name is not None]
    if path.suffix.lower() == ".json":
        content = read_json(path)
        draft = from_document(str(path), content)
        if draft is not None:
            if asked:
                raise UsageError(f"{path}: its format has no columns to choose; leave {asked[0]}= out")
            return draft
        table = from_json(str(path), content)
    else:
        table = read_table(path)
    if not asked:
        draft = from_instructions(table)
        if draft is not None:
            return draft
    columns, notes = choose(table, **names)
    return Draft(table.stem, str(path), {"train": columns.rows(table)}, notes=[*table.notes, *notes])
