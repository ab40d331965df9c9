"""What there is to compose adapters with. A module of this folder, at any depth, that says what it is gets listed:

KIND = "router"             or "composition", "merge", "hypernetwork"
NAME = "nearest-task"
PLACE = "input"             a router's granularity; where another acts
EQUATION, PAPER             one line each

and so does every rule that the decorators of `merging/` enter, and every method over other adapters.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Literal

from polytask.composition.merging.fitted import fitted_rules
from polytask.composition.merging.rule import rules
from polytask.methods.method import COMPOSED


@dataclass(frozen=True)
class Part:
    """One published way to compose adapters, as its module describes itself."""

    name: str
    kind: Literal["composition", "router", "merge", "hypernetwork"]
    place: str
    equation: str
    paper: str
    module: str


def catalogue() -> list[Part]:
    """Every part, by kind and name."""
    import polytask.composition as folder

    found = []
    for each in pkgutil.walk_packages(folder.__path__, folder.__name__ + "."):
        module = importlib.import_module(each.name)
        if hasattr(module, "KIND"):
            found.append(Part(module.NAME, module.KIND, module.PLACE, module.EQUATION, module.PAPER, each.name))
    for name, one in COMPOSED.items():
        found.append(Part(name, "composition", one.place, one.equation, one.paper, one.__module__))
    for name, rule in (rules() | fitted_rules()).items():
        found.append(Part(name, "merge", "weights", rule.equation, rule.paper, rule.__module__))
    return sorted(found, key=lambda part: (part.kind, part.name))
