"""A library: the folder where adapters are kept.

    format.json                        the version of this layout
    library.sqlite                     the index (or at a SQLAlchemy URL)
    adapters/<id>/                     one adapter: adapter.safetensors, adapter.json
    trash/<id>/                        removed ones, until they are restored or forgotten
    forgetting/<id>.json, <id>/        on their way out: a forget that was killed goes on at the next open
    forgotten.jsonl                    what was forgotten, when, its hash, and why

Where a folder stands is the truth; the index follows it when a library is opened. Every change is one write transaction
of the index, which keeps other processes out of the folders meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from polytask.adapters import Adapter, BackboneCard, Card, HeadCard, export_peft, import_peft, load, save
from polytask.adapters.peft import CONFIG, SiteLike
from polytask.adapters.store import DESCRIPTION, TENSORS, shown, sweep, sync
from polytask.errors import PolytaskError, UsageError
from polytask.library.index import Entry, Index, now, unit

FORMAT = "polytask-library"
FORMAT_VERSION = 1

_ID = re.compile(r"[0-9a-f]{16}")


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
        self._open_folder(create)
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
            save(adapter, self._live(adapter.id))
            shutil.rmtree(self._trash(adapter.id), ignore_errors=True)
            self._index.put(connection, adapter, embedding=vector, tags=tags)
        return adapter.id

    def get(self, ref: str, *, device: str | torch.device = "cpu") -> Adapter:
        """Load an adapter; it costs the same in a library of ten as of ten thousand.

        Raises:
            UsageError: nothing has this name, it is in the trash, or several ids begin so.
            PolytaskError: its files are damaged.
        """
        # A whole id names its folder, and where a folder stands is the truth: the index need not be asked.
        known = _ID.fullmatch(ref) and (self._live(ref) / DESCRIPTION).exists()
        return self._load(self._live(ref if known else self.entry(ref).id), device=device)

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
        """Put an adapter in the trash; its id. A name means its newest version, and then the one before is found."""
        with self._index.write() as connection:
            entry = self._resolve(ref, removed=False)
            self._move(self._live(entry.id), self._trash(entry.id))
            self._index.mark(connection, entry.id, removed=True)
        return entry.id

    def restore(self, ref: str) -> str:
        """Take an adapter out of the trash; its id."""
        with self._index.write() as connection:
            entry = self._resolve(ref, removed=True)
            self._move(self._trash(entry.id), self._live(entry.id))
            self._index.mark(connection, entry.id, removed=False)
        return entry.id

    def forget(self, ref: str, *, reason: str = "") -> str:
        """Delete an adapter for good, in the trash or not: files, rows, embedding, words; its id.

        `forgotten.jsonl` gets a line with the id, the time, the SHA-256 of its tensors' file and the reason.

        Raises:
            UsageError: nothing has this name; a name with several versions is refused, so that none stays by mistake.
        """
        with self._index.read() as connection:
            found = self._index.find(connection, ref, removed=None)
        if len(found) > 1:
            raise UsageError(f"{shown(ref)}: means several adapters ({_names(found)}); say which to forget")
        identity = found[0].id if found else ref
        folder = next((path for path in (self._live(identity), self._trash(identity)) if path.exists()), None)
        if not found and (folder is None or not _ID.fullmatch(identity)):
            raise UsageError(f"{shown(ref)}: no such adapter in {self.location}")
        with self._index.write(), _disk(self._forgetting()):
            # From here on it will be forgotten, whatever happens.
            line = {"id": identity, "when": now(), "sha256": _sha256(folder), "reason": reason}
            self._forgetting().mkdir(exist_ok=True)
            temporary = self._forgetting() / f".{identity}.tmp"
            temporary.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
            sync(temporary)
            os.replace(temporary, self._forgetting() / f"{identity}.json")
            sync(self._forgetting())
        self._finish_forgetting()
        return identity

    def forgotten(self) -> tuple[dict[str, str], ...]:
        """The ledger of what was forgotten: id, when, sha256 and reason of each, oldest first."""
        path = self.location / "forgotten.jsonl"
        if not path.exists():
            return ()
        try:
            return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        except ValueError as error:
            raise PolytaskError(f"{path}: is damaged: {error}") from None

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
        backbone: BackboneCard | None = None,
        card: Card | None = None,
        head: HeadCard | None = None,
        head_module: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> str:
        """Add the adapter of a folder: polytask's, or PEFT's (see `import_peft` for what it needs); its id."""
        folder = Path(folder)
        if (folder / DESCRIPTION).exists() or not (folder / CONFIG).exists():
            return self.add(load(folder), tags=tags)
        if sites is None:
            raise UsageError(f"{folder}: is of PEFT, whose format names modules: pass sites= of the backbone")
        adapter = import_peft(folder, sites, backbone=backbone, card=card, head=head, head_module=head_module)
        return self.add(adapter, tags=tags)

    def verify(self) -> tuple[Damage, ...]:
        """Read and hash every adapter, the trash too, and list those that are damaged, lost or strange."""
        with self._index.read() as connection:
            entries = {e.id: e for e in self._index.entries(connection, equal={}, removed=None)}
        found = self._standing()
        damaged = []
        for identity in sorted(set(entries) | set(found)):
            name = entries[identity].name if identity in entries else ""
            if identity not in found:
                damaged.append(Damage(identity, name, "its folder is gone"))
            else:
                try:
                    self._load(found[identity])
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

    # ------------------------------------------------------------------------------------------------------- folders

    def _live(self, identity: str) -> Path:
        return self.location / "adapters" / identity

    def _trash(self, identity: str) -> Path:
        return self.location / "trash" / identity

    def _forgetting(self) -> Path:
        return self.location / "forgetting"

    def _move(self, old: Path, new: Path) -> None:
        if not old.is_dir():
            raise PolytaskError(f"{old}: is gone; see verify()")
        with _disk(old):
            new.parent.mkdir(exist_ok=True)
            shutil.rmtree(new, ignore_errors=True)
            os.replace(old, new)
            try:
                sync(new.parent)
                sync(old.parent)
            except OSError:
                os.replace(new, old)
                raise

    def _open_folder(self, create: bool) -> None:
        path = self.location / "format.json"
        try:
            said = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            self._make_folder(path, create)
            return
        except (OSError, ValueError) as error:
            raise PolytaskError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(said, dict) or said.get("format") != FORMAT or not isinstance(said.get("version"), int):
            raise PolytaskError(f"{path}: is not of a polytask library")
        if said["version"] > FORMAT_VERSION:
            raise PolytaskError(
                f"{path}: library version {said['version']}; this polytask reads up to {FORMAT_VERSION}: "
                "install a newer one"
            )

    def _make_folder(self, path: Path, create: bool) -> None:
        if not create:
            raise UsageError(f"{self.location}: no library here")
        if self.location.exists() and not self.location.is_dir():
            raise UsageError(f"{self.location}: is a file; name a folder")
        ours = {"library.sqlite", "library.sqlite-wal", "library.sqlite-shm"}
        ours |= {"adapters", "trash", "forgetting", "forgotten.jsonl"}
        try:
            self.location.mkdir(parents=True, exist_ok=True)
            foreign = sorted(
                n for n in os.listdir(self.location) if n not in ours and not n.startswith(".format.json.")
            )
            # Another process may be making the same library.
            if foreign and not path.exists():
                raise UsageError(f"{self.location}: holds {foreign[0]} and is no library; choose a new or empty folder")
            (self.location / "adapters").mkdir(exist_ok=True)
            temporary = self.location / f".format.json.{os.getpid()}"
            try:
                temporary.write_text(json.dumps({"format": FORMAT, "version": FORMAT_VERSION}) + "\n")
                sync(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync(self.location)
        except OSError as error:
            raise PolytaskError(f"{self.location}: cannot be made: {error.strerror}") from None

    def _standing(self) -> dict[str, Path]:
        """The ids that have a folder, and where it stands."""
        found: dict[str, Path] = {}
        for parent in (self.location / "trash", self.location / "adapters"):
            if parent.is_dir():
                found |= {name: parent / name for name in os.listdir(parent) if _ID.fullmatch(name)}
        return found

    def _load(self, folder: Path, *, device: str | torch.device = "cpu") -> Adapter:
        adapter = load(folder, device=device)
        if adapter.id != folder.name:
            raise PolytaskError(f"{folder}: holds another adapter, {adapter.id}; get another copy, or forget it")
        return adapter

    # ------------------------------------------------------------------------------------------------------- healing

    def _reconcile(self) -> None:
        """Bring the index to what the folders say: a writer may have been killed between the two."""
        sweep(self.location / "adapters", ".*.tmp")
        if self._forgetting().is_dir() and any(self._forgetting().glob("*.json")):
            self._finish_forgetting()
        with self._index.read() as connection:
            states = self._index.states(connection)
        standing = self._standing()
        if all(states.get(identity) == self._in_trash(folder) for identity, folder in standing.items()):
            return
        with self._index.write() as connection:
            states, standing = self._index.states(connection), self._standing()
            fresh: list[tuple[str, int, Adapter]] = []
            for identity, folder in standing.items():
                if identity in states:
                    if states[identity] != self._in_trash(folder):
                        self._index.mark(connection, identity, removed=self._in_trash(folder))
                    continue
                with suppress(PolytaskError):  # verify() tells what is wrong with it
                    adapter = self._load(folder)
                    fresh.append((adapter.card.created, (folder / TENSORS).stat().st_mtime_ns, adapter))
            # The oldest first, so that versions of a name are numbered as they came.
            for _, _, adapter in sorted(fresh, key=lambda item: item[:2]):
                mean = adapter.tensors.get("task/mean")
                usable = mean is not None and mean.ndim == 1 and bool(mean.isfinite().all()) and bool(mean.any())
                self._index.put(connection, adapter, embedding=unit(mean) if usable else None, tags=None)
                if self._in_trash(standing[adapter.id]):
                    self._index.mark(connection, adapter.id, removed=True)

    def _in_trash(self, folder: Path) -> bool:
        return folder.parent.name == "trash"

    def _finish_forgetting(self) -> None:
        ledger = self.location / "forgotten.jsonl"
        done = []
        with self._index.write() as connection, _disk(ledger):
            for intent in sorted(self._forgetting().glob("*.json")):
                identity = intent.stem
                if not _ID.fullmatch(identity):
                    continue
                done.append(intent)
                gone = self._forgetting() / identity
                for folder in (self._live(identity), self._trash(identity)):
                    if folder.exists():
                        self._move(folder, gone)
                    shutil.rmtree(gone, ignore_errors=True)
                self._index.delete(connection, identity)
                line = intent.read_text(encoding="utf-8")
                if not ledger.exists() or line not in ledger.read_text(encoding="utf-8"):
                    with open(ledger, "a", encoding="utf-8") as file:
                        file.write(line)
                    sync(ledger)
        self._index.flush()
        # Last: until the rows are gone for good, the next open must know that it has to go on.
        for intent in done:
            intent.unlink(missing_ok=True)

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


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PolytaskError(f"{path}: the disk refuses: {error.strerror}; nothing is lost, do it again") from None


def _names(entries: Sequence[Entry]) -> str:
    said = ", ".join(f"{entry.id} = {entry.name}@{entry.version}" for entry in entries[:5])
    return said + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")


def _sha256(folder: Path | None) -> str:
    """Of the tensors' file as it is now, damaged or not; empty where there is none."""
    if folder is None or not (folder / TENSORS).exists():
        return ""
    with open(folder / TENSORS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
