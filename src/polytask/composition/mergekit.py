"""mergekit's YAML: whole checkpoints merged tensor by tensor.

    linear           θ = Σ w_k θ_k                      / Σ w_k where `normalize` (the default)
    task_arithmetic  θ = θ₀ + λ Σ w_k δ_k               δ_k = θ_k − θ₀
    ties             θ = θ₀ + λ Σ_{k ∈ A} w_k δ̂_k       / Σ_{k ∈ A} w_k where `normalize` (the default)
    dare_linear      θ = θ₀ + λ Σ w_k δ̂_k
    dare_ties        θ = θ₀ + λ Σ_{k ∈ A} w_k δ̂_k

δ̂_k of `ties` are the `density` largest of δ_k; of `dare_*` those that chance left, times ‖δ_k‖₁ / ‖δ̂_k‖₁ where
`rescale` (the default). A are the models whose w_k δ̂_k has the sign of their sum, plus where that is 0. Papers:
Wortsman et al. 2022, arXiv 2203.05482 (linear); Ilharco et al. 2022, arXiv 2212.04089; Yadav et al. 2023, arXiv
2306.01708; Yu et al. 2023, arXiv 2311.03099. The formulas are those of mergekit 0.1.5 (Goddard et al. 2024, arXiv
2403.13257), which the rules of `merging/` are not: there a weight of 2 is twice the task vector, here of `ties` it is
its share of a mean.

`weight`, `density` and the others may be numbers, lists of numbers that run over the blocks from the first to the
last, or lists of `filter` and `value`, whose first that is part of the tensor's name counts. A model's own go first.
Differences: sums are in fp32 and rounded to the dtype once (`int8_mask` saves memory that is not needed here, and is
ignored); masks depend on `seed`, the tensor's name and the model's number, so that they are the same each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from polytask.composition.checkpoints import Checkpoint, Shape, block, number_of_blocks, write
from polytask.composition.merging.rule import Rule, build
from polytask.errors import PolytaskError, UsageError

PART = 1 << 16  # numbers of each model that are worked on at once
SHARD = 5 * 10**9  # bytes of a file, as transformers and mergekit write them
GENERAL = {"normalize": bool, "lambda": float, "int8_mask": bool, "rescale": bool}
PER_MODEL = {"weight": float, "density": float}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True, "int8_mask": False},
    "task_arithmetic": {"normalize": False, "lambda": 1.0, "int8_mask": False},
    "ties": {"normalize": True, "lambda": 1.0, "int8_mask": False, "density": 1.0},
    "dare_linear": {"normalize": False, "rescale": True, "lambda": 1.0, "int8_mask": False, "density": 1.0},
    "dare_ties": {"normalize": False, "rescale": True, "lambda": 1.0, "int8_mask": False, "density": 1.0},
}
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
TOP = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "name")
ELSEWHERE = {
    "slices": "only whole models are merged, under `models`",
    "modules": "only whole models are merged, under `models`",
    "tokenizer": "the tokenizer is the base model's; `tokenizer_source: base` may stand",
    "chat_template": "the base model's stays",
}


@dataclass(frozen=True)
class Model:
    """A checkpoint's folder or id, and its own settings."""

    ref: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a file says. `settings` are all models'; `notes` what of it is not done."""

    method: str
    models: tuple[Model, ...]
    base: str | None
    settings: Mapping[str, Any]
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    notes: tuple[str, ...] = ()


