"""What adapters change, weight by weight: the exact ΔW that merging rules see, and how their results are kept.

A *place* is where a difference stands: a site, for the weight of the linear map whose output it is, and
`:<module path>/<parameter>` for any other weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polytask.adapters import Adapter
from polytask.backbones import Backbone
from polytask.composition.low_rank import differences
from polytask.errors import PolytaskError, UsageError
from polytask.methods.lifting import Active
from polytask.methods.lora import LoRA


@dataclass(frozen=True)
class Weighed:
    """An adapter and its weight."""

    adapter: Adapter
    active: Active
    weight: float

    def __str__(self) -> str:
        return f"{self.weight:g}·{self.adapter.name}"


def modules(base: Backbone) -> dict[str, list[str]]:
    """The modules of the backbone that have weights of their own, and the sites at each one's output where it is a
    linear map."""
    sites: dict[int, list[str]] = {}
    for at, site in base.sites.items():
        if site.point == "output":
            sites.setdefault(id(base.model.get_submodule(site.path)), []).append(at)
    return {path: sites.get(id(module), []) for path, module in base.base.named_modules() if module._parameters}


def places(base: Backbone, sources: Sequence[Weighed]) -> tuple[str, ...]:
    """Where any of the adapters changes something, in the order of modules."""
    found: dict[str, None] = {}
    for path, sites in modules(base).items():
        for source in sources:
            at = source.active.at
            if not source.active.method.swaps:
                found |= dict.fromkeys(site for site in sites if site in at)
                continue
            for parameter in at.get(f":{path}", {}):
                found |= dict.fromkeys(sites if sites and parameter == "weight" else [f":{path}/{parameter}"])
    return tuple(found)


def nothing(base: Backbone, place: str) -> Tensor:
    """No difference there, in fp32."""
    if not place.startswith(":"):
        site = base.sites[place]
        return torch.zeros(site.width, site.reads, device=_device(base))
    path, _, parameter = place[1:].rpartition("/")
    θ = base.base.get_submodule(path)._parameters[parameter]
    assert θ is not None
    return torch.zeros(θ.shape, device=_device(base))


def check(base: Backbone, source: Weighed, places: Mapping[str, list[str]]) -> None:
    """Raise UsageError where an adapter has no ΔW, as far as one site of it tells."""
    one, method, at = source.adapter, source.active.method, source.active.at
    who = f"{one.name}: {method.name}"
    if method.composed:
        raise UsageError(f"{who} is made of other adapters, so there is no ΔW to merge; merge those")
    if len(source.active.parts) > 1:
        raise UsageError(f"{who} are several methods in one, which are not merged; mix or route it instead")
    if not at:
        raise UsageError(f"{who} changes nothing in the backbone, so there is no ΔW to merge")
    if method.opaque and method.name != "peft":
        raise UsageError(f"{who} changes the model itself, so there is no ΔW to merge; ask for it alone")
    if method.opaque:
        raise UsageError(f"{who} keeps PEFT's own layers; export it as a LoRA, import that, and merge it")
    if method.slots:
        raise UsageError(
            f"{who} puts virtual tokens before the text, which have no ΔW to merge; mix or route it instead"
        )
    if method.swaps:
        if strange := [name for name in at if name[1:] not in places]:
            raise PolytaskError(f"adapter {one.name} ({one.id}) changes {strange[0]}, which {base.name} does not have")
        return
    known = {site for sites in places.values() for site in sites}
    if strange := [name for name in at if name not in known]:
        raise UsageError(
            f"{who} acts at {strange[0]}, which is no linear map's output, so there is no ΔW to merge; mix or route it "
            "instead"
        )
    first = next(iter(at))
    try:
        differences(base, one.name, Active(method, {first: at[first]}))
    except UsageError as error:
        raise UsageError(
            f"{who} is not linear in what it reads at {first}, so there is no ΔW to merge; mix or route it instead"
        ) from error
    _exact(base, source, {first: at[first]})


def beside(sources: Sequence[Weighed], places: Mapping[str, list[str]]) -> str:
    """A weight that is changed and is no linear map's; empty where there is none."""
    for source in sources:
        if source.active.method.swaps:
            for at, p in source.active.at.items():
                for parameter, Δθ in p.items():
                    if not (parameter == "weight" and places[at[1:]]) and bool(Δθ.any()):
                        return f"{source.adapter.name}: {at[1:]}.{parameter}"
    return ""


def at_module(base: Backbone, source: Weighed, path: str, sites: Sequence[str]) -> dict[str, Tensor]:
    """An adapter's differences to one module's weights, by site, and by `:<module path>/<parameter>` where they are no
    linear map's weight."""
    at = source.active.at
    if not source.active.method.swaps:
        return _exact(base, source, {site: at[site] for site in sites if site in at})
    p = at.get(f":{path}", {})
    maps = _exact(base, source, {f":{path}": {"weight": p["weight"]}}) if sites and "weight" in p else {}
    rest = {n: Δθ for n, Δθ in p.items() if not (sites and n == "weight")}
    return maps | {f":{path}/{n}": Δθ.to(_device(base), torch.float64) for n, Δθ in rest.items()}


def _exact(base: Backbone, source: Weighed, at: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """ΔW by site, in fp64. Raises UsageError where something else changes too."""
    maps, rest = differences(base, source.adapter.name, Active(source.active.method, at))
    maps = {site: ΔW.to(_device(base), torch.float64) for site, ΔW in maps.items()}
    lost = math.hypot(*rest.values())
    if lost > 1e-9 * math.hypot(lost, *map(norm, maps.values())):
        most = max(rest, key=lambda name: rest[name])
        raise UsageError(
            f"{source.adapter.name}: {source.active.method.name} changes {most}, which is in no ΔW; mix or route it"
        )
    return maps


def factors(sources: Sequence[Weighed], c: Sequence[float], at: str) -> tuple[Tensor, Tensor]:
    """A [Σr, in] and B [out, Σr] with B A = Σ_k c_k s_k B_k A_k."""
    As, Bs = [], []
    for source, c_k in zip(sources, c, strict=True):
        method, p = source.active.method, source.active.at.get(at)
        if p and c_k:
            assert isinstance(method, LoRA)
            ready = method.ready({n: t.double() for n, t in p.items()}, {})
            As.append(ready["A"])
            Bs.append(c_k * method.s * ready["B"])
    return torch.cat(As), torch.cat(Bs, dim=1)


def whole_weights(base: Backbone, path: str, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `full` keeps of one module: the sites' differences as its weight's, and all others as they are."""
    module: Any = base.base.get_submodule(path)
    upright = isinstance(module, nn.Linear)  # else a Conv1D, whose weight is [in, out]
    whole: Tensor | None = None
    others: dict[str, Tensor] = {}
    for at, Δ in made.items():
        if at.startswith(":"):
            others[at] = Δ.float().cpu().contiguous()
            continue
        part = base.sites[at].part
        if whole is None:
            shape = module.weight.shape if upright else module.weight.T.shape
            whole = Δ.new_zeros(shape)
        whole = Δ if part is None else part.put(whole.T, Δ.T).T
    if whole is None:
        return others
    return {f":{path}/weight": (whole if upright else whole.T).float().cpu().contiguous(), **others}


def norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def _device(base: Backbone) -> torch.device:
    return base.device if base.device.type == "cuda" else torch.device("cpu")
