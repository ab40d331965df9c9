"""What a task is: a kind, an instruction, labels with descriptions, examples in three splits, and a metric.

A task knows no model. It is a value: reading the same files gives an equal task and the same hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

Kind = Literal[
    "classification",  # one label of a text, or of a pair of texts
    "multilabel",  # any number of labels of a text
    "tagging",  # one BIO tag (or plain tag) for each token
    "regression",  # a number for a text
    "similarity",  # a number for a pair of texts
    "generation",  # a text
    "choice",  # one of the options that come with the input
    "retrieval",  # documents for a query
]
KINDS: tuple[str, ...] = get_args(Kind)
SPLITS = ("train", "validation", "test")

Output = str | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Label:
    """A label's name as it stands in the data, and what it means."""

    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task.

    `input` is a text, or the tokens of a tagging task. `pair` is the second text of a sentence pair. `output` is a
    label, a number, a text, the tags of the tokens, a tuple of labels (multilabel) or of accepted answers
    (generation); None where it is not known. `extra` keeps the fields that the reader did not use.
    """

    id: str
    input: str | tuple[str, ...]
    output: Output | None = None
    pair: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The input as one string, for embeddings, search and duplicates: tokens joined, a pair on two lines."""
        first = self.input if isinstance(self.input, str) else " ".join(self.input)
        return first if self.pair is None else f"{first}\n{self.pair}"


class LabelCard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    description: str = ""


class TaskCard(BaseModel):
    """What an adapter remembers of its task: everything but the examples themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    kind: Kind
    instruction: str = ""
    labels: tuple[LabelCard, ...] = ()
    pair: bool = False
    metric: str = ""
    language: str = ""
    licence: str = ""
    source: str = ""
    sizes: dict[str, int] = {}
    sha256: dict[str, str] = {}


@dataclass(frozen=True)
class Task:
    """A task with its data.

    `labels` are in the order in which a head numbers its classes (span types, without B- and I-, for BIO tagging).
    `demonstrations` were set apart by the task's author to show the task, and are in no split; `negatives` show wrong
    outputs. `notes` are what the reader found or did: splits it made, duplicates between splits, rows it could not use.
    `spans` says whether tags are BIO where no example can show it.
    """

    name: str
    kind: Kind
    train: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    instruction: str = ""
    labels: tuple[Label, ...] = ()
    metric: str = ""
    language: str = ""
    licence: str = ""
    source: str = ""
    demonstrations: tuple[Example, ...] = ()
    negatives: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()
    spans: bool | None = None

    @property
    def pair(self) -> bool:
        """True where the input is two texts."""
        return any(e.pair is not None for e in (self.train or self.validation or self.test)[:1])

    @property
    def targets(self) -> tuple[str, ...]:
        """What a head's classes stand for, in order: label names, or every tag of a tagging task."""
        names = tuple(label.name for label in self.labels)
        return ("O", *(f"{prefix}-{name}" for name in names for prefix in "BI")) if self.bio else names

    @cached_property
    def bio(self) -> bool:
        """True for a tagging task whose tags are BIO. Every split counts: a few rows may hold no span at all."""
        if self.kind != "tagging" or self.spans is not None:
            return bool(self.spans)
        examples = (*self.train, *self.validation, *self.test, *self.demonstrations)
        return any(is_bio(e.output) for e in examples if isinstance(e.output, tuple))

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of `train`, `validation` or `test`."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; one of {', '.join(SPLITS)}")
        examples: tuple[Example, ...] = getattr(self, name)
        return examples

    def card(self) -> TaskCard:
        return TaskCard(
            name=self.name,
            kind=self.kind,
            instruction=self.instruction,
            labels=tuple(LabelCard(name=label.name, description=label.description) for label in self.labels),
            pair=self.pair,
            metric=self.metric,
            language=self.language,
            licence=self.licence,
            source=self.source,
            sizes={name: len(self.split(name)) for name in SPLITS},
            sha256={name: digest(self.split(name)) for name in SPLITS if self.split(name)},
        )

    @classmethod
    def read(
        cls,
        source: str | Path,
        *,
        input: str | None = None,
        output: str | None = None,
        pair: str | None = None,
        kind: Kind | None = None,
        name: str | None = None,
        metric: str | None = None,
        seed: int = 0,
        unlabelled: bool = False,
    ) -> Task:
        """Read a task from a file, a folder or a hub id: see `polytask.tasks.readers.read`."""
        from polytask.tasks.readers import read

        return read(
            source,
            input=input,
            output=output,
            pair=pair,
            kind=kind,
            name=name,
            metric=metric,
            seed=seed,
            unlabelled=unlabelled,
        )


def is_bio(tags: Iterable[str]) -> bool:
    """True where one of the tags begins or goes on with a span."""
    return any(tag.startswith(("B-", "I-")) for tag in tags)


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the examples' ids, inputs and outputs, in order."""
    sha = hashlib.sha256()
    for e in examples:
        sha.update(json.dumps([e.id, e.input, e.pair, e.output], ensure_ascii=False).encode())
        sha.update(b"\n")
    return sha.hexdigest()
