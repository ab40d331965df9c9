"""The adapter on disk: a folder with `adapter.safetensors` and `adapter.json`.

`adapter.json` carries two hashes. `sha256` is of the safetensors file. `digest` is over every other field that decides
what is computed (id, method, hyperparameters, backbone, head, `sha256`, the tensors' names and shapes), so that an edit
to one of them is noticed; the `card` is free text about the adapter and may be edited. Neither is a signature: they
find damage and mistakes, not an attacker who can write both files.

A tensor that is mostly zeros (a sparse difference, a pruned adapter) stands in the file as the places and values of its
other numbers, `<name>.places` (int64, counted through the rows) and `<name>.values`; `adapter.json` names it under
`sparse`, and what is loaded is the whole tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save_file
from torch import Tensor

from polytask.adapters.adapter import Adapter, BackboneCard, Card, HeadCard
from polytask.adapters.disk import previous, whole_folder
from polytask.errors import PolytaskError, UsageError

FORMAT_VERSION = 3  # 1: no sparse tensors; 2: on no other adapters. An adapter is written as the oldest that has it
SPARSE = 0.3  # share of other numbers than zero up to which places and values take less room, of fp32
TENSORS = "adapter.safetensors"
DESCRIPTION = "adapter.json"


class Stored(BaseModel):
    """`adapter.json`, field by field. `tensors` gives each tensor's type and shape: `"float32 8x384"`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int
    id: str
    method: str
    hyperparameters: dict[str, Any]
    backbone: BackboneCard
    head: HeadCard | None
    sha256: str
    tensors: dict[str, str]
    sparse: tuple[str, ...] = ()
    above: tuple[str, ...] = ()
    digest: str
    card: Card

    def expected_digest(self) -> str:
        says = [
            self.format_version,
            self.id,
            self.method,
            self.hyperparameters,
            self.backbone.model_dump(mode="json"),
            self.head.model_dump(mode="json", exclude_none=True) if self.head else None,
            self.sha256,
            self.tensors,
            *([self.sparse] if self.sparse else []),
            *([{"above": self.above}] if self.above else []),
        ]
        text = json.dumps(says, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def save(adapter: Adapter, folder: str | Path) -> Path:
    """Write an adapter as a folder: after a crash at any moment there is the whole new one, or what was there before.

    An adapter that stands there already is replaced; a folder that holds anything else is refused.

    Raises:
        UsageError: the folder is a file, or holds other files.
        PolytaskError: the disk refuses (full, read-only), a tensor is empty or misnamed, a hyperparameter is not JSON.
    """
    folder = Path(folder)
    for name, tensor in adapter.tensors.items():
        if not name.rpartition("/")[0]:
            raise PolytaskError(f"{folder}: tensor {name!r} is not named <site>/<parameter>")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise PolytaskError(f"{folder}: tensor {name} is not a dense tensor with data; it cannot be stored")
        if tensor.numel() == 0:
            raise PolytaskError(f"{folder}: tensor {name} is empty, of shape {tuple(tensor.shape)}; leave it out")
    try:
        hyperparameters = json.loads(json.dumps(dict(adapter.hyperparameters), allow_nan=False))
        identity = adapter.id
    except (TypeError, ValueError) as error:
        raise PolytaskError(f"{folder}: a hyperparameter cannot be written as JSON: {_line(error)}") from None

    with whole_folder(folder, (TENSORS, DESCRIPTION), last=DESCRIPTION) as temporary:
        parts, sparse = _parted(adapter.tensors)
        write_safetensors(parts, temporary / TENSORS)
        with open(temporary / TENSORS, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        stored = Stored(
            format_version=3 if adapter.above else 2 if sparse else 1,
            id=identity,
            method=adapter.method,
            hyperparameters=hyperparameters,
            backbone=adapter.backbone,
            head=adapter.head,
            sha256=sha256,
            tensors={name: _shape(tensor) for name, tensor in adapter.tensors.items()},
            sparse=sparse,
            above=adapter.above,
            digest="",
            card=adapter.card,
        )
        fields = stored.model_dump(mode="json", exclude={n for n in ("sparse", "above") if not getattr(stored, n)})
        fields["digest"] = stored.expected_digest()
        write_json(fields, temporary / DESCRIPTION)
        # safetensors makes its files readable by their owner alone; a team's library needs what the umask says.
        shutil.copymode(temporary / DESCRIPTION, temporary / TENSORS)
    return folder


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> Adapter:
    """Read an adapter, and check that it is what was saved.

    Tensors are read into memory, not mapped: an adapter stays what it was when its file changes later.

    Raises:
        UsageError: there is no adapter in the folder.
        PolytaskError: it is damaged, edited, of a newer format, or no adapter; the message names the file and field.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists():
        # A writer that was killed between its two renames leaves the old adapter here: see `whole_folder`.
        aside = previous(folder)
        if not (aside / DESCRIPTION).exists():
            raise UsageError(f"{folder}: no adapter here (it has no {DESCRIPTION})")
        folder = aside
    stored = describe(folder)
    path = folder / TENSORS
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        raise PolytaskError(f"{path}: {_damage(data, None if stored.sparse else stored.tensors)}; get another copy")
    tensors = _whole(_parse(data, path), stored, path)
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    if shapes != stored.tensors:
        raise PolytaskError(f"{path}: {_difference(shapes, stored.tensors)}; get another copy")
    adapter = Adapter(
        method=stored.method,
        hyperparameters=stored.hyperparameters,
        tensors={name: tensors[name] for name in stored.tensors},  # in the order of the sites, as they were saved
        backbone=stored.backbone,
        card=stored.card,
        head=stored.head,
        above=stored.above,
    )
    if adapter.id != stored.id:
        raise PolytaskError(f"{folder / DESCRIPTION}: id is {stored.id}, but the content's is {adapter.id}")
    if torch.device(device).type != "cpu":
        moved = replace(adapter, tensors={name: tensor.to(device) for name, tensor in tensors.items()})
        vars(moved)["id"] = adapter.id  # checked above; it would cost a copy back to compute it again
        return moved
    return adapter


def _parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors as they stand in the file, and the names of those that are kept as places and values."""
    parts: dict[str, Tensor] = {}
    sparse: list[str] = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() >= 1024:
            flat = tensor.detach().cpu().reshape(-1)
            places = flat.nonzero()[:, 0]
            # Not where a zero has a sign: what is loaded is bit for bit what was saved.
            if len(places) <= SPARSE * len(flat) and int(flat.signbit().sum()) == int(flat[places].signbit().sum()):
                parts |= {f"{name}.places": places, f"{name}.values": flat[places]}
                sparse.append(name)
                continue
        parts[name] = tensor
    return parts, tuple(sparse)


def _whole(parts: dict[str, Tensor], stored: Stored, path: Path) -> dict[str, Tensor]:
    """The tensors from what stands in the file. PolytaskError where places do not fit their tensor."""
    for name in stored.sparse:
        places, values = parts.pop(f"{name}.places", None), parts.pop(f"{name}.values", None)
        shape = [int(n) for n in stored.tensors.get(name, "").partition(" ")[2].split("x") if n]
        if places is None or values is None or places.shape != values.shape or not shape:
            raise PolytaskError(f"{path}: has no places and values for {shown(name)}; get another copy")
        whole = torch.zeros(math.prod(shape), dtype=values.dtype)
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(whole):
            raise PolytaskError(f"{path}: {shown(name)} has values beyond its end; get another copy")
        whole[places] = values
        parts[name] = whole.reshape(shape)
    return parts


def describe(folder: str | Path) -> Stored:
    """What `adapter.json` says, checked against its digest; the tensors are not read.

    Raises:
        PolytaskError: the file is not JSON (with the line), has a wrong field (named), is newer, or was edited.
    """
    path = Path(folder) / DESCRIPTION
    text = _read(path)
    try:
        stored = Stored.model_validate_json(text)
    except ValidationError as error:
        version = _version(text)
        if version > FORMAT_VERSION:
            raise _newer(path, version) from None
        raise PolytaskError(f"{path}: {_explain(error)}") from None
    if stored.format_version > FORMAT_VERSION:
        raise _newer(path, stored.format_version)
    if stored.digest != stored.expected_digest():
        raise PolytaskError(
            f"{path}: a field that decides what the adapter computes was changed by hand (method, hyperparameters, "
            "backbone, head, tensors, id or a hash); put the saved value back, or train again"
        )
    return stored


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that carries no hash of its own; never a pickle.

    Raises:
        PolytaskError: it is not there, is a pickle or an archive, or is damaged.
    """
    return _parse(_read(path), path)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any layout, device and sharing.

    Raises:
        OSError: the disk refuses.
        PolytaskError: a tensor has no data (a meta tensor) or a type that safetensors does not know.
    """
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        # safetensors refuses two tensors over one storage (tied weights, slices of one buffer).
        if dense.untyped_storage().data_ptr() in seen:
            dense = dense.clone()
        seen.add(dense.untyped_storage().data_ptr())
        plain[name] = dense
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise PolytaskError(f"{path.name}: not written: {_line(error)}; nothing was changed") from None


def write_json(fields: Mapping[str, Any], path: Path) -> None:
    """Write JSON for people to read, in UTF-8.

    Raises:
        OSError: the disk refuses.
        PolytaskError: a text is not Unicode (half of a surrogate pair).
    """
    try:
        data = (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise PolytaskError(f"{path.name}: a text cannot be written as UTF-8: {_line(error)}") from None
    path.write_bytes(data)


def shown(text: str) -> str:
    """A foreign text as a message may hold it: in quotes and escaped where it would break the line."""
    return text if text.isprintable() else repr(text)


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise PolytaskError(f"{path}: is missing; get another copy of the folder") from None
    except OSError as error:
        raise PolytaskError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return parse_safetensors(data)
    except Exception:  # the parser meets foreign bytes: whatever it raises, the file is not usable
        raise PolytaskError(f"{path}: {_damage(data, None)}; get another copy") from None


def _damage(data: bytes, expected: Mapping[str, str] | None) -> str:
    """What is wrong with the bytes of a safetensors file: 8 bytes of header length n, n bytes of JSON, the numbers."""
    if data[8:9] != b"{":
        if data[:2] == b"PK":
            return "is a zip archive (PyTorch's pickle format), not safetensors, and is never opened"
        if data[:1] == b"\x80":
            return "is a pickle, not safetensors, and is never opened"
        return f"is not a safetensors file ({len(data)} bytes)"
    n = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + n])
        header.pop("__metadata__", None)
        end = 8 + n + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: "x".join(map(str, entry["shape"])) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"is truncated or damaged in its header ({len(data)} bytes)"
    if len(data) < end:
        return f"is truncated: {len(data)} of {end} bytes"
    if expected is not None and (
        difference := _difference(shapes, {name: said.rpartition(" ")[2] for name, said in expected.items()})
    ):
        return difference
    return "is damaged: its SHA-256 is not the one in adapter.json" if expected is not None else "is damaged"


def _difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """The tensors that are missing, too many or of another shape, by name; empty where there is none."""
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    other = sorted(name for name in set(found) & set(expected) if found[name] != expected[name])
    said = []
    if missing:
        said.append(f"misses {_some(missing)}")
    if extra:
        said.append(f"has {_some(extra)} too many")
    if other:
        said.append(f"has {shown(other[0])} as {found[other[0]]}, not {expected[other[0]]}")
    return " and ".join(said)


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _shape(tensor: Tensor) -> str:
    """As `Stored.tensors` has it: `float32 8x384`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"


def _explain(error: ValidationError) -> str:
    """The first complaint of pydantic in one line: the line of a JSON error, or the field and what it should be."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].replace("\n", " ")
    more = error.error_count() - 1
    rest = f" (and {more} more)" if more else ""
    return (f"field {where}: {message}" if where else message) + rest


def _version(text: bytes) -> int:
    """The format's version by a file whose other fields this polytask does not know; 0 where it has none."""
    with suppress(ValueError):
        fields = json.loads(text)
        if isinstance(fields, dict) and isinstance(fields.get("format_version"), int):
            return int(fields["format_version"])
    return 0


def _newer(path: Path, version: int) -> PolytaskError:
    return PolytaskError(
        f"{path}: format version {version}; this polytask reads up to {FORMAT_VERSION}: install a newer one"
    )


def _line(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
