"""Work that goes on where it was stopped: a hidden folder in the library for each job, named by what the job is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from polytask.errors import PolytaskError

if TYPE_CHECKING:
    from polytask.backbones import Backbone
    from polytask.recipes.adapt import Plan


def folder_for(library: Path, base: Backbone, plans: Sequence[Plan]) -> Path:
    """Where this work keeps its checkpoints: the same command finds them, any other does not."""
    from polytask import __version__

    says = [
        [
            plan.task.card().model_dump(mode="json"),
            plan.method,
            dict(plan.hyperparameters or {}),
            vars(plan.settings),
            vars(plan.reading),
            *([[one.id for one in plan.above], [one.id for one in plan.over]] if plan.above or plan.over else []),
        ]
        for plan in plans
    ]
    text = json.dumps([__version__, base.fingerprint, base.precision, says], sort_keys=True)
    return library / ".training" / hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def resumable(folder: Path, *, keep: bool = False) -> Iterator[None]:
    """Run work that keeps checkpoints in `folder`; they are removed when it succeeds, unless `keep`.

    Ctrl-C becomes a PolytaskError that says how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        if any(path.is_file() for path in folder.rglob("*")):
            raise PolytaskError("stopped; the same command goes on from its checkpoint") from None
        raise PolytaskError("stopped before the first checkpoint; the same command starts again") from None
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another job's checkpoints may stand beside
            folder.parent.rmdir()
