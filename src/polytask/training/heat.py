"""Trainings of several methods for one job, each of which stops after some epochs and may go on later.

All begin from one head, fitted once to frozen features. A training that stopped goes on as if it had not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from polytask.adapters import HeadCard
from polytask.backbones import Backbone
from polytask.methods import Method, build
from polytask.tasks import Task
from polytask.training import checkpoint
from polytask.training.learner import fit_head, prepare
from polytask.training.loop import Event, Loop
from polytask.training.settings import Job, Settings


class Start:
    """A task's data and its head, fitted to frozen features: where heats begin. `seconds` is what that took."""

    def __init__(self, backbone: Backbone, task: Task, head: HeadCard, settings: Settings) -> None:
        began = time.perf_counter()
        self.backbone = backbone
        self.learner = prepare(backbone, Job(task, build("head"), head, settings))
        fit_head(backbone, self.learner)
        self.seconds = time.perf_counter() - began

    def heat(
        self,
        method: Method,
        settings: Settings,
        folder: Path,
        on_event: Callable[[Event], None] | None = None,
    ) -> Heat:
        """A method's training, which goes on from the checkpoint in `folder` if there is one, as `train` with that
        folder does. Raises UsageError where the backbone has none of the method's sites."""
        job = replace(self.learner.job, method=method, settings=settings)
        made = method.start(self.backbone, settings.seed, writing=job.head.text is not None)
        own = {name: t.to(self.backbone.device) for name, t in made.items()}
        fitted = self.learner
        learner = replace(
            fitted,
            job=job,
            method=method,
            tensors={n: t.clone() for n, t in fitted.tensors.items()} | own,
            best_tensors={n: t.clone() for n, t in (fitted.tensors | own | fitted.probe_tensors).items()},
            units=[replace(unit, states=None) for unit in fitted.units],
            history=[],
            losses=[],
            order=[],
        )
        return Heat(Loop(self.backbone, [learner], lambda event: None, folder, None), folder, on_event)


class Heat:
    """One training. `seconds` is what it took, without the head's fit."""

    def __init__(self, loop: Loop, folder: Path, on_event: Callable[[Event], None] | None) -> None:
        self._loop, self._folder, self._on_event = loop, folder, on_event
        [self._learner] = loop.learners
        self._until = 0
        self._random = torch.get_rng_state()
        loop.tell = self._tell

    def run(self, epochs: int) -> float:
        """Go on until so many epochs are over in all; the best validation score of these epochs.

        Raises PolytaskError where the loss is no longer a number.
        """
        learner = self._learner
        self._until = epochs * learner.steps_an_epoch
        if not learner.done and learner.step < self._until:
            torch.set_rng_state(self._random)
            with suppress(_Stop):
                self._loop.run()
            self._random = torch.get_rng_state()
            checkpoint.save(self._folder, [learner], self._loop.backbone.fingerprint)
        return max(row["score"] for row in learner.history if row["epoch"] <= epochs)

    @property
    def seconds(self) -> float:
        return self._learner.seconds

    @property
    def epochs(self) -> int:
        """How many epochs are over."""
        return len(self._learner.history)

    def _tell(self, event: Event) -> None:
        if event.kind == "step" and self._on_event is not None:
            self._on_event(event)
        if event.kind == "score" and event.step >= self._until:
            raise _Stop


class _Stop(Exception):
    pass
