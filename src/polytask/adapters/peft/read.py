"""Reading a folder that PEFT, or `export_peft`, wrote."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from polytask.adapters.adapter import Adapter, BackboneCard, Card, HeadCard
from polytask.adapters.peft import inplace, tokens
from polytask.adapters.peft.layout import (
    CONFIG,
    HEAD,
    HEAD_TENSORS,
    PREFIX,
    TENSORS,
    ModelLike,
    SiteLike,
    features_of,
    sha256,
    whole_number,
    whole_width,
)
from polytask.adapters.store import read_safetensors, shown
from polytask.errors import PolytaskError, UsageError

# What PEFT writes that changes nothing about the finished adapter, or that is read below. Any other key that is set
# stands for a variant (aLoRA, BD-LoRA, …) that computes something else.
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
        "kasa_config",
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
        "use_dora",
        "use_rslora",
    )
)
# Starts that leave the base weights as they are; the others (OLoRA, CorDA, LoftQ, PiSSA's fast one, …) write into them
# what cannot be found again.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def import_peft(
    folder: str | Path,
    sites: Mapping[str, SiteLike],
    *,
    model: ModelLike | None = None,
    backbone: BackboneCard | None = None,
    card: Card | None = None,
    head: HeadCard | None = None,
    head_module: str | None = None,
) -> Adapter:
    """Read a folder that PEFT (or `export_peft`) wrote.

    PEFT does not say which weights an adapter belongs to: `backbone` and `card` must be given, unless polytask wrote
    the folder. `model` is the backbone itself: prefixes, PiSSA and KaSA by others need it. `head_module` names the
    module in `modules_to_save` that is the head described by `head`.

    A module whose scale is not the one of `r` and `alpha` (`rank_pattern`, `alpha_pattern`) has the ratio multiplied
    into its B.

    Raises:
        UsageError: `backbone`, `card` or `model` is needed; the folder has no adapter; a module has no site.
        PolytaskError: the weights are pickled or damaged, or the adapter cannot be represented (biases, saved modules,
            starts that change the base weights).
    """
    folder = Path(folder)
    config = _read_json(folder, CONFIG)
    kind = _accept(folder, config)
    tensors = _read_tensors(folder)
    said = _read_json(folder, HEAD) if (folder / HEAD).exists() else {}
    rest: dict[str, Tensor] = {}
    if said:
        if said.get("format_version") != 1:
            raise PolytaskError(f"{folder / HEAD}: format version {said.get('format_version')}; this polytask reads 1")
        rest = read_safetensors(folder / HEAD_TENSORS)
        try:
            was, had = str(said["method"]), dict(said["hyperparameters"])
            stated = BackboneCard.model_validate(said["backbone"])
            card = card or Card.model_validate(said["card"])
            head = head or (HeadCard.model_validate(said["head"]) if said["head"] else None)
        except (KeyError, TypeError, ValueError) as error:
            raise PolytaskError(f"{folder / HEAD}: is damaged: {' '.join(str(error).split())[:200]}") from None
        if backbone is not None and backbone.fingerprint != stated.fingerprint:
            raise PolytaskError(f"{folder}: was made for {stated.name}, whose weights are not those of {backbone.name}")
        backbone = stated
        head_module = head_module or said.get("head_module")
    if backbone is None or card is None:
        raise UsageError(f"{folder}: PEFT does not say which weights and task it is for; pass backbone= and card=")

    # PEFT's classifiers name these two, and twice, whatever the model has.
    saved = list(dict.fromkeys(config.get("modules_to_save") or []))
    saved = [m for m in saved if m not in ("classifier", "score") or any(f".{m}." in name for name in tensors)]
    if saved and saved != [head_module]:
        raise PolytaskError(f"{folder}: it trained {', '.join(saved)} too (modules_to_save); name it with head_module=")
    if head_module in saved:
        before = "base_model." if kind in tokens.METHODS else PREFIX
        for key, name in ((f"{before}{head_module}.weight", "head/W"), (f"{before}{head_module}.bias", "head/b")):
            if key in tensors:
                rest[name] = tensors.pop(key)
        if "head/W" in rest and head is None:
            raise UsageError(f"{folder}: say what the head {head_module} stands for with head=HeadCard(...)")

    untouched = bool(said) and said.get("sha256") == sha256(folder)
    beside = {name: rest.pop(name) for name in list(rest) if name.rpartition("/")[0] not in ("head", "task")}
    if untouched and beside:
        kind, learned, hyperparameters = was, beside, had
    elif kind in tokens.METHODS:
        learned, hyperparameters = tokens.read(folder, config, tensors, sites, model)
        note = tokens.note(config)
        card = card.model_copy(update={"notes": (*card.notes, note)}) if note else card
    elif kind == "ia3":
        learned, hyperparameters = _ia3_tensors(folder, config, tensors, sites)
    else:
        learned, hyperparameters = _lora_tensors(folder, kind, config, tensors, sites, said if untouched else {})
        if kind in inplace.PARAMETERS:
            learned, hyperparameters = inplace.completed(folder, kind, learned, hyperparameters, config, sites, model)
    order = {site: number for number, site in enumerate(sites)}
    unknown = next((site for name in learned if (site := name.rpartition("/")[0]) not in order), None)
    if unknown is not None:
        raise UsageError(f"{folder}: site {unknown} is not in this backbone; it is for another architecture")
    learned = dict(sorted(learned.items(), key=lambda item: order[item[0].rpartition("/")[0]]))
    if untouched:
        hyperparameters = had
    return Adapter(
        method=kind, hyperparameters=hyperparameters, tensors=learned | rest, backbone=backbone, card=card, head=head
    )


def _accept(folder: Path, config: Mapping[str, Any]) -> str:
    """Which method it is; refuses what polytask would compute differently."""
    path = folder / CONFIG
    if "peft_type" not in config and "config" in config:
        raise PolytaskError(f"{path}: is of AdapterHub's adapters, not of PEFT")
    types = {"LORA": "lora", "IA3": "ia3", **tokens.TYPES}
    kind = types.get(str(config.get("peft_type")).upper())
    if kind is None:
        raise PolytaskError(f"{path}: peft_type {config.get('peft_type')}; polytask imports {', '.join(types)}")
    if config.get("bias", "none") != "none":
        raise PolytaskError(f"{path}: bias is {config['bias']!r}: it trained the base's biases, which cannot be kept")
    for key, value in config.items():
        if key not in (tokens.HARMLESS if kind in tokens.METHODS else _HARMLESS) and value:
            raise PolytaskError(f"{path}: {key} is set; polytask's {kind} cannot represent it")
    start = config.get("init_lora_weights")
    kinds = ["dora"] if config.get("use_dora") else []
    kinds += ["kasa"] if config.get("kasa_config") else []
    kinds += ["pissa"] if start == "pissa" else []
    if len(kinds) > 1:
        raise PolytaskError(f"{path}: is {' and '.join(kinds)} at once; polytask has each by itself")
    if start not in (*_PLAIN_STARTS, "pissa"):
        raise PolytaskError(
            f"{path}: init_lora_weights {start!r} changes the base weights; save it from PEFT as a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return kinds[0] if kind == "lora" and kinds else kind


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


def _lora_tensors(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sites: Mapping[str, SiteLike],
    said: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Each site's A and B (of DoRA also m, of KaSA d), and the hyperparameters. `said` is what `export_peft` wrote
    beside a folder that nobody has changed since; empty for any other."""
    pairs: dict[str, dict[str, Tensor]] = {}
    files = {"A": "lora_A.weight", "B": "lora_B.weight"}
    files |= {"dora": {"m": "lora_magnitude_vector"}, "kasa": {"d": "lora_diag"}}.get(kind, {})
    letters = {file: letter for letter, file in files.items()}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_.+)", key)
        if match is None or match[2] not in letters:
            raise PolytaskError(
                f"{folder}: tensor {shown(key)} is no LoRA of a linear module; polytask cannot represent it"
            )
        pairs.setdefault(match[1], {})[letters[match[2]]] = tensor
    if not pairs:
        raise PolytaskError(f"{folder / TENSORS}: holds no LoRA tensors")
    for path, pair in pairs.items():
        for letter, file in files.items():
            if letter not in pair:
                raise PolytaskError(f"{folder / TENSORS}: {shown(path)} has no {file}")

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
        total = whole_width(sites[names[0]].path, sites)
        if tuple(B.shape) != (total, rank) or A.shape[1] != sites[names[0]].reads:
            raise PolytaskError(
                f"{folder}: {path} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
                f"but the module reads {sites[names[0]].reads} and is {total} wide"
            )
        for letter, length in (("m", total), ("d", rank)):
            if letter in pair and tuple(pair[letter].shape) != (length,):
                raise PolytaskError(
                    f"{folder}: {path}.{files[letter]} has shape {tuple(pair[letter].shape)}, and not ({length},)"
                )
        columns = said.get("columns", {}).get(path)
        for name in names:
            if columns is not None and name not in columns:
                continue
            start, stop = columns[name] if columns is not None else (0, rank)
            own_rows = B if sites[name].part is None else B[features_of(sites[name], sites)]
            if columns is None and kind == "lora" and len(names) > 1 and not own_rows.any() and B.any():
                continue  # the exporter's zeros at a part that has no adapter
            learned[f"{name}/A"] = A[start:stop].contiguous()
            learned[f"{name}/B"] = own_rows[:, start:stop].contiguous()
            if kind == "dora":
                m = pair["m"]
                learned[f"{name}/m"] = (
                    m if sites[name].part is None else m[features_of(sites[name], sites)]
                ).contiguous()
            if kind == "kasa":
                learned[f"{name}/d"] = pair["d"]
    hyperparameters: dict[str, Any] = {
        "r": r,
        "alpha": whole_number(alpha),
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


def _ia3_tensors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Mapping[str, SiteLike]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Each site's l, and the hyperparameters."""
    vectors: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.ia3_l", key)
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
        width = whole_width(sites[names[0]].path, sites) if not is_input else sites[names[0]].width
        if tuple(vector.shape) != ((1, width) if is_input else (width, 1)):
            raise PolytaskError(f"{folder}: {path}.ia3_l has shape {tuple(vector.shape)}, but the site is {width} wide")
        flat = vector.flatten()
        for name in names:
            own = flat if sites[name].part is None else flat[features_of(sites[name], sites)]
            if len(names) > 1 and bool((own == 1).all()) and bool((flat != 1).any()):
                continue  # the exporter's ones at a part that has no adapter
            learned[f"{name}/l"] = own.contiguous()
    return learned, {"sites": _patterns(learned, sites)}


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
            total = whole_width(own, self.known)
            if covered != total:
                raise PolytaskError(f"{self.folder}: the sites of {path} cover {covered} of its {total} features")
        return names