def read_mergekit(path: Path | str) -> Recipe:
    """A file of mergekit's. Raises UsageError, with the line, for what is unknown or not done here."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        said, lines = yaml.safe_load(text), _lines(yaml.compose(text, yaml.SafeLoader))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no YAML: {' '.join(str(error).split())}") from None

    def wrong(where: tuple[Any, ...], what: str) -> UsageError:
        return UsageError(f"{path}:{lines.get(where, 1)}: {what}")

    if not isinstance(said, dict):
        raise UsageError(f"{path}: no merge: models and merge_method are needed")
    for key in said:
        if key not in TOP:
            raise wrong((key,), f"{key}: " + ELSEWHERE.get(key, f"unknown; the fields are {', '.join(TOP)}"))
    method = str(said.get("merge_method"))
    if method not in METHODS:
        raise wrong(("merge_method",), f"merge_method {method!r} is not done; {', '.join(METHODS)} are")
    if said.get("tokenizer_source") not in (None, "base", said.get("base_model")):
        raise wrong(("tokenizer_source",), "tokenizer_source: only the base model's tokenizer is kept; write base")
    dtypes = {}
    for key in ("dtype", "out_dtype"):
        if said.get(key) is not None and str(said[key]) not in DTYPES:
            raise wrong((key,), f"{key} {said[key]!r}: one of {', '.join(DTYPES)}")
        dtypes[key] = DTYPES.get(str(said.get(key)))
    known = set(METHODS[method]) | {"weight"}

    def settings(given: Any, where: tuple[Any, ...], own: bool) -> dict[str, Any]:
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise wrong(where, "parameters: names with values are needed")
        for key, value in given.items():
            if key not in known:
                raise wrong((*where, key), f"{method} has no parameter {key!r}; it has {', '.join(sorted(known))}")
            if own and key not in PER_MODEL:
                raise wrong((*where, key), f"{key} is the whole merge's; put it under the file's own parameters")
            kind = (GENERAL | PER_MODEL)[key]
            if not _fits(value, kind):
                raise wrong((*where, key), f"{key} = {value!r}: a {_KINDS[kind]} is needed, or a list of them")
        return dict(given)

    if not isinstance(said.get("models"), list) or not said["models"]:
        raise wrong(("models",), "models: a list of models is needed")
    models = []
    for i, one in enumerate(said["models"]):
        at = ("models", i)
        if not isinstance(one, dict) or not isinstance(one.get("model"), str):
            raise wrong(at, "each of models needs a `model`: a folder or an id")
        if strange := [key for key in one if key not in ("model", "parameters")]:
            raise wrong((*at, strange[0]), f"{strange[0]}: unknown; a model has model and parameters")
        models.append(Model(_ref(one["model"], wrong, at), settings(one.get("parameters"), (*at, "parameters"), True)))
    base = said.get("base_model")
    if base is not None and not isinstance(base, str):
        raise wrong(("base_model",), "base_model: a folder or an id is needed")
    if base is None and method != "linear":
        raise wrong(("merge_method",), f"{method} needs a base_model")
    whole = settings(said.get("parameters"), ("parameters",), False)
    listed = {model.ref for model in models}
    if method != "linear" and listed == {base}:
        raise wrong(("models",), "models: there is none beside the base")
    if method == "linear" and base is not None and base not in listed:
        models.append(Model(base, {}))
    for model in models:
        if "weight" not in model.settings and "weight" not in whole and (method == "linear" or model.ref != base):
            raise wrong(("models",), f"{model.ref} has no weight; give it one under its parameters")
    notes = ("int8_mask is ignored: sums are in fp32",) if whole.get("int8_mask") else ()
    return Recipe(method, tuple(models), base, whole, dtypes["dtype"], dtypes["out_dtype"], notes)


def merge_checkpoints(recipe: Recipe, folder: Path | str, *, shard: int = SHARD, seed: int = 0) -> int:
    """Write the merged checkpoint, which transformers loads like its base; how many tensors it has.

    A tensor is read of each model, merged and written before the next one, so memory holds one of each. Configuration
    and tokenizer are the base model's (the first model's, where there is no base).

    Raises:
        UsageError: a model is no checkpoint, or the folder holds something.
        PolytaskError: models differ in tensors or shapes, or the disk refuses.
    """
    if shard < 1:
        raise UsageError(f"shard size {shard}: at least 1 byte is needed")
    first = recipe.base or recipe.models[0].ref
    others = [m for m in recipe.models if recipe.method == "linear" or m.ref != recipe.base]
    base = Checkpoint(folder_of(first))
    opened = [Checkpoint(folder_of(model.ref)) for model in others]
    for model, one in zip(others, opened, strict=True):
        for name, shape in base.shapes.items():
            its = one.shapes.get(name)
            if its is None or its.size != shape.size:
                what = "is not there" if its is None else f"is {list(its.size)} and not {list(shape.size)}"
                raise PolytaskError(f"{model.ref}: tensor {name} {what}; models of one architecture can be merged")
        if extra := sorted(one.shapes.keys() - base.shapes.keys()):
            raise PolytaskError(f"{model.ref}: tensor {extra[0]} is not in {first}; models of one architecture can be")
    depth = number_of_blocks([*base.shapes])
    shapes = {name: Shape(shape.size, _dtype(recipe, name, base, opened)) for name, shape in base.shapes.items()}

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            θ0 = base.tensor(name)
            if not θ0.is_floating_point():
                yield name, θ0
                continue
            said = [_settings(recipe, model, name, depth) for model in others]
            draws = [_draw(seed, name, k) for k in range(len(others))]
            read = (_rounded(one.tensor(name), recipe.dtype) for one in opened)
            θ = combined(recipe.method, _rounded(θ0, recipe.dtype), read, said, draws)
            if recipe.dtype is not None:
                θ = θ.to(recipe.dtype)
            yield name, θ.to(shapes[name].dtype)

    kept = recipe.out_dtype or recipe.dtype
    config = {} if kept is None else {"dtype": str(kept).removeprefix("torch.")}
    write(Path(folder), shapes, merged(), base.folder, shard, **config)
    return len(shapes)


def combined(
    method: str,
    θ0: Tensor,
    θ: Iterable[Tensor],
    settings: Sequence[Mapping[str, Any]],
    draws: Sequence[torch.Generator],
) -> Tensor:
    """One tensor, in its base's place: see this module's equations. `settings` are each model's; what is the whole
    merge's is the same in all."""
    whole = settings[0]
    w = torch.tensor([float(own["weight"]) for own in settings])
    normal, total = bool(w.sum().abs() >= 1e-8), torch.zeros_like(θ0)
    if method == "linear":
        for own, t in zip(settings, θ, strict=True):
            total.add_(t, alpha=float(own["weight"]))
        if whole["normalize"] and not normal:
            raise UsageError("linear: the weights add up to 0, so there is no mean; write normalize: false")
        return total.div_(w.sum()) if whole["normalize"] else total
    keep = {"ties": _largest, "dare_linear": _dropped, "dare_ties": _dropped}.get(method)
    differences = (t - θ0 for t in θ)
    each = zip(differences, settings, draws, strict=True)
    kept = (keep(δ, own, draw) if keep else δ for δ, own, draw in each)
    n: Tensor | float
    if method in ("ties", "dare_ties"):
        total, n = agreed(w, kept, θ0)
    else:
        for own, δ in zip(settings, kept, strict=True):
            total.add_(δ, alpha=float(own["weight"]))
        n = float(w.sum()) if normal else 1.0
    if whole["normalize"]:
        total.div_(n)
    return total.mul_(whole["lambda"]).add_(θ0)


