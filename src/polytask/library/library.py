"""A library: adapters by id, name and meaning.

Where a folder stands is the truth (`folders`); the index follows it when a library is opened. Every change is one write
transaction of the index, which keeps other processes out of the folders meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from polytask.adapters import Adapter, BackboneCard, Card, HeadCard, export_peft, import_peft, load, save
from polytask.adapters.peft import ModelLike, SiteLike, is_peft
from polytask.adapters.store import DESCRIPTION, TENSORS, shown
from polytask.errors import PolytaskError, UsageError
from polytask.library import forgetting
from polytask.library.folders import Folders, in_trash, is_id
from polytask.library.index import Entry, Index, unit


@dataclass(frozen=True, slots=True)
class Damage:
    """An adapter that cannot be trusted, and why, in one line. `name` is empty where the index does not know it."""

    id: str
    name: str
    problem: str


@dataclass(frozen=True, slots=True)
class Relatives:
    """What an adapter was made from and what was made from it; `missing` are parents that are not in the library."""

    parents: tuple[Entry, ...]
    children: tuple[Entry, ...]
    missing: tuple[str, ...]


class Library:
    """Adapters by id, name and meaning. Many processes may use one library at once.

    A `ref` is an id, an unambiguous beginning of one (3 digits or more), `name` (its newest version) or `name@version`.
    """

    def __init__(self, location: str | Path, *, index: str | None = None, create: bool = True) -> None:
        """Open a library, or make one in a folder that is new or empty.

        `index` is a SQLAlchemy URL for the index where a team has a database; `library.sqlite` in the folder otherwise.

        Raises:
            UsageError: the folder holds something else, or (create=False) there is no library.
            PolytaskError: the library is of a newer polytask, its index is damaged, or the disk refuses.
        """
        self.location = Path(location)
        self._folders = Folders(self.location, create=create)
        self._index = Index(index or f"sqlite:///{self.location.absolute() / 'library.sqlite'}")
        self._reconcile()

    def __repr__(self) -> str:
        return f"Library({str(self.location)!r})"

    def add(self, adapter: Adapter, *, embedding: Any = None, tags: Sequence[str] | None = None) -> str:
        """Keep an adapter; its id. The same name again makes a new version of it.

        Adding the same adapter again refreshes its card (and takes it out of the trash). `embedding` is a vector that
        stands for its task; the adapter's own `task/mean` by default.

        Raises:
            UsageError: the name is empty, the embedding is no vector, or the same content is kept under another name.
            PolytaskError: the adapter cannot be stored (see `adapters.store.save`).
        """
        if not adapter.name.strip() or not adapter.name.isprintable():
            raise UsageError(f"{adapter.name!r}: a name has at least one letter and is one line")
        if embedding is None:
            embedding = adapter.tensors.get("task/mean")
            embedding = embedding if embedding is not None and bool(embedding.any()) else None
        vector = None if embedding is None else unit(embedding)
        with self._index.write() as connection:
            known = self._index.find(connection, adapter.id, removed=None)
            if known and known[0].id == adapter.id and known[0].name != adapter.name:
                raise UsageError(
                    f"{adapter.name}: what it computes is kept already as {known[0].name} ({adapter.id}); "
                    "use that name, or forget it first"
                )
            save(adapter, self._folders.live(adapter.id))
            shutil.rmtree(self._folders.trash(adapter.id), ignore_errors=True)
            self._index.put(connection, adapter, embedding=vector, tags=tags)
        return adapter.id

    def get(self, ref: str, *, device: str | torch.device = "cpu") -> Adapter:
        """Load an adapter; it costs the same in a library of ten as of ten thousand.

        Raises:
            UsageError: nothing has this name, it is in the trash, or several ids begin so.
            PolytaskError: its files are damaged.
        """
        # A whole id names its folder, and where a folder stands is the truth: the index need not be asked.
        known = is_id(ref) and (self._folders.live(ref) / DESCRIPTION).exists()
        return self._folders.load(self._folders.live(ref if known else self.entry(ref).id), device=device)

    def entry(self, ref: str) -> Entry:
        """The row of an adapter that is not in the trash; errors as in `get`."""
        return self._resolve(ref, removed=False)

    def list(
        self,
        *,
        name: str | None = None,
        task: str | None = None,
        kind: str | None = None,
        method: str | None = None,
        backbone: str | None = None,
        fingerprint: str | None = None,
        tag: str | None = None,
        removed: bool = False,
        limit: int | None = None,
    ) -> tuple[Entry, ...]:
        """The entries that equal what is asked, by name, newest version first; `removed` lists the trash instead."""
        equal = {
            "name": name,
            "task": task,
            "kind": kind,
            "method": method,
            "backbone": backbone,
            "fingerprint": fingerprint,
        }
        with self._index.read() as connection:
            return self._index.entries(connection, equal=equal, tag=tag, removed=removed, limit=limit)

    def search(self, text: str, *, limit: int = 20) -> tuple[Entry, ...]:
        """Entries whose name, task, labels, instruction, method or notes have these words, best first (BM25)."""
        with self._index.read() as connection:
            return self._index.search(connection, text, limit)

    def similar(self, embedding: Any, k: int = 5, *, fingerprint: str | None = None) -> tuple[tuple[Entry, float], ...]:
        """The k entries whose task embeddings are nearest, with their cosines, best first.

        Embeddings of another width are left out; vectors of two backbones cannot be compared, so give `fingerprint`
        where the library holds adapters of several.

        Raises:
            UsageError: the embedding is no vector.
        """
        vector = unit(embedding)
        with self._index.read() as connection:
            return self._index.similar(connection, vector, k, fingerprint)

    def tag(self, ref: str, *tags: str) -> Entry:
        """Give an adapter these tags in place of those that it has."""
        with self._index.write() as connection:
            entry = self._resolve(ref, removed=False)
            self._index.tag(connection, entry.id, tags)
        return self.entry(entry.id)

    def remove(self, ref: str) -> str:
        """Put an adapter in the trash; its id. A name means its newest version, and then the one before is found.

        Raises:
            UsageError: nothing has this name, or another adapter is made of it or stands on it.
        """
        with self._index.write() as connection:
            entry = self._resolve(ref, removed=False)
            self._spared(connection, entry.id)
            self._folders.move(self._folders.live(entry.id), self._folders.trash(entry.id))
            self._index.mark(connection, entry.id, removed=True)
        return entry.id

    def restore(self, ref: str) -> str:
        """Take an adapter out of the trash; its id."""
        with self._index.write() as connection:
            entry = self._resolve(ref, removed=True)
            self._folders.move(self._folders.trash(entry.id), self._folders.live(entry.id))
            self._index.mark(connection, entry.id, removed=False)
        return entry.id

    def forget(self, ref: str, *, reason: str = "") -> str:
        """Delete an adapter for good, in the trash or not: files, rows, embedding, words; its id.

        `forgotten.jsonl` gets a line with the id, the time, the SHA-256 of its tensors' file and the reason.

        Raises:
            UsageError: nothing has this name, or another adapter is made of it or stands on it; a name with several
                versions is refused, so that none stays by mistake.
        """
        with self._index.read() as connection:
            found = self._index.find(connection, ref, removed=None)
        if len(found) > 1:
            raise UsageError(f"{shown(ref)}: means several adapters ({_names(found)}); say which to forget")
        identity = found[0].id if found else ref
        if not found and ref not in self._folders.standing():
            raise UsageError(f"{shown(ref)}: no such adapter in {self.location}")
        with self._index.write() as connection:
            self._spared(connection, identity)
            forgetting.begin(self._folders, identity, reason)
        forgetting.finish(self._folders, self._index)
        return identity

    def _spared(self, connection: Any, identity: str) -> None:
        """Raise UsageError where an adapter that is not in the trash cannot run without this one."""
        for child in self._index.children_of(connection, identity):
            folder = self._folders.live(child)
            if (folder / DESCRIPTION).exists() and identity in self._folders.load(folder).needs:
                entry = self._index.find(connection, child, removed=False)[0]
                raise UsageError(
                    f"{identity}: {entry.name}@{entry.version} ({child}) is made of it or stands on it; remove that "
                    "first"
                )

    def forgotten(self) -> tuple[dict[str, str], ...]:
        """The ledger of what was forgotten: id, when, sha256 and reason of each, oldest first."""
        return forgetting.forgotten(self._folders)

    def export(
        self,
        ref: str,
        folder: str | Path,
        *,
        format: Literal["polytask", "peft"] = "polytask",
        sites: Mapping[str, SiteLike] | None = None,
        **options: Any,
    ) -> Path:
        """Write an adapter to a folder outside the library. PEFT's format needs the backbone's `sites`; `options` are
        those of `export_peft`."""
        adapter = self.get(ref)
        if format == "polytask":
            return save(adapter, folder)
        if format != "peft":
            raise UsageError(f"format {format!r}: one of polytask, peft")
        if sites is None:
            raise UsageError("PEFT's format names modules: pass sites= of the backbone")
        return export_peft(adapter, folder, sites, **options)

    def import_(
        self,
        folder: str | Path,
        *,
        sites: Mapping[str, SiteLike] | None = None,
        model: ModelLike | None = None,
        backbone: BackboneCard | None = None,
        card: Card | None = None,
        head: HeadCard | None = None,
        head_module: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> str:
        """Add the adapter of a folder: polytask's, or PEFT's (see `import_peft` for what it needs); its id."""
        folder = Path(folder)
        if not is_peft(folder):
            return self.add(load(folder), tags=tags)
        if sites is None:
            raise UsageError(f"{folder}: is of PEFT, whose format names modules: pass sites= of the backbone")
        adapter = import_peft(
            folder, sites, model=model, backbone=backbone, card=card, head=head, head_module=head_module
        )
        return self.add(adapter, tags=tags)

    def verify(self) -> tuple[Damage, ...]:
        """Read and hash every adapter, the trash too, and list those that are damaged, lost or strange."""
        with self._index.read() as connection:
            entries = {e.id: e for e in self._index.entries(connection, equal={}, removed=None)}
        found = self._folders.standing()
        damaged = []
        for identity in sorted(set(entries) | set(found)):
            name = entries[identity].name if identity in entries else ""
            if identity not in found:
                damaged.append(Damage(identity, name, "its folder is gone"))
            else:
                try:
                    self._folders.load(found[identity])
                except PolytaskError as error:
                    damaged.append(Damage(identity, name, str(error)))
        return tuple(damaged)

    def lineage(self, ref: str) -> Relatives:
        """What an adapter was made from, and what was made from it; those in the trash too."""
        with self._index.read() as connection:
            entry = self._resolve(ref, removed=False)

            def rows(ids: Sequence[str]) -> tuple[Entry, ...]:
                found = (self._index.find(connection, identity, removed=None) for identity in ids)
                return tuple(
                    some[0] for some, identity in zip(found, ids, strict=True) if some and some[0].id == identity
                )

            made_from = self._index.parents_of(connection, entry.id)
            parents = rows(made_from)
            present = {parent.id for parent in parents}
            return Relatives(
                parents=parents,
                children=rows(self._index.children_of(connection, entry.id)),
                missing=tuple(identity for identity in made_from if identity not in present),
            )

    def _reconcile(self) -> None:
        """Bring the index to what the folders say: a writer may have been killed between the two."""
        self._folders.sweep()
        if forgetting.begun(self._folders):
            forgetting.finish(self._folders, self._index)
        with self._index.read() as connection:
            states = self._index.states(connection)
        standing = self._folders.standing()
        if all(states.get(identity) == in_trash(folder) for identity, folder in standing.items()):
            return
        with self._index.write() as connection:
            states, standing = self._index.states(connection), self._folders.standing()
            fresh: list[tuple[str, int, Adapter]] = []
            for identity, folder in standing.items():
                if identity in states:
                    if states[identity] != in_trash(folder):
                        self._index.mark(connection, identity, removed=in_trash(folder))
                    continue
                with suppress(PolytaskError):  # verify() tells what is wrong with it
                    adapter = self._folders.load(folder)
                    fresh.append((adapter.card.created, (folder / TENSORS).stat().st_mtime_ns, adapter))
            # The oldest first, so that versions of a name are numbered as they came.
            for _, _, adapter in sorted(fresh, key=lambda item: item[:2]):
                mean = adapter.tensors.get("task/mean")
                usable = mean is not None and mean.ndim == 1 and bool(mean.isfinite().all()) and bool(mean.any())
                self._index.put(connection, adapter, embedding=unit(mean) if usable else None, tags=None)
                if in_trash(standing[adapter.id]):
                    self._index.mark(connection, adapter.id, removed=True)

    def _resolve(self, ref: str, *, removed: bool) -> Entry:
        with self._index.read() as connection:
            found = self._index.find(connection, ref, removed=removed)
            if not found:
                elsewhere = self._index.find(connection, ref, removed=not removed)
                if elsewhere and not removed:
                    raise UsageError(f"{shown(ref)}: is in the trash ({elsewhere[0].id}); restore it first")
                where = "the trash of " if removed else ""
                raise UsageError(
                    f"{shown(ref)}: no such adapter in {where}{self.location}; list what is there, or search"
                )
        if len({entry.name for entry in found}) > 1 or (len(found) > 1 and found[0].name != ref):
            raise UsageError(f"{shown(ref)}: is the beginning of several ids: {_names(found)}")
        return found[0]


def _names(entries: Sequence[Entry]) -> str:
    said = ", ".join(f"{entry.id} = {entry.name}@{entry.version}" for entry in entries[:5])
    return said + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
