"""Every method beside LoRA at about LoRA's number of trained parameters: a step of training, and a batch with adapters.

    training      forward, backward and update on 32 real texts, to LoRA's (r = 8, query and value)
    1 adapter     a batch of 32 texts that all use one adapter, to the same batch through the backbone alone
    8 adapters    the same rows with eight different adapters, to the backbone alone
    generic       LoRA by the path that lifts any method, to LoRA by its own `mix`, with 1, 8 and 32 adapters

MiniLM, weights in its own precision, each method at its own sites. Where a hyperparameter sets a method's size, `SIZES`
has a value that comes near LoRA's number; the others are as they are by default, prompts among them: they cost what
their tokens cost, and one of LoRA's number would have 192.

Methods run a few at a time, in turns with what they are compared to. The file is written after each few, and
`--methods a,b` measures these again and leaves the rows of the others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch

from bench import data
from bench.infer import repeated
from bench.measure import Row, Samples, Turn, Window, options, read, show, turns, write
from polytask.backbones import Backbone, Batch, heads, load
from polytask.errors import UsageError
from polytask.methods import Method, build, methods
from polytask.methods.lifting import Active, Plan
from polytask.methods.lora import LoRA
from polytask.methods.passes import encode
from polytask.tasks import Task
from polytask.training import Job, Settings
from polytask.training.learner import prepare
from polytask.training.loop import Loop

BATCH = 32
ABREAST = 4  # methods that take turns; more of them would put more time between the two sides of a ratio
TARGET = 1.3  # of the activations place, in training
SIZES: dict[str, dict[str, Any]] = {
    "bottleneck": {"reduction": 48},
    "compacter": {"n": 12},
    "elastic": {"r": 2, "nested": (1,)},
    "ept": {"rank": 19},
    "experts": {"reduction": 96},
    "mtl_lora": {"r": 2},
    "parallel": {"reduction": 24},
    "peft": {"type": "LORA", "sites": ["*.attn.[qv]"], "r": 8},
    "pfeiffer": {"reduction": 24},
    "prefix": {"n": 16},
    "ptuning": {"hidden": 77},
    "smora": {"r": 5, "k": 1},
}


def trained(base: Backbone, method: Method) -> int:
    """How many numbers a method trains."""
    return sum(t.numel() for name, t in method.start(base, 0).items() if method.trains(name))


def fits(base: Backbone, name: str) -> bool:
    """Whether the method acts on this backbone with no more said than `SIZES` does."""
    try:
        build(name, SIZES.get(name)).start(base, 0)
    except UsageError:
        return False
    return True


def training(base: Backbone, task: Task, method: Method) -> Turn:
    """One epoch, always of the same batches; its units are steps."""
    learner = prepare(base, Job(task, method, heads.design(task), Settings(epochs=1, batch=BATCH)))
    loop = Loop(base, [learner], lambda event: None, None, None)

    def turn(window: Window) -> float:
        with window:
            for step in range(learner.steps):
                learner.step = step
                loop._step([learner])
        return float(learner.steps)

    return turn


def passing(base: Backbone, batch: Batch, method: Method, K: int) -> Turn:
    """Passes of a batch whose rows use K adapters in turn, with random tensors, none of them zero."""
    first = method.start(base, 0)
    draw = torch.Generator().manual_seed(0)

    def active() -> Active:
        return Active.of(method, {n: t + 0.02 * torch.randn(t.shape, generator=draw) for n, t in first.items()})

    plan = Plan(base, [active() for _ in range(K)])
    weights = torch.eye(K)[torch.arange(len(batch.ids)) % K]

    def turn(_: Window) -> float:
        with torch.no_grad():
            plan.hidden(batch, weights)
        return 1.0

    return repeated(turn)


def generic(turn: Turn) -> Turn:
    """The same without LoRA's own path."""

    def patched(window: Window) -> float:
        with patch.object(LoRA, "mix", None):
            return turn(window)

    return patched


