"""Expressions over adapters: values that can be built, printed, read back, kept, and run like a single adapter.

    0.7 * a + 0.3 * b      at every site y ← y + 0.7 Δ_a + 0.3 Δ_b
    -a                     weight −1: what a taught is taken away
    bare(a)                a without the adapters that it was trained on
    stack(a, b)            b acts on what a left: y ← y + Δ_a(y), then y ← y + Δ_b(y)
    fuse(a, b)             one LoRA, whose parameters are the means of theirs
    split(16, a, b)        a acts on the first 16 tokens of a text, b on the rest
    parallel(a, b)         several answers to one input, from one pass
    ensemble(a, b)         the mean of what a and b put out: of their heads' probabilities
    pipeline(a, yes=b, else=c)     a answers, and its answer says who answers next
    arrow(a, b), phatgoose(a, b)   each token goes to some of them, by tensors that are worked out when it is kept

Names are those of adapters, or their ids. The head that reads the result is that of the part with the greatest weight,
of a stack's last part, or of the adapter named by `head=`: `mix(a, 0.5*b, head=b)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from polytask.errors import UsageError

NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?"
# A name may have a minus or dot inside: `tickets-v2`. One between names needs a space before it.
TOKEN = re.compile(rf'\s*(?:({NUMBER})(?![\w.\-:/@])|([+*(),=-])|"([^"]+)"|([^\s+*(),="-][^\s+*(),="]*))')


ROUTERS = ("arrow", "phatgoose")  # token by token, without training


class Expression:
    """What all expressions can do. `head` names the adapter whose head reads, where that is said."""

    head: str | None

    def __add__(self, other: Expression | str) -> Mix:
        return Mix((*_terms(self), *_terms(_part(other))))

    def __sub__(self, other: Expression | str) -> Mix:
        return self + -1.0 * _part(other)

    def __mul__(self, weight: float) -> Mix:
        return Mix(tuple((weight * w, part) for w, part in _terms(self)))

    __rmul__ = __mul__

    def __neg__(self) -> Mix:
        return self * -1.0

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The expressions that it is made of."""
        raise NotImplementedError

    def names(self) -> Iterator[str]:
        """The adapters in it, from left to right, each time."""
        for part in self.parts:
            yield from part.names()

    def named(self, known: Callable[[str], str]) -> Self:
        """The same with other names, such as ids."""
        raise NotImplementedError

    def read_by(self, head: str) -> Self:
        """The same, read by the head of that adapter."""
        return replace(self, head=head)  # type: ignore[type-var]

    def _said(self, name: str, *inside: str) -> str:
        return f"{name}({', '.join([*inside, *([f'head={_quoted(self.head)}'] if self.head else [])])})"


@dataclass(frozen=True)
class Name(Expression):
    """An adapter by name or id."""

    name: str
    head: str | None = field(default=None)

    def __str__(self) -> str:
        return _quoted(self.name) if not self.head else self._said("mix", _quoted(self.name))

    @property
    def parts(self) -> tuple[Expression, ...]:
        return ()

    def names(self) -> Iterator[str]:
        yield self.name

    def named(self, known: Callable[[str], str]) -> Self:
        return replace(self, name=known(self.name), head=self.head and known(self.head))


@dataclass(frozen=True)
class Mix(Expression):
    """y ← y + Σ w Δ: `terms` are (weight, expression)."""

    terms: tuple[tuple[float, Expression], ...]
    head: str | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise UsageError("a mixture needs at least one adapter")
        for weight, part in self.terms:
            if not -1e6 < weight < 1e6:
                raise UsageError(f"{weight:g} * {part}: a finite weight is needed")

    def __str__(self) -> str:
        said = ""
        for weight, part in self.terms:
            sign = (" - " if said else "-") if weight < 0 else (" + " if said else "")
            inner = f"({part})" if isinstance(part, Mix) and not part.head else str(part)
            said += sign + ("" if abs(weight) == 1 else f"{abs(weight)!r} * ".replace(".0 *", " *")) + inner
        return self._said("mix", said) if self.head else said

    @property
    def parts(self) -> tuple[Expression, ...]:
        return tuple(part for _, part in self.terms)

    def named(self, known: Callable[[str], str]) -> Self:
        terms = tuple((w, part.named(known)) for w, part in self.terms)
        return replace(self, terms=terms, head=self.head and known(self.head))


@dataclass(frozen=True)
class Bare(Expression):
    """An adapter without those that it was trained on."""

    name: str
    head: str | None = None

    def __str__(self) -> str:
        return self._said("bare", _quoted(self.name))

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (Name(self.name),)

    def named(self, known: Callable[[str], str]) -> Self:
        return replace(self, name=known(self.name), head=self.head and known(self.head))


