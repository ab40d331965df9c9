"""A task in a folder: `task.yaml` beside data files, a `task.json` export, or only files named after the splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from polytask.errors import PolytaskError, UsageError
from polytask.tasks.columns import Columns, choose
from polytask.tasks.draft import Draft
from polytask.tasks.tables import SUFFIXES, Table, check_file, from_records, near, read_json, read_table
from polytask.tasks.task import KINDS, SPLITS, Kind, Label, LabelCard

NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


class ColumnsFile(BaseModel):
    """`columns:` of a task.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str | None = None
    input: str
    pair: str | None = None
    output: str


class TaskFile(BaseModel):
    """A task.yaml. Everything may be left out: what is missing is guessed from the data, and noted."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = ""
    kind: Kind | None = None
    instruction: str = ""
    labels: list[LabelCard | str] = []
    metric: str = ""
    language: str = ""
    licence: str = ""
    source: str = ""
    columns: ColumnsFile | None = None
    splits: dict[str, str] = {}

    @field_validator("splits")
    @classmethod
    def _known(cls, splits: dict[str, str]) -> dict[str, str]:
        for name in splits:
            if name not in SPLITS:
                raise ValueError(f"no split {name!r}; one of {', '.join(SPLITS)}")
        return splits


def from_folder(folder: Path, names: Mapping[str, str | None]) -> Draft:
    """The task in `folder`; `names` are the columns that the caller asked for (input, output, pair)."""
    if (folder / "task.yaml").exists():
        return _yaml(folder, names)
    if (folder / "task.json").exists():
        return _json(folder, names)
    tables = {split: read_table(path) for split, path in split_files(folder).items()}
    return from_tables(tables, Draft(folder.resolve().name, str(folder), {}), names)


def split_files(folder: Path) -> dict[str, Path]:
    """The files of `folder` that are named after splits: train.csv, dev.jsonl, ..."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = next((split for split, names in NAMES.items() if path.stem.casefold() in names), None)
        if split and path.suffix.lower() in SUFFIXES:
            if split in files:
                raise UsageError(
                    f"{folder}: both {files[split].name} and {path.name} could be {split}; name one in task.yaml"
                )
            files[split] = path
    if not files:
        raise UsageError(
            f"{folder} has no task.yaml and no file named train, validation or test ({', '.join(SUFFIXES)}); "
            "add one, or give a file"
        )
    return {split: files[split] for split in SPLITS if split in files}


def from_tables(
    tables: Mapping[str, Table], draft: Draft, names: Mapping[str, str | None], columns: Columns | None = None
) -> Draft:
    """`draft` with the rows of `tables`, by split; the columns are chosen once, from the first table."""
    guessed = columns is None
    if columns is None:
        columns, notes = choose(next(iter(tables.values())), **names)
        draft.notes += notes
    for split in (split for split in SPLITS if split in tables):
        # Nobody asked for the column of ids, so a file may do without it.
        bare = guessed and columns.id not in tables[split].columns
        draft.splits[split] = (replace(columns, id=None) if bare else columns).rows(tables[split])
        draft.notes += tables[split].notes
    ids: dict[str, str] = {}
    for split, rows in draft.splits.items():
        again = [row.id for row in rows if row.id is not None and ids.setdefault(row.id, split) != split]
        if again:
            draft.notes.append(f"ids of {split} also stand in another split: {', '.join(again[:3])}")
    return draft


