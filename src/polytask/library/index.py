"""The index of a library: one row for each adapter, full text, embeddings, and who was made from whom.

The folders are the truth and the index follows them: a lost index is built again from them. What only the index knows
are tags, embeddings that were given beside an adapter, and version numbers.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.exc import DatabaseError

from polytask.adapters import Adapter
from polytask.errors import PolytaskError, UsageError
from polytask.library.tables import MIGRATIONS, SEARCHED, adapters, embeddings, migrate, parents, schema_version

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter of a library. `score` is `metric` on the test split (or validation), `low` and `high` its interval.

    `bytes` is the size of the tensors; `created` and `added` are ISO 8601; `removed`: since when it is in the trash.
    """

    id: str
    name: str
    version: int
    task: str
    kind: str
    method: str
    backbone: str
    fingerprint: str
    metric: str
    score: float | None
    low: float | None
    high: float | None
    trained_parameters: int
    bytes: int
    licence: str
    created: str
    added: str
    removed: str | None
    tags: tuple[str, ...]


_ENTRY = tuple(adapters.c[field.name] for field in fields(Entry))


class Index:
    """The tables behind a library, in SQLite or at another SQLAlchemy URL. Methods take a connection: the library
    decides what is one transaction."""

    def __init__(self, url: str) -> None:
        """Raises PolytaskError where it is not a database, or of a newer polytask; UsageError for a bad URL."""
        try:
            parsed = sa.make_url(url)
            self.sqlite = parsed.get_backend_name() == "sqlite"
            # A connection to SQLite is cheap, and one that is never kept survives a fork and any number of threads.
            self._engine = sa.create_engine(parsed, **({"poolclass": sa.NullPool} if self.sqlite else {}))
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ModuleNotFoundError) as error:
            raise UsageError(f"{url}: is no SQLAlchemy URL that works here: {error}") from None
        self.where = parsed.database if self.sqlite else parsed.render_as_string(hide_password=True)
        sa.event.listen(self._engine, "begin", self._begin)
        if self.sqlite:
            sa.event.listen(self._engine, "connect", _configure)
        self._migrate()
        with self.read() as connection:
            self._full_text = self.sqlite and sa.inspect(connection).has_table("search")

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the index from begin to end."""
        with self._errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction; no other process writes while it is open, so it also guards the library's folders."""
        with self._errors(), self._engine.connect() as plain:
            connection = plain.execution_options(polytask_write=True)
            with connection.begin():
                yield connection

    def put(
        self, connection: sa.Connection, adapter: Adapter, *, embedding: Vector | None, tags: Sequence[str] | None
    ) -> None:
        """Insert an adapter as the next version of its name, or refresh what its card says."""
        row = _row(adapter)
        known = connection.execute(
            sa.select(adapters.c.key, adapters.c.tags).where(adapters.c.id == adapter.id)
        ).one_or_none()
        if known is None:
            newest = sa.select(sa.func.max(adapters.c.version)).where(adapters.c.name == adapter.name)
            row |= {
                "version": (connection.execute(newest).scalar() or 0) + 1,
                "added": now(),
                "tags": json.dumps(list(tags or ()), ensure_ascii=False),
            }
            key = connection.execute(adapters.insert().values(row)).inserted_primary_key[0]  # type: ignore[index]
        else:
            key = known.key
            if tags is not None:
                row["tags"] = json.dumps(list(tags), ensure_ascii=False)
            connection.execute(adapters.update().where(adapters.c.key == key).values(row))
        if self._full_text:
            connection.exec_driver_sql("DELETE FROM search WHERE rowid = ?", (key,))
            connection.exec_driver_sql(
                f"INSERT INTO search (rowid, {', '.join(SEARCHED)}) VALUES (?{', ?' * len(SEARCHED)})",
                (key, *(row[column] for column in SEARCHED)),
            )
        if embedding is not None:
            connection.execute(embeddings.delete().where(embeddings.c.id == adapter.id))
            connection.execute(
                embeddings.insert().values(
                    id=adapter.id, width=embedding.size, vector=embedding.astype("<f4").tobytes()
                )
            )
        connection.execute(parents.delete().where(parents.c.child == adapter.id))
        for parent in dict.fromkeys(adapter.card.lineage.parents):
            connection.execute(parents.insert().values(child=adapter.id, parent=parent))

    def mark(self, connection: sa.Connection, identity: str, *, removed: bool) -> None:
        when = now() if removed else None
        connection.execute(adapters.update().where(adapters.c.id == identity).values(removed=when))

    def tag(self, connection: sa.Connection, identity: str, tags: Sequence[str]) -> None:
        said = json.dumps(list(tags), ensure_ascii=False)
        connection.execute(adapters.update().where(adapters.c.id == identity).values(tags=said))

    def delete(self, connection: sa.Connection, identity: str) -> None:
        """Remove every row about an adapter. SQLite overwrites the freed pages (`secure_delete`)."""
        key = connection.execute(sa.select(adapters.c.key).where(adapters.c.id == identity)).scalar()
        connection.execute(adapters.delete().where(adapters.c.id == identity))
        connection.execute(embeddings.delete().where(embeddings.c.id == identity))
        connection.execute(parents.delete().where(parents.c.child == identity))
        if self._full_text and key is not None:
            connection.exec_driver_sql("DELETE FROM search WHERE rowid = ?", (key,))
            # A deleted word stays in FTS5's segments until they are merged into one.
            connection.exec_driver_sql("INSERT INTO search (search) VALUES ('optimize')")

    def flush(self) -> None:
        """Empty SQLite's write-ahead log, which holds old pages as they were before."""
        if self.sqlite:
            with self._errors(), self._engine.connect() as connection:
                raw: Any = connection.connection.dbapi_connection
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def states(self, connection: sa.Connection) -> dict[str, bool]:
        """Every id, with whether it is in the trash."""
        found = connection.execute(sa.select(adapters.c.id, adapters.c.removed))
        return {identity: removed is not None for identity, removed in found}

    def find(self, connection: sa.Connection, ref: str, *, removed: bool | None) -> tuple[Entry, ...]:
        """What a reference may mean, best first: an id, `name@version`, a name (newest first), or an id's beginning.

        `removed` looks in the trash (True), outside it (False) or in both (None).
        """
        for way in _ways(ref):
            query = sa.select(*_ENTRY).where(way, *_in_trash(removed)).order_by(adapters.c.version.desc()).limit(20)
            if found := tuple(_entry(row) for row in connection.execute(query)):
                return found
        return ()

    def entries(
        self,
        connection: sa.Connection,
        *,
        equal: dict[str, str | None],
        tag: str | None = None,
        removed: bool | None = False,
        limit: int | None = None,
    ) -> tuple[Entry, ...]:
        """The rows whose columns equal what is asked, by name and then newest version first."""
        query = sa.select(*_ENTRY).where(*_in_trash(removed)).order_by(adapters.c.name, adapters.c.version.desc())
        for column, value in equal.items():
            if value is not None:
                query = query.where(adapters.c[column] == value)
        if tag is not None:
            query = query.where(_contains(adapters.c.tags, json.dumps(tag, ensure_ascii=False)))
        return tuple(_entry(row) for row in connection.execute(query.limit(limit)))

    def search(self, connection: sa.Connection, text: str, limit: int) -> tuple[Entry, ...]:
        """Entries with any of the words, best first; where no word is found, those that contain the text as it is."""
        words = list(dict.fromkeys(re.findall(r"[^\W_]+", text.lower())))[:32]
        if self._full_text and words:
            # The last word may still be being typed.
            query = " OR ".join(f'"{word}"' for word in words) + "*"
            weights = ", ".join(str(weight) for weight in SEARCHED.values())
            sql = f"SELECT rowid FROM search WHERE search MATCH ? ORDER BY bm25(search, {weights}), rowid"
            keys = connection.exec_driver_sql(sql, (query,)).scalars().all()
            found = self._by_key(connection, keys, limit)
            if found:
                return found
        plain = text.replace("\0", " ").strip()  # SQLite takes a NUL for the end
        columns = [adapters.c[column] for column in SEARCHED]
        hits: dict[int, float] = {}
        for piece in [plain] if self._full_text or not words else words:
            if not piece:
                continue
            for column, weight in zip(columns, SEARCHED.values(), strict=True):
                for key in connection.execute(sa.select(adapters.c.key).where(_contains(column, piece))).scalars():
                    hits[key] = hits.get(key, 0.0) + weight
        return self._by_key(connection, sorted(hits, key=lambda key: (-hits[key], key)), limit)

    def similar(
        self, connection: sa.Connection, embedding: Vector, k: int, fingerprint: str | None
    ) -> tuple[tuple[Entry, float], ...]:
        """The k entries whose embeddings have the largest cosine with this one (of length 1), best first."""
        query = (
            sa.select(embeddings.c.id, embeddings.c.vector)
            .join(adapters, adapters.c.id == embeddings.c.id)
            .where(embeddings.c.width == embedding.size, adapters.c.removed.is_(None))
        )
        if fingerprint is not None:
            query = query.where(adapters.c.fingerprint == fingerprint)
        rows = connection.execute(query).all()
        if not rows:
            return ()
        matrix = np.frombuffer(b"".join(row.vector for row in rows), dtype="<f4").reshape(len(rows), -1)
        cosines = matrix @ embedding
        best = np.argsort(-cosines, kind="stable")[:k]
        ids = [rows[i].id for i in best]
        by_id = {row.id: _entry(row) for row in connection.execute(sa.select(*_ENTRY).where(adapters.c.id.in_(ids)))}
        return tuple((by_id[rows[i].id], float(cosines[i])) for i in best)

    def parents_of(self, connection: sa.Connection, identity: str) -> tuple[str, ...]:
        query = sa.select(parents.c.parent).where(parents.c.child == identity).order_by(parents.c.parent)
        return tuple(connection.execute(query).scalars())

    def children_of(self, connection: sa.Connection, identity: str) -> tuple[str, ...]:
        query = sa.select(parents.c.child).where(parents.c.parent == identity).order_by(parents.c.child)
        return tuple(connection.execute(query).scalars())

    def _by_key(self, connection: sa.Connection, keys: Sequence[int], limit: int) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for start in range(0, len(keys), 500):  # a query holds only so many parameters
            some = keys[start : start + 500]
            query = sa.select(adapters.c.key, *_ENTRY).where(adapters.c.key.in_(some), adapters.c.removed.is_(None))
            rows = {row.key: row for row in connection.execute(query)}
            found += [_entry(rows[key]) for key in some if key in rows]
            if len(found) >= limit:
                break
        return tuple(found[:limit])

    def _begin(self, connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("polytask_write", False)
        if self.sqlite:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
        elif write and connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7061)")

    def _migrate(self) -> None:
        with self.read() as connection:
            if schema_version(connection, str(self.where)) == len(MIGRATIONS):
                return
        with self.write() as connection:
            migrate(connection, str(self.where))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, sqlite3.DatabaseError) as error:
            cause = error.orig if isinstance(error, DatabaseError) else error
            reason = " ".join(str(cause).split())
            if isinstance(cause, sqlite3.DatabaseError) and not isinstance(cause, sqlite3.OperationalError):
                reason += "; move it away, and the library builds a new index from its folders"
            raise PolytaskError(f"{self.where}: {reason}") from None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def unit(embedding: Any) -> Vector:
    """A vector of length 1, from a sequence, an array or a tensor.

    Raises:
        UsageError: it is not one vector of finite numbers with a direction.
    """
    plain = embedding.detach().cpu().float().numpy() if hasattr(embedding, "detach") else embedding
    vector = np.asarray(plain, dtype=np.float32)
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all() or not vector.any():
        raise UsageError(f"an embedding is one vector of finite numbers that are not all 0, not shape {vector.shape}")
    # Twice in float64, so that neither very large nor very small numbers overflow in the square.
    wide = vector.astype(np.float64) / np.abs(vector).max()
    unit_vector: Vector = (wide / np.linalg.norm(wide)).astype(np.float32)
    return unit_vector


