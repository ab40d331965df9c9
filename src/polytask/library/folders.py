"""The folders of a library, which are the truth about it: their layout, and how an adapter moves from one to another.

format.json                        the version of this layout
library.sqlite                     the index (or at a SQLAlchemy URL)
adapters/<id>/                     one adapter: adapter.safetensors, adapter.json
trash/<id>/                        removed ones, until they are restored or forgotten
forgetting/<id>.json, <id>/        on their way out: a forget that was killed goes on at the next open
routers/                           what routers have learnt about this library
forgotten.jsonl                    what was forgotten, when, its hash, and why
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from polytask.adapters import Adapter, load
from polytask.adapters.disk import sweep, sync, write_whole
from polytask.errors import PolytaskError, UsageError

FORMAT = "polytask-library"
FORMAT_VERSION = 1

_ID = re.compile(r"[0-9a-f]{16}")


def is_id(text: str) -> bool:
    """Whether a text is a whole id, which names a folder and nothing outside the library."""
    return _ID.fullmatch(text) is not None


class Folders:
    """Where a library's adapters stand. Whoever moves one holds the index's write transaction meanwhile."""

    def __init__(self, location: Path, *, create: bool) -> None:
        """Raises UsageError where there is something else, or nothing and `create` is false; PolytaskError where the
        library is of a newer polytask or the disk refuses."""
        self.location = location
        self.forgetting = location / "forgetting"
        self.ledger = location / "forgotten.jsonl"
        path = location / "format.json"
        try:
            said = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            self._make(path, create)
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

    def live(self, identity: str) -> Path:
        return self.location / "adapters" / identity

    def trash(self, identity: str) -> Path:
        return self.location / "trash" / identity

    def standing(self) -> dict[str, Path]:
        """The ids that have a folder, and where it stands: `adapters` or, if it is not there, `trash`."""
        found: dict[str, Path] = {}
        for parent in (self.location / "trash", self.location / "adapters"):
            if parent.is_dir():
                found |= {name: parent / name for name in os.listdir(parent) if is_id(name)}
        return found

    def load(self, folder: Path, *, device: str | torch.device = "cpu") -> Adapter:
        """The adapter of one of these folders, whose name must be its id."""
        adapter = load(folder, device=device)
        if adapter.id != folder.name:
            raise PolytaskError(f"{folder}: holds another adapter, {adapter.id}; get another copy, or forget it")
        return adapter

    def move(self, old: Path, new: Path) -> None:
        """Put a folder in another place, and wait until that is on the disk; or leave it where it was."""
        if not old.is_dir():
            raise PolytaskError(f"{old}: is gone; see verify()")
        with disk(old):
            new.parent.mkdir(exist_ok=True)
            shutil.rmtree(new, ignore_errors=True)
            os.replace(old, new)
            try:
                sync(new.parent)
                sync(old.parent)
            except OSError:
                os.replace(new, old)
                raise

    def sweep(self) -> None:
        """Delete what killed writers left behind among the adapters."""
        sweep(self.location / "adapters", ".*.tmp")

    def _make(self, path: Path, create: bool) -> None:
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
            write_whole(path, (json.dumps({"format": FORMAT, "version": FORMAT_VERSION}) + "\n").encode())
        except OSError as error:
            raise PolytaskError(f"{self.location}: cannot be made: {error.strerror}") from None


def in_trash(folder: Path) -> bool:
    return folder.parent.name == "trash"


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """What the disk refuses, in one line."""
    try:
        yield
    except OSError as error:
        raise PolytaskError(f"{path}: the disk refuses: {error.strerror}; nothing is lost, do it again") from None
