"""From expressions to what a plan runs: weighted terms, each an adapter or a composed method over several.

A plan sums its terms at every site from the same y. So a mixture is its terms' terms; a stack whose parts meet at
no site, or do not read y where they meet, is too; another stack is one term of its own. What acts on whole weights or
by virtual tokens is always a term: it is done before any site is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from polytask.adapters import Adapter
from polytask.adapters.expression import Bare, Expression, Fuse, Mix, Name, Routed, Split, Stack
from polytask.composition.divided import Divided
from polytask.composition.fused import fuse
from polytask.composition.kept import expression_of
from polytask.composition.mixed import Mixed
from polytask.composition.stacked import Stacked
from polytask.errors import UsageError
from polytask.methods.composed import Composed
from polytask.methods.lifting import Active, Terms


def stack(parts: Sequence[Terms]) -> Terms:
    """Each part above those before it."""
    terms = [term for part in parts for term in part]
    _one_prompt(terms, "a stack")
    if not _meet([[active for _, active in part] for part in parts]):
        return tuple(terms)
    sites_of = [{at for _, active in part if not _apart(active) for at in active.at} for part in parts]
    free: list[tuple[float, Active]] = []  # what meets nothing of another part
    inner = []
    for i, part in enumerate(parts):
        others = set().union(*sites_of[:i], *sites_of[i + 1 :])
        met = [(w, active) for w, active in part if not _apart(active) and not others.isdisjoint(active.at)]
        free += [term for term in part if term not in met]
        inner += [_single(met)] if met else []
    return (*free, (1.0, Active.of(Stacked(), {}, inner)))


def mix(weights: Sequence[float], parts: Sequence[Terms]) -> Terms:
    """Σ w Δ: weights of terms multiply."""
    return tuple((w * inner, active) for w, part in zip(weights, parts, strict=True) for inner, active in part)


def split(at: Sequence[int], parts: Sequence[Terms]) -> Terms:
    """Part i acts on the tokens from at[i − 1] to at[i]."""
    for part in parts:
        for _, active in part:
            if _apart(active):
                raise UsageError(
                    f"split: {active.method.name} acts on whole texts, not on some of their tokens; use adapters whose "
                    "method acts at sites, such as lora or bottleneck"
                )
    return ((1.0, Active.of(Divided(at=tuple(at)), {}, [_single(part) for part in parts])),)


def _apart(active: Active) -> bool:
    """Whether it acts on whole weights, on the model itself, or by virtual tokens."""
    return active.method.swaps or active.method.opaque or bool(active.method.slots)


def _meet(parts: Sequence[Sequence[Active]]) -> bool:
    """Whether two parts act at one site where one reads what the other changes."""
    met: dict[str, bool] = {}  # by site: whether one that is there reads y
    for part in parts:
        here: dict[str, bool] = {}
        for active in part:
            if not _apart(active):
                for site in active.at:
                    here[site] = here.get(site, False) or active.method.low_rank is None
        for site, reads in here.items():
            if site in met and (reads or met[site]):
                return True
            met[site] = met.get(site, False) or reads
    return False


def _single(part: Sequence[tuple[float, Active]]) -> Active:
    """A part as one adapter."""
    if len(part) == 1 and part[0][0] == 1.0:
        return part[0][1]
    return Active.of(Mixed(weights=tuple(w for w, _ in part)), {}, [active for _, active in part])


def _one_prompt(terms: Sequence[tuple[float, Active]], what: str) -> None:
    if len([1 for _, active in terms if active.method.slots]) > 1:
        raise UsageError(
            f"{what} of two adapters by virtual tokens: both would stand in the same places; mix or ensemble them"
        )
    if len(terms) > 1 and (opaque := [active.method.name for _, active in terms if active.method.opaque]):
        raise UsageError(
            f"{what}: an adapter by {opaque[0]} changes the model itself and acts alone; ensemble or pipeline it"
        )


@dataclass(frozen=True, eq=False)
class Reader:
    """Whose head reads, by id, and what its rows ask for."""

    terms: Terms
    head: str


@dataclass(frozen=True, eq=False)
class Composer:
    """Works out expressions; `get` gives adapters by name or id, `active` makes a plain one ready to run (and may
    check it), once for each."""

    get: Callable[[str], Adapter]
    active: Callable[[Adapter], Active]
    _made: dict[str, Active] = field(default_factory=dict)

    def read(self, expression: Expression) -> Reader:
        """What an expression asks for. Raises UsageError where parts cannot go together."""
        return Reader(self.terms(expression), self.head(expression))

    def terms(self, expression: Expression, *, above: bool = False) -> Terms:
        """`above` is said of a part of a stack that stands on others, instead of what it was trained on."""
        if isinstance(expression, Name):
            adapter = self.get(expression.name)
            inner = expression_of(adapter)
            return self.of(adapter, above=above) if inner is None else self.terms(inner, above=above)
        if isinstance(expression, Bare):
            return self.terms(Name(expression.name), above=True)
        if isinstance(expression, Mix):
            parts = [self.terms(part, above=above) for part in expression.parts]
            return mix([w for w, _ in expression.terms], parts)
        if isinstance(expression, Stack):
            return stack([self.terms(part, above=above or i > 0) for i, part in enumerate(expression.parts)])
        if isinstance(expression, Fuse):
            return fuse([self.terms(part, above=above) for part in expression.parts])
        if isinstance(expression, Split):
            return split(expression.at, [self.terms(part, above=above) for part in expression.parts])
        if isinstance(expression, Routed):
            raise UsageError(f"{expression}: its tensors are worked out when it is kept: `polytask compose` it first")
        kind = type(expression).__name__.lower()
        raise UsageError(f"{expression}: {kind} gives answers, so it cannot be part of something else")

    def of(self, adapter: Adapter, *, above: bool = False) -> Terms:
        """One adapter's terms: with the adapters that it is made of, and above those that it was trained on."""
        own: Terms = tuple((1.0, part) for part in self._whole(adapter).parts)
        if above or not adapter.above:
            return own
        return stack([*(self.terms(Name(id), above=i > 0) for i, id in enumerate(adapter.above)), own])

    def forget(self) -> None:
        """Work everything out anew from now on."""
        self._made.clear()

    def _whole(self, adapter: Adapter) -> Active:
        if adapter.id not in self._made:
            active = self.active(adapter)
            if isinstance(active.method, Composed):
                sources = [source(self.terms(Name(id)), type(active.method)) for id in active.method.over]
                active = Active.of(active.method, adapter.tensors, sources, still=active.still)
            self._made[adapter.id] = active
        return self._made[adapter.id]

    def head(self, expression: Expression) -> str:
        """The id of the adapter whose head reads."""
        if expression.head:
            return self.get(expression.head).id
        if isinstance(expression, Name):
            return self.get(expression.name).id
        if isinstance(expression, Mix):
            return self.head(max(expression.terms, key=lambda term: abs(term[0]))[1])
        return self.head(expression.parts[-1])


def source(terms: Terms, kind: type[Composed]) -> Active:
    """What an adapter is to a composed method. Raises UsageError where it cannot join it."""
    if kind.made_of is not None:
        [(weight, active), *more] = terms
        if more or weight != 1 or type(active.method) is not kind.made_of:
            raise UsageError(f"{kind.name} joins adapters by {kind.made_of.name}, and this is by {active.method.name}")
        return active
    for _, active in terms:
        if _apart(active):
            raise UsageError(
                f"{kind.name} joins what adapters do at sites, and {active.method.name} acts on "
                f"{'virtual tokens' if active.method.slots else 'the whole model'}; leave it out"
            )
    return _single(terms)


def sites(sources: Sequence[Active]) -> tuple[str, ...]:
    """Where any of them acts, in their order."""
    return tuple(dict.fromkeys(site for source in sources for site in source.at))
