"""A comparison of methods on one task: what was measured, and nothing that measures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict

from polytask.adapters import BackboneCard, ScoreCard
from polytask.evaluation.latency import Latency
from polytask.tasks import TaskCard


class Trial(BaseModel):
    """One method trained once. `scores` by split; `history` has epoch, loss, score (validation) and seconds of each
    evaluation, and is empty for a method that is fitted and not trained; `memory` is the most bytes that trained
    tensors, their gradients and the optimiser's state took at once, None where it was not seen; `bytes` is what the
    saved adapter takes on disk; `threads` are those it was trained with. `latency` is measured later, if at all."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    seed: int
    hyperparameters: dict[str, Any]
    lr: float
    scores: dict[str, ScoreCard]
    history: tuple[dict[str, float], ...]
    trained_parameters: int
    seconds: float
    bytes: int
    memory: int | None = None
    threads: int = 1
    latency: Latency | None = None

    @property
    def validation(self) -> float:
        """What a learning rate is chosen by."""
        return self.scores["validation"].value if "validation" in self.scores else 0.0


@dataclass(frozen=True)
class Failure:
    """A training that came to nothing, and why."""

    method: str
    lr: float
    seed: int
    reason: str


@dataclass(frozen=True)
class Row:
    """One method at the learning rate that was kept, over its seeds: means, and `spread`, the standard deviation of the
    score over seeds where there are several. `low` and `high` are the means of the trials' 95 % bootstrap intervals
    over test examples: they say how far another test set of this size could move the score, and nothing of seeds.
    `latency` is how many times as long a forward pass takes as with the backbone alone. `front`: no other method is at
    least as good in score, trained parameters, seconds and latency and better in one; figures count as shown."""

    method: str
    seeds: int
    lr: float
    score: float
    low: float
    high: float
    spread: float | None
    trained_parameters: int
    seconds: float
    latency: float | None
    memory: int | None
    bytes: int
    front: bool = False

    @property
    def merits(self) -> tuple[float, ...]:
        """The figures that make the front, rounded as they are shown; more is better."""
        slower = 0.0 if self.latency is None else round(self.latency, 2)
        return round(self.score, 3), -self.trained_parameters, -round(self.seconds, 1), -slower


def front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points are on the Pareto front: those that no other equals everywhere and beats somewhere; more is
    better."""
    return [not any(q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in points) for p in points]


@dataclass(frozen=True)
class Comparison:
    """Trials of several methods on one task over one backbone. `settings` are the training settings that all share.
    `factors`: each method was trained with seed 0 at its default rate times these, as far as it has a rate, and then
    with the other seeds at the rate of the best validation score. `left_out` says of methods that were not compared
    why. `jobs` trainings ran at once."""

    task: TaskCard
    backbone: BackboneCard
    precision: str
    settings: dict[str, Any]
    date: str
    version: str
    trials: tuple[Trial, ...]
    factors: tuple[float, ...] = (1.0,)
    failures: tuple[Failure, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    jobs: int = 1

    @property
    def metric(self) -> str:
        return self.task.metric

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trial.method for trial in self.trials))

    @cached_property
    def split(self) -> str:
        """Where the scores are measured: the test split, or validation if there is no test."""
        return "test" if all("test" in trial.scores for trial in self.trials) else "validation"

    def tries(self, method: str) -> list[Trial]:
        """A method's trials with seed 0, one for each learning rate, by rate."""
        return sorted((t for t in self.trials if t.method == method and t.seed == 0), key=lambda t: t.lr)

    def kept(self, method: str) -> list[Trial]:
        """A method's trials at the learning rate that was kept, by seed."""
        lr = best([t for t in self.trials if t.method == method and t.seed == 0]).lr
        return [t for t in self.trials if t.method == method and t.lr == lr]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row for each method, in the order of the trials."""
        rows = []
        for method in self.methods:
            mine = self.kept(method)
            scores = [trial.scores[self.split] for trial in mine]
            values = [score.value for score in scores]
            rows.append(
                Row(
                    method=method,
                    seeds=len(mine),
                    lr=mine[0].lr,
                    score=statistics.fmean(values),
                    low=statistics.fmean(score.low for score in scores),
                    high=statistics.fmean(score.high for score in scores),
                    spread=statistics.stdev(values) if len(values) > 1 else None,
                    trained_parameters=mine[0].trained_parameters,
                    seconds=statistics.fmean(trial.seconds for trial in mine),
                    latency=mine[0].latency.ratio if mine[0].latency else None,
                    memory=max((t.memory for t in mine if t.memory is not None), default=None),
                    bytes=mine[0].bytes,
                )
            )
        marks = front([row.merits for row in rows])
        return tuple(replace(row, front=mark) for row, mark in zip(rows, marks, strict=True))

    def report(self) -> dict[str, Any]:
        """What a program is told."""
        methods = []
        for row in self.rows:
            said = asdict(row)
            said["interval"] = [said.pop("low"), said.pop("high")]
            said["trainable_params"] = said.pop("trained_parameters")
            mine = self.kept(row.method)
            said["latency"] = mine[0].latency.model_dump() if mine[0].latency else None
            said["trials"] = [
                {
                    "seed": trial.seed,
                    "lr": trial.lr,
                    "score": trial.scores[self.split].value,
                    "seconds": trial.seconds,
                    "threads": trial.threads,
                    "history": list(trial.history),
                }
                for trial in mine
            ]
            said["tries"] = [
                {"lr": trial.lr, "validation": trial.validation, "seconds": trial.seconds}
                for trial in self.tries(row.method)
            ]
            methods.append(said)
        return {
            "task": self.task.name,
            "base": self.backbone.name,
            "backbone_params": self.backbone.parameters,
            "precision": self.precision,
            "metric": self.metric,
            "split": self.split,
            "sizes": self.task.sizes,
            "settings": self.settings,
            "date": self.date,
            "version": self.version,
            "factors": list(self.factors),
            "jobs": self.jobs,
            "methods": methods,
            "failures": [asdict(failure) for failure in self.failures],
            "left_out": dict(self.left_out),
        }


def best(tries: Sequence[Trial]) -> Trial:
    """The one with the best validation score; the first of equals."""
    return max(tries, key=lambda trial: trial.validation)
