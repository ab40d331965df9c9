"""TaRot: what attention heads put out is turned, two features at a time.

    (a, b) ← (a cos θ + b sin θ,  b cos θ − a sin θ)      for every two neighbouring features a, b of z [width]

Singh, Dutta, Chakraborty 2024, arXiv 2410.04277. z are the heads' outputs side by side, before the output projection,
in the first blocks (16 of Llama 3's 32), at every token. θ [width / (2 · shared)] = 0, so that it starts at the
backbone. The paper finds the angles without gradients, within ±π/6 or ±π/4, from 10 to 20 labelled examples: see
`polytask.recipes.blackbox`; gradients reach them too. It has one angle for every two features, and so tens of thousands
in a large model; `shared` lets neighbouring pairs turn together. Equal to W_o Rᵀ in place of the output projection W_o,
R the blocks [[cos θ, −sin θ], [sin θ, cos θ]].
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method


@method(
    "rotation",
    place="activations",
    equation="(a, b) ← (a cos θ + b sin θ, b cos θ − a sin θ)",
    paper="Singh et al. 2024, arXiv 2410.04277",
)
class Rotation(Method):
    """shared: how many neighbouring pairs of features turn by one angle; half a head's features give one angle a head,
    half the site's one a block."""

    shared: int = 1
    sites: tuple[str, ...] = ("*.attn.heads",)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        if self.shared < 1 or site.width % (2 * self.shared):
            raise UsageError(
                f"rotation: shared = {self.shared} pairs to an angle do not divide the {site.width} features of "
                f"{site.name}; give a divisor of {site.width // 2}"
            )
        return {"theta": torch.zeros(site.width // (2 * self.shared))}

    def ready(self, p: Params, frozen: Params) -> Params:
        θ = p["theta"].repeat_interleave(2 * self.shared)
        signs = θ.new_tensor([1.0, -1.0]).repeat(len(θ) // 2)
        # 1 − cos θ would be lost in the rounding of bf16 where θ is small.
        return {"cos − 1": -2 * (θ / 2).sin().square(), "± sin": signs * θ.sin()}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        # Whole rows with each pair's other feature beside it: every second feature apart would be three times as slow.
        others = y.reshape(len(y), -1, 2).flip(-1).flatten(1)
        return p["cos − 1"] * y + p["± sin"] * others
