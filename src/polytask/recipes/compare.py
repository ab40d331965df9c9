"""Several methods on one task: each is trained as `adapt` trains it, with its own default rate, one after the other.

Every result is kept as JSON in a folder as it comes, so that work that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

import polytask
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.evaluation import Comparison, Trial
from polytask.methods import selectors
from polytask.recipes.adapt import adapt
from polytask.recipes.reading import Reading
from polytask.tasks import Task
from polytask.training import Event, Settings


class OnTrial(Protocol):
    """Told about each result, `new` or found in the folder."""

    def __call__(self, trial: Trial, *, new: bool) -> None: ...


def compare(
    base: Backbone,
    task: Task,
    methods: Sequence[str],
    *,
    seeds: int = 1,
    settings: Settings | None = None,
    reading: Reading | None = None,
    folder: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_trial: OnTrial | None = None,
) -> Comparison:
    """Train each method with seeds 0, 1, ... and put the results side by side.

    `folder` keeps results and checkpoints, and must be of this task, backbone and settings: results in it are taken as
    they are. Raises UsageError for an unknown method, PolytaskError where there is nothing to measure on.
    """
    if not methods or seeds < 1:
        raise UsageError("a comparison needs at least one method and one seed")
    for method in methods:
        selectors.build(method)
    if not task.test and not task.validation:
        raise PolytaskError(f"task {task.name}: no test and no validation examples to compare methods on")
    settings, reading = settings or Settings(), reading or Reading()
    trials = []
    for method in dict.fromkeys(methods):
        for seed in range(seeds):
            kept = None if folder is None else folder / f"{method}-{seed}.json"
            trial = None if kept is None else _found(kept)
            new = trial is None
            if trial is None:
                trial = _measure(base, task, method, replace(settings, seed=seed), reading, folder, on_event)
                if kept is not None:
                    _keep(trial, kept)
            trials.append(trial)
            if on_trial is not None:
                on_trial(trial, new=new)
    shared = {name: value for name, value in vars(settings).items() if name not in ("lr", "seed")}
    return Comparison(
        task=task.card(),
        backbone=base.card(),
        precision=str(base.dtype).removeprefix("torch."),
        settings=shared | {name: value for name, value in vars(reading).items() if value != getattr(Reading, name)},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        version=polytask.__version__,
        trials=tuple(trials),
    )


def _measure(
    base: Backbone,
    task: Task,
    method: str,
    settings: Settings,
    reading: Reading,
    folder: Path | None,
    on_event: Callable[[Event], None] | None,
) -> Trial:
    # One folder for the checkpoints of all: a checkpoint of other work in it is refused, so each has its own.
    training = None if folder is None else folder / "training" / f"{method}-{settings.seed}"
    adapter = adapt(base, task, method, settings=settings, reading=reading, folder=training, on_event=on_event)
    if training is not None:
        shutil.rmtree(training, ignore_errors=True)
        with suppress(OSError):
            training.parent.rmdir()
    card = adapter.card
    return Trial(
        method=method,
        seed=settings.seed,
        hyperparameters=dict(adapter.hyperparameters),
        lr=card.recipe["settings"]["lr"],
        scores=dict(card.scores),
        history=tuple(card.recipe["history"]),
        trained_parameters=card.trained_parameters,
        seconds=card.seconds,
        bytes=adapter.bytes,
    )


def _found(path: Path) -> Trial | None:
    """A result that was kept; None where there is none or it is damaged, and then it is measured again."""
    try:
        return Trial.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _keep(trial: Trial, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(trial.model_dump_json(indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PolytaskError(f"{path}: the result could not be kept: {error.strerror}") from None