def main() -> None:
    o = options(__doc__ or "", rounds=5, limit=300.0, examples=128, methods="")
    base = load("minilm")
    names = o.methods.split(",") if o.methods else [name for name in methods() if name != "head" and fits(base, name)]
    task = data.part(data.task("banking77_intent"), o.examples)
    texts = sorted((unit.ids[0] for unit in encode(base, heads.design(task), task.train)), key=len)
    middle = max(0, len(texts) - BATCH) // 2  # passes are of texts of about one length
    batch = base.collate(texts[middle : middle + BATCH])

    def alone(_: Window) -> float:
        with torch.no_grad():
            base.hidden(batch)
        return 1.0

    groups: list[Sequence[str]] = [names[i : i + ABREAST] for i in range(0, len(names), ABREAST)]
    limit = o.limit / (2 * len(groups) + 1)

    def measured(variants: dict[str, Turn]) -> Samples:
        return turns(variants, rounds=o.rounds, limit=limit, clock=o.clock)

    reference = build("lora")
    rows = {row.what: row for row in read("methods")}
    kept: dict[str, Samples] = {}
    more = {"dtype": str(base.dtype), "batch": list(batch.ids.shape), "sizes": SIZES}

    def add(*new: Row) -> None:
        rows.update({row.what: row for row in new})
        write("methods", sorted(rows.values(), key=placed), kept, more)

    for group in groups:
        chosen = {name: build(name, SIZES.get(name)) for name in group}
        steps = {"to": training(base, task, reference)} | {n: training(base, task, m) for n, m in chosen.items()}
        train = kept[f"training {' '.join(group)}"] = measured(steps)
        sides: dict[str, Turn] = {"alone": repeated(alone)}
        for name, method in chosen.items():
            sides |= {f"{name} {K}": passing(base, batch, method, K) for K in (1, 8)}
        serve = kept[f"passes {' '.join(group)}"] = measured(sides)
        for name, method in chosen.items():
            who = f"{name} ({method.place})"
            target = TARGET if method.place == "activations" else None
            ms = f"{1e3 * train.cost(name).median:.3g} ms a step, LoRA {1e3 * train.cost('to').median:.3g} ms"
            note = f"{trained(base, method):,} parameters, LoRA {trained(base, reference):,}; {ms}"
            ratio = train.ratio(name, "to")
            add(Row.of("methods", f"{who}: training", ratio, target=target, better="less", note=note))
            for what, variant in (("1 adapter", f"{name} 1"), ("8 adapters", f"{name} 8")):
                ms = f"{1e3 * serve.cost(variant).median:.3g} ms, alone {1e3 * serve.cost('alone').median:.3g} ms"
                add(Row.of("methods", f"{who}: {what}", serve.ratio(variant, "alone"), better="less", note=ms))
    if not o.methods:
        own: dict[str, Turn] = {f"mix {K}": passing(base, batch, reference, K) for K in (1, 8, 32)}
        paths = kept["paths"] = measured(own | {n.replace("mix", "generic"): generic(turn) for n, turn in own.items()})
        for K in (1, 8, 32):
            what = f"lora by the generic path to its own: {K} adapter{'s' * (K > 1)}"
            ms = f"{1e3 * paths.cost(f'generic {K}').median:.3g} and {1e3 * paths.cost(f'mix {K}').median:.3g} ms"
            add(Row.of("methods", what, paths.ratio(f"generic {K}", f"mix {K}"), note=ms))
    show(sorted(rows.values(), key=placed))


def placed(row: Row) -> tuple[int, float]:
    """Where it stands in the table: by what it measures, then by value."""
    parts = ("training", "1 adapter", "8 adapters")
    part = row.what.rpartition(": ")[2]
    return len(parts) if "generic" in row.what else parts.index(part), row.value


if __name__ == "__main__":
    main()
