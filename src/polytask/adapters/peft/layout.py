"""What reading and writing share: PEFT's file names, and where the features of a site are among those of a module."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from polytask.adapters.store import DESCRIPTION

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD_TENSORS = "polytask_head.safetensors"
HEAD = "polytask_head.json"

PREFIX = "base_model.model."  # before every module's path in a file of PEFT


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


class ModelLike(Protocol):
    """What some methods need of the backbone itself: `polytask.backbones.Backbone` is one.

    `heads`: query heads of an attention. `linear` gives a site's weight `W` [width, reads]. The other two take the name
    of a site `3.attn.k`, and turn what it puts out at positions 0, 1, … into what the attention keeps, and back.
    """

    @property
    def heads(self) -> int: ...
    def linear(self, site: Any) -> Mapping[str, Tensor]: ...
    def keys_kept(self, name: str, K: Tensor) -> Tensor: ...
    def keys_put_out(self, name: str, kept: Tensor) -> Tensor: ...


class Written(NamedTuple):
    """An adapter in PEFT's words. Where `exact`, the same tensors, number for number, come back out of it. `columns`
    says which of a module's rank columns are whose."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    exact: bool
    columns: dict[str, Any] | None = None


def is_peft(folder: Path) -> bool:
    """Whether a folder is for `import_peft`; one that also holds polytask's own format is read as that."""
    return (folder / CONFIG).exists() and not (folder / DESCRIPTION).exists()


def by_path(names: Iterable[str], sites: Mapping[str, SiteLike]) -> dict[str, list[str]]:
    """The sites of each module."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(sites[name].path, []).append(name)
    return found


def whole_width(path: str, sites: Mapping[str, SiteLike]) -> int:
    """How wide a module's output is: what its whole site says, or the last feature of its last part."""
    outputs = [site for site in sites.values() if site.path == path and site.point == "output"]
    return max(s.width if s.part is None else s.part.groups * s.part.stop for s in outputs)


def features_of(site: SiteLike, sites: Mapping[str, SiteLike]) -> Tensor:
    """The indices of a site's features among the module's: [width]"""
    total = whole_width(site.path, sites)
    every = torch.arange(total)
    if site.part is None:
        return every
    return every.view(site.part.groups, -1)[:, site.part.start : site.part.stop].reshape(-1)


def sha256(folder: Path) -> str:
    """Of what PEFT reads; it tells whether somebody changed the folder since polytask wrote it."""
    sha = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        sha.update((folder / name).read_bytes())
    return sha.hexdigest()


def whole_number(number: float) -> float | int:
    """PEFT's files say 16, not 16.0."""
    return int(number) if float(number).is_integer() else number
