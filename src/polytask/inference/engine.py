"""The engine: batches whose rows ask for different adapters, answered from one resident backbone.

It chooses nothing by itself: a request names an adapter or a mixture, or asks for the router. Rows of all requests
share passes by length; each row gets what its adapter alone would give.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from polytask.adapters import Adapter, HeadCard
from polytask.backbones import Backbone, heads
from polytask.composition import Mixture
from polytask.composition.routing.nearest_task import Choice, NearestTask, Profile
from polytask.errors import PolytaskError, UsageError
from polytask.methods import Method, build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat, Unit
from polytask.tasks import Example
from polytask.tasks.task import Output

PLANS_KEPT = 16


class Source(Protocol):
    """Where adapters come from by id or name: a library, or anything like one."""

    def get(self, ref: str) -> Adapter: ...


@dataclass(frozen=True)
class Request:
    """An input and who is to answer: an adapter's id or name, a mixture, or None for the router."""

    input: str | tuple[str, ...]
    pair: str | None = None
    adapter: str | Mixture | None = None


@dataclass(frozen=True)
class Answer:
    """An output with the probability its head gives it. `adapter` is who answered (None where no adapter was near),
    `name` its name, `routed` the router's probability for it where it was routed."""

    output: Output | None
    probability: float | None
    adapter: str | None
    name: str | None = None
    routed: float | None = None


@dataclass(frozen=True, eq=False)
class _Loaded:
    adapter: Adapter
    method: Method
    active: Active
    head: dict[str, Tensor]


