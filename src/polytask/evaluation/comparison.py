"""A comparison of methods on one task: what was measured, and nothing that measures."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict

from polytask.adapters import BackboneCard, ScoreCard
from polytask.tasks import TaskCard


class Trial(BaseModel):
    """One method trained once. `scores` by split; `history` has epoch, loss, score (validation) and seconds of each
    evaluation, and is empty for a method that is fitted and not trained; `bytes` is the size of the adapter."""

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


@dataclass(frozen=True)
class Row:
    """One method over its seeds: means, and `spread`, the standard deviation of the score over seeds where there are
    several. `low` and `high` are the means of the trials' 95 % bootstrap intervals over test examples: they say how
    far another test set of this size could move the score, and nothing of seeds."""

    method: str
    seeds: int
    score: float
    low: float
    high: float
    spread: float | None
    trained_parameters: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Comparison:
    """Trials of several methods on one task over one backbone. `settings` are the training settings that all share."""

    task: TaskCard
    backbone: BackboneCard
    precision: str
    settings: dict[str, Any]
    date: str
    version: str
    trials: tuple[Trial, ...]

    @property
    def metric(self) -> str:
        return self.task.metric

    @cached_property
    def split(self) -> str:
        """Where the scores are measured: the test split, or validation if there is no test."""
        return "test" if all("test" in trial.scores for trial in self.trials) else "validation"

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row for each method, in the order in which they were asked for."""
        rows = []
        for method in dict.fromkeys(trial.method for trial in self.trials):
            mine = [trial for trial in self.trials if trial.method == method]
            scores = [trial.scores[self.split] for trial in mine]
            values = [score.value for score in scores]
            rows.append(
                Row(
                    method=method,
                    seeds=len(mine),
                    score=statistics.fmean(values),
                    low=statistics.fmean(score.low for score in scores),
                    high=statistics.fmean(score.high for score in scores),
                    spread=statistics.stdev(values) if len(values) > 1 else None,
                    trained_parameters=mine[0].trained_parameters,
                    seconds=statistics.fmean(trial.seconds for trial in mine),
                    bytes=mine[0].bytes,
                )
            )
        return tuple(rows)

    def report(self) -> dict[str, Any]:
        """What a program is told."""
        methods = []
        for row in self.rows:
            said = asdict(row)
            said["interval"] = [said.pop("low"), said.pop("high")]
            said["trainable_params"] = said.pop("trained_parameters")
            said["trials"] = [
                {
                    "seed": trial.seed,
                    "lr": trial.lr,
                    "score": trial.scores[self.split].value,
                    "seconds": trial.seconds,
                    "history": list(trial.history),
                }
                for trial in self.trials
                if trial.method == row.method
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
            "methods": methods,
        }