def _yaml(folder: Path, names: Mapping[str, str | None]) -> Draft:
    import yaml

    path = folder / "task.yaml"
    check_file(path)
    try:
        # The base loader keeps every scalar as it is written: a label `no` stays "no" and does not become False.
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
        file = TaskFile.model_validate(content or {})
    except UnicodeDecodeError as error:
        raise PolytaskError(f"{path}: byte at offset {error.start} is not UTF-8; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise PolytaskError(f"{path}{where}: broken YAML ({getattr(error, 'problem', None) or 'unreadable'})") from None
    except ValidationError as error:
        raise PolytaskError(f"{path}: {_first(error)}") from None

    if file.splits:
        paths = {split: folder / file.splits[split] for split in SPLITS if split in file.splits}
        for split, data in paths.items():
            if not data.is_file():
                others = [p.name for p in folder.iterdir()]
                raise PolytaskError(f"{path}: the {split} file {data.name!r} is not there{near(data.name, others)}")
    else:
        paths = split_files(folder)
    tables = {split: read_table(data) for split, data in paths.items()}
    columns = None
    if file.columns:
        asked = {what: name for what, name in names.items() if name is not None}
        columns = Columns(**{**file.columns.model_dump(), **asked})
    draft = Draft(
        name=file.name or folder.resolve().name,
        source=file.source or str(folder),
        splits={},
        kind=file.kind,
        instruction=file.instruction,
        labels=tuple(Label(x) if isinstance(x, str) else Label(x.name, x.description.strip()) for x in file.labels),
        metric=file.metric,
        language=file.language,
        licence=file.licence,
    )
    return from_tables(tables, draft, names, columns)


def _json(folder: Path, names: Mapping[str, str | None]) -> Draft:
    path = folder / "task.json"
    check_file(path)
    card = read_json(path)
    if not isinstance(card, dict) or card.get("kind") not in KINDS:
        said = repr(card.get("kind")) if isinstance(card, dict) else "missing"
        raise PolytaskError(f"{path}: its kind is {said}; it must be one of {', '.join(KINDS)}")
    kind: Kind = card["kind"]
    if kind == "retrieval":
        raise PolytaskError(f"{path}: a retrieval task has a corpus and queries; it is not read as rows of examples")
    tables = {split: read_table(data) for split, data in split_files(folder).items()}
    columns = None
    if not any(names.values()):
        has = next(iter(tables.values())).columns
        if kind == "tagging":
            columns = Columns("tokens", "tags", id="id" if "id" in has else None)
        else:
            pair = {"text1", "text2"} <= set(has)
            columns = Columns(
                "text1" if pair else "input", "output", "text2" if pair else None, "id" if "id" in has else None
            )
    meanings = card.get("label_descriptions") or {}
    draft = Draft(
        name=str(card.get("name") or folder.resolve().name),
        source=_origin(card.get("source")) or str(folder),
        splits={},
        kind=kind,
        instruction=str(card.get("definition") or ""),
        labels=tuple(Label(str(name), str(meanings.get(name, ""))) for name in card.get("labels") or ()),
        metric=str(card.get("metric") or ""),
        language=str(card.get("language") or ""),
        licence=str(card.get("licence") or ""),
        notes=[str(card["notes"])] if card.get("notes") else [],
        foreign=True,
    )
    for what, into in (("positive example", draft.demonstrations), ("negative example", draft.negatives)):
        shown = card.get(f"{what.replace(' ', '_')}s") or []
        if shown and columns and all(isinstance(e, dict) and {columns.input, columns.output} <= set(e) for e in shown):
            into += replace(columns, id=None).rows(from_records(str(path), what, enumerate(shown, 1)))
        elif shown:
            draft.notes.append(f"not kept: {len(shown)} {what}s, whose fields are not those of the rows")
    return from_tables(tables, draft, names, columns)


def _origin(source: Any) -> str:
    """Where an export came from, in one line: repository, commit and paths."""
    if isinstance(source, dict):
        paths = source.get("paths") or []
        commit = str(source.get("commit") or "")[:10]
        where = f"{source.get('repo', '')}@{commit}" if commit else str(source.get("repo", ""))
        return f"{where}: {', '.join(map(str, paths))}" if paths else where
    if isinstance(source, Sequence) and not isinstance(source, str):
        return "; ".join(_origin(part) for part in source)
    return str(source or "")


def _first(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        fields = ColumnsFile.model_fields if "columns" in first["loc"] else TaskFile.model_fields
        return f"there is no field {where!r}{near(key, fields)}; the fields are {', '.join(fields)}"
    return f"{where or 'the file'}: {first['msg'][0].lower()}{first['msg'][1:]}"
