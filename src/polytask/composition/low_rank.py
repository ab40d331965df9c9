"""An adapter as a LoRA of a chosen rank, for servers that know nothing else, and how far off it is.

    ΔW e_j = Δ(e_j) − Δ(0),   ΔW = U diag(σ) Vᵀ,   B = U_r diag(σ_r)^½,   A = diag(σ_r)^½ V_rᵀ,   α = r
    error = ‖ΔW − B A‖_F / ‖ΔW‖_F        ΔW [out, in], A [r, in], B [out, r]

No matrix of rank r is nearer to ΔW (Eckart & Young 1936, The approximation of one matrix by another of lower rank). ΔW
is taken from the method's own equation, by giving it the unit vectors e_j with y = W e_j + b; from the weights'
difference where a method keeps one (`full`); from what its layers put out (`peft`). Sites that are parts of one fused
module share one A, so that r is the rank of the module's LoRA in PEFT's file too.

A LoRA has no bias part Δ(0), and stands at the outputs of linear maps alone: what changes elsewhere (layer norms,
biases, embeddings) is refused, or left out and counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from polytask.adapters import Adapter
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.methods import Params, build
from polytask.methods.lifting import Active

BENT = 1e-4  # relative deviation from a straight line above which an equation is none; rounding is far below
SMALL = 1e-6  # of the weight's norm: a difference up to this is how an untrained adapter was rounded


@dataclass(frozen=True)
class Off:
    """How far a LoRA is from what it stands for. `sites`: ‖ΔW − B A‖_F / ‖ΔW‖_F at each site. `whole`: the same of all
    ΔW together. `left_out`: the norm of what has no place in a LoRA over the norm of all that the adapter changes."""

    sites: Mapping[str, float]
    whole: float
    left_out: float

    def __str__(self) -> str:
        worst = max(self.sites, key=lambda site: self.sites[site])
        said = f"off by {self.whole:.2%} in all, by {self.sites[worst]:.2%} at most ({worst})"
        return f"{said}; left out: {self.left_out:.2%}" if self.left_out else said


def as_lora(base: Backbone, adapter: Adapter, rank: int, *, drop: bool = False) -> tuple[Adapter, Off]:
    """The nearest LoRA of this rank, and how near it is. `drop` leaves out what has no place in a LoRA.

    Raises:
        UsageError: the method is not affine in what its sites read, acts where a LoRA cannot stand, or changes
            something that has no place in one (without `drop`).
        PolytaskError: the adapter belongs to another backbone.
    """
    if rank < 1:
        raise UsageError(f"rank = {rank}: at least 1 is needed")
    if adapter.backbone.fingerprint != base.fingerprint:
        raise PolytaskError(
            f"adapter {adapter.name} ({adapter.id}) belongs to other weights than those of {base.name}; load its own"
        )
    if adapter.needs:
        raise UsageError(
            f"{adapter.name}: it is made of other adapters or stands on some, and its own tensors are not all that it "
            "does; merge them"
        )
    active = Active.of(build(adapter.method, adapter.hyperparameters), adapter.tensors)
    maps, rest = differences(base, adapter.name, active)
    norm = {site: _norm(maps[site]) for site in base.sites if site in maps}
    lost, all_ = math.hypot(*rest.values()), math.hypot(*norm.values(), *rest.values())
    if lost <= 1e-9 * all_:
        lost = 0.0
    changed = [at for at in norm if norm[at] > SMALL * _norm(base.linear(base.sites[at])["W"])]
    if not changed:
        raise UsageError(
            f"{adapter.name}: {adapter.method} changes no weight of a linear map here, so no LoRA stands for it; serve "
            "it with polytask, or train lora"
        )
    if lost and not drop:
        most = max(rest, key=lambda name: rest[name])
        raise UsageError(
            f"{adapter.name}: {lost / all_:.2%} of the norm of its difference has no place in a LoRA (most of it: "
            f"{most}); leave that out with drop=True (--drop)"
        )
    modules: dict[str, list[str]] = {}
    for site in changed:
        modules.setdefault(base.sites[site].path, []).append(site)
    tensors: dict[str, Tensor] = {}
    missed: dict[str, float] = {}
    for sites in modules.values():
        whole_module = _exact(base, torch.cat([maps[site] for site in sites]))
        A, B = (t.float() for t in nearest(whole_module, rank))
        heights = [len(maps[site]) for site in sites]
        for site, ΔW, part in zip(sites, torch.split(whole_module, heights), torch.split(B, heights), strict=True):
            tensors[f"{site}/A"], tensors[f"{site}/B"] = A.cpu(), part.cpu().contiguous()
            missed[site] = _norm(ΔW - part.double() @ A.double())
    whole = math.hypot(*missed.values()) / math.hypot(*(norm[site] for site in changed))
    off = Off({site: missed[site] / norm[site] for site in changed}, whole, lost / all_)
    rest_of = {n: t for n, t in adapter.tensors.items() if n.rpartition("/")[0] in ("head", "task")}
    card = adapter.card.model_copy(
        update={
            "scores": {},  # they were measured on the adapter itself
            "lineage": adapter.card.lineage.model_copy(update={"parents": (adapter.id,)}),
            "notes": (*adapter.card.notes, f"{adapter.method} {adapter.id} as a LoRA of rank {rank}: {off}"),
        }
    )
    said = build("lora", {"r": rank, "alpha": float(rank), "sites": changed}).hyperparameters()
    return replace(adapter, method="lora", hyperparameters=said, tensors=tensors | rest_of, card=card), off


def differences(base: Backbone, name: str, active: Active) -> tuple[dict[str, Tensor], dict[str, float]]:
    """ΔW [width, reads] by site, and by its name the norm of whatever else changes. Raises UsageError as `as_lora` does
    of the method."""
    maps: dict[str, Tensor] = {}
    rest: dict[str, float] = {}
    for part in active.parts:
        read = _stored if part.method.swaps else _layered if part.method.opaque else _probed
        its, beside = read(base, name, part)
        for at, ΔW in its.items():
            maps[at] = maps[at] + ΔW if at in maps else ΔW
        rest |= beside
    return maps, rest


def nearest(ΔW: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of the nearest B A of rank r, equal in norm; rows and columns beyond ΔW's own are 0."""
    U, σ, Vt = torch.linalg.svd(ΔW, full_matrices=False)
    k = min(r, len(σ))
    A, B = ΔW.new_zeros(r, ΔW.shape[1]), ΔW.new_zeros(ΔW.shape[0], r)
    A[:k], B[:, :k] = σ[:k, None].sqrt() * Vt[:k], U[:, :k] * σ[:k].sqrt()
    return A, B


