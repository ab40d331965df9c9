"""A race: several methods are trained for some epochs, the better half of them for more, until one is left.

    n candidates, k = ⌈log₂ n⌉ rungs; at rung i = 1 ... k all that are left have been trained for E / 2^(k−i+1) epochs,
    and the ⌈n_i / 2⌉ with the best validation scores go on; the last one is trained for all E

Successive halving: Jamieson, Talwalkar 2016, arXiv 1502.07943. Nobody begins anew: a training stops at a rung and goes
on from there, at the rate that it would have had without the stop, so that the winner is what it would be alone. With
n = 4 a race takes 2 E epochs. Equal scores go to who stands first.

The four were chosen among eight on the validation splits of two tasks of the demo, tickets and calendar. DoRA on all
maps was as good as they are, and takes 1.3 times as long as LoRA; LoRA on query and value, bottleneck and (IA)³ were
worse.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polytask.adapters import HeadCard
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build
from polytask.tasks import Task
from polytask.training import Event, Job, Learned, Settings, train
from polytask.training.heat import Heat, Start


@dataclass(frozen=True)
class Candidate:
    """A method by name, its hyperparameters, and its peak rate."""

    method: str
    hyperparameters: Mapping[str, Any]
    lr: float

    @property
    def name(self) -> str:
        return f"{self.method} at {self.lr:g}"


@dataclass(frozen=True)
class Rung:
    """Each candidate's best validation score after so many epochs, the best candidate first, None where training
    failed; and the seconds of all, since the rung before."""

    epochs: int
    scores: Mapping[str, float | None]
    seconds: float

    def __str__(self) -> str:
        said = (f"{name} {'failed' if score is None else f'{score:.3f}'}" for name, score in self.scores.items())
        return f"race, epoch {self.epochs} ({self.seconds:.1f} s): {', '.join(said)}"


@dataclass(frozen=True)
class Won:
    """What a race gives. `cost` is the epochs of all over those of the winner; the seconds of `learned` are of all."""

    job: Job
    learned: Learned
    rungs: tuple[Rung, ...]
    cost: float


def candidates(lora: Candidate, settings: Settings, width: int, *, writing: bool) -> list[Candidate]:
    """Who runs: `lora` on all linear maps, at its rate and at another; parallel adapters; and biases.

    Where the answer is in text no head was fitted before, and the methods' own rates are too low.
    """
    factor = 2.5 if writing else 1.0
    other = replace(lora, lr=lora.lr / 3 if writing else 3 * lora.lr)
    return [lora, other, *(Candidate(m, {}, factor * settings.rate(m, width)) for m in ("parallel", "bitfit"))]


def race(
    base: Backbone,
    task: Task,
    head: HeadCard,
    entered: Sequence[Candidate],
    settings: Settings,
    *,
    folder: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Won:
    """Race the candidates and train the winner to the end.

    `folder` keeps the checkpoints of all; a race that was stopped goes on from them to the same end. Raises
    PolytaskError where there is no validation split to judge by, or nobody can be trained.
    """
    if not task.validation:
        raise PolytaskError(f"task {task.name}: a race needs validation examples to judge by; name a method instead")
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return race(base, task, head, entered, settings, folder=Path(name), on_event=on_event)
    start = Start(base, task, head, settings)
    left: list[_Runner] = []
    why = ""
    for i, one in enumerate(entered):
        job = Job(task, build(one.method, one.hyperparameters), head, replace(settings, lr=one.lr))
        try:
            heat = start.heat(job.method, job.settings, folder / str(i), on_event)
        except UsageError as error:  # the backbone has none of its sites
            why = str(error)
        else:
            left.append(_Runner(one, job, heat, folder / str(i)))
    all_of_them = [*left]
    E = settings.rounds(-(-len(task.train) // settings.batch))
    k = math.ceil(math.log2(max(1, len(left))))
    rungs: list[Rung] = []
    for i in range(1, k + 1):
        epochs = max(1, round(E / 2 ** (k - i + 1)))
        before = sum(runner.heat.seconds for runner in left)
        found: dict[str, float | None] = {}
        for runner in left:
            try:
                found[runner.name] = runner.heat.run(epochs)
            except PolytaskError as error:
                found[runner.name], why = None, str(error)
        order = sorted(left, key=lambda r: -math.inf if (s := found[r.name]) is None else s, reverse=True)
        seconds = sum(runner.heat.seconds for runner in left) - before
        rungs.append(Rung(epochs, {r.name: found[r.name] for r in order}, round(seconds, 3)))
        left = [r for r in order if found[r.name] is not None][: -(-len(left) // 2)]
    if not left:
        raise PolytaskError(f"task {task.name}: nobody could run the race: {why}")
    [winner] = left[:1]
    others = [runner for runner in all_of_them if runner is not winner]
    [learned] = train(base, [winner.job], on_event=on_event, folder=winner.folder)
    total = len(learned.history) + sum(runner.heat.epochs for runner in others)
    # The last training fits the head again, and finds its checkpoint then.
    seconds = learned.seconds + 2 * start.seconds + sum(runner.heat.seconds for runner in others)
    return Won(winner.job, replace(learned, seconds=seconds), tuple(rungs), total / max(1, len(learned.history)))


@dataclass(frozen=True, eq=False)
class _Runner:
    candidate: Candidate
    job: Job
    heat: Heat
    folder: Path

    @property
    def name(self) -> str:
        return self.candidate.name
