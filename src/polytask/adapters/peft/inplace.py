"""PiSSA and KaSA: LoRAs in the place of a part of the weight.

PEFT takes the part out of the weight when it loads them, so that its files have A, B and KaSA's d alone. Here the
weight stays whole and the part stands beside. What is written is a plain LoRA of twice the rank, which computes the
same and leaves alone the weights that others read:

    PiSSA   [A − A₀; A₀], [B, B − B₀]   at the scale s
    KaSA    [A; Vᵀ], [s B diag(d), −U]   at the scale 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.adapters.adapter import Adapter
from polytask.adapters.peft.layout import CONFIG, ModelLike, SiteLike, by_path, features_of, whole_number, whole_width
from polytask.errors import PolytaskError, UsageError

PARAMETERS = {"pissa": ("A", "B", "A0", "B0"), "kasa": ("A", "B", "d", "U", "V")}


def as_lora(adapter: Adapter) -> Adapter:
    """The LoRA that computes what a PiSSA or a KaSA does; its name and card are those of the adapter."""
    says = adapter.hyperparameters
    r, alpha = int(says["r"]), float(says["alpha"])
    tensors: dict[str, Tensor] = {}
    for site in adapter.sites:
        p = adapter.at(site)
        if set(p) != set(PARAMETERS[adapter.method]):
            wanted = ", ".join(PARAMETERS[adapter.method])
            raise PolytaskError(f"{adapter.name}: {site} has {', '.join(p)}, where {adapter.method} has {wanted}")
        A, B = p["A"], p["B"]
        if adapter.method == "pissa":
            A, B = torch.cat([A - p["A0"], p["A0"]]), torch.cat([B, B - p["B0"]], 1)
        else:
            A, B = torch.cat([A, p["V"].T]), torch.cat([alpha / r * B * p["d"], -p["U"]], 1)
        tensors |= {f"{site}/A": A, f"{site}/B": B}
    doubled = {"r": 2 * r, "alpha": 2.0 * r, "dropout": says.get("dropout", 0.0), "sites": says.get("sites")}
    if adapter.method == "pissa":
        doubled["alpha"] = alpha * (math.sqrt(2) if says.get("rslora") else 2)
        doubled["rslora"] = bool(says.get("rslora"))
    return replace(adapter, method="lora", hyperparameters=doubled, tensors=tensors)


def completed(
    folder: Path,
    kind: str,
    learned: Mapping[str, Tensor],
    says: Mapping[str, Any],
    config: Mapping[str, Any],
    sites: Mapping[str, SiteLike],
    model: ModelLike | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What PEFT's file has of a PiSSA or a KaSA, with what it leaves to the weight: its tensors and hyperparameters."""
    if model is None:
        raise UsageError(f"{folder}: {kind} takes a part out of the weights; pass the backbone as model=")
    r = int(says["r"])
    s = says["alpha"] / (math.sqrt(r) if says.get("rslora") else r)
    tensors = dict(learned)
    for path, names in by_path(dict.fromkeys(name.rpartition("/")[0] for name in learned), sites).items():
        W: Tensor | None = None
        rows = {name: features_of(sites[name], sites) for name in names}
        for name in names:
            if len(learned[f"{name}/A"]) != r:
                raise PolytaskError(f"{folder}: its ranks differ from module to module; polytask's {kind} has one")
            part = model.linear(sites[name])["W"].float().cpu()
            W = part.new_zeros(whole_width(path, sites), part.shape[1]) if W is None else W
            W[rows[name]] = part
        assert W is not None
        P, σ, Qt = torch.linalg.svd(W, full_matrices=False)
        for name in names:
            if kind == "pissa":
                root = (σ[:r] / s).sqrt()
                tensors |= {f"{name}/A0": root[:, None] * Qt[:r], f"{name}/B0": (P[:, :r] * root)[rows[name]]}
            else:
                tensors |= {f"{name}/U": (P[:, -r:] * σ[-r:])[rows[name]], f"{name}/V": Qt[-r:].T.contiguous()}
    if kind == "pissa":
        return tensors, dict(says)
    costs = config["kasa_config"]
    if not isinstance(costs, Mapping):
        raise PolytaskError(f"{folder / CONFIG}: kasa_config {costs!r} is no JSON object")
    return tensors, {
        "r": r,
        "alpha": whole_number(s * r),
        "beta": costs.get("beta", 1e-4),
        "gamma": costs.get("gamma", 1e-3),
        "dropout": says["dropout"],
        "sites": says["sites"],
    }
