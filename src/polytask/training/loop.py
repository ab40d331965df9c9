"""The training loop: any number of adapters at once over one frozen backbone.

In each step every job that is still learning takes its next batch; the rows of all batches are sorted by length and
cut into passes, so that rows of different tasks share a pass and little is padding. Each job has its own loss, clipped
gradient, AdamW state, rate and early stopping, so that it learns what it would learn alone.

The backbone is in evaluation mode (no dropout) and has no gradients; what lies below the lowest trained site of all
jobs is computed once and kept.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.backbones import Backbone, heads, perfect
from polytask.errors import PolytaskError
from polytask.methods import passes
from polytask.methods.lifting import Plan, planned
from polytask.methods.method import Method
from polytask.methods.passes import Seat, Unit
from polytask.methods.selectors.selector import Penalty
from polytask.training import checkpoint, probe, tfew
from polytask.training.learner import CACHE_BYTES, Learner, fit_head, penalise, predicted, prepare, scored, targets
from polytask.training.look import Looking
from polytask.training.settings import Job


@dataclass(frozen=True)
class Event:
    """What a progress display gets: `kind` is `probe`, `step`, `score` or `done`; `metric` is what `score` measures."""

    kind: str
    job: int
    step: int = 0
    steps: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    score: float = 0.0
    seconds: float = 0.0
    metric: str = ""


@dataclass
class Learned:
    """What training gives: the best tensors by validation score, that of the frozen features, and how it went.
    `method` is the job's, at the sites that its selector left to it; `chosen` counts the numbers that were trained."""

    method: Method
    tensors: dict[str, Tensor]
    chosen: int
    validation: float
    probe: float
    probe_tensors: dict[str, Tensor]
    history: list[dict[str, float]]
    seconds: float
    examples: int
    """Examples seen, counting each time."""


def train(
    backbone: Backbone,
    jobs: Sequence[Job],
    *,
    on_event: Callable[[Event], None] | None = None,
    folder: Path | None = None,
    accelerator: Any = None,
) -> list[Learned]:
    """Train one adapter for each job; all of them at once.

    `folder` keeps a checkpoint after every evaluation, and training that finds one there goes on from it to the same
    end. `accelerator` (accelerate.Accelerator) shares each batch among its processes.

    Raises PolytaskError where a job has nothing to learn from or its loss is no longer a number.
    """
    tell = on_event or (lambda event: None)
    methods = [job.method for job in jobs]
    mates = [methods[:i].count(one) if one.common else 0 for i, one in enumerate(methods)]
    learners = [prepare(backbone, job, place) for job, place in zip(jobs, mates, strict=True)]
    for i, learner in enumerate(learners):
        began = time.perf_counter()
        fit_head(backbone, learner)
        learner.seconds = time.perf_counter() - began
        tell(Event("probe", i, score=learner.probe, seconds=learner.seconds, metric=learner.metric))
    for learner in learners:
        learner.done = all(n.startswith("head/") for n in learner.tensors)
    if folder is None or not checkpoint.found(folder):
        for learner in learners:
            began = time.perf_counter()
            _select(backbone, learner)
            learner.seconds += time.perf_counter() - began
    if not all(learner.done for learner in learners):
        Loop(backbone, learners, tell, folder, accelerator).run()
    return [
        Learned(
            method=learner.method,
            tensors=learner.best_tensors,
            chosen=learner.chosen,
            validation=learner.best,
            probe=learner.probe,
            probe_tensors=learner.probe_tensors,
            history=learner.history,
            seconds=learner.seconds,
            examples=learner.step * learner.job.settings.batch,
        )
        for learner in learners
    ]


def _share(learners: Sequence[Learner]) -> None:
    """Give learners whose methods share tensors an owner: the one with the most steps, so that its rate is never at an
    end while another learns."""
    for method in dict.fromkeys(learner.method for learner in learners if learner.common and not learner.done):
        mates = [learner for learner in learners if learner.method == method and not learner.done]
        owner = max(mates, key=lambda learner: learner.steps)
        for learner in mates:
            learner.owner = owner if len(mates) > 1 else None


