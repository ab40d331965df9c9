"""Token-level centroid routing: Belofsky 2023, arXiv 2311.10847.

The paper mixes four LoRAs of Llama 2 by how near the text so far lies to their tasks' data, anew for each token or
every other, and is better in the mean over the tasks than each of the four is. Here the embedded decoder, four LoRAs of
tasks that pick one of several words, and inputs of all four that do not say which task they are of: among animals one
of the tasks wants the animal and another what is none. The rule without rejection of foreign inputs, as in the paper.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import chain
from statistics import mean
from typing import Any

from claims import P238_lorahub as words
from claims.claim import Rows, Verdict
from polytask.adapters.expression import Expression, Name, mix
from polytask.composition.routing.centroid import Centroid
from polytask.inference import Engine, Request

PAPER = "Belofsky 2023"
CLAIM = "four LoRAs mixed by centroids beat the best of them by 10 points, alike for every and every other token"
TASKS = ("verb_v_adjective_3", "color_v_animal_3", "animal_v_object_3", "choose_last_of_5")
EACH = 40  # test inputs of a task
MORE, WITHIN = 10.0, 1.0  # points
NEVER = 1000  # tokens


@cache
def engine() -> Engine:
    return Engine(words.base(), adapters=[words.lora(name) for name in TASKS])


def inputs() -> list[tuple[str, str, Any]]:
    """Task, input and answer of each, tasks in turn."""
    tests = [words.rows_of(name)[words.TRAINED : words.TRAINED + EACH] for name in TASKS]
    rows = [[(name, e.input, e.output) for e in test] for name, test in zip(TASKS, tests, strict=True)]
    return [*chain.from_iterable(zip(*rows, strict=True))]


def named(who: dict[str, Expression]) -> dict[str, Any]:
    """Who answers inputs of each task."""
    return counted([Request(text, adapter=who[name]) for name, text, _ in inputs()], Centroid())


def routed(every: int) -> dict[str, Any]:
    router = Centroid(every=every, threshold=math.inf)
    return counted([Request(text) for _, text, _ in inputs()], router)


def counted(asked: list[Request], router: Centroid) -> dict[str, Any]:
    by_task: dict[str, list[bool]] = {}
    first: list[bool] = []
    for (name, _, right), answer in zip(inputs(), engine().answer(asked, router=router), strict=True):
        by_task.setdefault(name, []).append(answer.output == right)
        first.append(answer.name == name)
    shares = {name: mean(rows) for name, rows in by_task.items()}
    return {"right": mean(shares.values()), "by_task": shares, "first": mean(first)}


def measure(rows: Rows) -> Verdict:
    one = {name: Name(words.lora(name).id) for name in TASKS}
    own = rows.get(lambda: named(dict(one)), way="own")
    single = {
        name: rows.get(lambda it=it: named(dict.fromkeys(TASKS, it)), way=name)["right"] for name, it in one.items()
    }
    alike = mix({it.name: 1 / len(TASKS) for it in one.values()})
    same = rows.get(lambda: named(dict.fromkeys(TASKS, alike)), way="mean")
    found = {k: rows.get(lambda k=k: routed(k), way="centroid", every=k) for k in (1, 2, NEVER)}
    best = max(single, key=lambda name: float(single[name]))
    ours, every = 100 * found[2]["right"], 100 * found[1]["right"]
    return Verdict(
        f"{len(TASKS)} tasks x {EACH} inputs: centroids anew every 2 tokens {ours:.1f}, every token {every:.1f}, "
        f"once {100 * found[NEVER]['right']:.1f}; the best single LoRA ({best}) {100 * single[best]:.1f}, the mean of "
        f"all {100 * same['right']:.1f}, each input's own {100 * own['right']:.1f}; the own is nearest for "
        f"{found[2]['first']:.0%}",
        ours >= 100 * single[best] + MORE and abs(ours - every) <= WITHIN,
    )
