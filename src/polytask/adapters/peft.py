"""LoRA and (IA)^3 adapters to and from the folder format of Hugging Face PEFT, which vLLM, LoRAX and others serve.

| polytask                          | PEFT                                                                        |
|-----------------------------------|-----------------------------------------------------------------------------|
| LoRA `<site>/A` [r, in]           | `base_model.model.<path>.lora_A.weight` [r, in]                             |
| LoRA `<site>/B` [out, r]          | `base_model.model.<path>.lora_B.weight` [out, r]                            |
| alpha / r, or alpha / √r (rslora) | `lora_alpha`, `r`, `use_rslora`, and by module `alpha_pattern`, `rank_pattern` |
| (IA)^3 `<site>/l` at an output    | `<path>.ia3_l` [out, 1]                                                     |
| (IA)^3 `<site>/l` at an input     | `<path>.ia3_l` [1, in], the path also in `feedforward_modules`              |
| head, `task/mean`, card           | `polytask_head.safetensors`, `polytask_head.json`: PEFT does not read them  |

A site that is a part of a fused projection (GPT-2's q of `c_attn`) has no module of its own. The parts p of one module
become one block,

    A = [A_1; A_2; …],  B[rows_p, columns_p] = B_p,  alpha = scale · Σ r_p,

which computes the same; parts that share one A keep its rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from polytask.adapters.adapter import Adapter, BackboneCard, Card, HeadCard
from polytask.adapters.store import read_safetensors, shown, whole_folder, write_json, write_safetensors
from polytask.errors import PolytaskError, UsageError

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD_TENSORS = "polytask_head.safetensors"
HEAD = "polytask_head.json"

_PREFIX = "base_model.model."

# What PEFT writes that changes nothing about the finished adapter, or that is read below. Any other key that is set
# stands for a variant (DoRA, aLoRA, BD-LoRA, …) that computes something else.
_HARMLESS = frozenset(
    (
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "feedforward_modules",
        "inference_mode",
        "init_ia3_weights",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    )
)
_HYPERPARAMETERS = frozenset(("r", "alpha", "dropout", "rslora", "sites"))
# Starts that leave the base weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ, …) write into them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class PartLike(Protocol):
    """In each of `groups` equal groups of a fused output, the features from `start` to `stop`."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def groups(self) -> int: ...


