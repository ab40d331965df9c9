"""Whole models in safetensors files, read and written one tensor at a time.

A checkpoint is a folder as transformers writes it: `model.safetensors`, or several files with an index that says which
tensor is where, beside `config.json` and a tokenizer's files. What is written is laid out first, from the tensors'
shapes alone, and then filled in order; so memory holds no more than the tensors that are worked on.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polytask.adapters.disk import whole_folder
from polytask.errors import PolytaskError, UsageError

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """A tensor's size and dtype."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(eq=False)
class Checkpoint:
    """A folder's tensors by name."""

    folder: Path
    shapes: dict[str, Shape] = field(init=False)
    _files: dict[str, Any] = field(init=False, default_factory=dict)
    _where: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UsageError where the folder is no checkpoint, PolytaskError where a file is damaged."""
        if (self.folder / INDEX).is_file():
            try:
                where = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(where.values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise PolytaskError(f"{self.folder / INDEX}: damaged: it says of no tensor where it is") from None
        elif (self.folder / ONE).is_file():
            files = [ONE]
        else:
            raise UsageError(f"{self.folder}: no {ONE} and no {INDEX}, so it is no checkpoint that can be merged")
        self.shapes = {}
        for name in files:
            try:
                file: Any = safe_open(self.folder / name, "pt")
                self._files[name] = file
                for key in file.keys():  # noqa: SIM118  # not a mapping
                    part = file.get_slice(key)
                    code = part.get_dtype()
                    if code not in DTYPES:
                        raise PolytaskError(f"{self.folder / name}: tensor {key} is of type {code}, which is not read")
                    self.shapes[key] = Shape(tuple(part.get_shape()), DTYPES[code])
                    self._where[key] = name
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise PolytaskError(f"{self.folder / name}: damaged or not there: {reason}") from None

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now."""
        found: Tensor = self._files[self._where[name]].get_tensor(name)
        return found


def write(
    folder: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, Tensor]],
    like: Path,
    shard: int,
    **config: Any,
) -> None:
    """A checkpoint of these tensors, which come in the order of `shapes`, in files of at most `shard` bytes (or one
    tensor). Every other small file is that of the checkpoint `like`; `config` is put into its `config.json`.

    Raises:
        UsageError: the folder holds something already.
        PolytaskError: the disk refuses; nothing is there then.
    """
    shards = _shards(shapes, shard)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [ONE] if len(shards) == 1 else names
    with whole_folder(folder, ()) as made:
        coming = iter(tensors)
        for file, own in zip(names, shards, strict=True):
            with open(made / file, "wb") as out:
                out.write(_header({name: shapes[name] for name in own}))
                for name in own:
                    given, t = next(coming)
                    assert given == name, f"{given} came where {name} was laid out"
                    out.write(_raw(t, shapes[name]))
        if len(shards) > 1:
            where = {name: file for file, own in zip(names, shards, strict=True) for name in own}
            total = sum(shape.bytes for shape in shapes.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (made / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for path in _beside(like):
            shutil.copyfile(path, made / path.name)
        if config and (made / "config.json").is_file():
            said = json.loads((made / "config.json").read_text(encoding="utf-8"))
            (made / "config.json").write_text(json.dumps(said | config, indent=2), encoding="utf-8")


def _shards(shapes: Mapping[str, Shape], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        if shards[-1] and used + shape.bytes > most:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += shape.bytes
    return shards


def _header(shapes: Mapping[str, Shape]) -> bytes:
    """A safetensors file's beginning: the length of the JSON, and the JSON that says where each tensor stands."""
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        said[name] = {
            "dtype": CODES[shape.dtype],
            "shape": list(shape.size),
            "data_offsets": [at, at + shape.bytes],
        }
        at += shape.bytes
    raw = json.dumps(said, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _raw(t: Tensor, shape: Shape) -> Any:
    assert (tuple(t.shape), t.dtype) == (shape.size, shape.dtype), f"{t.shape} {t.dtype} is not {shape}"
    flat = t.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _beside(folder: Path) -> Iterator[Path]:
    """What belongs to a model beside its weights: configuration, tokenizer, templates."""
    for path in sorted(folder.iterdir()):
        small = path.suffix in (".json", ".txt", ".model", ".jinja") and path.name != INDEX
        if path.is_file() and small and not path.name.endswith(".index.json"):
            yield path


def number_of_blocks(names: Sequence[str]) -> dict[str, int]:
    """How many blocks each stack has, by what its names begin with: `model.layers` of `model.layers.3.mlp.weight`."""
    found: dict[str, int] = {}
    for name in names:
        if place := block(name):
            found[place[0]] = max(found.get(place[0], 0), place[1] + 1)
    return found


def block(name: str) -> tuple[str, int] | None:
    """The stack and the number of a tensor's block, None where it stands in none."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part)
    return None
