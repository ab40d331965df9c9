"""Who is here: the adapters loaded so far, and what is worked out of them for a pass.

Each is checked against the backbone when it comes. Expressions over their names become readers, readers that share a
pass become a plan, and profiles of their tasks become what a router knows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from polytask.adapters import Adapter, HeadCard
from polytask.adapters.expression import Ensemble, Expression, Mix, Name, Parallel, Pipeline, understood
from polytask.backbones import Backbone, heads
from polytask.composition.compose import Composer, Reader
from polytask.composition.ensembled import refuse_unlike
from polytask.composition.kept import expression_of
from polytask.composition.routing.router import Known
from polytask.errors import PolytaskError, UsageError
from polytask.methods import Method, build
from polytask.methods.lifting import Active, Plan, Terms, planned

PLANS_KEPT = 16
READERS_KEPT = 4096


class Source(Protocol):
    """Where adapters come from by id or name: a library, or anything like one."""

    def get(self, ref: str) -> Adapter: ...


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter that fits the backbone, ready to run, and its head's tensors where the backbone is."""

    adapter: Adapter
    method: Method
    active: Active
    head: dict[str, Tensor]


class Roster:
    """The adapters over one backbone, by id and by name. Not to be asked from two threads at once."""

    def __init__(self, backbone: Backbone, source: Source | None = None) -> None:
        self.backbone = backbone
        self.source = source
        self._known: dict[bool, Known] = {}  # by whether of last states alone
        self._loaded: dict[str, Loaded] = {}
        self._names: dict[str, str] = {}
        self._routed: set[str] = set()
        self._shapes: dict[tuple[Method, bool], dict[str, torch.Size]] = {}
        self._plans: OrderedDict[tuple[Active, ...], Plan] = OrderedDict()
        self._readers: OrderedDict[str, Reader] = OrderedDict()
        self._numbers: WeakKeyDictionary[Active, int] = WeakKeyDictionary()  # a router makes ever new ones
        self._next = count()
        self._composer = Composer(lambda ref: self._loaded[self.find(ref)].adapter, lambda a: self._loaded[a.id].active)

    def add(self, adapter: Adapter, *, routed: bool) -> str:
        """Load an adapter if it is not here yet; its id. Where it is `routed`, inputs are routed to it and its name is
        its own from now on. Raises PolytaskError where it does not fit the backbone."""
        if adapter.id not in self._loaded:
            self._loaded[adapter.id] = self._fit(adapter)
        if routed:
            self._routed.add(adapter.id)
            self._known.clear()
            self._names[adapter.name] = adapter.id
        return adapter.id

    def drop(self, id: str) -> None:
        """Forget an adapter, and what was worked out of it."""
        self._loaded.pop(id, None)
        self._routed.discard(id)
        self._known.clear()
        self._names = {name: at for name, at in self._names.items() if at != id}
        self._plans.clear()
        self._readers.clear()
        self._numbers.clear()
        self._composer.forget()

    @property
    def adapters(self) -> list[Adapter]:
        return [loaded.adapter for loaded in list(self._loaded.values())]  # others may come meanwhile

    def adapter(self, id: str | None) -> Adapter | None:
        """The adapter with that id, if it is here."""
        loaded = self._loaded.get(id) if id is not None else None
        return loaded.adapter if loaded else None

    def __getitem__(self, id: str) -> Loaded:
        """An adapter that is here, by its id."""
        return self._loaded[id]

    def _fit(self, adapter: Adapter) -> Loaded:
        if adapter.backbone.fingerprint != self.backbone.fingerprint:
            raise PolytaskError(
                f"adapter {adapter.name} ({adapter.id}) was trained on {adapter.backbone.name} with the weights "
                f"{adapter.backbone.fingerprint[:12]}…, this backbone is {self.backbone.name} with "
                f"{self.backbone.fingerprint[:12]}…; load the backbone it names, or train it anew on this one"
            )
        who = f"adapter {adapter.name} ({adapter.id})"
        method = build(adapter.method, adapter.hyperparameters)
        expected = self._expected(method, adapter.head)
        own = {name: t for name, t in adapter.tensors.items() if not name.startswith("task/")}
        for name in sorted(expected.keys() ^ own.keys()):
            what = "lacks the tensor" if name in expected else "has a tensor of no known place,"
            raise PolytaskError(f"{who} {what} {name}; it is damaged or of another version")
        for name, shape in method.expects(expected, own).items():
            if own[name].shape != shape:
                owner = "its head" if name.startswith("head/") else f"{adapter.method} with its hyperparameters"
                raise PolytaskError(f"{who}: {name} is {list(own[name].shape)}, {owner} makes {list(shape)} here")
            if not bool(own[name].isfinite().all()):
                raise PolytaskError(f"{who}: {name} holds numbers that are not finite; train it anew")
        head = {
            n.removeprefix("head/"): t.to(self.backbone.device)
            for n, t in adapter.tensors.items()
            if n.startswith("head/")
        }
        return Loaded(adapter, method, Active.of(method, adapter.tensors), head)

    def _expected(self, method: Method, head: HeadCard | None) -> dict[str, torch.Size]:
        """The shape of every tensor that an adapter of this method with this head has on this backbone."""
        key = (method, head is not None and head.text is not None)
        if key not in self._shapes:
            own = method.start(self.backbone, 0, writing=key[1])
            self._shapes[key] = {name: t.shape for name, t in own.items()}
        if head is None:
            return self._shapes[key]
        first = heads.start(head, self.backbone.hidden_size, 0)
        return self._shapes[key] | {f"head/{name}": t.shape for name, t in first.items()}

    def find(self, ref: str) -> str:
        """The id of an adapter by id or name, loaded from the source if need be. Raises UsageError where it is not."""
        if ref in self._loaded:
            return ref
        if ref in self._names:
            return self._names[ref]
        if self.source is None:
            raise UsageError(f"no adapter {ref!r} here; there are {', '.join(self._names) or 'none'}")
        found = self.add(self.source.get(ref), routed=False)
        self._names.setdefault(ref, found)
        return found

    def expression(self, ref: str | Expression) -> Expression:
        """What a name, an id, or an expression over them asks for, by ids. Raises UsageError where nothing is known of
        that name, or the text cannot be read."""
        found = self.named(ref)
        while isinstance(found, Name) and (kept := expression_of(self._loaded[found.name].adapter)):
            found = kept.named(self.find)
        return found

    def named(self, ref: str | Expression) -> Expression:
        """What is asked for, by ids, with kept expressions under their own."""
        return (understood(ref, self.find) if isinstance(ref, str) else ref).named(self.find)

    def reader(self, ref: str | Expression) -> Reader:
        """Whose head reads, and the adapters with weights that rows have, for an expression that is run in a pass."""
        expression = self.expression(ref)
        key = str(expression)
        if key not in self._readers:
            self._readers[key] = self._composer.read(expression)
            if len(self._readers) > READERS_KEPT:
                self._readers.popitem(last=False)
        self._readers.move_to_end(key)
        return self._readers[key]

    def owner(self, expression: Expression) -> Adapter:
        """The adapter whose head reads."""
        return self._loaded[self._composer.head(expression)].adapter

    def joint(self, ref: str | Expression | None) -> Adapter | None:
        """A kept ensemble, which answers under its own name."""
        found = self.named(ref) if ref is not None else None
        joint = isinstance(found, Name) and isinstance(self.expression(found), Ensemble)
        return self._loaded[found.name].adapter if joint and isinstance(found, Name) else None

    def check(self, expression: Expression) -> None:
        """Raise UsageError where parts cannot go together, before anything is asked."""
        if isinstance(expression, Pipeline):
            for part in expression.parts:
                self.check(self.expression(part))
        elif isinstance(expression, Ensemble):
            self.members(expression)
        else:
            for part in expression.parts if isinstance(expression, Parallel) else (expression,):
                self.reader(part)

    def members(self, ensemble: Ensemble) -> tuple[list[float], list[Reader], list[HeadCard]]:
        """How much each part counts, who they are, and their heads, which answer with the same things."""
        weighted = [_weighted(part) for part in ensemble.parts]
        readers = [self.reader(part) for _, part in weighted]
        heads_ = [self.head(reader) for reader in readers]
        refuse_unlike(heads_, [self._loaded[reader.head].adapter.name for reader in readers])
        return [weight for weight, _ in weighted], readers, heads_

    def head(self, reader: Reader) -> HeadCard:
        """The card of the head that reads. Raises UsageError where its adapter has none."""
        adapter = self._loaded[reader.head].adapter
        if adapter.head is None:
            raise UsageError(f"adapter {adapter.name} has no head; name an adapter whose head is to answer")
        return adapter.head

    def plan(self, who: Sequence[Terms]) -> tuple[Plan, Tensor]:
        """The plan of all that someone asks for, and the weights [n, K] that each gives."""
        order, weights = planned(who)
        ranks = [self._numbers.setdefault(active, next(self._next)) for active in order]
        by_rank = sorted(range(len(order)), key=ranks.__getitem__)  # so that one plan serves all orders
        key, weights = tuple(order[k] for k in by_rank), weights[:, by_rank]
        if key not in self._plans:
            self._plans[key] = Plan(self.backbone, key)
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        self._plans[key].allow(weights)
        return self._plans[key], weights

    def known(self, *, last: bool) -> Known:
        """The adapters that inputs are routed to, by the gists of their tasks, or with `last` by last states alone."""
        if last not in self._known:
            those = [one.adapter for id, one in self._loaded.items() if id in self._routed]
            for one in those:
                if (mean := one.at("task").get("mean")) is not None and len(mean) != 2 * self.backbone.hidden_size:
                    raise PolytaskError(
                        f"adapter {one.name} ({one.id}) keeps {len(mean)} numbers of its task, and inputs are routed "
                        f"by {2 * self.backbone.hidden_size}: an earlier polytask made it; adapt it again, or say who "
                        "is to answer"
                    )
            self._known[last] = Known.of(those, last=last)
        return self._known[last]


def _weighted(part: Expression) -> tuple[float, Expression]:
    """A part of an ensemble, and how much it counts."""
    if isinstance(part, Mix) and len(part.terms) == 1:
        weight, inner = part.terms[0]
        if weight <= 0:
            raise UsageError(f"ensemble: {part} counts {weight:g}; a weight above 0 is needed")
        return weight, inner
    return 1.0, part