@dataclass(frozen=True)
class _Several(Expression):
    inside: tuple[Expression, ...]
    head: str | None = None

    def __post_init__(self) -> None:
        if len(self.inside) < 2:
            raise UsageError(f"{type(self).__name__.lower()}: at least two adapters are needed")

    def __str__(self) -> str:
        return self._said(type(self).__name__.lower(), *map(str, self.inside))

    @property
    def parts(self) -> tuple[Expression, ...]:
        return self.inside

    def named(self, known: Callable[[str], str]) -> Self:
        return replace(self, inside=tuple(p.named(known) for p in self.inside), head=self.head and known(self.head))


class Stack(_Several):
    """Each part acts on what those before it left."""


class Fuse(_Several):
    """One LoRA, whose parameters are the means of the parts'."""


class Parallel(_Several):
    """An answer of each part."""


class Ensemble(_Several):
    """The weighted mean of what the parts put out; the weights are those of parts written `0.7 * a`."""


@dataclass(frozen=True)
class Split(_Several):
    """Part i acts on the tokens from `at[i − 1]` to `at[i]`, counted from a text's beginning; the last on the rest."""

    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.at) != len(self.inside) - 1 or any(b <= a for a, b in zip((0, *self.at), self.at, strict=False)):
            raise UsageError(f"{self}: positions that rise, one fewer than adapters, are needed: split(16, a, b)")

    def __str__(self) -> str:
        return self._said("split", *map(str, self.at), *map(str, self.inside))


@dataclass(frozen=True)
class Routed(_Several):
    """Each token goes to some of the adapters, by the router `by` of ROUTERS."""

    by: str = ""

    def __post_init__(self) -> None:
        if len(self.inside) < 2:
            raise UsageError(f"{self.by}: at least two adapters are needed")
        if not all(isinstance(part, Name) for part in self.inside):
            raise UsageError(f"{self}: {self.by} routes among adapters; keep what is inside it under a name first")

    def __str__(self) -> str:
        return self._said(self.by, *map(str, self.inside))


@dataclass(frozen=True)
class Pipeline(Expression):
    """`first` answers; the part that its answer names in `cases` answers next, or `other`, or none: then its answer
    stays."""

    first: Expression
    cases: tuple[tuple[str, Expression], ...]
    other: Expression | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        if not self.cases:
            raise UsageError("a pipeline needs answers with adapters: pipeline(kind, question=qa, else=chat)")
        if self.head:
            raise UsageError("a pipeline has no head of its own: each part answers by its own")

    def __str__(self) -> str:
        said = [f"{_quoted(answer)}={part}" for answer, part in self.cases]
        return self._said("pipeline", str(self.first), *said, *([f"else={self.other}"] if self.other else []))

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (self.first, *(part for _, part in self.cases), *([self.other] if self.other else []))

    def named(self, known: Callable[[str], str]) -> Self:
        cases = tuple((answer, part.named(known)) for answer, part in self.cases)
        other = self.other.named(known) if self.other else None
        return replace(self, first=self.first.named(known), cases=cases, other=other)


def mix(weights: Mapping[str, float], head: str | None = None) -> Mix:
    """`mix({"a": 0.7, "b": 0.3})`. Raises UsageError where there is nothing to mix or the head is not among them."""
    if head is not None and head not in weights:
        raise UsageError(f"the mixture's head {head!r} is not one of its adapters: {', '.join(weights)}")
    return Mix(tuple((float(w), Name(name)) for name, w in weights.items()), head)


def bare(name: str) -> Bare:
    """`bare("task")`: without the adapters that it was trained on."""
    return Bare(name)


def stack(*parts: Expression | str) -> Stack:
    """`stack("lang", "task")`: each acts on what those before it left."""
    return Stack(tuple(map(_part, parts)))


def fuse(*parts: Expression | str) -> Fuse:
    """`fuse("a", "b")`: LoRAs as one, by the means of their parameters."""
    return Fuse(tuple(map(_part, parts)))


def split(at: int | tuple[int, ...], *parts: Expression | str) -> Split:
    """`split(16, "a", "b")`: a acts on the first 16 tokens, b on the rest."""
    return Split(tuple(map(_part, parts)), at=(at,) if isinstance(at, int) else tuple(at))


def parallel(*parts: Expression | str) -> Parallel:
    """`parallel("a", "b")`: an answer of each."""
    return Parallel(tuple(map(_part, parts)))


def ensemble(*parts: Expression | str) -> Ensemble:
    """`ensemble("a", "b")`: the mean of what they put out."""
    return Ensemble(tuple(map(_part, parts)))


def pipeline(
    first: Expression | str, cases: Mapping[str, Expression | str], other: Expression | str | None = None
) -> Pipeline:
    """`pipeline("kind", {"question": "qa"}, "chat")`: the first one's answer says who answers next."""
    steps = tuple((answer, _part(part)) for answer, part in cases.items())
    return Pipeline(_part(first), steps, None if other is None else _part(other))


def read(text: str) -> Expression:
    """The expression that a text says; see the module. Raises UsageError where it says none."""
    reader = _Reader(text)
    found = reader.sum()
    if reader.token:
        raise reader.wrong(f"{reader.token!r} is one too many")
    return found


