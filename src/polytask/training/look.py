"""What a selector sees of a job before it is trained: gradients, passes, a trial training, the validation score."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polytask.backbones import Backbone, Batch
from polytask.methods import Method, Params
from polytask.methods.lifting import Plan, planned
from polytask.methods.passes import Seat, forward, schedule
from polytask.methods.selectors.selector import Penalty

if TYPE_CHECKING:
    from polytask.training.learner import Learner
    from polytask.training.loop import Loop


class Looking:
    """The `polytask.methods.selectors.Look` of a learner; `loop` opens a loop over copies of it."""

    def __init__(self, backbone: Backbone, learner: Learner, loop: Callable[[Learner, Penalty | None], Loop]) -> None:
        self.backbone, self.method, self.tensors = backbone, learner.job.method, dict(learner.tensors)
        self.writing = learner.job.head.text is not None
        self.seed = learner.job.settings.seed
        self._learner, self._loop = learner, loop

    def gradients(self, method: Method, tensors: Params, rows: int, passes: int) -> Iterator[Params]:
        copy = self._copy(method, tensors)
        loop = self._loop(copy, None)
        for lot in self._lots(rows, passes):
            loop.backward([copy], [lot])
            yield {n: t.grad.detach() for n, t in copy.tensors.items() if t.grad is not None}
            for t in copy.tensors.values():
                t.grad = None

    def outputs(self, method: Method, tensors: Params, rows: int, passes: int, times: int) -> Iterator[list[Tensor]]:
        head = {n.removeprefix("head/"): t for n, t in tensors.items() if n.startswith("head/")}
        order, weights = planned([self._learner.terms(method, tensors)])
        seats = [Seat(self._learner.job.head, head, weights[0])]
        plan = Plan(self.backbone, order, training=True)
        for lot in self._lots(rows, passes):
            units = [self._learner.units[i] for i in lot]
            packs = [*schedule(seats, units, [0] * len(lot), packable=self.backbone.packable)]
            yield [
                torch.cat([z for p in packs for _, _, z in forward(plan, seats, [units[i] for i in p], [0] * len(p))])
                for _ in range(times)
            ]

    def read(self, rows: int, passes: int) -> Iterator[Batch]:
        causal = self._learner.job.head.causal
        for lot in self._lots(rows, passes):
            batch = self.backbone.collate([ids for i in lot for ids in self._learner.units[i].ids])
            with torch.no_grad():
                self.backbone.hidden(batch, causal=causal)
            yield batch

    def trained(self, method: Method, tensors: Params, epochs: float = 1.0, penalty: Penalty | None = None) -> Params:
        copy = self._copy(method, tensors)
        rounds = copy.job.settings.rounds(copy.steps_an_epoch)
        shorter = replace(copy.job.settings, epochs=max(1, round(epochs * rounds)))
        copy.job = replace(copy.job, settings=shorter)
        copy.held = []  # the last tensors are wanted, and not the best
        self._loop(copy, penalty).run()
        return {n: t.detach() for n, t in copy.tensors.items()}

    @torch.no_grad()
    def score(self, method: Method, tensors: Params) -> float:
        copy = self._copy(method, tensors)
        return self._loop(copy, None).validate([copy])[0]

    def _lots(self, rows: int, passes: int) -> list[list[int]]:
        n = len(self._learner.units)
        order = random.Random(self.seed).sample(range(n), n)
        return [order[i : i + rows] for i in range(0, n, rows)][: passes or None]

    def _copy(self, method: Method, tensors: Params) -> Learner:
        return replace(
            self._learner,
            job=replace(self._learner.job, method=method, selector=None),
            method=method,
            tensors={n: t.detach().clone() for n, t in tensors.items()},
            units=[replace(unit, states=None) for unit in self._learner.units],
            order=[],
            history=[],
            losses=[],
            best_tensors={},
            optimiser=None,
        )
