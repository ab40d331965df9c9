"""A library that also answers: the kept adapters, and an engine over the backbone that they were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from polytask.adapters.expression import Expression
from polytask.backbones import Backbone, load
from polytask.composition.routing import dlp
from polytask.composition.routing.router import Router, build
from polytask.errors import UsageError
from polytask.inference import Answer, Engine, Request
from polytask.library import Library as Store
from polytask.tasks import Task

LEARNED_FROM = 512  # inputs of a task that a router learns from, at most


class Library(Store):
    """Adapters on disk that answer: `lib.answer(text)` routes a text to the adapter that knows.

    The backbone is loaded by the name that the adapters carry when it is first needed, or given with `use`.
    """

    _engine: Engine | None = None

    def use(self, base: Backbone) -> None:
        """Answer with this resident backbone."""
        self._engine = Engine(base, source=self)

    @overload
    def answer(  # type: ignore[overload-overlap]  # a str is a sequence of str too
        self, inputs: str, adapter: str | Expression | None = None, *, router: str | Router | None = None
    ) -> Answer: ...
    @overload
    def answer(
        self,
        inputs: Sequence[str | Request],
        adapter: str | Expression | None = None,
        *,
        router: str | Router | None = None,
    ) -> list[Answer]: ...

    def answer(
        self,
        inputs: str | Sequence[str | Request],
        adapter: str | Expression | None = None,
        *,
        router: str | Router | None = None,
    ) -> Answer | list[Answer]:
        """Answers to one text or to many, by the adapter named, or by whom the router picks: the nearest task's
        adapter if no router is given.

        Raises UsageError where the library is empty or holds adapters of several backbones and none was given with
        `use`.
        """
        one = isinstance(inputs, str)
        given: Sequence[str | Request] = [inputs] if isinstance(inputs, str) else inputs
        requests = [r if isinstance(r, Request) else Request(r, adapter=adapter) for r in given]
        how = self.router(router) if isinstance(router, str) else router
        answers = self.engine().answer(requests, router=how)
        return answers[0] if one else answers

    def router(self, name: str, hyperparameters: Mapping[str, Any] | None = None) -> Router:
        """A router by name, with what the library keeps for it. Raises UsageError where there is no such router, a
        hyperparameter is not its own, or it is not trained yet."""
        made = build(name, hyperparameters)
        if isinstance(made, dlp.DLP):
            return replace(made, classifier=dlp.Classifier.load(self._classifier))
        return made

    def learn_routing(self, tasks: Sequence[Task]) -> dlp.Classifier:
        """Train the `dlp-lora` router on the training inputs of the tasks of all adapters that are routed to, and keep
        it with the library.

        A task belongs to the adapters of its name, or that were made for a task of its name. Raises UsageError where an
        adapter has no task here, or a task no adapter.
        """
        engine = self.engine()
        known = engine.known
        made_for = {one.id: {one.name, one.card.task.name} for one in engine.adapters if one.id in known.ids}
        own = {id: [task for task in tasks if task.name in said] for id, said in made_for.items()}
        if idle := [task.name for task in tasks if not any(task in found for found in own.values())]:
            raise UsageError(f"{idle[0]}: no adapter of this task in {self.location}; adapt one first, or leave it out")
        if missing := [name for id, name in zip(known.ids, known.names, strict=True) if not own[id]]:
            raise UsageError(f"{dlp.NAME} needs the tasks of all adapters; those of {', '.join(missing)} are not given")
        texts = {task.name: [example.text for example in task.train[:LEARNED_FROM]] for task in tasks}
        found = dlp.learned(
            engine.backbone, [*zip(known.ids, known.names, strict=True)], [texts[own[id][0].name] for id in known.ids]
        )
        found.save(self._classifier)
        return found

    @property
    def _classifier(self) -> Path:
        return self.location / "routers" / f"{dlp.NAME}.safetensors"

    def engine(self) -> Engine:
        """The engine over the adapters that are in the library now and belong to its backbone.

        Inputs are routed among the newest versions; an older one answers where it is named.
        """
        entries = self.list()
        if not entries:
            raise UsageError(f"the library {self.location} is empty: add an adapter with `polytask adapt`")
        if self._engine is None:
            names = sorted({(entry.backbone, entry.fingerprint) for entry in entries})
            if len(names) > 1:
                listed = ", ".join(name for name, _ in names)
                raise UsageError(f"the library holds adapters of several backbones ({listed}); say which with `use`")
            self.use(load(names[0][0]))
        engine = self._engine
        assert engine is not None
        newest: dict[str, str] = {}
        for entry in entries:  # by name, newest first
            if entry.fingerprint == engine.backbone.fingerprint:
                newest.setdefault(entry.name, entry.id)
        wanted = set(newest.values())
        for loaded in {adapter.id for adapter in engine.adapters} - wanted:
            engine.drop(loaded)
        for missing in sorted(wanted - {adapter.id for adapter in engine.adapters}):
            engine.add(self.get(missing))
        return engine
