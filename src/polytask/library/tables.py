"""The tables of a library's index, and how those of an older polytask become them."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from polytask.errors import PolytaskError

_metadata = sa.MetaData()

adapters = sa.Table(
    "adapters",
    _metadata,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("backbone", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("metric", sa.Text, nullable=False),
    sa.Column("score", sa.Float),
    sa.Column("low", sa.Float),
    sa.Column("high", sa.Float),
    sa.Column("trained_parameters", sa.BigInteger, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("licence", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("added", sa.Text, nullable=False),
    sa.Column("removed", sa.Text),
    sa.Column("tags", sa.Text, nullable=False),
    sa.Column("instruction", sa.Text, nullable=False),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("notes", sa.Text, nullable=False),
    sa.UniqueConstraint("name", "version"),
)
embeddings = sa.Table(
    "embeddings",
    _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("width", sa.Integer, nullable=False, index=True),
    sa.Column("vector", sa.LargeBinary, nullable=False),  # float32, little-endian, of length 1
)
parents = sa.Table(
    "parents",
    _metadata,
    sa.Column("child", sa.String(64), primary_key=True),
    sa.Column("parent", sa.String(64), primary_key=True, index=True),
)
schema = sa.Table("polytask_schema", _metadata, sa.Column("version", sa.Integer, nullable=False))

# What a search reads, and how much a hit there counts.
SEARCHED = {"name": 8.0, "task": 6.0, "labels": 4.0, "instruction": 2.0, "method": 1.0, "notes": 1.0}


def _first(connection: sa.Connection) -> None:
    _metadata.create_all(connection)
    if _has_full_text(connection):
        columns = ", ".join(SEARCHED)
        tokens = "porter unicode61 remove_diacritics 2"
        connection.exec_driver_sql(f"CREATE VIRTUAL TABLE search USING fts5({columns}, tokenize='{tokens}')")


# Migration n brings the schema from version n to n + 1. Append only: libraries of every version are out there.
MIGRATIONS: tuple[Callable[[sa.Connection], None], ...] = (_first,)


def schema_version(connection: sa.Connection, where: str) -> int:
    """Of the tables that are there, 0 where there are none. PolytaskError for those of a newer polytask."""
    if not sa.inspect(connection).has_table(schema.name):
        return 0
    found = connection.execute(sa.select(schema.c.version)).scalar() or 0
    if found > len(MIGRATIONS):
        raise PolytaskError(
            f"{where}: index version {found}; this polytask reads up to {len(MIGRATIONS)}: install a newer one"
        )
    return int(found)


def migrate(connection: sa.Connection, where: str) -> None:
    """Bring the tables to this polytask's version."""
    for migration in MIGRATIONS[schema_version(connection, where) :]:
        migration(connection)
    connection.execute(schema.delete())
    connection.execute(schema.insert().values(version=len(MIGRATIONS)))


def _has_full_text(connection: sa.Connection) -> bool:
    if connection.dialect.name != "sqlite":
        return False
    options = connection.exec_driver_sql("PRAGMA compile_options").scalars().all()
    return "ENABLE_FTS5" in options