def understood(ref: str, known: Callable[[str], Any]) -> Expression:
    """An adapter's name where `known` knows it (and raises UsageError where not), else the expression that it says."""
    try:
        known(ref)
    except UsageError:
        if not re.search(r"[-+*(),]", ref):
            raise
        found = read(ref)
        if found == Name(ref):  # a name with a minus in it
            raise
        return found
    return Name(ref)


class _Reader:
    """A text's tokens, one ahead."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.next()

    def wrong(self, why: str) -> UsageError:
        return UsageError(f"{self.text!r}: {why}; write 0.7*a + 0.3*b, stack(a, b), ensemble(a, b), parallel(a, b)")

    def next(self) -> None:
        """Go on by one token: `kind` is number, sign, name, or empty at the end."""
        self.kind, self.token = "", ""
        if not self.text[self.at :].strip():
            return
        match = TOKEN.match(self.text, self.at)
        if match is None:
            raise self.wrong(f"cannot be read from {self.text[self.at :].strip()[:20]!r} on")
        number, sign, quoted, name = match.groups()
        self.kind = "number" if number else "sign" if sign else "name"
        self.token = number or sign or quoted or name
        self.at = match.end()

    def take(self, sign: str) -> bool:
        if self.kind == "sign" and self.token == sign:
            self.next()
            return True
        return False

    def need(self, sign: str) -> None:
        if not self.take(sign):
            raise self.wrong(f"{sign!r} is missing before {self.token or 'the end'!r}")

    def sum(self) -> Expression:
        """A term, or several with signs between them."""
        terms = [self.term()]
        while self.kind == "sign" and self.token in "+-":
            terms.append(self.term())
        if len(terms) == 1 and terms[0][0] == 1.0:
            return terms[0][1]
        return Mix(tuple(terms))

    def term(self) -> tuple[float, Expression]:
        weight = 1.0
        while self.kind == "sign" and self.token in "+-":
            weight *= -1.0 if self.token == "-" else 1.0
            self.next()
        while self.kind == "number":
            number = self.token
            self.next()
            if self.kind != "sign" or self.token in "+-),":  # an id may be a number too
                if self.kind:
                    raise self.wrong(f"'*' is missing after {number}")
                return weight, Name(number)
            weight *= float(number)
            self.need("*")
        if self.take("("):
            inside = self.sum()
            self.need(")")
            return weight, inside
        return weight, self.factor()

    def name(self) -> str:
        if self.kind not in ("name", "number"):
            raise self.wrong(f"a name is missing before {self.token or 'the end'!r}")
        found = self.token
        self.next()
        return found

    def factor(self) -> Expression:
        name = self.name()
        if not self.take("("):
            return Name(name)
        if name not in ("mix", "bare", "stack", "fuse", "split", "parallel", "ensemble", "pipeline", *ROUTERS):
            raise self.wrong(f"there is no {name}(...)")
        parts: list[Expression] = []
        at: list[int] = []
        said: dict[str, Expression] = {}
        while not self.take(")"):
            if parts or at or said:
                self.need(",")
            ahead, kind, token = self.at, self.kind, self.token
            self.next()
            if kind in ("name", "number") and self.take("="):
                said[token] = self.sum()
            elif name == "split" and kind == "number" and self.kind == "sign" and self.token == ",":
                at.append(int(float(token)))
            else:
                self.at, self.kind, self.token = ahead, kind, token
                parts.append(self.sum())
        head: str | None = None
        if name != "pipeline":
            if odd := [key for key in said if key != "head"]:
                raise self.wrong(f"{name} has no {odd[0]}=")
            if "head" in said:
                if not isinstance(said["head"], Name):
                    raise self.wrong(f"head= {said['head']}: one adapter's name is needed")
                head = said["head"].name
        if name == "pipeline":
            if len(parts) != 1:
                raise self.wrong("pipeline(first, answer=next, ...) has one adapter that answers first")
            other = said.pop("else", None)
            return Pipeline(parts[0], tuple(said.items()), other)
        if name == "mix":
            if not parts:
                raise self.wrong("a mixture needs at least one adapter")
            return Mix(tuple(term for part in parts for term in _terms(part)), head)
        if name == "bare":
            if len(parts) != 1 or not isinstance(parts[0], Name):
                raise self.wrong("bare(a) has one adapter's name")
            return Bare(parts[0].name, head)
        if name == "split":
            return Split(tuple(parts), head, tuple(at))
        if name in ROUTERS:
            return Routed(tuple(parts), head, name)
        return {"stack": Stack, "fuse": Fuse, "parallel": Parallel, "ensemble": Ensemble}[name](tuple(parts), head)


def _terms(part: Expression) -> tuple[tuple[float, Expression], ...]:
    return part.terms if isinstance(part, Mix) and not part.head else ((1.0, part),)


def _part(part: Expression | str) -> Expression:
    return read(part) if isinstance(part, str) else part


def _quoted(name: str) -> str:
    """A name as it can be read back."""
    match = TOKEN.fullmatch(name)
    plain = match is not None and match[4] and name not in ("stack", "mix", "else", "head")
    return name if plain else f'"{name}"'
