"""Adapters that are added up with coefficients, as one adapter that a plan runs and whose coefficients get gradients.

    Δ = Σ_g λ_g Σ_{k ∈ g} c_k τ_k        at each place

λ [G, P] are what is looked for, c what is known: an adapter's weight, or what was found before. It is the adapter that
merging with these coefficients makes: LoRAs stay factors, A their A's one after the other and B their λ c s B's, and
anything else is the exact ΔW of each, in fp32. Memory holds one ΔW for each group, or the factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polytask.backbones import Backbone
from polytask.composition.differences import Weighed, at_module, factors, modules, nothing, whole_weights
from polytask.methods import build
from polytask.methods.lifting import Active
from polytask.methods.lora import LoRA

Group = Sequence[tuple[Weighed, Tensor]]
"""Adapters, each with its c [P]."""


class Blend:
    """`groups` at the places `at`; with `whole` as ΔW even where all are LoRAs."""

    def __init__(self, base: Backbone, groups: Sequence[Group], at: Sequence[str], *, whole: bool = False) -> None:
        self.base, self.at, self.G = base, tuple(at), len(groups)
        self.loras = not whole and all(isinstance(s.active.method, LoRA) for group in groups for s, _ in group)
        self.factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.paths: dict[str, dict[str, Tensor]] = {}
        if self.loras:
            self._join(groups)
        else:
            self._add(groups)

    def active(self, λ: Tensor) -> Active:
        """The adapter that λ [G, P] makes."""
        column = {at: λ[:, p] for p, at in enumerate(self.at)}
        tensors: dict[str, Tensor] = {}
        if self.loras:
            for at, (A, B, of) in self.factors.items():
                tensors |= {f"{at}/A": A, f"{at}/B": B * column[at][of]}
            r = max((len(of) for _, _, of in self.factors.values()), default=1)
            return Active.of(build("lora", {"r": r, "alpha": float(r)}), tensors)
        for path, τ in self.paths.items():
            made = {at: torch.einsum("g,g...->...", column[at].to(t.device), t) for at, t in τ.items()}
            tensors |= whole_weights(self.base, path, made)
        return Active.of(build("full"), tensors)

    def _join(self, groups: Sequence[Group]) -> None:
        for p, at in enumerate(self.at):
            parts = [
                (g, *factors([source], [float(c[p])], at))
                for g, group in enumerate(groups)
                for source, c in group
                if at in source.active.at and c[p] != 0
            ]
            if parts:
                A = torch.cat([A for _, A, _ in parts]).float().to(self.base.device)
                B = torch.cat([B for _, _, B in parts], dim=1).float().to(self.base.device)
                of = torch.cat([torch.full((len(A),), g) for g, A, _ in parts])
                self.factors[at] = A, B, of.to(self.base.device)

    def _add(self, groups: Sequence[Group]) -> None:
        number = {at: p for p, at in enumerate(self.at)}
        for path, sites in modules(self.base).items():
            here = [at for at in self.at if at in sites or at.startswith(f":{path}/")]
            if here:
                none = {at: nothing(self.base, at) for at in here}
                self.paths[path] = {at: t.expand(self.G, *t.shape).clone() for at, t in none.items()}
            for g, group in enumerate(groups):
                for source, c in group:
                    for at, τ in at_module(self.base, source, path, sites).items():
                        self.paths[path][at][g] += float(c[number[at]]) * τ.float()