class Engine:
    """One backbone and the adapters loaded so far. Safe to call from several threads; calls take turns."""

    def __init__(self, backbone: Backbone, source: Source | None = None, adapters: Sequence[Adapter] = ()) -> None:
        self.backbone = backbone
        self.source = source
        self._loaded: dict[str, _Loaded] = {}
        self._names: dict[str, str] = {}
        self._routed: set[str] = set()
        self._shapes: dict[Method, dict[str, torch.Size]] = {}
        self._plans: OrderedDict[tuple[str, ...], Plan] = OrderedDict()
        self._lock = threading.RLock()
        for adapter in adapters:
            self.add(adapter)

    def add(self, adapter: Adapter, *, routed: bool = True) -> str:
        """Make an adapter ready to answer; its id. With `routed=False` inputs are not routed to it and its name stays
        another's (that of a newer version): it answers only where it is asked for.

        Raises PolytaskError where it does not fit the backbone.
        """
        with self._lock:
            if adapter.id not in self._loaded:
                self._loaded[adapter.id] = self._fit(adapter)
            if routed:
                self._routed.add(adapter.id)
                self._names[adapter.name] = adapter.id
            return adapter.id

    def drop(self, id: str) -> None:
        """Forget an adapter."""
        with self._lock:
            self._loaded.pop(id, None)
            self._routed.discard(id)
            self._names = {name: at for name, at in self._names.items() if at != id}
            for key in [key for key in self._plans if id in key]:
                del self._plans[key]

    @property
    def adapters(self) -> list[Adapter]:
        return [loaded.adapter for loaded in self._loaded.values()]

    def _fit(self, adapter: Adapter) -> _Loaded:
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
        for name, shape in expected.items():
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
        return _Loaded(adapter, method, Active.of(method, adapter.tensors), head)

    def _expected(self, method: Method, head: HeadCard | None) -> dict[str, torch.Size]:
        """The shape of every tensor that an adapter of this method with this head has on this backbone."""
        if method not in self._shapes:
            self._shapes[method] = {name: t.shape for name, t in method.start(self.backbone, 0).items()}
        if head is None:
            return self._shapes[method]
        first = heads.start(head, self.backbone.hidden_size, 0)
        return self._shapes[method] | {f"head/{name}": t.shape for name, t in first.items()}

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

    def answer(self, requests: Sequence[Request], limit: int = 256) -> list[Answer]:
        """An answer for each request, in order."""
        with self._lock, torch.no_grad():
            return self._answer([_parted(request) for request in requests], limit)

    def _answer(self, requests: list[Request], limit: int) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(requests)
        routed: dict[int, Choice] = {}
        open_ = [i for i, r in enumerate(requests) if r.adapter is None]
        if open_:
            ids, router = self.router()
            texts = [Example("", r.input, pair=r.pair).text for r in (requests[i] for i in open_)]
            fits = torch.tensor([[self._pairs(id) == (requests[i].pair is not None) for id in ids] for i in open_])
            choices = router.route(self.embed(texts, limit), fits.reshape(len(open_), len(ids)))
            for i, choice in zip(open_, choices, strict=True):
                if choice.index is None:
                    answers[i] = Answer(None, None, None, None, choice.probability)
                    continue
                routed[i] = choice
                requests[i] = replace(requests[i], adapter=ids[choice.index])
        chosen = [(i, r, r.adapter) for i, r in enumerate(requests) if r.adapter is not None]
        if not chosen:
            return [a for a in answers if a is not None]
        who = {ref: self._weights(ref) for _, _, ref in chosen}
        order = sorted({k for weights, _ in who.values() for k in weights})
        plan = self._plan(tuple(order))
        seats: dict[str | Mixture, int] = {}
        made: list[Seat] = []
        for ref, (weights, reader) in who.items():
            loaded = self._loaded[reader]
            if loaded.adapter.head is None:
                raise UsageError(f"adapter {loaded.adapter.name} has no head; name an adapter whose head is to answer")
            seats[ref] = len(made)
            made.append(Seat(loaded.adapter.head, loaded.head, torch.tensor([weights.get(k, 0.0) for k in order])))
        units: list[Unit] = []
        which: list[int] = []
        for _, request, ref in chosen:
            adapter = self._loaded[who[ref][1]].adapter
            head = made[seats[ref]].head
            units += passes.encode(self.backbone, head, [self._example(request, head, adapter)], limit)
            which.append(seats[ref])
        found = passes.answer(plan, made, units, which)
        for (i, _, ref), (output, probability) in zip(chosen, found, strict=True):
            reader = who[ref][1]
            share = routed[i].probability if i in routed else None
            answers[i] = Answer(output, probability, reader, self._loaded[reader].adapter.name, share)
        return [a for a in answers if a is not None]

    def _weights(self, ref: str | Mixture) -> tuple[dict[str, float], str]:
        """Weights by adapter id, and whose head reads."""
        if isinstance(ref, str):
            found = self.find(ref)
            return {found: 1.0}, found
        weights: dict[str, float] = {}
        for name, weight in ref.weights:
            weights[self.find(name)] = weights.get(self.find(name), 0.0) + weight
        return weights, self.find(ref.head)

    def _plan(self, ids: tuple[str, ...]) -> Plan:
        if ids not in self._plans:
            self._plans[ids] = Plan(self.backbone, [self._loaded[id].active for id in ids])
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(ids)
        return self._plans[ids]

    def _example(self, request: Request, head: HeadCard, adapter: Adapter) -> Example:
        """The request as its head reads it: a tagger gets words, a pair head two texts."""
        given: str | tuple[str, ...] = request.input
        if head.kind == "tagging" and isinstance(given, str):
            given = split_words(given)
        if head.pair != "none" and request.pair is None:
            raise UsageError(f"adapter {adapter.name} compares two texts and got one; put a tab between them")
        if head.pair == "none" and request.pair is not None:
            raise UsageError(f"adapter {adapter.name} reads one text and got a pair")
        return Example("", given, pair=request.pair)

    def _pairs(self, id: str) -> bool:
        head = self._loaded[id].adapter.head
        return head is not None and head.pair != "none"

    def router(self) -> tuple[list[str], NearestTask]:
        """The ids of the adapters that inputs are routed to, those with a profile of their task, and the router."""
        known = [(id, loaded.adapter.at("task")) for id, loaded in self._loaded.items() if id in self._routed]
        with_profile = [(id, t) for id, t in known if "mean" in t and "spread" in t]
        profiles = [Profile(t["mean"], float(t["spread"][0]), float(t["spread"][1])) for _, t in with_profile]
        return [id for id, _ in with_profile], NearestTask(profiles)

    def embed(self, texts: Sequence[str], limit: int = 256) -> Tensor:
        """Mean-pooled last hidden states [N, d] of the backbone alone, fp32, on the CPU."""
        return passes.embed(self.backbone, texts, limit)


def _parted(request: Request) -> Request:
    """A text with one tab in it is a pair."""
    if request.pair is not None or not isinstance(request.input, str) or request.input.count("\t") != 1:
        return request
    first, second = request.input.split("\t")
    return replace(request, input=first, pair=second)


def split_words(text: str) -> tuple[str, ...]:
    """Words and punctuation marks of a text, for a tagger that was trained on such tokens."""
    return tuple(re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text)) or ("",)
