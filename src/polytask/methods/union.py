"""Several methods trained together as one adapter: `invertible+pfeiffer`, `lora+bitfit`, `prefix+parallel`.

    y ← y + Σ_i Δ_i(x, y)        over the methods i that act at a site

Each has its own sites, hyperparameters (`pfeiffer.reduction`) and learning rate; where two act at one site, both read
the same x and y. Published unions: a language's adapter is `invertible+pfeiffer` (MAD-X: Pfeiffer, Vulić, Gurevych,
Ruder 2020, arXiv 2005.00052), a prefix beside parallel bottlenecks the MAM adapter (He, Zhou, Ma, Berg-Kirkpatrick,
Neubig 2022, arXiv 2110.04366).

The runtime takes a union apart: `Active.parts` are what a batch, a mixture or a stack has of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from polytask.backbones import Backbone
from polytask.errors import UsageError
from polytask.methods.method import Method, build, methods

JOIN = "+"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Union(Method):
    """together: the methods by name. A tensor of `pfeiffer` is named `<site>/pfeiffer.<parameter>`."""

    together: Mapping[str, Method] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", JOIN.join(self.together))
        object.__setattr__(self, "elsewhere", any(one.elsewhere for one in self.together.values()))
        prompts = [name for name, one in self.together.items() if one.slots]
        if len(prompts) > 1:
            one, other = prompts[:2]
            raise UsageError(f"{self.name}: the virtual tokens of {one} and {other} would stand in one place")

    def __hash__(self) -> int:
        return hash(tuple(self.together.items()))

    @classmethod
    def named(cls, name: str, hyperparameters: Mapping[str, Any]) -> Self:
        """From `a+b` and hyperparameters such as `a.r`. Raises UsageError where a method cannot join others."""
        names = name.split(JOIN)
        for one in names:
            if one not in methods():
                raise UsageError(f"{name}: no method {one!r}; the methods are {', '.join(methods())}")
            kind = methods()[one]
            if kind.opaque or kind.beside or kind.common or kind.selector or one == "head":
                raise UsageError(f"{name}: {one} is trained alone; leave it out")
        if len({*names}) < len(names):
            raise UsageError(f"{name}: a method twice; name each once, and its sites with {names[0]}.sites")
        own: dict[str, dict[str, Any]] = {one: {} for one in names}
        for key, value in hyperparameters.items():
            owner, _, what = key.partition(".")
            if owner not in own or not what:
                raise UsageError(f"{name} has no hyperparameter {key!r}: say whose it is, as in {names[0]}.{key}")
            own[owner][what] = value
        return cls(together={one: build(one, given) for one, given in own.items()})

    def hyperparameters(self) -> dict[str, Any]:
        return {f"{name}.{k}": v for name, one in self.together.items() for k, v in one.hyperparameters().items()}

    @property
    def slots(self) -> int:
        return sum(one.slots for one in self.together.values())

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        made = {name: one.start(backbone, seed, writing=writing) for name, one in self.together.items()}
        return {prefixed(n, name): t for name, own in made.items() for n, t in own.items()}

    def shown(self, own: Mapping[str, Tensor], inputs: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        apart = self.apart(own)
        made = {name: one.shown(apart[name], inputs) for name, one in self.together.items()}
        return {prefixed(n, name): t for name, its in made.items() for n, t in its.items()}

    def trains(self, name: str) -> bool:
        owner, own = unprefixed(name)
        return self.together[owner].trains(own) if owner in self.together else super().trains(name)

    def whose(self, name: str) -> str:
        owner, _ = unprefixed(name)
        return owner if owner in self.together else self.name

    def annealed(self, share: float) -> Self:
        return dataclasses.replace(self, together={name: one.annealed(share) for name, one in self.together.items()})

    def only(self, tensors: Mapping[str, Tensor]) -> Self:
        apart = self.apart(tensors)
        return dataclasses.replace(
            self, together={name: one.only(apart[name]) for name, one in self.together.items() if apart[name]}
        )

    def expects(self, made: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> Mapping[str, torch.Size]:
        ours, its = self.apart(made), self.apart(given)
        found = {name: one.expects(ours[name], its[name]) for name, one in self.together.items()}
        whole = {prefixed(n, name): shape for name, own in found.items() for n, shape in own.items()}
        return {name: whole.get(name, shape) for name, shape in made.items()}

    def apart(self, tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
        """By method, what is its own of tensors (or anything by their names), under the names that it knows."""
        found: dict[str, dict[str, T]] = {name: {} for name in self.together}
        for name, t in tensors.items():
            owner, own = unprefixed(name)
            if owner in found:
                found[owner][own] = t
        return found


def prefixed(name: str, owner: str) -> str:
    site, _, parameter = name.rpartition("/")
    return f"{site}/{owner}.{parameter}"


def unprefixed(name: str) -> tuple[str, str]:
    """Whose tensor it is, and what its method calls it."""
    site, _, parameter = name.rpartition("/")
    owner, _, own = parameter.partition(".")
    return owner, f"{site}/{own}"
