"""The engine: batches whose rows ask for different adapters, answered from one resident backbone.

It chooses nothing by itself: a request names an adapter or a mixture, or asks for the router. Rows of all requests
share passes by length; each row gets what its adapter alone would give.
"""

from __future__ import annotations

import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from polytask.adapters import Adapter, HeadCard, TextCard
from polytask.adapters.expression import Ensemble, Expression, Mix, Name, Parallel, Pipeline, understood
from polytask.backbones import Backbone, heads, text
from polytask.composition import elrea
from polytask.composition.compose import Composer, Reader
from polytask.composition.ensembled import ensembled, refuse_unlike
from polytask.composition.kept import expression_of
from polytask.composition.routing.nearest_task import NearestTask
from polytask.composition.routing.router import Following, Known, Reads, Routed, Router
from polytask.errors import PolytaskError, UsageError
from polytask.inference.answers import Options, say, weigh
from polytask.inference.generation import generate, stream
from polytask.inference.writing import Piece, Prompt, Sampling, Steering, Written
from polytask.methods import Method, build, passes
from polytask.methods.lifting import Active, Plan, Terms, planned
from polytask.methods.passes import Seat, Unit
from polytask.tasks import Example
from polytask.tasks.task import Output

PLANS_KEPT = 16
READERS_KEPT = 4096
Decode = Callable[[Tensor], tuple[Output, float | None]]
WRITER = HeadCard(kind="generation", text=TextCard(template="plain"))  # reads answers' tokens; of no task


class Source(Protocol):
    """Where adapters come from by id or name: a library, or anything like one."""

    def get(self, ref: str) -> Adapter: ...


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
class _Follow:
    """What a router goes on from while an answer is written: the adapters it chose for an input, and the input's text
    with its embedding [d]."""

    router: Following
    ids: tuple[str, ...]
    text: str
    mean: Tensor


@dataclass(frozen=True, eq=False)
class _Ask:
    """An input, and who is to answer in a pass."""

    request: Request
    reader: Reader
    whole: bool = False
    follow: _Follow | None = None


@dataclass(frozen=True)
class _Found:
    """The answer; and where it was asked for `whole`, the logits of the head or log-probabilities of the options, and
    what an answer is made of others in their shape by."""

    answer: Answer
    logits: Tensor | None = None
    decode: Decode | None = None


@dataclass(frozen=True, eq=False)
class _Loaded:
    adapter: Adapter
    method: Method
    active: Active
    head: dict[str, Tensor]