def _select(backbone: Backbone, learner: Learner) -> None:
    """Have the job's selector choose what is trained."""
    if learner.job.selector is None:
        return

    def open_loop(copy: Learner, penalty: Penalty | None) -> Loop:
        copy.penalty = penalty
        return Loop(backbone, [copy], lambda event: None, None, None)

    look = Looking(backbone, learner, open_loop)
    choice = learner.job.selector.choose(look)
    learner.method, learner.tensors, learner.shares = choice.method, choice.tensors, choice.shares
    if learner.job.begin is not None:  # what was learnt before stays, where it is not chosen
        left = {n: t for n, t in look.tensors.items() if n not in choice.tensors and bool(t.any())}
        learner.tensors, learner.shares = (
            choice.tensors | left,
            choice.shares | {n: torch.zeros_like(t) for n, t in left.items()},
        )
        learner.method = choice.method.only(learner.tensors) if left else choice.method
    learner.best_tensors = {n: t.clone() for n, t in (learner.tensors | learner.probe_tensors).items()}
    if choice.done:
        learner.done = True
        learner.best, learner.best_tensors = look.score(choice.method, choice.tensors), choice.tensors


class Loop:
    """Steps until every learner is done."""

    def __init__(
        self,
        backbone: Backbone,
        learners: list[Learner],
        tell: Callable[[Event], None],
        folder: Path | None,
        accelerator: Any,
    ) -> None:
        self.backbone, self.learners, self.tell, self.folder = backbone, learners, tell, folder
        self.accelerator = accelerator
        if folder is not None and checkpoint.found(folder):
            checkpoint.restore(folder, learners, backbone.fingerprint, self._open)
        else:
            self._open()
            torch.manual_seed(learners[0].job.settings.seed)
        self.start = self._first_block()
        if self.start:
            self._cache()

    def run(self) -> None:
        while active := [learner for learner in self.learners if not learner.done]:
            began = time.perf_counter()
            self._step(active)
            spent = time.perf_counter() - began
            ended = []
            for learner in active:
                learner.step += 1
                learner.seconds += spent / len(active)
                at = learner.step / learner.steps_an_epoch
                self._tell("step", learner, at, learner.losses[-1], learner.best)
                if learner.step % learner.steps_an_epoch == 0:
                    ended.append(learner)
            if ended:
                self._evaluate(ended)
                if self.folder is not None and (self.accelerator is None or self.accelerator.is_main_process):
                    checkpoint.save(self.folder, self.learners, self.backbone.fingerprint)

    def _open(self) -> None:
        _share(self.learners)
        for learner in self.learners:
            if not learner.done:
                self._prepare(learner)

    def _prepare(self, learner: Learner) -> None:
        """Make the learner's tensors trainable and give them an optimiser; shared ones are its owner's."""
        settings = learner.job.settings
        method = learner.method
        if learner.owner not in (None, learner):
            learner.tensors |= {name: learner.owner.tensors[name] for name in learner.common}
        own = {name: t.requires_grad_() for name, t in learner.tensors.items() if method.trains(name)}
        others = set(learner.common) if learner.owner not in (None, learner) else set()
        inner: dict[str, list[Tensor]] = {}
        for name, t in own.items():
            if not name.startswith("head/") and name not in others:
                inner.setdefault(method.whose(name), []).append(t)
        outer = [t for name, t in own.items() if name.startswith("head/")]
        rates = {owner: settings.rate(owner, self.backbone.hidden_size) for owner in inner}
        # The matrices of labels that attend start where their fit ended, and bear no higher rate than it had.
        head_rate = min(settings.head_lr, probe.RATE) if learner.job.head.pool == "labels" else settings.head_lr
        learner.optimiser = torch.optim.AdamW(
            [
                *(
                    {"params": mine, "lr": rates[owner], "peak": rates[owner], "weight_decay": settings.weight_decay}
                    for owner, mine in inner.items()
                ),
                {"params": outer, "lr": head_rate, "peak": head_rate, "weight_decay": 0.0},
            ],
            fused=True,
        )

    def _step(self, active: list[Learner]) -> None:
        self.backward(active, [self._next(learner) for learner in active])
        for learner in active:
            if self._rank == 0:
                penalise(learner)
            self._update(learner)

    def backward(self, active: list[Learner], batches: Sequence[list[int]]) -> None:
        """The gradients of each learner's mean loss over its batch of training examples, by number."""
        plan, seats = self._plan(active, training=True)
        units: list[Unit] = []
        which: list[int] = []
        index: list[int] = []
        count: list[int] = []
        bound: dict[int, tuple[int, int]] = {}
        for s, (learner, batch) in enumerate(zip(active, batches, strict=True)):
            count.append(self._loss_terms(learner, batch))
            for i in batch[self._rank :: self._world]:
                answers = [learner.units[i], *(learner.wrong[i] if learner.wrong else ())]
                if learner.wrong:
                    bound |= dict.fromkeys(range(len(units), len(units) + len(answers)), (s, i))
                units += answers
                which += [s] * len(answers)
                index += [i] * len(answers)
            learner.losses.append(0.0)
        for pack in passes.schedule(seats, units, which, packable=self.backbone.packable, bound=bound):
            total = torch.zeros((), device=self.backbone.device)
            for s, members, z in passes.forward(
                plan, seats, [units[i] for i in pack], [which[i] for i in pack], self.start
            ):
                learner = active[s]
                examples = [index[pack[j]] for j in members]
                if learner.wrong:
                    each = tfew.losses(z, [units[pack[j]].target or [] for j in members], examples)
                else:
                    y = targets(learner, examples).to(z.device)
                    if learner.job.head.reads == "words":
                        z, y = z[y != heads.IGNORED], y[y != heads.IGNORED]
                    each = heads.losses(learner.job.head, z, y, learner.class_weights)
                loss = each.sum() / count[s]
                learner.losses[-1] += float(loss.detach())
                total = total + loss
            total.backward()  # type: ignore[no-untyped-call]

    def _loss_terms(self, learner: Learner, batch: Sequence[int]) -> int:
        if learner.job.head.reads == "sequence" or learner.wrong:
            return len(batch)
        return max(1, int((targets(learner, batch) != heads.IGNORED).sum()))

    def _update(self, learner: Learner) -> None:
        assert learner.optimiser is not None
        settings = learner.job.settings
        others = set(learner.common) if learner.owner not in (None, learner) else set()
        own = [t for name, t in learner.tensors.items() if name not in others]
        for name, kept in learner.shares.items():  # what stays does not count for clipping
            if (slope := learner.tensors[name].grad) is not None:
                slope.mul_(kept > 0)
        if self._world > 1:
            flat = torch.cat([t.grad.flatten() if t.grad is not None else torch.zeros_like(t).flatten() for t in own])
            flat = torch.cat([flat, flat.new_tensor([learner.losses[-1]])])
            flat = self.accelerator.reduce(flat, reduction="sum")
            learner.losses[-1] = float(flat[-1])
            for tensor, part in zip(own, flat[:-1].split([t.numel() for t in own]), strict=True):
                tensor.grad = part.view_as(tensor)
        norm = float(torch.nn.utils.clip_grad_norm_(own, settings.clip))
        for what, value in (("loss", learner.losses[-1]), ("gradient", norm)):
            if not math.isfinite(value):
                raise PolytaskError(
                    f"task {learner.job.task.name}: the {what} became {value} at step {learner.step + 1}; "
                    f"try a smaller lr than {settings.rate(learner.job.method.name, self.backbone.hidden_size):g}"
                )
        warm = max(1.0, settings.warmup * learner.steps)
        t = learner.step
        share = min((t + 1) / warm, (learner.steps - t) / max(1.0, learner.steps - warm))
        for group in learner.optimiser.param_groups:
            group["lr"] = group["peak"] * share
        before = {name: learner.tensors[name].detach().clone() for name in learner.shares}
        learner.optimiser.step()
        learner.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, kept in learner.shares.items():
                learner.tensors[name].lerp_(before[name], 1 - kept)

    def _next(self, learner: Learner) -> list[int]:
        """The next batch. An epoch is a shuffle, cut into chunks that are sorted by length and cut into batches; what
        is packed side by side needs no sorting."""
        at = learner.step % learner.steps_an_epoch
        if at == 0 or not learner.order:
            settings = learner.job.settings
            epoch = learner.step // learner.steps_an_epoch
            generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
            shuffled = torch.randperm(len(learner.units), generator=generator).tolist()
            chunk = settings.batch * 32
            order: list[list[int]] = []
            for begin in range(0, len(shuffled), chunk):
                near = shuffled[begin : begin + chunk]
                if not (learner.job.head.text and self.backbone.packable):
                    near.sort(key=lambda i: learner.units[i].length)
                order += [near[i : i + settings.batch] for i in range(0, len(near), settings.batch)]
            learner.order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
        return learner.order[at]

    def _plan(self, learners: Sequence[Learner], *, training: bool) -> tuple[Plan, list[Seat]]:
        order, weights = planned([learner.terms() for learner in learners])
        reads = heads.taught if training else dict
        seats = [Seat(one.job.head, reads(one.head), row) for one, row in zip(learners, weights, strict=True)]
        return Plan(self.backbone, order, training=training), seats

    @torch.no_grad()
    def validate(self, learners: list[Learner]) -> list[float]:
        """Each learner's validation score as it is now."""
        for learner in learners:
            if learner.job.head.masks:
                self._place(learner)
        plan, seats = self._plan(learners, training=False)
        return self._values(learners, plan, seats)

    def _place(self, learner: Learner) -> None:
        """Put the prototypes of a head that answers by them where its classes lie now."""
        terms = learner.terms()
        h = passes.features(self.backbone, learner.job.head, learner.units, terms=terms, start=self.start)
        y = targets(learner, range(len(learner.units))).to(h[0].device)
        learner.tensors["head/c"] = perfect.prototypes(torch.stack(h), y, len(learner.job.head.targets))

    def _evaluate(self, learners: list[Learner]) -> None:
        began = time.perf_counter()
        values = self.validate(learners)
        spent = time.perf_counter() - began
        for learner, value in zip(learners, values, strict=True):
            learner.seconds += spent / len(learners)
            recent = learner.losses[-learner.steps_an_epoch :]
            learner.losses = recent
            loss = sum(recent) / len(recent)
            epoch = learner.step // learner.steps_an_epoch
            learner.history.append({"epoch": epoch, "loss": loss, "score": value, "seconds": learner.seconds})
            if value > learner.best or not learner.held:
                learner.best, learner.stale = value, 0
                learner.best_tensors = {name: t.detach().clone() for name, t in learner.tensors.items()}
            else:
                learner.stale += 1
            mates = [other for other in self.learners if other.owner is learner and other is not learner]
            learner.done = learner.over and all(other.done or other.over for other in mates)
            self._tell("score", learner, epoch, loss, value)
            if learner.done:
                self._tell("done", learner, epoch, loss, learner.best)

    def _tell(self, kind: str, learner: Learner, epoch: float, loss: float, score: float) -> None:
        i = self.learners.index(learner)
        self.tell(Event(kind, i, learner.step, learner.steps, epoch, loss, score, learner.seconds, learner.metric))

    def _values(self, learners: list[Learner], plan: Plan, seats: list[Seat]) -> list[float]:
        """Each learner's validation score; of answers in text, how well they are predicted, which needs no writing."""
        values = [0.0] * len(learners)
        for written in (False, True):
            mine = [s for s, learner in enumerate(learners) if (learner.job.head.text is not None) == written]
            units = [unit for s in mine for unit in learners[s].held]
            which = [s for s in mine for _ in learners[s].held]
            find: Callable[..., list[Any]] = passes.logprobs if written else passes.answer
            found = iter(find(plan, seats, units, which))
            for s in mine:
                own = [next(found) for _ in learners[s].held]
                values[s] = predicted(own) if written else scored(learners[s], [output for output, _ in own])
        return values

    @property
    def _rank(self) -> int:
        return self.accelerator.process_index if self.accelerator is not None else 0

    @property
    def _world(self) -> int:
        return self.accelerator.num_processes if self.accelerator is not None else 1

    def _first_block(self) -> int:
        """The first block that holds a trained site of any job, if all below it can be computed once."""
        writing = any(learner.job.head.text for learner in self.learners)
        if not self.backbone.resumable or (writing and self.backbone.kind == "encoder-decoder"):
            return 0
        prefix = "enc." if self.backbone.kind == "encoder-decoder" else ""
        lowest = len(self.backbone.blocks) - 1
        for learner in self.learners:
            if learner.done:
                continue
            acting = [active for _, active in learner.terms()]
            if learner.wrong or any(active.method.slots for active in acting):
                return 0
            for site in itertools.chain(*(active.at for active in acting)):
                number = site.removeprefix(prefix).partition(".")[0]
                lowest = min(lowest, int(number)) if number.isdigit() else 0
        if len({learner.job.head.causal for learner in self.learners}) > 1:
            return 0
        tokens = sum(len(row) for learner in self.learners for unit in learner.units for row in unit.ids)
        size = tokens * self.backbone.hidden_size * self.backbone.dtype.itemsize
        return lowest if size <= CACHE_BYTES else 0

    @torch.no_grad()
    def _cache(self) -> None:
        """Keep what block `start` reads for every training example."""
        causal = self.learners[0].job.head.causal
        for learner in self.learners:
            for pack in passes.packs(learner.units):
                for side in range(len(learner.units[pack[0]].ids)):
                    rows = [learner.units[i].ids[side] for i in pack]
                    states = self.backbone.upto(self.backbone.collate(rows), self.start, causal=causal)
                    for i, row, state in zip(pack, rows, states, strict=True):
                        kept = state[: len(row)].clone()
                        learner.units[i].states = (*(learner.units[i].states or ()), kept)
