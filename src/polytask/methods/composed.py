"""Methods over other adapters, their sources: equations whose terms are what other adapters do.

A composed method is written like any other, for one row, and gets each source's Δ as a function of y: so one acts on
what another left (`stack`), all act on the same and are weighed (`mix`, fusion, gates), with tensors of its own per
site where it learns something. The runtime sees it as one adapter, whose tensors at a site are its own and its
sources': lifting, mixed batches, mixtures and training hold for it as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.backbones import Backbone, Site
from polytask.methods.lora import LoRA
from polytask.methods.method import Method, Params

WIDE = -1  # the number that the sources which are computed together go by
FEW = 8  # times what a token takes: with more sources than that, only those that it takes are computed for it
LARGE = 1 << 16  # numbers; sources with fewer are computed whole: see `lifting.GATHER_LIMIT`
GROUPED: Any = getattr(F, "grouped_mm", None)  # since torch 2.10


@dataclass
class Wide:
    """Sources Δ_n = h_n U_n + c_n as one, for a method with `rows`: their tensors p, U [Σm, width] and c [n, width] (or
    none) joined, and the m of each by its number, in order. `read` gives what they read where the value is y."""

    method: Method
    p: Params
    U: Tensor
    c: Tensor | None
    m: Mapping[int, int]
    read: Callable[[Tensor], Tensor]
    _last: tuple[Tensor, Tensor] | None = None

    def h(self, y: Tensor) -> Tensor:
        """All of h [T, Σm]."""
        if self._last is None or self._last[0] is not y:
            self._last = y, self.method.down(self.p, self.read(y), y)
        return self._last[1]

    def part(self, number: int) -> Callable[[Tensor], Tensor]:
        """One of them."""
        place = [*self.m].index(number)
        first = sum([*self.m.values()][:place])
        its = slice(first, first + self.m[number])
        p, c = {name: t[its] for name, t in self.p.items()}, 0 if self.c is None else self.c[place]
        return lambda y: self.method.down(p, self.read(y), y) @ self.U[its] + c

    def weighted(self, g: Tensor, y: Tensor) -> Tensor:
        """Σ_n g_n Δ_n(y) = (g ∘ h) U + g c, each g_n for all that is its source's; g [T, n] or [n]."""
        h = self.h(y)
        alike = len(set(self.m.values())) == 1
        h = (self._apart(h) * g[..., None]).flatten(-2) if alike else h * g[..., self._owners]
        return h @ self.U if self.c is None else h @ self.U + g @ self.c

    def along(self, q: Tensor, y: Tensor) -> Tensor:
        """qᵀ Δ_n(y) [T, n] = h_nᵀ (U_n q) + c_nᵀ q, for q [T, width]."""
        found = self.h(y) * (q @ self.U.T)
        if len(set(self.m.values())) == 1:
            found = self._apart(found).sum(-1)
        else:
            found = torch.stack([part.sum(-1) for part in torch.split(found, [*self.m.values()], -1)], -1)
        return found if self.c is None else found + q @ self.c.T

    def _apart(self, h: Tensor) -> Tensor:
        return h.reshape(*h.shape[:-1], len(self.m), -1)

    @property
    def _owners(self) -> list[int]:
        return [place for place, m in enumerate(self.m.values()) for _ in range(m)]

    def takes(self, k: int) -> bool:
        """Whether `chosen` is the faster way, and one that there is: tensors so large are never lifted by vmap, which
        does not know its products."""
        size = self.U.numel() + sum(t.numel() for t in self.p.values())
        there = GROUPED is not None and isinstance(self.method, LoRA) and self.U.device.type == "cpu"
        return there and len(self.m) > FEW * k and len(set(self.m.values())) == 1 and size > LARGE

    def chosen(self, g: Tensor, which: Tensor, y: Tensor) -> Tensor:
        """Σ_j g_j Δ_which_j(y) of LoRAs, where each token takes the k sources which [T, k]: A x of these alone, tokens
        sorted by source, and the sum over the rows of U that they name."""
        T, k = which.shape
        A = self.p["A"].view(len(self.m), -1, self.p["A"].shape[1])
        source, order = which.flatten().sort()
        ends = torch.bincount(source, minlength=len(A)).cumsum(0).to(torch.int32)
        h = GROUPED(self.read(y)[order // k], A.mT, offs=ends)[order.argsort()]
        ranks = which[..., None] * A.shape[1] + torch.arange(A.shape[1], device=y.device)
        weights = (h.view(T, k, -1) * g[..., None]).flatten(1)
        return F.embedding_bag(ranks.flatten(1), self.U, per_sample_weights=weights, mode="sum")


class Sources(Mapping[int, Callable[[Tensor], Tensor]]):
    """The sources that act at a site, by their number: y ↦ Δ. Those in `wide` are computed together."""

    def __init__(self, changes: Mapping[int, Callable[[Tensor], Tensor]], wide: Wide | None = None) -> None:
        self._changes, self._wide = changes, wide

    def __getitem__(self, number: int) -> Callable[[Tensor], Tensor]:
        return self._changes[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def weighted(self, g: Tensor, y: Tensor) -> Tensor:
        """Σ_n g_n Δ_n(y) [T, width]. g [T, n] or [n] has a weight for each source that acts here, in order."""
        g = g.to(y.dtype)
        inside, rest = self._places
        Δ = self._wide.weighted(g[..., inside] if rest else g, y) if self._wide else y.new_zeros(y.shape)
        for place, change in rest.items():
            Δ = Δ + g[..., place, None] * change(y)
        return Δ

    def along(self, q: Tensor, y: Tensor) -> Tensor:
        """qᵀ Δ_n(y) [T, n] for each source that acts here, in order; q [T, width]."""
        inside, rest = self._places
        together = self._wide.along(q, y) if self._wide else q[:, :0]
        if not rest:
            return together
        found = dict(zip(inside, together.unbind(-1), strict=True))
        found |= {place: (q * change(y)).sum(-1) for place, change in rest.items()}
        return torch.stack([found[place] for place in range(len(self))], -1)

    @property
    def _places(self) -> tuple[list[int], dict[int, Callable[[Tensor], Tensor]]]:
        """Which of them are computed together, and what is not, by their places in the order."""
        together = self._wide.m if self._wide else {}
        inside = [place for place, n in enumerate(self) if n in together]
        return inside, {place: change for place, (n, change) in enumerate(self.items()) if n not in together}

    def averaged(self, y: Tensor) -> Tensor:
        """Δ(y) of one LoRA by the means of A and s B, where all sources here are LoRAs of one rank."""
        wide = self._wide
        assert wide is not None
        assert len(wide.m) == len(self)
        A, B = (t.view(len(self), -1, t.shape[1]).mean(0) for t in (wide.p["A"], wide.U))
        return wide.read(y) @ A.T @ B

    def chosen(self, g: Tensor, which: Tensor, y: Tensor) -> Tensor:
        """Σ_j g_j Δ_which_j(y) [T, width], where each token takes k: g [T, k], which [T, k] places in their order."""
        wide = self._wide
        if wide and len(wide.m) == len(self) and wide.takes(which.shape[1]):
            return wide.chosen(g.to(y.dtype), which, y)
        return self.weighted(g.new_zeros(len(g), len(self)).scatter(1, which, g), y)


@dataclass(frozen=True)
class Composed(Method):
    """`over`: the ids of the adapters that it is made of, in order. `sites`: where they act, and so its own tensors."""

    composed = True
    learned: ClassVar[bool] = True
    """Whether training makes it; else its tensors follow from its sources."""
    made_of: ClassVar[type[Method] | None] = None
    """The method whose adapters alone it is made of; None for all that act at sites."""
    owned: ClassVar[bool] = False
    """Whether `owner` says which of them is the task's own: the one that learned a task of its name if not given."""
    over: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {}

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        """Δ [T, width] for one row, from the method's own tensors at the site and the sources' changes."""
        raise NotImplementedError(type(self).__name__)

    def around(
        self,
        backbone: Backbone,
        at: Mapping[str, Params],
        sources: Sequence[tuple[Method, Mapping[str, Params]]],
    ) -> contextlib.AbstractContextManager[None]:
        """`inside`, for a composed method that is `opaque`: `at` has its own tensors by site, and `sources` each
        source's method and tensors."""
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class Source:
    """A source where it acts: its number, its method, and whether it is being trained."""

    number: int
    method: Method
    live: bool = False


@dataclass(frozen=True)
class Seen:
    """What a site reads where that is its own value y: its norm's output, or y itself."""

    norm: nn.Module | None = None

    def __call__(self, y: Tensor) -> Tensor:
        return y if self.norm is None else type(self.norm).forward(self.norm, y)


@dataclass(frozen=True)
class Bound(Method):
    """A composed method at one site with the sources that act there. Parameters of source n are named
    `n.<parameter>`. `seen` is what the site reads of a y that another source has changed (None: what it reads is no
    matter of y)."""

    outer: Composed = dataclasses.field(default_factory=Composed)
    sources: tuple[Source, ...] = ()
    seen: Seen | None = None

    def __post_init__(self) -> None:
        several = (self.outer, *(source.method for source in self.sources))
        for what in ("precise", "positional"):
            object.__setattr__(self, what, any(getattr(method, what) for method in several))

    @staticmethod
    def joined(own: Params, sources: Mapping[int, Params]) -> Params:
        """All tensors of a site under one another's names."""
        return own | {f"{n}.{name}": t for n, p in sources.items() for name, t in p.items()}

    def _parted(self, p: Params) -> tuple[Params, dict[int, Params]]:
        own: Params = {}
        parts: dict[int, Params] = {number: {} for number in (WIDE, *(source.number for source in self.sources))}
        for name, t in p.items():
            number, dot, parameter = name.partition(".")
            if dot:
                parts[int(number)][parameter] = t
            else:
                own[name] = t
        return own, parts

    def frozen(self, backbone: Backbone, site: Site) -> Params:
        each = {source.number: source.method.frozen(backbone, site) for source in self.sources}
        return self.joined(self.outer.frozen(backbone, site), each)

    def sampled(self, p: Params) -> Params:
        own, parts = self._parted(p)
        parts |= {s.number: s.method.sampled(parts[s.number]) for s in self.sources if s.live}
        return self.joined(self.outer.sampled(own), parts)

    def ready(self, p: Params, frozen: Params) -> Params:
        own, parts = self._parted(p)
        first, others = self._parted(frozen)
        parts = {s.number: s.method.ready(parts[s.number], others[s.number]) for s in self.sources}
        return self.joined(self.outer.ready(own, first), self._widened(parts))

    def _widened(self, parts: dict[int, Params]) -> dict[int, Params]:
        """Sources of one method with `rows` as one; the m of each is the length of a tensor without numbers, named by
        its number. Where there are several such methods, that of the most."""
        found: dict[Any, dict[int, Method]] = {}
        for s in self.sources:
            odd = s.method.positional or s.method.precise or (s.live and s.method.dropout)  # each reads its own x
            if s.method.rows and not odd:
                found.setdefault(type(s.method).down, {})[s.number] = s.method
        several = max(found.values(), key=len, default={})
        if len(several) < 2:
            return parts
        rows = next(iter(several.values())).rows
        ups = {n: method.up(parts[n]) for n, method in several.items()}
        wide = {name: torch.cat([parts[n][name] for n in several]) for name in rows}
        wide["U"] = torch.cat([U for U, _ in ups.values()])
        if any(c is not None for _, c in ups.values()):
            wide["c"] = torch.stack([U.new_zeros(U.shape[1]) if c is None else c for U, c in ups.values()])
        wide |= {str(n): U.new_empty(len(U), 0) for n, (U, _) in ups.items()}
        return parts | {n: {} for n in several} | {WIDE: wide}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        own, parts = self._parted(p)
        where = {name: own[name] for name in ("at", "left") if name in own}
        parts |= {s.number: parts[s.number] | where for s in self.sources if s.method.positional}
        wide: Wide | None = None
        if joined := {name: t.to(y.dtype) for name, t in parts.pop(WIDE).items()}:
            m = {s.number: len(joined.pop(str(s.number))) for s in self.sources if str(s.number) in joined}
            method = next(s.method for s in self.sources if s.number in m)
            U, c = joined.pop("U"), joined.pop("c", None)
            wide = Wide(method, joined, U, c, m, lambda new: self._read(x, y, new))
        changes = {
            s.number: wide.part(s.number)
            if wide and s.number in wide.m
            else self._change(s, self._cast(parts[s.number], s.method, y), x, y)
            for s in self.sources
        }
        return self.outer.join(self._cast(own, self.outer, y), x, y, Sources(changes, wide))

    @staticmethod
    def _cast(p: Params, method: Method, y: Tensor) -> Params:
        """Tensors in the backbone's dtype, unless the method is precise."""
        if method.precise:
            return p
        return {name: t.to(y.dtype) if t.is_floating_point() else t for name, t in p.items()}

    def _change(self, source: Source, p: Params, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        dropout = source.method.dropout if source.live else 0.0

        def change(new: Tensor) -> Tensor:
            read = self._read(x, y, new)
            return source.method.delta(p, F.dropout(read, dropout) if dropout else read, new)

        return change

    def _read(self, x: Tensor, y: Tensor, new: Tensor) -> Tensor:
        """What the site reads where its value is `new` and no longer y."""
        return x if new is y or self.seen is None else self.seen(new)
