"""What a merging rule is: an equation over the differences that K adapters make to one matrix.

A rule is a file of this folder with a class under the decorator `rule`: its annotated fields are hyperparameters with
the paper's defaults, `keep` says what of each difference takes part, `join` makes one difference of that. τ
[K, ...] are the differences, w [K] the weights; `polytask.composition.merge` does all else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from polytask.errors import UsageError
from polytask.methods.method import values

if TYPE_CHECKING:
    from polytask.composition.merging.fitted import Fitted


class Rule:
    """One published way to merge. `linear`: the result is Σ c_k τ_k with c from the weights alone."""

    name: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    linear: ClassVar[bool] = False
    seed = 0

    def keep(self, τ: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """What of each difference takes part, [K, ...]. What is drawn for difference k comes from draws[k]."""
        return τ

    def join(self, τ: Tensor, w: Tensor) -> Tensor:
        """One difference [...] of what takes part."""
        raise NotImplementedError(type(self).__name__)

    def at(self, where: str) -> Rule:
        """The rule for one place: itself, unless it was fitted to data and has something of its own for each."""
        return self

    def coefficients(self, w: Tensor) -> list[float]:
        """c [K] of a linear rule: its result is Σ c_k τ_k."""
        found: list[float] = self.join(self.keep(torch.eye(len(w), dtype=w.dtype), []), w).tolist()
        return found

    def found(self) -> dict[str, Any]:
        """What the merged adapter's card keeps of what was found on data, as JSON can hold it."""
        return {}

    def told(self) -> tuple[str, ...]:
        """The same in words."""
        return ()

    def draw(self, adapter: str, where: str) -> torch.Generator:
        """For what an adapter loses by chance at one place: the same whatever it is merged with."""
        said = hashlib.sha256(f"{self.seed} {adapter} {where}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(said[:8]) >> 1)

    def __post_init__(self) -> None:
        density = getattr(self, "density", 1.0)
        if not 0 < density <= 1:
            raise UsageError(f"{self.name}.density = {density:g}: a share above 0 and up to 1 is needed")

    def __str__(self) -> str:
        said = ", ".join(f"{name} = {value}" for name, value in vars(self).items())
        return f"{self.name} ({said})" if said else self.name


RULES: dict[str, type[Rule]] = {}


def rule(name: str, *, equation: str, paper: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make a frozen dataclass of the class and enter it under `name`."""

    def enter(cls: type[Any]) -> type[Any]:
        cls.name, cls.equation, cls.paper = name, equation, paper
        cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
        RULES[name] = cls
        return cls

    return enter


def rules() -> dict[str, type[Rule]]:
    """Every rule by name: each module of this folder enters its own."""
    import polytask.composition.merging as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(sorted(RULES.items()))


def build(name: str, hyperparameters: Mapping[str, Any] | None = None) -> Rule | Fitted:
    """The rule of that name; UsageError where there is none, or a hyperparameter is none of its own or out of range."""
    from polytask.composition.merging.fitted import fitted_rules

    known, others = rules(), fitted_rules()
    if name not in known and name not in others:
        raise UsageError(f"no merging rule {name!r}; the rules are {', '.join(known)}; with data {', '.join(others)}")
    given = hyperparameters or {}
    cls: Any = known[name] if name in known else others[name]
    if given and not dataclasses.fields(cls):
        raise UsageError(f"{name} has no hyperparameters, and got {', '.join(given)}")
    made: Rule | Fitted = cls(**values(cls, name, given))
    return made
