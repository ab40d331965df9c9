"""A Hugging Face dataset: `hf:name`, `hf:name/config`, `hf:owner/name/config`, or `hf:` and a folder on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytask.errors import PolytaskError, UsageError
from polytask.tasks.columns import choose
from polytask.tasks.draft import Draft
from polytask.tasks.folders import NAMES, from_tables
from polytask.tasks.tables import Table, from_records
from polytask.tasks.task import Label


def from_hub(source: str, names: Mapping[str, str | None]) -> Draft:
    """The dataset `source`, class ids turned into their names.

    A split whose outputs are all hidden (-1, as in GLUE's tests) is left out and noted, like splits with other names.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{source} needs the datasets package: pip install 'polytask[datasets]'") from None
    try:
        loaded = _load(source.removeprefix("hf:"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PolytaskError(f"{source}: {reason}") from error
    parts = dict(loaded.items()) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    draft = Draft(source.removeprefix("hf:").rstrip("/").rsplit("/", 1)[-1], source, {})
    tables: dict[str, Table] = {}
    classes: dict[str, list[str]] = {}
    for name, part in parts.items():
        split = next((split for split, known in NAMES.items() if str(name) in known), None)
        if split is None or split in tables or not len(part):
            draft.notes.append(f"split {str(name)!r} is not used")
            continue
        classes = {column: ids for column, feature in part.features.items() if (ids := _class_names(feature))}
        rows = ({**row, **{c: _named(row[c], classes[c]) for c in classes}} for row in part)
        tables[split] = from_records(f"{source} {name}", "row", enumerate(rows, 1))
    if not tables:
        raise PolytaskError(f"{source} has no split named train, validation or test; it has {', '.join(parts)}")
    columns, notes = choose(next(iter(tables.values())), **names)
    draft.notes += notes
    for split, table in list(tables.items()):
        if columns.output in classes and all(value is None for value in table.column(columns.output)):
            draft.notes.append(f"split {split!r} is not used: its labels are hidden")
            del tables[split]
    draft.labels = tuple(Label(name) for name in classes.get(columns.output, ()))
    return from_tables(tables, draft, names, columns)


def _load(name: str) -> Any:
    import datasets

    if Path(name).exists():
        saved = any((Path(name) / mark).exists() for mark in ("dataset_dict.json", "state.json"))
        return datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    parts = name.split("/")
    if len(parts) == 3:
        return datasets.load_dataset("/".join(parts[:2]), parts[2])
    try:
        return datasets.load_dataset(name)
    except datasets.exceptions.DatasetNotFoundError:
        if len(parts) != 2:
            raise
        # `glue/mrpc` may be a dataset of an owner, or a dataset and its configuration.
        return datasets.load_dataset(*parts)


def _class_names(feature: Any) -> list[str]:
    inner = getattr(feature, "feature", feature)
    return list(getattr(inner, "names", None) or ())


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
