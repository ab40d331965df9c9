"""Forgetting an adapter for good: folder, rows, embedding, words. What stays is one line of the ledger.

First the intention is written down, as `forgetting/<id>.json`; from then on the adapter will be forgotten, whatever
happens. Then its folder, its rows and what the index still holds of them go, the ledger gets its line, and last of all
the intention goes. A process that is killed in between leaves the intention, and the next open goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from polytask.adapters.disk import sync, write_whole
from polytask.adapters.store import TENSORS
from polytask.errors import PolytaskError
from polytask.library.folders import Folders, disk, is_id
from polytask.library.index import Index, now


def begin(folders: Folders, identity: str, reason: str) -> None:
    """Write the intention down; the caller holds the index's write transaction. `finish` does the rest."""
    folder = next((path for path in (folders.live(identity), folders.trash(identity)) if path.exists()), None)
    with disk(folders.forgetting):
        line = {"id": identity, "when": now(), "sha256": _sha256(folder), "reason": reason}
        folders.forgetting.mkdir(exist_ok=True)
        write_whole(folders.forgetting / f"{identity}.json", (json.dumps(line, ensure_ascii=False) + "\n").encode())


def begun(folders: Folders) -> list[Path]:
    """The intentions that are written down."""
    return sorted(path for path in folders.forgetting.glob("*.json") if is_id(path.stem))


def finish(folders: Folders, index: Index) -> None:
    """Forget what was intended. It may be done again at any point."""
    done = []
    with index.write() as connection, disk(folders.ledger):
        for intention in begun(folders):
            identity = intention.stem
            done.append(intention)
            gone = folders.forgetting / identity
            for folder in (folders.live(identity), folders.trash(identity)):
                if folder.exists():
                    folders.move(folder, gone)
                shutil.rmtree(gone, ignore_errors=True)
            index.delete(connection, identity)
            line = intention.read_text(encoding="utf-8")
            if not folders.ledger.exists() or line not in folders.ledger.read_text(encoding="utf-8"):
                with open(folders.ledger, "a", encoding="utf-8") as file:
                    file.write(line)
                sync(folders.ledger)
    index.flush()
    # Last: until the rows are gone for good, the next open must know that it has to go on.
    for intention in done:
        intention.unlink(missing_ok=True)


def forgotten(folders: Folders) -> tuple[dict[str, str], ...]:
    """The lines of the ledger, oldest first."""
    if not folders.ledger.exists():
        return ()
    try:
        lines = folders.ledger.read_text(encoding="utf-8").split("\n")  # a reason may hold other ends of lines
        return tuple(json.loads(line) for line in lines if line.strip())
    except ValueError as error:
        raise PolytaskError(f"{folders.ledger}: is damaged: {error}") from None


def _sha256(folder: Path | None) -> str:
    """Of the tensors' file as it is now, damaged or not; empty where there is none."""
    if folder is None or not (folder / TENSORS).exists():
        return ""
    with open(folder / TENSORS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