def agreed(w: Tensor, kept: Iterable[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_{k ∈ A} w_k δ̂_k, and Σ_{k ∈ A} w_k, 1 where that is 0; both as large as `like`. Worked out a few numbers at a
    time, which stay in the processor's cache."""
    δ = like.new_empty(len(w), like.numel())
    for row, weight, t in zip(δ, w.tolist(), kept, strict=True):
        torch.mul(t.reshape(-1), weight, out=row)
    Σ, n = like.new_empty(like.shape), like.new_empty(like.shape)
    for begin in range(0, like.numel(), PART):
        some = δ[:, begin : begin + PART]
        A = ((some >= 0) == (some.sum(0) >= 0)) & (some != 0)
        Σ.view(-1)[begin : begin + PART] = (some * A).sum(0)
        n.view(-1)[begin : begin + PART] = A.T.float() @ w
    return Σ, n.masked_fill_(n == 0, 1.0)


def _largest(δ: Tensor, own: Mapping[str, Any], draw: torch.Generator) -> Tensor:
    if own["density"] >= 1:
        return δ
    if own["density"] <= 0 or not δ.numel():
        return torch.zeros_like(δ)
    trim = build("ties", {"density": own["density"]})
    assert isinstance(trim, Rule)
    return trim.keep(δ[None], [])[0]


def _dropped(δ: Tensor, own: Mapping[str, Any], draw: torch.Generator) -> Tensor:
    if own["density"] >= 1:
        return δ
    left = δ * torch.bernoulli(torch.full_like(δ, own["density"]), generator=draw)
    return rescaled(δ, left) if own["rescale"] else left


def rescaled(δ: Tensor, left: Tensor) -> Tensor:
    """What is left of δ, with the sum of its magnitudes."""
    before, after = δ.abs().sum(), left.abs().sum()
    return left if min(before, after) < 1e-7 else left * (before / after)


def folder_of(ref: str) -> Path:
    """A model's folder: itself, or what the hub's cache or the hub has of an id."""
    if Path(ref).is_dir():
        return Path(ref)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(ref, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{ref}: no folder, and no model of the hub that can be had now: {reason}") from None


def _rounded(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return (t if dtype is None else t.to(dtype)).float()


def _dtype(recipe: Recipe, name: str, base: Checkpoint, opened: Sequence[Checkpoint]) -> torch.dtype:
    own = base.shapes[name].dtype
    if not own.is_floating_point:
        return own
    for one in opened:
        own = torch.promote_types(own, one.shapes[name].dtype)
    return recipe.out_dtype or recipe.dtype or own


def _settings(recipe: Recipe, model: Model, name: str, depth: Mapping[str, int]) -> dict[str, Any]:
    """A model's settings at one tensor, with mergekit's defaults where the file says nothing."""
    place = block(name)
    t = 0.0
    if place:
        t = place[1] / (depth[place[0]] - 1) if depth[place[0]] > 1 else 1.0
    found: dict[str, Any] = dict(METHODS[recipe.method])
    for given in (recipe.settings, model.settings):
        for key, value in given.items():
            at = _value(value, name, t)
            if at is not None:
                found[key] = at
    if "weight" not in found:
        raise UsageError(
            f"{model.ref}: no weight for tensor {name}: its filters leave it out; add one without a filter"
        )
    return found


def _value(given: Any, name: str, t: float) -> Any:
    """A setting at a tensor: a value, the point t of a list of values, or that of the first filter that fits."""
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list):
        return given
    if any(isinstance(part, dict) for part in given):
        for part in given:
            if part.get("filter") in (None, "*") or part["filter"] in name:
                return _value(part["value"], name, t)
        return None
    if all(isinstance(part, bool) for part in given):
        return given[int(t * (len(given) - 1))]
    scaled = t * (len(given) - 1)
    low = int(scaled)
    share = scaled - low
    return (1 - share) * float(given[low]) + share * float(given[min(len(given) - 1, low + 1)])


_KINDS = {float: "number", bool: "true or false"}


def _fits(value: Any, kind: type) -> bool:
    """Whether it is a setting of that kind: a value, a list of them, or filters with values."""
    parts = value if isinstance(value, list) else [value]
    if parts and all(isinstance(part, dict) for part in parts):
        filters = all(isinstance(part.get("filter"), str | None) for part in parts)
        return filters and all(set(p) <= {"filter", "value"} and _fits(p.get("value"), kind) for p in parts)
    if kind is bool:
        return bool(parts) and all(isinstance(part, bool) for part in parts)
    return bool(parts) and all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)


def _ref(said: str, wrong: Callable[[tuple[Any, ...], str], UsageError], where: tuple[Any, ...]) -> str:
    if "+" in said and not Path(said).exists():
        raise wrong(
            (*where, "model"), f"model {said}: a model with a LoRA on it is not read; merge the adapters instead"
        )
    return said


def _draw(seed: int, name: str, k: int) -> torch.Generator:
    said = hashlib.sha256(f"{seed} {name} {k}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(said[:8]) >> 1)


def _lines(node: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """The line of every field and item, by the way to it."""
    found: dict[tuple[Any, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found[(*path, key.value)] = key.start_mark.line + 1
            found |= _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found[(*path, i)] = value.start_mark.line + 1
            found |= _lines(value, (*path, i))
    return found