def _row(adapter: Adapter) -> dict[str, Any]:
    card = adapter.card
    score = card.scores.get("test") or card.scores.get("validation") or next(iter(card.scores.values()), None)
    labels = " ".join(f"{label.name} {label.description}".strip() for label in card.task.labels)
    return {
        "id": adapter.id,
        "name": adapter.name,
        "task": card.task.name,
        "kind": card.task.kind,
        "method": adapter.method,
        "backbone": adapter.backbone.name,
        "fingerprint": adapter.backbone.fingerprint,
        "metric": score.metric if score else "",
        "score": score.value if score else None,
        "low": score.low if score else None,
        "high": score.high if score else None,
        "trained_parameters": card.trained_parameters,
        "bytes": adapter.bytes,
        "licence": card.licence,
        "created": card.created or now(),
        "removed": None,
        "instruction": card.task.instruction,
        "labels": labels,
        "notes": " ".join(card.notes),
    }


def _entry(row: sa.Row[Any]) -> Entry:
    said = {field.name: getattr(row, field.name) for field in fields(Entry)}
    return Entry(**(said | {"tags": tuple(json.loads(row.tags))}))


def _ways(ref: str) -> Iterator[sa.ColumnElement[bool]]:
    """What a reference may say, one after another: most are ids, and building a condition costs more than asking."""
    yield adapters.c.id == ref
    if (match := re.fullmatch(r"(.+)@(\d{1,9})", ref, re.DOTALL)) is not None:
        yield (adapters.c.name == match[1]) & (adapters.c.version == int(match[2]))
    yield adapters.c.name == ref
    if re.fullmatch(r"[0-9a-f]{3,64}", ref):
        yield (adapters.c.id >= ref) & (adapters.c.id < ref + "g")


def _in_trash(removed: bool | None) -> list[sa.ColumnElement[bool]]:
    if removed is None:
        return []
    return [adapters.c.removed.is_not(None) if removed else adapters.c.removed.is_(None)]


def _contains(column: sa.Column[Any], text: str) -> sa.ColumnElement[bool]:
    return sa.func.lower(column).contains(text.lower(), autoescape=True)


def _configure(connection: Any, _: object) -> None:
    # The driver would begin transactions by itself, too late and never immediate: see Index._begin.
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 60000")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA synchronous = FULL")
    if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
        return
    for attempt in range(100):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:  # another process changes it now, and here SQLite does not wait
            if attempt == 99:
                raise
            time.sleep(0.05)