class Engine:
    """One backbone and the adapters loaded so far. Safe to call from several threads; calls take turns."""

    def __init__(
        self,
        backbone: Backbone,
        source: Source | None = None,
        adapters: Sequence[Adapter] = (),
        router: Router | None = None,
    ) -> None:
        """`router` says who answers requests that name nobody: the nearest task's adapter if not given."""
        self.backbone = backbone
        self.source = source
        self.router: Router = router or NearestTask()
        self._known: dict[bool, Known] = {}  # by whether of last states alone
        self._loaded: dict[str, _Loaded] = {}
        self._names: dict[str, str] = {}
        self._routed: set[str] = set()
        self._shapes: dict[tuple[Method, bool], dict[str, torch.Size]] = {}
        self._plans: OrderedDict[tuple[Active, ...], Plan] = OrderedDict()
        self._readers: OrderedDict[str, Reader] = OrderedDict()
        self._numbers: dict[Active, int] = {}
        self._composer = Composer(lambda ref: self._loaded[self.find(ref)].adapter, lambda a: self._loaded[a.id].active)
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
                self._known.clear()
                self._names[adapter.name] = adapter.id
            return adapter.id

    def drop(self, id: str) -> None:
        """Forget an adapter."""
        with self._lock:
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
        return [loaded.adapter for loaded in self._loaded.values()]

    def adapter(self, id: str | None) -> Adapter | None:
        """The adapter with that id, if it is here."""
        loaded = self._loaded.get(id) if id is not None else None
        return loaded.adapter if loaded else None

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
        return _Loaded(adapter, method, Active.of(method, adapter.tensors), head)

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

    def answer(self, requests: Sequence[Request], limit: int = 256, router: Router | None = None) -> list[Answer]:
        """An answer for each request, in order. `router`: another than the engine's, for those that name nobody."""
        with self._lock, torch.no_grad():
            return self._answer([parted(request) for request in requests], limit, router or self.router)

    def _answer(self, requests: list[Request], limit: int, router: Router) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(requests)
        routed: dict[int, Routed] = {}
        follows: dict[int, _Follow] = {}
        open_ = [i for i, r in enumerate(requests) if r.adapter is None]
        if open_:
            texts = [Example("", r.input, pair=r.pair).text for r in (requests[i] for i in open_)]
            pairs = [requests[i].pair is not None for i in open_]
            means = self.embed(texts, limit, router.reads)
            for i, text_, mean, one in zip(open_, texts, means, self.route(means, pairs, router), strict=True):
                if not one.weights:
                    answers[i] = Answer(None, None, None, None, one.sure)
                    continue
                routed[i] = one
                requests[i] = replace(requests[i], adapter=router.expression(one.weights))
                if isinstance(router, Following) and len(one.weights) > 1:
                    follows[i] = _Follow(router, tuple(one.weights), text_, mean)
        by_input = self._by_input(requests, limit)
        programs = {i: self._program(self.expression(r.adapter), r) for i, r in enumerate(requests) if r.adapter}
        asked = {i: next(program) for i, program in programs.items()}
        while asked:
            asks = [replace(ask, follow=follows.get(i)) for i, each in asked.items() for ask in each]
            found = iter(self._found(asks, limit))
            ahead: dict[int, list[_Ask]] = {}
            for i, each in asked.items():
                try:
                    ahead[i] = programs[i].send([next(found) for _ in each])
                except StopIteration as end:
                    own = by_input.get(i) or self._joint(requests[i].adapter)
                    answer = replace(end.value, adapter=own.id, name=own.name) if own else end.value
                    answers[i] = self._told(answer, router, routed[i]) if i in routed else answer
            asked = ahead
        return [a for a in answers if a is not None]

    def _joint(self, ref: str | Expression | None) -> Adapter | None:
        """A kept ensemble, which answers under its own name."""
        found = self._named(ref) if ref is not None else None
        joint = isinstance(found, Name) and isinstance(self.expression(found), Ensemble)
        return self._loaded[found.name].adapter if joint and isinstance(found, Name) else None

    def _by_input(self, requests: list[Request], limit: int) -> dict[int, Adapter]:
        """Have requests for adapters that answer each input by another expression ask for that; and these adapters."""
        found: dict[int, Adapter] = {}
        for i, request in enumerate(requests):
            asked = request.adapter and self._named(request.adapter)
            if isinstance(asked, Name) and isinstance(self._loaded[asked.name].method, elrea.Elrea):
                found[i] = self._loaded[asked.name].adapter
        for adapter in {own.id: own for own in found.values()}.values():
            rows = [i for i, own in found.items() if own is adapter]
            base = self._loaded[self.find(adapter.needs[0])].adapter
            examples = [_example(requests[i], self._head(self.reader(base.id)), adapter.name) for i in rows]
            for i, said in zip(rows, elrea.asked(self.backbone, adapter, base, examples, limit), strict=True):
                requests[i] = replace(requests[i], adapter=said)
        return found

    def _program(self, expression: Expression, request: Request) -> Generator[list[_Ask], list[_Found], Answer]:
        """The answer to one request, by asking one thing after another; what all requests ask for is found together."""
        if isinstance(expression, Pipeline):
            first = yield from self._program(expression.first, request)
            cases = dict(expression.cases)
            then = cases.get(str(first.output), expression.other)
            if then is None:
                return first
            last = yield from self._program(then, request)
            return replace(last, parts=(first, *(last.parts or (last,))))
        if isinstance(expression, Parallel):
            several = yield [_Ask(request, self.reader(part)) for part in expression.parts]
            return Answer(None, None, None, None, parts=tuple(one.answer for one in several))
        if isinstance(expression, Ensemble):
            weights, readers, heads_ = self._members(expression)
            several = yield [_Ask(request, reader, whole=True) for reader in readers]
            who = self._loaded[self._composer.head(expression)].adapter
            z = [one.logits for one in several if one.logits is not None]
            assert several[0].decode is not None
            whole = (
                elrea.pooled(z, weights) if isinstance(expression, elrea.Pooled) else ensembled(heads_[0], z, weights)
            )
            output, probability = several[0].decode(whole)
            return Answer(output, probability, who.id, who.name, parts=tuple(one.answer for one in several))
        [alone] = yield [_Ask(request, self.reader(expression))]
        return alone.answer

    def check(self, expression: Expression) -> None:
        """Raise UsageError where parts cannot go together, before anything is asked."""
        if isinstance(expression, Pipeline):
            for part in expression.parts:
                self.check(self.expression(part))
        elif isinstance(expression, Ensemble):
            self._members(expression)
        else:
            for part in expression.parts if isinstance(expression, Parallel) else (expression,):
                self.reader(part)

    def _members(self, ensemble: Ensemble) -> tuple[list[float], list[Reader], list[HeadCard]]:
        """How much each part counts, who they are, and their heads, which answer with the same things."""
        weighted = [_weighted(part) for part in ensemble.parts]
        readers = [self.reader(part) for _, part in weighted]
        heads_ = [self._head(reader) for reader in readers]
        refuse_unlike(heads_, [self._loaded[reader.head].adapter.name for reader in readers])
        return [weight for weight, _ in weighted], readers, heads_

    def _head(self, reader: Reader) -> HeadCard:
        adapter = self._loaded[reader.head].adapter
        if adapter.head is None:
            raise UsageError(f"adapter {adapter.name} has no head; name an adapter whose head is to answer")
        return adapter.head

    def _found(self, asks: Sequence[_Ask], limit: int) -> list[_Found]:
        """An answer to each, and its head's logits where it is asked for `whole`, in shared passes."""
        readers = [*dict.fromkeys(ask.reader for ask in asks)]
        follows = {n: ask.follow for n, ask in enumerate(asks) if ask.follow and _writes(self._head(ask.reader))}
        members = {id: self.reader(Name(id)) for follow in follows.values() for id in follow.ids}
        plan, weights = self._planned([reader.terms for reader in (*readers, *members.values())])
        alone = dict(zip(members, weights[len(readers) :], strict=True))
        made = [
            Seat(self._head(reader), self._loaded[reader.head].head, row)
            for reader, row in zip(readers, weights, strict=False)
        ]
        seats = {reader: s for s, reader in enumerate(readers)}
        which = [seats[ask.reader] for ask in asks]
        names = [self._loaded[ask.reader.head].adapter.name for ask in asks]
        examples = [_example(a.request, made[s].head, n) for a, s, n in zip(asks, which, names, strict=True)]
        found: dict[int, tuple[Output, float | None, float | None]] = {}
        logits: dict[int, Tensor] = {}
        decodes: dict[int, Decode] = {}

        read = [n for n, s in enumerate(which) if not made[s].head.text]
        units: list[Unit] = []
        for n in read:
            room = min(limit, self.backbone.max_length - plan.room(made[which[n]].weights))
            units += passes.encode(self.backbone, made[which[n]].head, [examples[n]], room)
        if any(asks[n].whole for n in read):
            z = passes.logits(plan, made, units, [which[n] for n in read])
            for n, unit, own in zip(read, units, z, strict=True):
                decodes[n] = partial(passes.decoded, made[which[n]].head, unit)
                found[n], logits[n] = (*decodes[n](own), None), own
        else:
            for n, answer in zip(read, passes.answer(plan, made, units, [which[n] for n in read]), strict=True):
                found[n] = (*answer, None)

        said = [n for n, s in enumerate(which) if made[s].head.text]
        rules = {m: rule for m, n in enumerate(said) if (rule := asks[n].request.sampling)}
        steering = {m: self._steering(follows[n], alone, limit) for m, n in enumerate(said) if n in follows}
        spoken = say(plan, [made[which[n]] for n in said], [examples[n] for n in said], rules, steering)
        for n, one in zip(said, spoken, strict=True):
            found[n] = (one.output, one.probability, one.mass)
            if one.scores is not None:
                logits[n] = one.scores
                decodes[n] = partial(_option, text.options(made[which[n]].head, examples[n]))
        answers = []
        for n, ask in enumerate(asks):
            output, probability, mass = found[n]
            said_by = Answer(output, probability, ask.reader.head, names[n], mass=mass)
            answers.append(_Found(said_by, logits.get(n), decodes.get(n)))
        return answers

    def _steering(self, follow: _Follow, alone: Mapping[str, Tensor], limit: int) -> Steering:
        """Weights that follow an answer; `alone` are those [K] that each adapter alone has in the plan."""
        known, rows = self._known_by(last=True), torch.stack([alone[id] for id in follow.ids])
        [ids] = self.backbone.tokenize([follow.text], limit=limit)

        def weigh(mean: Tensor) -> Tensor:
            return follow.router.follow(known, follow.ids, mean[None])[0] @ rows

        return Steering(ids, follow.mean, weigh, follow.router.every)

    def weigh(self, requests: Sequence[Request]) -> list[Options]:
        """The likelihood of each request's options, by the adapter that it names."""
        with self._lock, torch.no_grad():
            if any(request.adapter is None for request in requests):
                raise UsageError("name the adapter that is to weigh the options")
            who = [self.reader(r.adapter) for r in requests if r.adapter is not None]
            plan, weights = self._planned([reader.terms for reader in who])
            seats, examples = [], []
            for request, reader, row in zip(requests, who, weights, strict=True):
                adapter = self._loaded[reader.head].adapter
                if adapter.head is None or not adapter.head.text:
                    raise UsageError(f"adapter {adapter.name} does not answer in text, so it weighs no options")
                seats.append(Seat(adapter.head, {}, row))
                examples.append(_example(request, adapter.head, adapter.name))
            return weigh(plan, seats, examples)

    def generate(self, asks: Sequence[Ask]) -> list[Written]:
        """What follows each prompt, in order."""
        with self._lock, torch.no_grad():
            return generate(*self._prompts(asks))

    def stream(self, asks: Sequence[Ask]) -> Iterator[Piece]:
        """The same piece by piece, as it is written. Whoever takes the pieces may come from any thread, ask for other
        things meanwhile, which are answered when the writing is over, or stop: then it ends with the next piece."""
        pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        left = threading.Event()

        def write() -> None:
            # Hooks, lock and grad mode belong to one thread, which is not the one that takes the pieces.
            while not self._lock.acquire(timeout=0.05):
                if left.is_set():
                    return
            try:
                with torch.no_grad():
                    for piece in stream(*self._prompts(asks)):
                        if left.is_set():
                            return
                        pieces.put(piece)
                pieces.put(None)
            except BaseException as error:  # raised again where the pieces are taken
                pieces.put(error)
            finally:
                self._lock.release()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left.set()
            writer.join()

    def logprobs(self, asks: Sequence[Ask], answers: Sequence[str], *, end: bool = True) -> list[Tensor]:
        """log p of each token of `answers[i]` [tokens] after `asks[i]`, and of the token that ends it unless not `end`.

        The answer stands in the text as it is given: one that begins a word needs its space.
        """
        with self._lock, torch.no_grad():
            plan, prompts = self._prompts(asks)
            asked = []
            for ask, prompt, answer in zip(asks, prompts, answers, strict=True):
                chat = not isinstance(ask.prompt, str)
                target = text.target_ids(self.backbone, self._text(ask), answer, list(prompt.ids), chat=chat)
                if not end and len(target) > 1 and target[-1] == self.backbone.tokenizer.eos_token_id:
                    target = target[:-1]
                self._fits(len(prompt.ids), len(target))
                asked.append(text.Asked(list(prompt.ids), target))
            seats = [Seat(WRITER, {}, prompt.weights) for prompt in prompts]
            return passes.logprobs(plan, seats, passes.answered(self.backbone, asked), range(len(asks)))

    def _fits(self, prompt: int, answer: int) -> None:
        """Raise UsageError where a prompt and an answer of so many tokens have no positions."""
        longest = prompt + answer - 1 if self.backbone.kind == "decoder" else max(prompt, answer)
        if longest > self.backbone.max_length:
            raise UsageError(
                f"a prompt of {prompt} tokens and an answer of {answer}: {self.backbone.name} has "
                f"{self.backbone.max_length} positions; shorten it"
            )

    def _prompts(self, asks: Sequence[Ask]) -> tuple[Plan, list[Prompt]]:
        who: list[Terms] = [() if ask.adapter is None else self.reader(ask.adapter).terms for ask in asks]
        plan, weights = self._planned(who)
        prompts = []
        for ask, row in zip(asks, weights, strict=True):
            ids = text.prompt_ids(self.backbone, self._text(ask), chat=not isinstance(ask.prompt, str))
            prompts.append(Prompt(ids, row, ask.sampling))
        return plan, prompts

    def _text(self, ask: Ask) -> str:
        return ask.prompt if isinstance(ask.prompt, str) else text.conversation(self.backbone, ask.prompt)

    def _planned(self, who: Sequence[Terms]) -> tuple[Plan, Tensor]:
        """The plan of all that someone asks for, and the weights [n, K] that each gives."""
        order, weights = planned(who)
        ranks = [self._numbers.setdefault(active, len(self._numbers)) for active in order]
        by_rank = sorted(range(len(order)), key=ranks.__getitem__)  # so that one plan serves all orders
        key, weights = tuple(order[k] for k in by_rank), weights[:, by_rank]
        if key not in self._plans:
            self._plans[key] = Plan(self.backbone, key)
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        self._plans[key].allow(weights)
        return self._plans[key], weights

    def expression(self, ref: str | Expression) -> Expression:
        """What a name, an id, or an expression over them asks for, by ids. Raises UsageError where nothing is known of
        that name, or the text cannot be read."""
        found = self._named(ref)
        while isinstance(found, Name) and (kept := expression_of(self._loaded[found.name].adapter)):
            found = kept.named(self.find)
        return found

    def _named(self, ref: str | Expression) -> Expression:
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

    @property
    def known(self) -> Known:
        """The adapters that inputs are routed to: those with a profile of their task."""
        return self._known_by(last=False)

    def _known_by(self, *, last: bool) -> Known:
        with self._lock:
            if last not in self._known:
                those = [one.adapter for id, one in self._loaded.items() if id in self._routed]
                for one in those:
                    if (mean := one.at("task").get("mean")) is not None and len(mean) != 2 * self.backbone.hidden_size:
                        raise PolytaskError(
                            f"adapter {one.name} ({one.id}) keeps {len(mean)} numbers of its task, and inputs are "
                            f"routed by {2 * self.backbone.hidden_size}: an earlier polytask made it; adapt it again, "
                            "or say who is to answer"
                        )
                self._known[last] = Known.of(those, last=last)
            return self._known[last]

    def route(self, embeddings: Tensor, pairs: Sequence[bool], router: Router | None = None) -> list[Routed]:
        """Who answers inputs that the router reads as these embeddings [R, d or 2d], each one text or a pair."""
        router = router or self.router
        known = self._known_by(last=router.reads != "gist")
        return router.choose(known, embeddings, known.fits(pairs))

    def _told(self, answer: Answer, router: Router, routed: Routed) -> Answer:
        """The answer, with how it came to be routed so."""
        by = None
        if len(routed.weights) > 1:
            shown = {id: round(weight, 4) for id, weight in routed.weights.items()}
            by = str(router.expression(shown).named(lambda id: self._loaded[id].adapter.name))
        return replace(answer, routed=routed.sure, by=by)

    def embed(self, texts: Sequence[str], limit: int = 256, reads: Reads = "gist") -> Tensor:
        """What a router `reads` of texts by the backbone alone [N, d or 2d], fp32, on the CPU."""
        if reads == "gist":
            return passes.gist(self.backbone, texts, limit)
        return passes.embed(self.backbone, texts, limit, None if reads == "last" else reads)


