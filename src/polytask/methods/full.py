"""Full fine-tuning, kept as a difference to the frozen weights.

    θ' = θ + Δθ   for every weight that the pass from tokens to hidden states reads

The upper baseline, and what merging rules call a task vector (Ilharco et al. 2022, arXiv 2212.04089). Δθ = 0 at first.
Stored in the shape of the weights under `:<module path>/<parameter>`, so one adapter is as large as the backbone; a
difference that is mostly zeros takes as much room on disk as the others in it.
Rows that use it run in a pass of their own with the weights swapped; a mixture adds w·Δθ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor

from polytask.backbones import Backbone
from polytask.errors import UsageError
from polytask.methods.method import Method, method


@method("full", place="weights", equation="θ ← θ + Δθ", paper="task vectors: Ilharco et al. 2022, arXiv 2212.04089")
class Full(Method):
    """weights: patterns of `<module path>.<parameter>`, `*` for all that are read."""

    swaps = True

    weights: tuple[str, ...] = ("*",)

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        read = {f"{path}.{name}": (path, name, p) for path, name, p in backbone.weights_read(writing=writing)}
        chosen = set()
        for pattern in self.weights:
            hits = {pattern} if pattern in read else {name for name in read if fnmatchcase(name, pattern)}
            if not hits:
                raise UsageError(f"no weight of {backbone.name} matches {pattern!r}; one of them is {next(iter(read))}")
            chosen |= hits
        return {f":{path}/{name}": torch.zeros(p.shape) for key, (path, name, p) in read.items() if key in chosen}

    def only(self, tensors: Mapping[str, Tensor]) -> Self:
        names = [f"{at[1:]}.{name}" for at, _, name in (n.rpartition("/") for n in tensors) if at.startswith(":")]
        return replace(self, weights=tuple(names))  # type: ignore[type-var]
