"""What claims about routing share: test inputs of eight tasks, mixed, that do not say which task they are of.

The adapters are those of `claims.library`. An answer counts as right where it is the label that its own task has for
the input, whoever gave it; so an input that goes to another task's head, or to nobody, is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from itertools import zip_longest
from statistics import mean
from typing import Any

from claims import library, short
from polytask.adapters.expression import mix
from polytask.composition.routing.router import Router
from polytask.inference import Answer, Engine, Request

EACH = 100  # test inputs of a task
TURNS = 5


@cache
def engine() -> Engine:
    return Engine(short.base(), adapters=[library.skill(name, "lora") for name in library.SKILLS])


@cache
def inputs() -> list[tuple[str, Request, Any]]:
    """Task, request and label of each, tasks in turn."""
    tests = [(name, short.task(name).test[:EACH]) for name in library.SKILLS]
    rows = [[(name, Request(e.input, e.pair), e.output) for e in test] for name, test in tests]
    return [one for several in zip_longest(*rows) for one in several if one is not None]


def own(name: str) -> str:
    return library.skill(name, "lora").id


def uniform(name: str) -> Any:
    """All adapters, alike, read by the head of the input's own task."""
    ids = [own(other) for other in library.SKILLS]
    return mix(dict.fromkeys(ids, 1 / len(ids)), head=own(name))


def named(who: Callable[[str], Any]) -> dict[str, Any]:
    """Answers where it is known which task each input is of."""
    asked = [Request(r.input, r.pair, who(name)) for name, r, _ in inputs()]
    return _row(lambda: engine().answer(asked, short.LIMIT))


def routed(router: Router) -> dict[str, Any]:
    return _row(lambda: engine().answer([r for _, r, _ in inputs()], short.LIMIT, router))


def times(router: Router) -> list[float]:
    """Processor time, routed, over that of each input's own adapter, named; in turns."""
    asked = [r for _, r, _ in inputs()]
    known = [Request(r.input, r.pair, own(name)) for name, r, _ in inputs()]

    def spent(requests: list[Request]) -> float:
        began = time.process_time()
        engine().answer(requests, short.LIMIT, router)
        return time.process_time() - began

    return [spent(asked) / spent(known) for _ in range(1 + TURNS)][1:]


def _row(answer: Callable[[], list[Answer]]) -> dict[str, Any]:
    answer()  # once before the clock runs
    began = time.process_time()
    found = answer()
    seconds = time.process_time() - began
    by_task: dict[str, list[bool]] = {}
    for (name, _, label), one in zip(inputs(), found, strict=True):
        by_task.setdefault(name, []).append(one.output == label)
    there = [one.adapter == own(name) for (name, _, _), one in zip(inputs(), found, strict=True)]
    return {
        "right": mean(mean(rows) for rows in by_task.values()),
        "by_task": {name: mean(rows) for name, rows in by_task.items()},
        "own": mean(there),
        "nobody": mean(one.adapter is None for one in found),
        "seconds": seconds,
    }