def _writes(head: HeadCard) -> bool:
    """Whether its answers are written."""
    return head.text is not None and head.text.decide == "write"


def _option(names: Sequence[str], log_p: Tensor) -> tuple[Output, float | None]:
    """The most probable option."""
    p = log_p.softmax(-1)
    return names[int(p.argmax())], float(p.max())


def _weighted(part: Expression) -> tuple[float, Expression]:
    """A part of an ensemble, and how much it counts."""
    if isinstance(part, Mix) and len(part.terms) == 1:
        weight, inner = part.terms[0]
        if weight <= 0:
            raise UsageError(f"ensemble: {part} counts {weight:g}; a weight above 0 is needed")
        return weight, inner
    return 1.0, part


def _example(request: Request, head: HeadCard, owner: str) -> Example:
    """The request as `owner`'s head reads it: a tagger gets words, a pair head two texts."""
    given: str | tuple[str, ...] = request.input
    if head.kind == "tagging" and isinstance(given, str):
        given = split_words(given)
    if head.pair not in ("none", "beside") and request.pair is None:
        raise UsageError(f"adapter {owner} compares two texts and got one; put a tab between them")
    if head.pair == "none" and request.pair is not None:
        raise UsageError(f"adapter {owner} reads one text and got a pair")
    return Example("", given, pair=request.pair, extra={"options": request.options} if request.options else {})


def parted(request: Request) -> Request:
    """A text with one tab in it is a pair."""
    if request.pair is not None or not isinstance(request.input, str) or request.input.count("\t") != 1:
        return request
    first, second = request.input.split("\t")
    return replace(request, input=first, pair=second)


def split_words(text: str) -> tuple[str, ...]:
    """Words and punctuation marks of a text, for a tagger that was trained on such tokens."""
    return tuple(re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text)) or ("",)
