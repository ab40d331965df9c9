"""Full fine-tuning, kept as a difference to the frozen weights.

    θ' = θ + Δθ   for every weight that the pass from tokens to hidden states reads

The upper baseline, and what merging rules call a task vector (Ilharco et al. 2022, arXiv 2212.04089). Δθ = 0 at first.
Stored in the shape of the weights under `:<module path>/<parameter>`, so one adapter is as large as the backbone.
Rows that use it run in a pass of their own with the weights swapped; a mixture adds w·Δθ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Backbone
from polytask.methods.method import Method, method


@method("full", place="weights", equation="θ ← θ + Δθ", paper="task vectors: Ilharco et al. 2022, arXiv 2212.04089")
class Full(Method):
    """No hyperparameters: everything that is read is trained."""

    swaps = True

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        read = backbone.weights_read(writing=writing)
        return {f":{path}/{name}": torch.zeros(parameter.shape) for path, name, parameter in read}
