"""A library that also answers: the kept adapters, and an engine over the backbone that they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from polytask.adapters.expression import Expression
from polytask.backbones import Backbone, load
from polytask.errors import UsageError
from polytask.inference import Answer, Engine, Request
from polytask.library import Library as Store


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
        self, inputs: str, adapter: str | Expression | None = None
    ) -> Answer: ...
    @overload
    def answer(self, inputs: Sequence[str | Request], adapter: str | Expression | None = None) -> list[Answer]: ...

    def answer(
        self, inputs: str | Sequence[str | Request], adapter: str | Expression | None = None
    ) -> Answer | list[Answer]:
        """Answers to one text or to many, by the adapter named, or by the nearest task's.

        Raises UsageError where the library is empty or holds adapters of several backbones and none was given with
        `use`.
        """
        one = isinstance(inputs, str)
        given: Sequence[str | Request] = [inputs] if isinstance(inputs, str) else inputs
        requests = [r if isinstance(r, Request) else Request(r, adapter=adapter) for r in given]
        answers = self.engine().answer(requests)
        return answers[0] if one else answers

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