class SiteLike(Protocol):
    """Where a site is: `polytask.backbones.site.Site` is one. `reads` and `width` are the sizes of x and y."""

    @property
    def path(self) -> str: ...
    @property
    def point(self) -> str: ...
    @property
    def reads(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def part(self) -> PartLike | None: ...


class _Block(NamedTuple):
    """One module's LoRA, and which of its rank columns belong to which site."""

    A: Tensor
    B: Tensor
    columns: dict[str, tuple[int, int]]


def export_peft(
    adapter: Adapter,
    folder: str | Path,
    sites: Mapping[str, SiteLike],
    *,
    base_model: str | None = None,
    prefix: str = "",
    head_module: str | None = None,
) -> Path:
    """Write an adapter as PEFT's folder; `import_peft` gets the same adapter back.

    `base_model` is the id or folder that PEFT loads the backbone from (the backbone's name by default). `prefix` goes
    before module paths where the model that will be used wraps the one that `sites` describes (`"bert."`).
    `head_module` names a linear module of that model (`"classifier"`) that the head's `W` and `b` become; without it
    the head stays beside, in polytask's own file.

    Raises:
        UsageError: the method is not LoRA or (IA)^3, or a site is not in `sites`.
        PolytaskError: PEFT cannot express it (a whole block's output, two vectors at one module), or the disk refuses.
    """
    folder = Path(folder)
    if adapter.method not in ("lora", "ia3"):
        raise UsageError(f"{adapter.name}: PEFT's format has no place for method {adapter.method}; only lora and ia3")
    unknown = [site for site in adapter.sites if site not in sites]
    if unknown:
        raise UsageError(f"{adapter.name}: site {unknown[0]} is not in this backbone; pass the sites of its own one")
    method_config = _lora_config if adapter.method == "lora" else _ia3_config
    tensors, config, columns = method_config(adapter, sites, prefix)

    rest = {name: tensor for name, tensor in adapter.tensors.items() if name.rpartition("/")[0] in ("head", "task")}
    if head_module is not None:
        head = adapter.at("head")
        if not {"W"} <= set(head) <= {"W", "b"}:
            raise UsageError(f"{adapter.name}: its head ({', '.join(head) or 'none'}) is not one linear map W, b")
        tensors[f"{_PREFIX}{head_module}.weight"] = head["W"]
        if "b" in head:
            tensors[f"{_PREFIX}{head_module}.bias"] = head["b"]
    config = {
        "base_model_name_or_path": base_model or adapter.backbone.name,
        "task_type": None,
        "inference_mode": True,
        "modules_to_save": [head_module] if head_module else None,
        **config,
    }
    with whole_folder(folder, (TENSORS, CONFIG, HEAD_TENSORS, HEAD, "README.md")) as temporary:
        write_json(config, temporary / CONFIG)
        write_safetensors(tensors, temporary / TENSORS)
        write_safetensors(rest, temporary / HEAD_TENSORS)
        for name in (TENSORS, HEAD_TENSORS):
            (temporary / name).chmod((temporary / CONFIG).stat().st_mode)
        said = {
            "format_version": 1,
            "method": adapter.method,
            "hyperparameters": dict(adapter.hyperparameters),
            "prefix": prefix,
            "columns": columns,
            "head_module": head_module,
            "backbone": adapter.backbone.model_dump(mode="json"),
            "head": adapter.head.model_dump(mode="json") if adapter.head else None,
            "card": adapter.card.model_dump(mode="json"),
            "sha256": _sha256(temporary),
        }
        write_json(said, temporary / HEAD)
    return folder


def import_peft(
    folder: str | Path,
    sites: Mapping[str, SiteLike],
    *,
    backbone: BackboneCard | None = None,
    card: Card | None = None,
    head: HeadCard | None = None,
    head_module: str | None = None,
) -> Adapter:
    """Read a folder that PEFT (or `export_peft`) wrote.

    PEFT does not say which weights an adapter belongs to: `backbone` and `card` must be given, unless polytask wrote
    the folder. `head_module` names the module in `modules_to_save` that is the head described by `head`.

    A module whose scale is not the one of `r` and `alpha` (`rank_pattern`, `alpha_pattern`) has the ratio multiplied
    into its B.

    Raises:
        UsageError: `backbone` or `card` is needed; the folder has no adapter; a module has no site.
        PolytaskError: the weights are pickled or damaged, or the adapter cannot be represented (DoRA, biases, saved
            modules, starts that change the base weights).
    """
    folder = Path(folder)
    config = _read_json(folder, CONFIG)
    kind = _accept(folder, config, head_module)
    tensors = _read_tensors(folder)
    said = _read_json(folder, HEAD) if (folder / HEAD).exists() else {}
    rest: dict[str, Tensor] = {}
    if said:
        if said.get("format_version") != 1:
            raise PolytaskError(f"{folder / HEAD}: format version {said.get('format_version')}; this polytask reads 1")
        rest = read_safetensors(folder / HEAD_TENSORS)
        try:
            stated = BackboneCard.model_validate(said["backbone"])
            card = card or Card.model_validate(said["card"])
            head = head or (HeadCard.model_validate(said["head"]) if said["head"] else None)
        except (KeyError, ValueError) as error:
            raise PolytaskError(f"{folder / HEAD}: is damaged: {' '.join(str(error).split())[:200]}") from None
        if backbone is not None and backbone.fingerprint != stated.fingerprint:
            raise PolytaskError(f"{folder}: was made for {stated.name}, whose weights are not those of {backbone.name}")
        backbone = stated
        head_module = head_module or said.get("head_module")
    if backbone is None or card is None:
        raise UsageError(f"{folder}: PEFT does not say which weights and task it is for; pass backbone= and card=")

    saved = list(config.get("modules_to_save") or [])
    if saved and saved != [head_module]:
        raise PolytaskError(f"{folder}: it trained {', '.join(saved)} too (modules_to_save); name it with head_module=")
    if head_module in saved:
        for key, name in ((f"{_PREFIX}{head_module}.weight", "head/W"), (f"{_PREFIX}{head_module}.bias", "head/b")):
            if key in tensors:
                rest[name] = tensors.pop(key)
        if "head/W" in rest and head is None:
            raise UsageError(f"{folder}: say what the head {head_module} stands for with head=HeadCard(...)")

    untouched = bool(said) and said.get("sha256") == _sha256(folder)
    if kind == "lora":
        learned, hyperparameters = _lora_tensors(folder, config, tensors, sites, said if untouched else {})
    else:
        learned, hyperparameters = _ia3_tensors(folder, config, tensors, sites)
    order = {site: number for number, site in enumerate(sites)}
    learned = dict(sorted(learned.items(), key=lambda item: order[item[0].rpartition("/")[0]]))
    if untouched:
        hyperparameters = said["hyperparameters"]
    return Adapter(
        method=kind, hyperparameters=hyperparameters, tensors=learned | rest, backbone=backbone, card=card, head=head
    )


# ---------------------------------------------------------------------------------------------------------------- LoRA


def _lora_config(
    adapter: Adapter, sites: Mapping[str, SiteLike], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
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
    for path, names in _by_path(adapter.sites, sites).items():
        for name in names:
            _check_lora(adapter, name, sites[name])
        block = _block(adapter, names, sites)
        tensors[f"{_PREFIX}{prefix}{path}.lora_A.weight"] = block.A
        tensors[f"{_PREFIX}{prefix}{path}.lora_B.weight"] = block.B
        ranks[prefix + path] = block.A.shape[0]
        columns[prefix + path] = block.columns

    # PEFT divides by each module's own rank. Servers read only the global r and lora_alpha, so these say what most
    # modules have, and the patterns hold the exceptions.
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else r
    alphas = {
        rank: _whole(alpha if rank == r else scale * (math.sqrt(rank) if rslora else rank))
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
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": list(ranks),
    }
    return tensors, config, columns


def _check_lora(adapter: Adapter, name: str, site: SiteLike) -> None:
    if site.point != "output":
        raise PolytaskError(f"{adapter.name}: PEFT has no LoRA at {name}, which is no module's output ({site.point})")
    found = adapter.at(name)
    if set(found) != {"A", "B"}:
        raise PolytaskError(f"{adapter.name}: {name} has {', '.join(found)}, where PEFT's LoRA has A and B")
    A, B = found["A"], found["B"]
    if A.ndim != 2 or tuple(A.shape) != (A.shape[0], site.reads) or tuple(B.shape) != (site.width, A.shape[0]):
        raise PolytaskError(
            f"{adapter.name}: {name} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
            f"but the site reads {site.reads} and is {site.width} wide"
        )


def _block(adapter: Adapter, names: list[str], sites: Mapping[str, SiteLike]) -> _Block:
    factors = {name: adapter.at(name) for name in names}
    if len(names) == 1 and sites[names[0]].part is None:
        A, B = factors[names[0]]["A"], factors[names[0]]["B"]
        return _Block(A, B, {names[0]: (0, A.shape[0])})
    rows = {name: _rows(sites[name], sites) for name in names}
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
    B = torch.zeros(_total(sites[names[0]].path, sites), end, dtype=dtype)
    for name in names:
        start, stop = columns[name]
        B[rows[name], start:stop] = factors[name]["B"].detach().cpu().to(dtype)
    return _Block(A, B, columns)


def _lora_tensors(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sites: Mapping[str, SiteLike],
    said: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise PolytaskError(
                f"{folder}: tensor {shown(key)} is no LoRA of a linear module; polytask cannot represent it"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise PolytaskError(f"{folder / TENSORS}: holds no LoRA tensors")
    for path, pair in pairs.items():
        if len(pair) != 2:
            raise PolytaskError(f"{folder / TENSORS}: {shown(path)} has no lora_{'B' if 'A' in pair else 'A'}.weight")

    shift = _Shift(folder, pairs, sites)
    rslora = bool(config.get("use_rslora"))
    settings = {path: _rank_and_alpha(folder, config, path) for path in pairs}
    for path, (rank, _) in settings.items():
        if pairs[path]["A"].ndim != 2 or pairs[path]["A"].shape[0] != rank:
            shape = tuple(pairs[path]["A"].shape)
            raise PolytaskError(f"{folder}: {path}.lora_A has shape {shape}, but {CONFIG} says rank {rank}")
    # One r and one alpha for the adapter; the pair that most modules have costs no rounding there.
    r, alpha = Counter(settings.values()).most_common(1)[0][0]
    alpha = alpha or float(r)

    learned: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        A, B = pair["A"], pair["B"]
        rank, own = settings[path]
        if not said:
            ratio = (own / (math.sqrt(rank) if rslora else rank)) / (alpha / (math.sqrt(r) if rslora else r))
            B = B if math.isclose(ratio, 1.0, rel_tol=1e-12) else (B.double() * ratio).to(B.dtype)
        names = shift.sites(path, ("output",))
        total = _total(sites[names[0]].path, sites)
        if tuple(B.shape) != (total, rank) or A.shape[1] != sites[names[0]].reads:
            raise PolytaskError(
                f"{folder}: {path} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
                f"but the module reads {sites[names[0]].reads} and is {total} wide"
            )
        columns = said.get("columns", {}).get(path)
        for name in names:
            if columns is not None and name not in columns:
                continue
            start, stop = columns[name] if columns is not None else (0, rank)
            own_rows = B if sites[name].part is None else B[_rows(sites[name], sites)]
            if columns is None and len(names) > 1 and not own_rows.any() and B.any():
                continue  # the exporter's zeros at a part that has no adapter
            learned[f"{name}/A"] = A[start:stop].contiguous()
            learned[f"{name}/B"] = own_rows[:, start:stop].contiguous()
    hyperparameters: dict[str, Any] = {
        "r": r,
        "alpha": _whole(alpha),
        "sites": _patterns(learned, sites),
        "dropout": float(config.get("lora_dropout") or 0.0),
    }
    return learned, hyperparameters | ({"rslora": True} if rslora else {})


def _rank_and_alpha(folder: Path, config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """A module's own r and lora_alpha: as in PEFT, the first pattern that matches the end of its path."""

    def of(patterns: object, usual: Any) -> Any:
        if not isinstance(patterns, dict):
            return usual
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", path):
                    return value
            except re.error as error:
                raise PolytaskError(
                    f"{folder / CONFIG}: pattern {pattern!r} is no regular expression: {error}"
                ) from None
        return usual

    rank, alpha = of(config.get("rank_pattern"), config.get("r", 8)), of(config.get("alpha_pattern"), None)
    alpha = config.get("lora_alpha", 8) if alpha is None else alpha
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise PolytaskError(f"{folder / CONFIG}: r {rank!r} and lora_alpha {alpha!r} of {path} are no rank and number")
    return rank, float(alpha)


# --------------------------------------------------------------------------------------------------------------- (IA)^3


def _ia3_config(
    adapter: Adapter, sites: Mapping[str, SiteLike], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    inputs: list[str] = []
    for path, names in _by_path(adapter.sites, sites).items():
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
            vector = torch.ones(_total(path, sites), dtype=first.dtype)
            for name in names:
                vector[_rows(sites[name], sites)] = adapter.at(name)["l"].detach().cpu().to(first.dtype)
        is_input = points == {"input"}
        tensors[f"{_PREFIX}{prefix}{path}.ia3_l"] = vector.reshape((1, -1) if is_input else (-1, 1))
        targets.append(prefix + path)
        inputs += [prefix + path] if is_input else []
    config = {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": inputs,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    return tensors, config, {}


def _ia3_tensors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Mapping[str, SiteLike]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    vectors: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.ia3_l", key)
        if match is None:
            raise PolytaskError(f"{folder}: tensor {shown(key)} is no (IA)^3 vector; polytask cannot represent it")
        vectors[match[1]] = tensor
    if not vectors:
        raise PolytaskError(f"{folder / TENSORS}: holds no (IA)^3 vectors")
    shift = _Shift(folder, vectors, sites)
    feedforward = config.get("feedforward_modules") or []
    learned: dict[str, Tensor] = {}
    for path, vector in vectors.items():
        if isinstance(feedforward, str):
            is_input = re.fullmatch(feedforward, path) is not None
        else:
            is_input = any(path.endswith(end) for end in feedforward)
        names = shift.sites(path, ("input",) if is_input else ("output",))
        width = _total(sites[names[0]].path, sites) if not is_input else sites[names[0]].width
        if tuple(vector.shape) != ((1, width) if is_input else (width, 1)):
            raise PolytaskError(f"{folder}: {path}.ia3_l has shape {tuple(vector.shape)}, but the site is {width} wide")
        flat = vector.flatten()
        for name in names:
            own = flat if sites[name].part is None else flat[_rows(sites[name], sites)]
            if len(names) > 1 and bool((own == 1).all()) and bool((flat != 1).any()):
                continue  # the exporter's ones at a part that has no adapter
            learned[f"{name}/l"] = own.contiguous()
    return learned, {"sites": _patterns(learned, sites)}


# --------------------------------------------------------------------------------------------------- sites and modules


def _by_path(names: Iterable[str], sites: Mapping[str, SiteLike]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(sites[name].path, []).append(name)
    return found


def _total(path: str, sites: Mapping[str, SiteLike]) -> int:
    """How wide a module's output is: what its whole site says, or the last feature of its last part."""
    outputs = [site for site in sites.values() if site.path == path and site.point == "output"]
    return max(s.width if s.part is None else s.part.groups * s.part.stop for s in outputs)


def _rows(site: SiteLike, sites: Mapping[str, SiteLike]) -> Tensor:
    """The indices of a site's features among the module's: [width]"""
    total = _total(site.path, sites)
    every = torch.arange(total)
    if site.part is None:
        return every
    return every.view(site.part.groups, -1)[:, site.part.start : site.part.stop].reshape(-1)


def _patterns(tensors: Iterable[str], sites: Mapping[str, SiteLike]) -> list[str]:
    """The sites of these tensors, in few words: `*.attn.q` where every layer's q is among them."""
    have = {name.rpartition("/")[0] for name in tensors}
    names = [name for name in sites if name in have]
    said: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"(^|\.)\d+\.", r"\1*.", name, count=1)
        everywhere = {other for other in sites if fnmatchcase(other, pattern)}
        said[pattern if everywhere <= have else name] = None
    return list(said)


class _Shift:
    """How a file's module paths differ from those of `sites`: the file may come from a model that wraps this one
    (`bert.encoder…`, `model.layers…`), or the other way round."""

    def __init__(self, folder: Path, paths: Iterable[str], sites: Mapping[str, SiteLike]) -> None:
        self.folder, self.known = folder, sites
        by_path = {site.path for site in sites.values()}
        paths = list(paths)
        pieces = paths[0].split(".")
        known = next(iter(by_path), "").split(".")
        for drop in range(len(pieces)):
            head = "".join(piece + "." for piece in pieces[:drop])
            if all(path.startswith(head) and path[len(head) :] in by_path for path in paths):
                self.drop, self.add = len(head), ""
                return
        for more in range(1, len(known)):
            head = "".join(piece + "." for piece in known[:more])
            if all(head + path in by_path for path in paths):
                self.drop, self.add = 0, head
                return
        strange = next((path for path in paths if path not in by_path), paths[0])
        raise UsageError(
            f"{folder}: module {shown(strange)} has no site in this backbone; it is for another architecture"
        )

    def sites(self, path: str, points: tuple[str, ...]) -> list[str]:
        """The sites at a module: the whole one, or all its parts."""
        own = self.add + path[self.drop :]
        names = [name for name, site in self.known.items() if site.path == own and site.point in points]
        whole = [name for name in names if self.known[name].part is None][:1]
        names = whole or names
        if not names:
            raise UsageError(f"{self.folder}: module {path} has no site for its {points[0]} in this backbone")
        if not whole:
            covered = sum(self.known[name].width for name in names)
            total = _total(own, self.known)
            if covered != total:
                raise PolytaskError(f"{self.folder}: the sites of {path} cover {covered} of its {total} features")
        return names


# --------------------------------------------------------------------------------------------------------------- files


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        fields = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{folder}: no PEFT adapter here (it has no {name})") from None
    except OSError as error:
        raise PolytaskError(f"{folder / name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PolytaskError(f"{folder / name}: is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise PolytaskError(f"{folder / name}: is not a JSON object")
    return fields


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / TENSORS).exists() and (folder / "adapter_model.bin").exists():
        raise PolytaskError(
            f"{folder}: adapter_model.bin is a pickle and is never read; save it again as {TENSORS} "
            "(PEFT: model.save_pretrained(folder))"
        )
    return read_safetensors(folder / TENSORS)


def _accept(folder: Path, config: Mapping[str, Any], head_module: str | None) -> str:
    """Which method it is: `lora` or `ia3`; refuses what polytask would compute differently."""
    path = folder / CONFIG
    if "peft_type" not in config and "config" in config:
        raise PolytaskError(f"{path}: is of AdapterHub's adapters, not of PEFT")
    kind = {"LORA": "lora", "IA3": "ia3"}.get(str(config.get("peft_type")).upper())
    if kind is None:
        raise PolytaskError(f"{path}: peft_type {config.get('peft_type')}; polytask imports LORA and IA3")
    if config.get("bias", "none") != "none":
        raise PolytaskError(f"{path}: bias is {config['bias']!r}: it trained the base's biases, which cannot be kept")
    for key, value in config.items():
        if key not in _HARMLESS and value:
            raise PolytaskError(f"{path}: {key} is set; polytask's {kind} cannot represent it")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise PolytaskError(
            f"{path}: init_lora_weights {start!r} changes the base weights; save it from PEFT as a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return kind


def _sha256(folder: Path) -> str:
    sha = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        sha.update((folder / name).read_bytes())
    return sha.hexdigest()


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
