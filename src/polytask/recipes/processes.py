"""Processes that share the trainings of a comparison: whoever is free takes the next one."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Self

import torch

from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.evaluation import Trial
from polytask.training import Event

if TYPE_CHECKING:
    from polytask.recipes.compare import Bench, Work

Tell = Callable[["Work", Event], None]


class Crew:
    """Measures works on a bench: this process where `jobs` is 1, else so many others, each with its own backbone and
    its share of this one's threads. They are started when there is something to do, and end with the `with`."""

    def __init__(self, base: Backbone, bench: Bench, jobs: int, load: Callable[[], Backbone] | None) -> None:
        if jobs < 1 or (jobs > 1 and load is None):
            raise UsageError(f"{jobs} processes: at least 1 is needed, and more than 1 need a way to load the backbone")
        self._base, self._bench, self._jobs, self._load = base, bench, jobs, load
        self._others: dict[Any, BaseProcess] = {}  # by our end of the pipe to it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for other in self._others.values():
            other.terminate()  # a checkpoint is whole at any moment
        for connection, other in self._others.items():
            other.join()
            connection.close()

    def run(self, works: Sequence[Work], tell: Tell) -> Iterator[tuple[Work, Trial | str]]:
        """Each work with its result, or with what went wrong, as they come."""
        if self._jobs == 1:
            for work in works:
                yield work, _tried(self._bench, self._base, work, partial(tell, work))
            return
        todo = list(reversed(works))
        busy: dict[Any, Work] = {}
        while todo or busy:
            for _ in range(min(self._jobs, len(todo) + len(busy)) - len(self._others)):
                self._start()
            for connection in [c for c in self._others if c not in busy][: len(todo)]:
                busy[connection] = todo.pop()
                connection.send(busy[connection])
            ready: Any
            for ready in wait([*busy]):
                try:
                    said = ready.recv()
                except (EOFError, ConnectionError):
                    self._others[ready].join()
                    raise PolytaskError(
                        f"a process ended while it trained {busy[ready].method} (exit status "
                        f"{self._others[ready].exitcode}; out of memory?); give fewer jobs, what is done is kept"
                    ) from None
                if isinstance(said, Event):
                    tell(busy[ready], said)
                elif isinstance(said, PolytaskError):
                    raise said
                else:
                    yield busy.pop(ready), said

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        ours, theirs = context.Pipe()
        threads = max(1, torch.get_num_threads() // self._jobs)
        other = context.Process(target=serve, args=(theirs, self._load, self._bench, threads), daemon=True)
        other.start()
        theirs.close()
        self._others[ours] = other


def _tried(bench: Bench, base: Backbone, work: Work, tell: Callable[[Event], None]) -> Trial | str:
    try:
        return bench.measure(base, work, tell)
    except PolytaskError as error:
        return str(error)


def serve(connection: Any, load: Callable[[], Backbone], bench: Bench, threads: int) -> None:
    """What another process does until it is ended: measure each work that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    torch.set_num_threads(threads)
    # The one that started it may be gone at any time.
    with suppress(EOFError, ConnectionError), ExitStack() as stack:
        stack.callback(connection.close)
        try:
            base = load()
            while True:
                connection.send(_tried(bench, base, connection.recv(), connection.send))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send(PolytaskError(f"{type(error).__name__}: {error}"))
