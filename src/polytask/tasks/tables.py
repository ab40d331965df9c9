"""One file of rows: CSV, TSV, JSONL, a JSON list, Parquet. Every row remembers where it stood, for error messages.

CSV and TSV go through the standard library's reader and not through polars, because only it refuses a broken quote at
the line where it stands; it costs 1.5 s instead of 1.2 s for 500,000 rows.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from polytask.errors import PolytaskError, UsageError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
FIELD_LIMIT = 16 * 2**20  # characters in one cell


@dataclass(frozen=True, slots=True)
class Row:
    """What a file says about one example, before it is known what kind of task this is."""

    file: str
    unit: str  # what `number` counts: "line" or "row"
    number: int
    input: Any
    output: Any
    pair: Any = None
    id: str | None = None
    extra: dict[str, Any] | None = None

    @property
    def where(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a file as mappings from column to value, each with its line (or its row, counted from 1)."""

    file: str
    unit: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, Any]], ...]
    notes: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        return Path(self.file).stem

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for _, row in self.rows]

    def require(self, name: str, what: str) -> str:
        """`name`, if there is such a column."""
        if name not in self.columns:
            raise UsageError(
                f"{self.file} has no column {name!r} (asked for as {what}){near(name, self.columns)}; "
                f"its columns are {listed(self.columns)}"
            )
        return name


def read_table(path: Path) -> Table:
    """The rows of `path`, read as its suffix says.

    Raises UsageError for a path that is not there or has another suffix, PolytaskError for a file that is damaged,
    empty, not UTF-8, or has a header and no rows.
    """
    suffix = path.suffix.lower()
    check_file(path)
    if suffix in (".csv", ".tsv"):
        return _delimited(path, "," if suffix == ".csv" else "\t")
    if suffix in (".jsonl", ".ndjson"):
        return from_records(str(path), "line", _json_lines(path))
    if suffix == ".json":
        return from_json(str(path), read_json(path))
    if suffix == ".parquet":
        return _parquet(path)
    raise UsageError(f"{path}: no reader for {suffix or 'a file without a suffix'}; one of {', '.join(SUFFIXES)}")


def check_file(path: Path) -> None:
    """Raise unless `path` is a file with something in it."""
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"{path} is not there{near(path.name, names)}; give the path of a file or folder")
    if path.is_file() and path.stat().st_size == 0:
        raise PolytaskError(f"{path} is empty; it needs at least a few rows")


def from_json(file: str, value: Any) -> Table:
    """The table in a JSON document: a list of objects."""
    if not isinstance(value, list):
        raise PolytaskError(
            f"{file}: a JSON {type(value).__name__} that is no known task format; expected a list of objects, "
            "Super-NaturalInstructions (Definition, Instances) or BIG-bench (examples)"
        )
    return from_records(file, "row", enumerate(value, 1))


def from_records(file: str, unit: str, records: Iterable[tuple[int, Any]]) -> Table:
    """A table of numbered JSON objects; the columns stand in the order in which they first turn up."""
    rows: list[tuple[int, dict[str, Any]]] = []
    columns: dict[str, None] = {}
    for number, record in records:
        if not isinstance(record, dict):
            raise PolytaskError(f"{file}, {unit} {number}: expected an object {{...}}, got {type(record).__name__}")
        rows.append((number, record))
        columns.update(dict.fromkeys(record))
    if not rows:
        raise PolytaskError(f"{file} has no rows; it needs at least a few")
    return Table(file, unit, tuple(columns), tuple(rows))


def read_json(path: Path) -> Any:
    """A whole JSON file; broken JSON is told with its line."""
    data = path.read_bytes()
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        _not_utf8(path)
    except json.JSONDecodeError as error:
        raise PolytaskError(f"{path}, line {error.lineno}: broken JSON ({error.msg}); mend or remove it") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise PolytaskError(f"{path}: JSON that cannot be held ({error}); mend it") from None


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, where something like `name` is among `names`."""
    names = list(names)
    folded = {n.casefold(): n for n in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _not_utf8(path: Path) -> NoReturn:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolytaskError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} at offset "
            f"{error.start} is not UTF-8; save the file as UTF-8, e.g. "
            f"`iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}`"
        ) from None
    raise PolytaskError(f"{path} changed while it was read; try again")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield number, json.loads(line)
            except UnicodeDecodeError:
                _not_utf8(path)
            except json.JSONDecodeError as error:
                raise PolytaskError(
                    f"{path}, line {number}: broken JSON ({error.msg} at character {error.colno}); mend or remove it"
                ) from None
            except (ValueError, RecursionError) as error:
                raise PolytaskError(f"{path}, line {number}: JSON that cannot be held ({error}); mend it") from None


def _delimited(path: Path, separator: str) -> Table:
    # The limit belongs to the process: it is only ever raised, never put back under another thread's feet.
    csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))
    notes: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline(FIELD_LIMIT)
        other = next((s for s in ";\t|" if s in first), None)
        if separator not in first and other:
            separator = other
            notes.append(f"{path.name}: read with {other!r} between the cells")
        try:
            header, rows = _cells(path, separator, quoted=True)
        except PolytaskError:
            if separator != "\t":
                raise
            # Many TSV files quote nothing, and then a text may begin with a quotation mark.
            header, rows = _cells(path, separator, quoted=False)
            notes.append(f"{path.name}: quotation marks were read as they stand, since they do not pair up")
    except UnicodeDecodeError:
        _not_utf8(path)
    if not rows:
        raise PolytaskError(f"{path} has a header ({listed(header)}) and no rows")
    return Table(str(path), "line", tuple(header), tuple(rows), tuple(notes))


def _cells(path: Path, separator: str, *, quoted: bool) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, delimiter=separator, strict=True, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        )
        start = 1
        try:
            header = next(reader, [])
            while not header and reader.line_num:
                header = next(reader)
        except StopIteration:
            raise PolytaskError(f"{path} has no header; its first line must name the columns") from None
        except csv.Error as error:
            raise PolytaskError(f"{path}, line 1: {_csv_advice(error)}") from None
        twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
        if twice:
            raise PolytaskError(f"{path}, line 1: two columns are named {twice[0]!r}; give each its own name")
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return header, rows
            except csv.Error as error:
                raise PolytaskError(f"{path}, line {start}: {_csv_advice(error)}") from None
            if not cells:
                continue
            if len(cells) != len(header):
                raise PolytaskError(
                    f"{path}, line {start}: {len(cells)} cells where the header has {len(header)} ({listed(header)}); "
                    f"a cell that holds {separator!r}, a quote or a newline must stand in quotes"
                )
            rows.append((start, dict(zip(header, cells, strict=True))))


def _csv_advice(error: csv.Error) -> str:
    if "field larger than" in str(error):
        return f"a cell is larger than {FIELD_LIMIT // 2**20} MB; shorten it"
    if "unexpected end" in str(error):
        return "a quoted cell is never closed; close it, or write a quote in a quoted cell twice"
    return f'broken quoting ({error}); write a quote in a quoted cell twice ("")'


def _parquet(path: Path) -> Table:
    import polars

    try:
        frame = polars.read_parquet(path)
    except (polars.exceptions.PolarsError, OSError) as error:
        raise PolytaskError(f"{path} is no whole Parquet file ({str(error).splitlines()[0]}); write it again") from None
    if frame.is_empty():
        raise PolytaskError(f"{path} has columns ({listed(frame.columns)}) and no rows")
    return Table(str(path), "row", tuple(frame.columns), tuple(enumerate(frame.iter_rows(named=True), 1)))
