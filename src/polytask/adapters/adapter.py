"""The Adapter value: what was learned for one task over one frozen backbone, and nothing that runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from polytask.tasks import LabelCard, TaskCard


class BackboneCard(BaseModel):
    """Which backbone an adapter belongs to. `fingerprint` is a SHA-256 over the weights, so that an adapter is never
    put on other weights of the same shape."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    fingerprint: str
    family: str
    hidden_size: int
    parameters: int


class TermCard(BaseModel):
    """A text that may be said for a label, and how much it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    term: str
    weight: float


class TextCard(BaseModel):
    """How a task is put to a language model and its answer found; see `polytask.backbones.text`.

    `template` with its `options` words the prompt from `instruction` and `labels`. `spans`: tags are BIO. `decide`:
    `write` an answer, at most `max_tokens` long and up to a text of `stop`, or take the label or option of the greatest
    `likelihood`, `normalise`d `raw` (its probability), by `length` (per token) or by `pmi` (over its probability
    without the input). `limit`: tokens of prompt and answer together. `terms`: for each label in order, what may be
    said for it; a label's score is the weighted mean of its terms'. `objective`: what was trained beside the likelihood
    of right answers: the losses over wrong options of `polytask.training.tfew`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    template: str
    options: dict[str, bool | int | str] = {}
    instruction: str = ""
    labels: tuple[LabelCard, ...] = ()
    spans: bool = False
    decide: Literal["write", "likelihood"] = "write"
    normalise: Literal["raw", "length", "pmi"] = "raw"
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    limit: int = 512
    terms: tuple[tuple[TermCard, ...], ...] | None = None
    objective: Literal["tfew"] | None = None


class HeadCard(BaseModel):
    """How hidden states become answers; its tensors stand beside the method's, under the site `head`.

    `targets` name the classes in order. `pool` is how a sequence becomes one vector. `pair` says what the linear map
    reads of two texts: both vectors with their difference and product, one joint encoding, or the first text's alone,
    where the method reads the second one `beside` it. `causal` says whether a decoder's mask stays, or where it is
    dropped: see `Backbone.opened`. With `text` the answer is in words, and there are no tensors. With the pool `masks`,
    that many mask tokens stand behind the input and are read (`polytask.backbones.perfect`). The characters of
    `alphabet` are read one by one, wherever they are in a text.

    A field that was not there in an older version is None by default, and so left out of what ids are made from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    targets: tuple[str, ...] = ()
    pool: str = "mean"
    pair: str = "none"
    causal: bool | str = True
    text: TextCard | None = None
    masks: int | None = None
    alphabet: str | None = None

    @field_validator("causal")
    @classmethod
    def _digits(cls, causal: bool | str) -> bool | str:
        if isinstance(causal, str) and not re.fullmatch("[01]+", causal):
            raise ValueError("true, false, or a text of the digits 0 and 1")
        return causal

    @property
    def reads(self) -> Literal["sequence", "words", "answer"]:
        """What there are logits for: a sequence as a whole, each word of a tagged one, each token of an answer."""
        return "answer" if self.text else "words" if self.kind == "tagging" else "sequence"


class ScoreCard(BaseModel):
    """A metric on one split with its 95 % bootstrap interval; all in [0, 1] except correlations in [-1, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    value: float
    low: float
    high: float
    n: int
    others: dict[str, float] = {}


class Lineage(BaseModel):
    """Where an adapter comes from: the ids of the adapters it was made from, and the SHA-256 of its data by split."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parents: tuple[str, ...] = ()
    data: dict[str, str] = {}
    made_by: str = ""


class Card(BaseModel):
    """What is said about an adapter. Nothing here changes what it computes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    task: TaskCard
    scores: dict[str, ScoreCard] = {}
    lineage: Lineage = Lineage()
    licence: str = ""
    created: str = ""
    trained_parameters: int = 0
    seconds: float = 0.0
    recipe: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """A method's tensors per site, a head, and a card.

    `tensors` are named `<site>/<parameter>`: the method's own (`3.attn.q/A`), the head's (`head/W`), and the mean of
    its task's inputs for routing (`task/mean`). `above` are the ids of the adapters, lowest first, that stood below it
    when it was trained, and stand below it where it answers, unless it is asked for in a stack on others. Two adapters
    that compute the same have the same `id`, whatever their cards say.
    """

    method: str
    hyperparameters: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    backbone: BackboneCard
    card: Card
    head: HeadCard | None = None
    above: tuple[str, ...] = ()

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of a SHA-256 over method, hyperparameters, head, backbone and tensors."""
        return content_digest(self)[:16]

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def needs(self) -> tuple[str, ...]:
        """The ids of the adapters that it cannot run without: those it stands on, and those it is made of."""
        return tuple(dict.fromkeys((*self.above, *self.hyperparameters.get("over", ()))))

    @property
    def parameters(self) -> int:
        """How many numbers a user has to keep for it: the method's tensors and the head's."""
        return sum(t.numel() for name, t in self.tensors.items() if not name.startswith("task/"))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def at(self, site: str) -> dict[str, Tensor]:
        """The tensors at one site, by parameter name; empty where it has none."""
        prefix = site + "/"
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites of the backbone at which the method acts, in order."""
        found = dict.fromkeys(name.rpartition("/")[0] for name in self.tensors)
        return tuple(site for site in found if site not in ("head", "task", "shared"))

    def save(self, folder: str | Path) -> Path:
        """Write it as a folder, whole or not at all: see `polytask.adapters.store.save`."""
        from polytask.adapters.store import save

        return save(self, folder)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Adapter:
        """Read a folder that `save` wrote: see `polytask.adapters.store.load`."""
        from polytask.adapters.store import load

        return load(folder, device=device)


def content_digest(adapter: Adapter) -> str:
    """SHA-256 over everything that decides what the adapter computes."""
    sha = hashlib.sha256()
    head = adapter.head.model_dump(mode="json", exclude_none=True) if adapter.head else None
    says: list[Any] = [adapter.method, dict(adapter.hyperparameters), head, adapter.backbone.fingerprint]
    says += [list(adapter.above)] if adapter.above else []
    sha.update(json.dumps(says, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(adapter.tensors):
        tensor = adapter.tensors[name].detach().cpu().contiguous()
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
