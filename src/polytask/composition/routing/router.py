"""What a router is: from inputs' embeddings to the adapters that answer, once for each input.

A router is a file of this folder with a class under the decorator `router`. Its fields that are numbers are its
hyperparameters; `choose` gives for each input the adapters with their weights, and how sure that is; `expression`
says how several answer together. It knows the adapters by their profiles (`Known`) and never runs one.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, dataclass_transform, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import Adapter
from polytask.adapters.expression import Expression, Name, mix
from polytask.composition.kept import Kept
from polytask.errors import UsageError
from polytask.methods.lora import LoRA
from polytask.methods.method import build as method_of
from polytask.methods.method import values

TEMPERATURE = 0.05  # of a softmax over cosines, for routers that say how sure they are and have no other measure


Reads = Literal["gist", "last"] | int
"""What embeddings are: the gist of texts [2d] (see `passes.gist`), their mean last states [d], or the mean of what the
block of that number reads [d]."""


@dataclass(frozen=True, eq=False)
class Known:
    """N adapters that inputs may go to, in the order of their ids: those that have a profile of their task.

    μ [N, 2d] of unit length, m and s [N]: see `nearest_task.Profile`. `pairs` [N] bool: it compares two texts. `alone`
    [N] bool: it is not mixed with others. `kin` [N]: those with the same number are LoRAs of one shape.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    μ: Tensor
    m: Tensor
    s: Tensor
    pairs: Tensor
    alone: Tensor
    kin: Tensor

    @classmethod
    def of(cls, adapters: Sequence[Adapter], *, last: bool = False) -> Known:
        """Of these adapters, those with a profile; of their tasks' last states alone, μ [N, d], with `last`."""
        profiles = {one.id: one.at("task") for one in adapters}
        those = [one for one in adapters if {"mean", "spread"} <= profiles[one.id].keys()]
        those.sort(key=lambda one: one.id)
        whole = [profiles[one.id]["mean"].float() for one in those]
        means = [μ[len(μ) // 2 :] for μ in whole] if last else whole
        spreads = [profiles[one.id]["spread"].float()[2 * last :][:2] for one in those]
        methods = [method_of(one.method, one.hyperparameters) for one in those]
        numbers: dict[Any, int] = {}
        kin = []
        for one, its in zip(those, methods, strict=True):
            own = {n: t.shape for n, t in one.tensors.items() if not n.startswith(("head/", "task/"))}
            averages = type(its) is LoRA and not one.needs
            key = (its, tuple(sorted(own.items()))) if averages else one.id
            kin.append(numbers.setdefault(key, len(numbers)))
        spread = torch.stack(spreads) if those else torch.empty(0, 2)
        return cls(
            tuple(one.id for one in those),
            tuple(one.name for one in those),
            F.normalize(torch.stack(means), dim=-1) if those else torch.empty(0, 0),
            spread[:, 0],
            spread[:, 1],
            torch.tensor([one.head is not None and one.head.pair != "none" for one in those], dtype=torch.bool),
            torch.tensor([its.opaque or isinstance(its, Kept) for its in methods], dtype=torch.bool),
            torch.tensor(kin, dtype=torch.long),
        )

    def fits(self, pairs: Sequence[bool]) -> Tensor:
        """[R, N] bool: a pair of texts goes to adapters over pairs, one text to the others."""
        return torch.tensor(pairs, dtype=torch.bool)[:, None] == self.pairs

    def cosines(self, embeddings: Tensor, fits: Tensor) -> Tensor:
        """c [R, N] of embeddings [R, d]; −∞ where it does not fit."""
        return (F.normalize(embeddings.float(), dim=-1) @ self.μ.T).masked_fill(~fits, -torch.inf)

    def deviations(self, c: Tensor, which: Tensor) -> Tensor:
        """z [R]: how unusual each input is for the adapter `which` [R], as inputs of its task go."""
        return (c.gather(1, which[:, None])[:, 0] - self.m[which]) / self.s[which]

    def near(self, c: Tensor, which: Tensor, threshold: float) -> Tensor:
        """[R] bool: whether each input may be of the task of the adapter `which` [R]: it fits, and is not too unusual
        for it."""
        z = self.deviations(c, which)
        return (z >= -threshold) & (z > -torch.inf)

    def mixes(self, best: Tensor) -> Tensor:
        """[R, N] bool: who can be mixed with the adapter `best` [R], itself among them."""
        return ~(self.alone | self.alone[best][:, None]) | self._self(best)

    def averages(self, best: Tensor) -> Tensor:
        """[R, N] bool: whose parameters can be averaged with those of `best` [R]."""
        return self.kin == self.kin[best][:, None]

    def _self(self, best: Tensor) -> Tensor:
        return torch.arange(len(self.ids)) == best[:, None]


@dataclass(frozen=True)
class Routed:
    """Who answers an input: `weights` of adapters by id, the best first; nobody where there are none. `sure`: how
    probable it is that the input is of a task of theirs, by the router; where nobody answers, of the nearest."""

    weights: Mapping[str, float]
    sure: float


class Router(Protocol):
    """One published way to route."""

    name: ClassVar[str]

    @property
    def reads(self) -> Reads:
        """What its embeddings are."""
        ...

    def choose(self, known: Known, embeddings: Tensor, fits: Tensor) -> list[Routed]:
        """Who answers each row of embeddings [R, d]; `fits` [R, N] says who may at all."""
        ...

    def expression(self, weights: Mapping[str, float]) -> Expression:
        """How they answer together."""
        ...


@runtime_checkable
class Following(Protocol):
    """A router whose weights follow an answer while it is written."""

    @property
    def every(self) -> int:
        """After so many tokens they are worked out anew."""
        ...

    def follow(self, known: Known, ids: Sequence[str], embeddings: Tensor) -> Tensor:
        """Weights [R, N] of the adapters `ids`, those that were chosen for an input, from the embeddings [R, d] of the
        input with what has been written."""
        ...


class Mixing:
    """A router whose adapters answer as a mixture of what they do at each site. The best one's head reads."""

    name: ClassVar[str] = ""

    @property
    def reads(self) -> Reads:
        return "gist"

    def expression(self, weights: Mapping[str, float]) -> Expression:
        return Name(*weights) if len(weights) == 1 else mix(weights)


def nobody(rows: int) -> list[Routed]:
    return [Routed({}, 0.0)] * rows


def decided(known: Known, which: Tensor, weights: Tensor, sure: Tensor, near: Tensor) -> list[Routed]:
    """A decision for each row: the adapters `which` [R, k] with weights [R, k], of which those above 0 answer, if the
    row is `near` [R]."""
    each = zip(which.tolist(), weights.tolist(), sure.nan_to_num(0.0).tolist(), near.tolist(), strict=True)
    return [
        Routed({known.ids[n]: w for n, w in zip(ns, ws, strict=True) if w > 0} if here else {}, p)
        for ns, ws, p, here in each
    ]


ROUTERS: dict[str, type[Any]] = {}


@dataclass_transform(frozen_default=True)
def router(name: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make a frozen dataclass of the class and enter it under `name`."""

    def enter(cls: type[Any]) -> type[Any]:
        cls.name = name
        cls = dataclasses.dataclass(frozen=True)(cls)
        ROUTERS[name] = cls
        return cls

    return enter


def routers() -> dict[str, type[Any]]:
    """Every router by name: each module of this folder enters its own."""
    import polytask.composition.routing as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(sorted(ROUTERS.items()))


def build(name: str, hyperparameters: Mapping[str, Any] | None = None) -> Router:
    """The router of that name. Raises UsageError where there is none, or a hyperparameter is none of its own or out of
    range."""
    known, given = routers(), hyperparameters or {}
    if name not in known:
        raise UsageError(f"no router {name!r}; the routers are {', '.join(known)}")
    cls = known[name]
    own = [field.name for field in dataclasses.fields(cls) if isinstance(field.default, int | float)]
    if odd := [key for key in given if key not in own]:
        raise UsageError(f"{name} has no hyperparameter {odd[0]!r}; it has {', '.join(own)}")
    made: Router = cls(**values(cls, name, given))
    return made
