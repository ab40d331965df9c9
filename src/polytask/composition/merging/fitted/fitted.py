"""What a rule is that reads the tasks' data: it looks at them once, and gives a rule like any other.

A file of this folder has a class under the decorator `fitted`, its annotated fields the hyperparameters, and `fit`:
what it finds by passes over examples becomes a `Rule` that has something of its own for each place.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from polytask.backbones import Backbone
from polytask.composition.differences import Weighed
from polytask.composition.merging.rule import Rule
from polytask.errors import UsageError
from polytask.tasks import Task
from polytask.tasks.task import SPLITS


class Fitted:
    """One published way to merge with data."""

    name: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    seed: int = 0
    split: str = ""

    def fit(self, base: Backbone, sources: Sequence[Weighed], tasks: Sequence[Task]) -> Rule:
        """The rule for these adapters; task k is adapter k's.

        Raises UsageError where a task has nothing to read or an adapter has no head to read it by.
        """
        raise NotImplementedError(type(self).__name__)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UsageError(f"{self.name}.split = {self.split!r}: one of {', '.join(SPLITS)} is needed")

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{name} = {value}' for name, value in vars(self).items())})"


FITTED: dict[str, type[Fitted]] = {}


def fitted(name: str, *, equation: str, paper: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make a frozen dataclass of the class and enter it under `name`."""

    def enter(cls: type[Any]) -> type[Any]:
        cls.name, cls.equation, cls.paper = name, equation, paper
        cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
        FITTED[name] = cls
        return cls

    return enter


def fitted_rules() -> dict[str, type[Fitted]]:
    """Every one by name: each module of this folder enters its own."""
    import polytask.composition.merging.fitted as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(sorted(FITTED.items()))
