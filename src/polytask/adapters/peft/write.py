"""Writing PEFT's folder from an adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polytask.adapters.adapter import Adapter
from polytask.adapters.disk import whole_folder
from polytask.adapters.peft import inplace, tokens
from polytask.adapters.peft.layout import (
    CONFIG,
    HEAD,
    HEAD_TENSORS,
    PREFIX,
    TENSORS,
    ModelLike,
    SiteLike,
    Written,
    by_path,
    features_of,
    sha256,
    whole_number,
    whole_width,
)
from polytask.adapters.store import write_json, write_safetensors
from polytask.errors import PolytaskError, UsageError

# Of a LoRA, those that PEFT has too.
_HYPERPARAMETERS = frozenset(("r", "alpha", "dropout", "rslora", "sites"))


def export_peft(
    adapter: Adapter,
    folder: str | Path,
    sites: Mapping[str, SiteLike],
    *,
    model: ModelLike | None = None,
    base_model: str | None = None,
    prefix: str = "",
    head_module: str | None = None,
) -> Path:
    """Write an adapter as PEFT's folder; `import_peft` gets the same adapter back.

    `model` is the backbone itself: a prefix needs it. Where PEFT's tensors are not the adapter's own, number for number
    (`tokens`, `inplace`), its own stand beside, and come back as long as nobody changes the folder.

    `base_model` is the id or folder that PEFT loads the backbone from (the backbone's name by default). `prefix` goes
    before module paths where the model that will be used wraps the one that `sites` describes (`"bert."`).
    `head_module` names a linear module of that model (`"classifier"`) that the head's `W` and `b` become; without it
    the head stays beside, in polytask's own file.

    Raises:
        UsageError: PEFT's format has no place for the method or its head, a site is not in `sites`, or `model` is
            needed.
        PolytaskError: PEFT cannot express it (a whole block's output, two vectors at one module), or the disk refuses.
    """
    folder = Path(folder)
    known = ("lora", "dora", *inplace.PARAMETERS, "ia3", *tokens.METHODS)
    if adapter.method not in known:
        raise UsageError(
            f"{adapter.name}: PEFT's format has no place for method {adapter.method}; only for {', '.join(known)}"
        )
    if adapter.above:
        raise UsageError(
            f"{adapter.name}: it stands on {', '.join(adapter.above)}, which PEFT's format cannot say; merge them"
        )
    unknown = [site for site in adapter.sites if site not in sites]
    if unknown:
        raise UsageError(f"{adapter.name}: site {unknown[0]} is not in this backbone; pass the sites of its own one")
    if adapter.method in tokens.METHODS:
        if head_module is not None:
            raise UsageError(
                f"{adapter.name}: PEFT's heads read other states than polytask's where virtual tokens stand before the "
                "text; leave head_module out, and the head stands beside"
            )
        written = tokens.written(adapter, sites, model)
    elif adapter.method == "ia3":
        written = _ia3(adapter, sites, prefix)
    elif adapter.method in inplace.PARAMETERS:
        written = _lora(inplace.as_lora(adapter), sites, prefix)._replace(exact=False)
    else:
        written = _lora(adapter, sites, prefix)

    beside = ("head", "task") if written.exact else ("head", "task", *adapter.sites)
    rest = {name: tensor for name, tensor in adapter.tensors.items() if name.rpartition("/")[0] in beside}
    if head_module is not None:
        head = adapter.at("head")
        if not {"W"} <= set(head) <= {"W", "b"}:
            raise UsageError(f"{adapter.name}: its head ({', '.join(head) or 'none'}) is not one linear map W, b")
        written.tensors[f"{PREFIX}{head_module}.weight"] = head["W"]
        if "b" in head:
            written.tensors[f"{PREFIX}{head_module}.bias"] = head["b"]
    config = {
        "base_model_name_or_path": base_model or adapter.backbone.name,
        "task_type": None,
        "inference_mode": True,
        "modules_to_save": [head_module] if head_module else None,
        **written.config,
    }
    with whole_folder(folder, (TENSORS, CONFIG, HEAD_TENSORS, HEAD, "README.md")) as temporary:
        write_json(config, temporary / CONFIG)
        write_safetensors(written.tensors, temporary / TENSORS)
        write_safetensors(rest, temporary / HEAD_TENSORS)
        for name in (TENSORS, HEAD_TENSORS):
            (temporary / name).chmod((temporary / CONFIG).stat().st_mode)
        said = {
            "format_version": 1,
            "method": adapter.method,
            "hyperparameters": dict(adapter.hyperparameters),
            "prefix": prefix,
            "columns": written.columns or {},
            "head_module": head_module,
            "backbone": adapter.backbone.model_dump(mode="json"),
            "head": adapter.head.model_dump(mode="json") if adapter.head else None,
            "card": adapter.card.model_dump(mode="json"),
            "sha256": sha256(temporary),
        }
        write_json(said, temporary / HEAD)
    return folder


def _lora(adapter: Adapter, sites: Mapping[str, SiteLike], prefix: str) -> Written:
    says = adapter.hyperparameters
    strange = [name for name, value in says.items() if name not in _HYPERPARAMETERS and value]
    if strange or not {"r", "alpha"} <= set(says):
        raise PolytaskError(
            f"{adapter.name}: PEFT's LoRA has no {strange[0]}" if strange else f"{adapter.name}: no r, alpha"
        )
    r, alpha, rslora = int(says["r"]), float(says["alpha"]), bool(says.get("rslora", False))
    scale = alpha / (math.sqrt(r) if rslora else r)

    tensors: dict[str, Tensor] = {}
    columns: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    for path, names in by_path(adapter.sites, sites).items():
        for name in names:
            _check_lora(adapter, name, sites[name])
        block = _block(adapter, names, sites)
        tensors[f"{PREFIX}{prefix}{path}.lora_A.weight"] = block.A
        tensors[f"{PREFIX}{prefix}{path}.lora_B.weight"] = block.B
        if adapter.method == "dora":
            tensors[f"{PREFIX}{prefix}{path}.lora_magnitude_vector"] = _magnitudes(adapter, path, names, sites)
        ranks[prefix + path] = block.A.shape[0]
        columns[prefix + path] = block.columns

    # PEFT divides by each module's own rank. Servers read only the global r and lora_alpha, so these say what most
    # modules have, and the patterns hold the exceptions.
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else r
    alphas = {
        rank: whole_number(alpha if rank == r else scale * (math.sqrt(rank) if rslora else rank))
        for rank in {usual, *ranks.values()}
    }
    config = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": alphas[usual],
        "lora_dropout": float(says.get("dropout", 0.0)),
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != usual},
        "alpha_pattern": {path: alphas[rank] for path, rank in ranks.items() if alphas[rank] != alphas[usual]},
        "use_rslora": rslora,
        "use_dora": adapter.method == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": list(ranks),
    }
    return Written(tensors, config, True, columns)


def _check_lora(adapter: Adapter, name: str, site: SiteLike) -> None:
    if site.point != "output":
        raise PolytaskError(f"{adapter.name}: PEFT has no LoRA at {name}, which is no module's output ({site.point})")
    found = adapter.at(name)
    name_in_peft, wanted = ("DoRA", "A, B and m") if adapter.method == "dora" else ("LoRA", "A and B")
    if set(found) != set(wanted) & set("ABm"):
        raise PolytaskError(f"{adapter.name}: {name} has {', '.join(found)}, where PEFT's {name_in_peft} has {wanted}")
    A, B = found["A"], found["B"]
    if A.ndim != 2 or tuple(A.shape) != (A.shape[0], site.reads) or tuple(B.shape) != (site.width, A.shape[0]):
        raise PolytaskError(
            f"{adapter.name}: {name} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
            f"but the site reads {site.reads} and is {site.width} wide"
        )


def _magnitudes(adapter: Adapter, path: str, names: list[str], sites: Mapping[str, SiteLike]) -> Tensor:
    """A module's m from those of its parts. PEFT has one for all rows of the module."""
    if sites[names[0]].part is None:
        return adapter.at(names[0])["m"]
    rows = torch.cat([features_of(sites[name], sites) for name in names])
    if len(set(rows.tolist())) < whole_width(sites[names[0]].path, sites):
        raise PolytaskError(
            f"{adapter.name}: PEFT has DoRA for all of {path} or for none of it; train it with all sites of the module "
            f"and not only {', '.join(names)}"
        )
    m = torch.cat([adapter.at(name)["m"] for name in names])
    return torch.empty_like(m).index_copy(0, rows.to(m.device), m)


class _Block(NamedTuple):
    """One module's LoRA, and which of its rank columns belong to which site."""

    A: Tensor
    B: Tensor
    columns: dict[str, tuple[int, int]]


def _block(adapter: Adapter, names: list[str], sites: Mapping[str, SiteLike]) -> _Block:
    """The LoRA of a module from those of its parts."""
    factors = {name: adapter.at(name) for name in names}
    if len(names) == 1 and sites[names[0]].part is None:
        A, B = factors[names[0]]["A"], factors[names[0]]["B"]
        return _Block(A, B, {names[0]: (0, A.shape[0])})
    rows = {name: features_of(sites[name], sites) for name in names}
    first = factors[names[0]]["A"]
    shared = all(torch.equal(factors[name]["A"], first) for name in names)
    columns: dict[str, tuple[int, int]] = {}
    end = 0
    for name in names:
        rank = factors[name]["A"].shape[0]
        start = 0 if shared else end
        columns[name] = (start, start + rank)
        end = start + rank
    A = first if shared else torch.cat([factors[name]["A"] for name in names])
    dtype = factors[names[0]]["B"].dtype
    for name in names:
        dtype = torch.promote_types(dtype, factors[name]["B"].dtype)
    B = torch.zeros(whole_width(sites[names[0]].path, sites), end, dtype=dtype)
    for name in names:
        start, stop = columns[name]
        B[rows[name], start:stop] = factors[name]["B"].detach().cpu().to(dtype)
    return _Block(A, B, columns)


def _ia3(adapter: Adapter, sites: Mapping[str, SiteLike], prefix: str) -> Written:
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    inputs: list[str] = []
    for path, names in by_path(adapter.sites, sites).items():
        points = {sites[name].point for name in names}
        if not points <= {"input", "output"}:
            raise PolytaskError(
                f"{adapter.name}: PEFT has no (IA)^3 at {names[0]}, which is no module's output or input"
            )
        if len(points) > 1 or len({id(sites[name].part) for name in names}) < len(names):
            raise PolytaskError(f"{adapter.name}: {' and '.join(names)} scale one module; PEFT has one vector for it")
        for name in names:
            found = adapter.at(name)
            if set(found) != {"l"} or tuple(found["l"].shape) != (sites[name].width,):
                shapes = ", ".join(f"{p} {tuple(t.shape)}" for p, t in found.items())
                raise PolytaskError(f"{adapter.name}: {name} has {shapes}, where (IA)^3 has l ({sites[name].width},)")
        first = adapter.at(names[0])["l"]
        if len(names) == 1 and sites[names[0]].part is None:
            vector = first
        else:
            vector = torch.ones(whole_width(path, sites), dtype=first.dtype)
            for name in names:
                vector[features_of(sites[name], sites)] = adapter.at(name)["l"].detach().cpu().to(first.dtype)
        is_input = points == {"input"}
        tensors[f"{PREFIX}{prefix}{path}.ia3_l"] = vector.reshape((1, -1) if is_input else (-1, 1))
        targets.append(prefix + path)
        inputs += [prefix + path] if is_input else []
    config = {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": inputs,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    return Written(tensors, config, True)
