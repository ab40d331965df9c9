"""The engine: batches whose rows ask for different adapters, answered from one resident backbone.

It chooses nothing by itself: a request names an adapter or a mixture, or asks for the router. Rows of all requests
share passes by length; each row gets what its adapter alone would give.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from polytask.adapters import Adapter, HeadCard, TextCard
from polytask.adapters.expression import Ensemble, Expression, Name, Parallel, Pipeline
from polytask.backbones import Backbone, text
from polytask.composition import elrea
from polytask.composition.compose import Reader
from polytask.composition.ensembled import ensembled
from polytask.composition.routing.nearest_task import NearestTask
from polytask.composition.routing.router import Following, Known, Reads, Routed, Router
from polytask.errors import UsageError
from polytask.inference.answers import Options, likeliest, say, weigh, writes
from polytask.inference.generation import generate, stream
from polytask.inference.requests import Answer, Ask, Decode, Follow, Found, Query, Request, example_of, parted
from polytask.inference.roster import Roster, Source
from polytask.inference.writing import Piece, Prompt, Steering, Written
from polytask.methods import passes
from polytask.methods.lifting import Plan, Terms
from polytask.methods.passes import Seat, Unit
from polytask.tasks import Example
from polytask.tasks.task import Output

WRITER = HeadCard(kind="generation", text=TextCard(template="plain"))  # reads answers' tokens; of no task


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
        self.router: Router = router or NearestTask()
        self._roster = Roster(backbone, source)
        self._lock = threading.RLock()
        for adapter in adapters:
            self.add(adapter)

    def add(self, adapter: Adapter, *, routed: bool = True) -> str:
        """Make an adapter ready to answer; its id. With `routed=False` inputs are not routed to it and its name stays
        another's (that of a newer version): it answers only where it is asked for.

        Raises PolytaskError where it does not fit the backbone.
        """
        with self._lock:
            return self._roster.add(adapter, routed=routed)

    def drop(self, id: str) -> None:
        """Forget an adapter."""
        with self._lock:
            self._roster.drop(id)

    @property
    def adapters(self) -> list[Adapter]:
        return self._roster.adapters

    def adapter(self, id: str | None) -> Adapter | None:
        """The adapter with that id, if it is here."""
        return self._roster.adapter(id)

    def find(self, ref: str) -> str:
        """The id of an adapter by id or name, loaded from the source if need be. Raises UsageError where it is not."""
        with self._lock:
            return self._roster.find(ref)

    def reader(self, ref: str | Expression) -> Reader:
        """Whose head reads, and the adapters with weights that rows have, for an expression that is run in a pass."""
        with self._lock:
            return self._roster.reader(ref)

    def check(self, expression: Expression) -> None:
        """Raise UsageError where parts cannot go together, before anything is asked."""
        with self._lock:
            self._roster.check(expression)

    @property
    def known(self) -> Known:
        """The adapters that inputs are routed to: those with a profile of their task."""
        with self._lock:
            return self._roster.known(last=False)

    def answer(self, requests: Sequence[Request], limit: int = 256, router: Router | None = None) -> list[Answer]:
        """An answer for each request, in order. `router`: another than the engine's, for those that name nobody."""
        with self._lock, torch.no_grad():
            return self._answer([parted(request) for request in requests], limit, router or self.router)

    def _answer(self, requests: list[Request], limit: int, router: Router) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(requests)
        routed: dict[int, Routed] = {}
        follows: dict[int, Follow] = {}
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
                    follows[i] = Follow(router, tuple(one.weights), text_, mean)
        by_input = self._by_input(requests, limit)
        expression = self._roster.expression
        programs = {i: self._program(expression(r.adapter), r) for i, r in enumerate(requests) if r.adapter}
        asked = {i: next(program) for i, program in programs.items()}
        while asked:
            queries = [replace(one, follow=follows.get(i)) for i, each in asked.items() for one in each]
            found = iter(self._found(queries, limit))
            ahead: dict[int, list[Query]] = {}
            for i, each in asked.items():
                try:
                    ahead[i] = programs[i].send([next(found) for _ in each])
                except StopIteration as end:
                    own = by_input.get(i) or self._roster.joint(requests[i].adapter)
                    answer = replace(end.value, adapter=own.id, name=own.name) if own else end.value
                    answers[i] = self._told(answer, router, routed[i]) if i in routed else answer
            asked = ahead
        return [a for a in answers if a is not None]

    def _by_input(self, requests: list[Request], limit: int) -> dict[int, Adapter]:
        """Have requests for adapters that answer each input by another expression ask for that; and these adapters."""
        found: dict[int, Adapter] = {}
        for i, request in enumerate(requests):
            asked = request.adapter and self._roster.named(request.adapter)
            if isinstance(asked, Name) and isinstance(self._roster[asked.name].method, elrea.Elrea):
                found[i] = self._roster[asked.name].adapter
        for adapter in {own.id: own for own in found.values()}.values():
            rows = [i for i, own in found.items() if own is adapter]
            base = self._roster[self._roster.find(adapter.needs[0])].adapter
            head = self._roster.head(self._roster.reader(base.id))
            examples = [example_of(requests[i], head, adapter.name) for i in rows]
            for i, said in zip(rows, elrea.asked(self.backbone, adapter, base, examples, limit), strict=True):
                requests[i] = replace(requests[i], adapter=said)
        return found

    def _program(self, expression: Expression, request: Request) -> Generator[list[Query], list[Found], Answer]:
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
            several = yield [Query(request, self._roster.reader(part)) for part in expression.parts]
            return Answer(None, None, None, None, parts=tuple(one.answer for one in several))
        if isinstance(expression, Ensemble):
            weights, readers, heads_ = self._roster.members(expression)
            several = yield [Query(request, reader, whole=True) for reader in readers]
            who = self._roster.owner(expression)
            z = [one.logits for one in several if one.logits is not None]
            assert several[0].decode is not None
            whole = (
                elrea.pooled(z, weights) if isinstance(expression, elrea.Pooled) else ensembled(heads_[0], z, weights)
            )
            output, probability = several[0].decode(whole)
            return Answer(output, probability, who.id, who.name, parts=tuple(one.answer for one in several))
        [alone] = yield [Query(request, self._roster.reader(expression))]
        return alone.answer

    def _found(self, queries: Sequence[Query], limit: int) -> list[Found]:
        """An answer to each, and its head's logits where it is asked for `whole`, in shared passes."""
        readers = [*dict.fromkeys(query.reader for query in queries)]
        follows = {
            n: query.follow
            for n, query in enumerate(queries)
            if query.follow and writes(self._roster.head(query.reader))
        }
        members = {id: self._roster.reader(Name(id)) for follow in follows.values() for id in follow.ids}
        plan, weights = self._roster.plan([reader.terms for reader in (*readers, *members.values())])
        alone = dict(zip(members, weights[len(readers) :], strict=True))
        made = [
            Seat(self._roster.head(reader), self._roster[reader.head].head, row)
            for reader, row in zip(readers, weights, strict=False)
        ]
        seats = {reader: s for s, reader in enumerate(readers)}
        which = [seats[query.reader] for query in queries]
        names = [self._roster[query.reader.head].adapter.name for query in queries]
        examples = [example_of(a.request, made[s].head, n) for a, s, n in zip(queries, which, names, strict=True)]
        found: dict[int, tuple[Output, float | None, float | None]] = {}
        logits: dict[int, Tensor] = {}
        decodes: dict[int, Decode] = {}

        read = [n for n, s in enumerate(which) if not made[s].head.text]
        units: list[Unit] = []
        for n in read:
            room = min(limit, self.backbone.max_length - plan.room(made[which[n]].weights))
            units += passes.encode(self.backbone, made[which[n]].head, [examples[n]], room)
        if any(queries[n].whole for n in read):
            z = passes.logits(plan, made, units, [which[n] for n in read])
            for n, unit, own in zip(read, units, z, strict=True):
                decodes[n] = partial(passes.decoded, made[which[n]].head, unit)
                found[n], logits[n] = (*decodes[n](own), None), own
        else:
            for n, answer in zip(read, passes.answer(plan, made, units, [which[n] for n in read]), strict=True):
                found[n] = (*answer, None)

        said = [n for n, s in enumerate(which) if made[s].head.text]
        rules = {m: rule for m, n in enumerate(said) if (rule := queries[n].request.sampling)}
        steering = {m: self._steering(follows[n], alone, limit) for m, n in enumerate(said) if n in follows}
        spoken = say(plan, [made[which[n]] for n in said], [examples[n] for n in said], rules, steering)
        for n, one in zip(said, spoken, strict=True):
            found[n] = (one.output, one.probability, one.mass)
            if one.scores is not None:
                logits[n] = one.scores
                decodes[n] = partial(likeliest, text.options(made[which[n]].head, examples[n]))
        answers = []
        for n, query in enumerate(queries):
            output, probability, mass = found[n]
            said_by = Answer(output, probability, query.reader.head, names[n], mass=mass)
            answers.append(Found(said_by, logits.get(n), decodes.get(n)))
        return answers

    def _steering(self, follow: Follow, alone: Mapping[str, Tensor], limit: int) -> Steering:
        """Weights that follow an answer; `alone` are those [K] that each adapter alone has in the plan."""
        known, rows = self._roster.known(last=True), torch.stack([alone[id] for id in follow.ids])
        [ids] = self.backbone.tokenize([follow.text], limit=limit)

        def weigh(mean: Tensor) -> Tensor:
            return follow.router.follow(known, follow.ids, mean[None])[0] @ rows

        return Steering(ids, follow.mean, weigh, follow.router.every)

    def weigh(self, requests: Sequence[Request]) -> list[Options]:
        """The likelihood of each request's options, by the adapter that it names."""
        with self._lock, torch.no_grad():
            if any(request.adapter is None for request in requests):
                raise UsageError("name the adapter that is to weigh the options")
            who = [self._roster.reader(r.adapter) for r in requests if r.adapter is not None]
            plan, weights = self._roster.plan([reader.terms for reader in who])
            seats, examples = [], []
            for request, reader, row in zip(requests, who, weights, strict=True):
                adapter = self._roster[reader.head].adapter
                if adapter.head is None or not adapter.head.text:
                    raise UsageError(f"adapter {adapter.name} does not answer in text, so it weighs no options")
                seats.append(Seat(adapter.head, {}, row))
                examples.append(example_of(request, adapter.head, adapter.name))
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
        who: list[Terms] = [() if ask.adapter is None else self._roster.reader(ask.adapter).terms for ask in asks]
        plan, weights = self._roster.plan(who)
        prompts = []
        for ask, row in zip(asks, weights, strict=True):
            ids = text.prompt_ids(self.backbone, self._text(ask), chat=not isinstance(ask.prompt, str))
            prompts.append(Prompt(ids, row, ask.sampling))
        return plan, prompts

    def _text(self, ask: Ask) -> str:
        return ask.prompt if isinstance(ask.prompt, str) else text.conversation(self.backbone, ask.prompt)

    def route(self, embeddings: Tensor, pairs: Sequence[bool], router: Router | None = None) -> list[Routed]:
        """Who answers inputs that the router reads as these embeddings [R, d or 2d], each one text or a pair."""
        router = router or self.router
        with self._lock:
            known = self._roster.known(last=router.reads != "gist")
        return router.choose(known, embeddings, known.fits(pairs))

    def _told(self, answer: Answer, router: Router, routed: Routed) -> Answer:
        """The answer, with how it came to be routed so."""
        by = None
        if len(routed.weights) > 1:
            shown = {id: round(weight, 4) for id, weight in routed.weights.items()}
            by = str(router.expression(shown).named(lambda id: self._roster[id].adapter.name))
        return replace(answer, routed=routed.sure, by=by)

    def embed(self, texts: Sequence[str], limit: int = 256, reads: Reads = "gist") -> Tensor:
        """What a router `reads` of texts by the backbone alone [N, d or 2d], fp32, on the CPU."""
        if reads == "gist":
            return passes.gist(self.backbone, texts, limit)
        return passes.embed(self.backbone, texts, limit, None if reads == "last" else reads)
