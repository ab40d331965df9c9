"""Recipes that `adapt --method` takes in a method's place: each trains methods in its own way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.errors import UsageError

if TYPE_CHECKING:
    from polytask.adapters import Adapter
    from polytask.backbones import Backbone
    from polytask.cli.progress import Progress
    from polytask.recipes.adapt import Plan

NAMES = ("distil", "elrea", "tada")


def alone(name: str, *, over: bool, **others: object) -> None:
    """Raise UsageError where it is told to begin with adapters, which it does not."""
    if any(others.values()) or (over and name != "distil"):
        options = ["begin", "above", *(["over"] if name != "distil" else []), "reuse"]
        said = ", ".join(f"--{option}" for option in options[:-1])
        raise UsageError(f"{name} begins at the backbone: leave out {said} and --{options[-1]}")


def trains(name: str, hyperparameters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The methods that it trains for a task with a head, and their hyperparameters. Raises UsageError where its own
    are wrong."""
    from polytask.recipes import distil, elrea, tada

    if name == "distil":
        own, student = distil.split(hyperparameters)
        return {own.student: student}
    if name == "elrea":
        return {"lora": elrea.split(hyperparameters)[1]}
    tada.split(hyperparameters)
    return {}


def learn(backbone: Backbone, plan: Plan, folder: Path, progress: Progress) -> list[Adapter]:
    """What the recipe `plan.method` makes, all that goes into the library: the adapter that was asked for is last."""
    from polytask.recipes import distil, elrea, tada

    given: dict[str, Any] = {
        "hyperparameters": plan.hyperparameters,
        "settings": plan.settings,
        "reading": plan.reading,
        "on_event": progress,
    }
    if plan.method == "distil":
        return [distil.distil(backbone, plan.task, plan.over, library=plan.library, folder=folder, **given)]
    if plan.method == "elrea":
        made = elrea.elrea(backbone, plan.task, folder=folder, tell=progress.say, **given)
        return [*made.support, made.adapter]
    return [tada.tada(backbone, plan.task, **given)]