def _probed(base: Backbone, name: str, active: Active) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each site's ΔW [width, reads], and the norms of the bias parts."""
    maps: dict[str, Tensor] = {}
    rest: dict[str, float] = {}
    method = active.method
    if method.slots:
        raise UsageError(f"{name}: {method.name} puts virtual tokens before the text, for which no LoRA stands")
    for at, p in active.at.items():
        site = base.sites.get(at)
        if site is None or site.point != "output":
            what = f"no linear map's output ({site.point})" if site else "no site"
            raise UsageError(
                f"{name}: {method.name} acts at {at}, which is {what}, where no LoRA can stand; export it in "
                "polytask's own format"
            )
        W, b = (_exact(base, t) for t in base.linear(site).values())
        frozen = {n: _exact(base, t) for n, t in method.frozen(base, site).items()}
        ready = method.ready({n: _exact(base, t) for n, t in p.items()}, frozen)

        def Δ(x: Tensor, p: Params = ready, W: Tensor = W, b: Tensor = b) -> Tensor:
            return method.delta(p, x, x @ W.T + b)

        maps[at], c = _affine(Δ, W, f"{name}: {method.name} at {at}")
        rest[f"the bias part at {at}"] = _norm(c)
    return maps, rest


def _layered(base: Backbone, name: str, active: Active) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same of an opaque method's layers, by what they put out beside what the backbone's own modules do."""
    sites = _sites(base)
    maps: dict[str, Tensor] = {}
    rest: dict[str, float] = {}
    own = dict(base.base.named_modules())
    with active.method.inside(base, active.at):
        worn = {path: module for path, module in base.base.named_modules() if module is not own.get(path, module)}
        layers = {path: copy.deepcopy(module) for path, module in worn.items()}
    for path, layer in layers.items():
        here = sites.get(id(own[path]), [])
        if not here:
            raise UsageError(f"{name}: {path} has a layer of {active.method.name}'s and is no linear map, so no LoRA")
        weight: Any = own[path].weight
        W = _exact(base, weight if isinstance(own[path], nn.Linear) else weight.T)
        layer.to(W.device, W.dtype)
        plain = copy.deepcopy(own[path]).to(W.device, W.dtype)

        def Δ(x: Tensor, layer: Any = layer, plain: Any = plain) -> Tensor:
            changed: Tensor = layer(x) - plain(x)
            return changed

        what = f"{name}: {active.method.name}'s layer at {path}"
        try:
            ΔW, c = _affine(Δ, W, what)
        except RuntimeError as error:  # of a layer that holds tensors in fp32 for itself
            raise UsageError(f"{what} does not run in fp64, where it would be compared with a LoRA") from error
        maps |= _parts(base, here, ΔW)
        rest[f"the bias part at {path}"] = _norm(c)
    return maps, rest


@torch.no_grad()
def _affine(Δ: Callable[[Tensor], Tensor], W: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """ΔW [width, reads] and Δ(0) [width]. Raises UsageError where Δ is something else than ΔW x + Δ(0)."""
    c = Δ(W.new_zeros(1, W.shape[1]))[0]
    ΔW = (Δ(torch.eye(W.shape[1]).to(W)) - c).T
    z = torch.randn(8, W.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(W)
    z = z * torch.logspace(-2, 2, 8).to(W)[:, None]
    straight = z @ ΔW.T + c
    rounding = 1e-12 * (z @ W.T).norm(dim=1)
    if bool(((Δ(z) - straight).norm(dim=1) > BENT * straight.norm(dim=1) + rounding).any()):
        raise UsageError(f"{what} is not linear in what it reads, so no LoRA comes near it; serve it with polytask")
    return ΔW, c


def _stored(base: Backbone, name: str, active: Active) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same from differences of whole weights; what is no linear map's weight is among the norms."""
    sites = _sites(base)
    maps: dict[str, Tensor] = {}
    rest: dict[str, float] = {}
    for at, p in active.at.items():
        module = base.base.get_submodule(at.removeprefix(":"))
        for parameter, Δθ in p.items():
            if parameter == "weight" and id(module) in sites:
                maps |= _parts(base, sites[id(module)], Δθ if isinstance(module, nn.Linear) else Δθ.T)  # else a Conv1D
            else:
                rest[f"{at.removeprefix(':')}.{parameter}"] = _norm(Δθ)
    return maps, rest


def _sites(base: Backbone) -> dict[int, list[str]]:
    """The sites at the output of each linear map, by the module's id."""
    found: dict[int, list[str]] = {}
    for at, site in base.sites.items():
        if site.point == "output":
            found.setdefault(id(base.model.get_submodule(site.path)), []).append(at)
    return found


def _parts(base: Backbone, sites: list[str], ΔW: Tensor) -> dict[str, Tensor]:
    """A module's ΔW [width, reads] as that of its sites."""
    parts = {at: base.sites[at].part for at in sites}
    return {at: ΔW if part is None else part.take(ΔW.T).T for at, part in parts.items()}


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def _exact(base: Backbone, t: Tensor) -> Tensor:
    """In fp64, on the GPU where there is one that has it."""
    return t.detach().to(base.device if base.device.type == "cuda" else "cpu", torch.float64)
