"""A task's examples as an adapter's head reads them, for rules that look at data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, heads, text
from polytask.composition.differences import Weighed
from polytask.composition.merging.fitted.fitted import Fitted
from polytask.errors import UsageError
from polytask.methods import passes
from polytask.methods.passes import Seat, Unit
from polytask.tasks import Task


@dataclass(frozen=True)
class Read:
    """`seat`: an adapter's own head, on rows that have the plan's only adapter. `units`: examples. `targets`: of each,
    what its head is to answer [1, ...], or [words], [tokens]; none where inputs alone are read."""

    name: str
    seat: Seat
    units: list[Unit]
    targets: list[Tensor]

    @property
    def head(self) -> HeadCard:
        return self.seat.head

    def terms(self, i: int) -> int:
        """How many losses example i has: of one, or of each of its words or tokens that has a target."""
        if self.head.reads == "sequence":
            return 1
        return int((self.targets[i] != heads.IGNORED).sum()) if self.targets else len(self.units[i].at)


def read(
    rule: Fitted, base: Backbone, sources: Sequence[Weighed], tasks: Sequence[Task], n: int, *, labelled: bool
) -> list[Read]:
    """Of each task, n examples that the rule's seed draws from its split; only inputs are read where not `labelled`.

    Raises UsageError where there are none, an adapter has no head, or its head is another kind of task's.
    """
    return [_read(rule, base, source, task, n, labelled) for source, task in zip(sources, tasks, strict=True)]


def _read(rule: Fitted, base: Backbone, source: Weighed, task: Task, n: int, labelled: bool) -> Read:
    one, head = source.adapter, source.adapter.head
    if head is None:
        raise UsageError(f"{rule.name}: adapter {one.name} has no head to read task {task.name} by")
    if head.kind != task.kind:
        raise UsageError(f"{rule.name}: adapter {one.name} answers {head.kind}, and task {task.name} is {task.kind}")
    known = [e for e in task.split(rule.split) if e.output is not None or not labelled]
    if not known:
        raise UsageError(f"{rule.name}: task {task.name} has no {'labelled ' * labelled}examples in split {rule.split}")
    examples = random.Random(rule.seed).sample(known, min(n, len(known)))
    params = {name: t.to(base.device) for name, t in one.at("head").items()}
    seat = Seat(head, params, torch.ones(1))
    if head.text and not labelled:
        asked = text.encode(base, head, [text.ask(head, replace(e, output=None)) for e in examples])
        return Read(task.name, seat, passes.answered(base, [replace(a, target=[0]) for a in asked]), [])
    units = passes.encode(base, head, examples)
    if not labelled:
        return Read(task.name, seat, units, [])
    if head.text:
        return Read(task.name, seat, units, [torch.tensor(unit.target) for unit in units])
    try:
        targets = [heads.encode(head, e.output) for e in examples]
    except KeyError as error:
        raise UsageError(f"{rule.name}: adapter {one.name} does not know label {error} of task {task.name}") from None
    if head.kind == "tagging":
        pairs = zip(targets, units, strict=True)
        tags = [[tag for tag, at in zip(own, u.starts or (), strict=True) if at >= 0] for own, u in pairs]
        return Read(task.name, seat, units, [torch.tensor(own, dtype=torch.long) for own in tags])
    dtype = torch.long if head.kind == "classification" else torch.float32
    return Read(task.name, seat, units, [torch.tensor([target], dtype=dtype) for target in targets])
