"""What goes into an engine and what comes out.

A request is an input to be answered as a task's inputs are, an ask is a prompt to go on from; both say who is to do it,
and an answer says who did. The engine works a request off by queries, each for one pass, and what is found for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from polytask.adapters import HeadCard
from polytask.adapters.expression import Expression
from polytask.composition.compose import Reader
from polytask.composition.routing.router import Following
from polytask.errors import UsageError
from polytask.inference.writing import Sampling
from polytask.tasks import Example
from polytask.tasks.task import Output

Decode = Callable[[Tensor], tuple[Output, float | None]]


@dataclass(frozen=True)
class Request:
    """An input and who is to answer: an adapter's id or name, an expression, or None for the router.

    `options` are what a choice is made from; `sampling` is another rule for an answer that is written.
    """

    input: str | tuple[str, ...]
    pair: str | None = None
    adapter: str | Expression | None = None
    options: tuple[str, ...] = ()
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Ask:
    """A prompt as it stands, or the turns of a conversation (`role`, `content`), and who is to go on from it: an
    adapter's id or name, an expression, or None for the backbone alone."""

    prompt: str | Sequence[Mapping[str, str]]
    adapter: str | Expression | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Answer:
    """An output with its probability: its head's, or that of its text. `adapter` is who answered (None where no adapter
    was near), `name` its name, `routed` the router's probability for it where it was routed. `mass` is the
    attentiveness of a choice by likelihood: how much probability falls on its options. `by` is the expression that
    answered where the router let several adapters answer together; `adapter` is then the one whose head read."""

    output: Output | None
    probability: float | None
    adapter: str | None
    name: str | None = None
    routed: float | None = None
    mass: float | None = None
    parts: tuple[Answer, ...] = ()
    by: str | None = None


@dataclass(frozen=True, eq=False)
class Follow:
    """What a router goes on from while an answer is written: the adapters it chose for an input, and the input's text
    with its embedding [d]."""

    router: Following
    ids: tuple[str, ...]
    text: str
    mean: Tensor


@dataclass(frozen=True, eq=False)
class Query:
    """An input, and who is to answer in a pass."""

    request: Request
    reader: Reader
    whole: bool = False
    follow: Follow | None = None


@dataclass(frozen=True)
class Found:
    """The answer; and where it was asked for `whole`, the logits of the head or log-probabilities of the options, and
    what an answer is made of others in their shape by."""

    answer: Answer
    logits: Tensor | None = None
    decode: Decode | None = None


def parted(request: Request) -> Request:
    """A text with one tab in it is a pair."""
    if request.pair is not None or not isinstance(request.input, str) or request.input.count("\t") != 1:
        return request
    first, second = request.input.split("\t")
    return replace(request, input=first, pair=second)


def split_words(text: str) -> tuple[str, ...]:
    """Words and punctuation marks of a text, for a tagger that was trained on such tokens."""
    return tuple(re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text)) or ("",)


def example_of(request: Request, head: HeadCard, owner: str) -> Example:
    """The request as `owner`'s head reads it: a tagger gets words, a pair head two texts."""
    given: str | tuple[str, ...] = request.input
    if head.kind == "tagging" and isinstance(given, str):
        given = split_words(given)
    if head.pair not in ("none", "beside") and request.pair is None:
        raise UsageError(f"adapter {owner} compares two texts and got one; put a tab between them")
    if head.pair == "none" and request.pair is not None:
        raise UsageError(f"adapter {owner} reads one text and got a pair")
    return Example("", given, pair=request.pair, extra={"options": request.options} if request.options else {})
