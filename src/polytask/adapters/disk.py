"""Files and folders that are on the disk whole, or not at all: whoever is killed or meets a full disk loses nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polytask.errors import PolytaskError, UsageError

# A writer that was killed leaves its temporary folder behind; one this old (seconds) has no writer any more.
_ABANDONED = 3600.0


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and wait until it is on the disk; what was there before stays until the new one is whole.

    Raises:
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def whole_folder(folder: Path, names: Collection[str], *, last: str | None = None) -> Iterator[Path]:
    """A temporary sibling to write into, which takes the folder's place, whole, when the block ends well.

    Where the folder exists and holds nothing but `names`, it is replaced. No system renames over a full folder, so the
    old one steps aside as `previous(folder)` first; a reader finds it there if the writer is killed between the two
    renames. `last` is the one file that changes most: where the others are as they were, only it is replaced.

    Raises:
        UsageError: the folder is a file, or holds something that is not in `names`.
        PolytaskError: the disk refuses; what was there before is still there.
    """
    target = Path(os.path.realpath(folder))
    temporary = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        _check_replaceable(folder, target, names)
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, f".{target.name}.*.tmp")
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        _put(temporary, target, last)
        sync(target.parent)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise PolytaskError(f"{folder}: not written: {reason}; what was there is unchanged") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def previous(folder: Path) -> Path:
    """Where the old folder stands while `whole_folder` puts the new one in its place."""
    target = Path(os.path.realpath(folder))
    return target.parent / f".{target.name}.previous"


def sweep(parent: Path, pattern: str) -> None:
    """Delete temporary folders that killed writers left behind, once they are an hour old."""
    for path in parent.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path)


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no fsync of a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_replaceable(folder: Path, target: Path, names: Collection[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{folder}: is a file; name a folder")
    foreign = sorted(set(os.listdir(target)) - set(names))
    if foreign:
        raise UsageError(f"{folder}: holds {foreign[0]}, which is no part of an adapter; choose another folder")


def _put(temporary: Path, target: Path, last: str | None) -> None:
    aside = previous(target)
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES) or not target.is_dir():
            raise
        if last is not None and _same_but(last, temporary, target):
            # One rename of one file, and a reader never finds the folder missing.
            os.replace(temporary / last, target / last)
            sync(target)
            return
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(target, aside)
        try:
            os.replace(temporary, target)
        except BaseException:
            os.replace(aside, target)
            raise
    shutil.rmtree(aside, ignore_errors=True)


def _same_but(last: str, new: Path, old: Path) -> bool:
    """Whether the two folders have the same files with the same bytes, but for the last."""
    if not set(os.listdir(old)) <= set(os.listdir(new)):
        return False
    for path in new.iterdir():
        if path.name == last:
            continue
        try:
            with open(path, "rb") as one, open(old / path.name, "rb") as other:
                if hashlib.file_digest(one, "sha256").digest() != hashlib.file_digest(other, "sha256").digest():
                    return False
        except FileNotFoundError:
            return False
    return True
