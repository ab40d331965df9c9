"""The training loop: any number of adapters at once over one frozen backbone.

In each step every job that is still learning takes its next batch; the rows of all batches are sorted by length and
cut into passes, so that rows of different tasks share a pass and little is padding. Each job has its own loss, clipped
gradient, AdamW state, rate and early stopping, so that it learns what it would learn alone.

The backbone is in evaluation mode (no dropout) and has no gradients; what lies below the lowest trained site of all
jobs is computed once and kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.backbones import Backbone, heads
from polytask.errors import PolytaskError
from polytask.methods import passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat, Unit
from polytask.tasks.scorers import score
from polytask.training import checkpoint, probe
from polytask.training.settings import Job

# Training starts from the probe's logits times this. A probe that separates its training data has a loss, and so a
# gradient, near zero, and the method would learn nothing.
SOFTER = 0.3
CACHE_BYTES = 512 << 20  # hidden states of a frozen prefix are kept up to this size


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


PREDICTED = "p(token)"  # the geometric mean of the probabilities of the answers' tokens


@dataclass
class Learned:
    """What training gives: the best tensors by validation score, that of the frozen features, and how it went."""

    tensors: dict[str, Tensor]
    validation: float
    probe: float
    probe_tensors: dict[str, Tensor]
    history: list[dict[str, float]]
    seconds: float
    examples: int
    """Examples seen, counting each time."""


@dataclass(eq=False)
class Learner:
    """One job's data, tensors and state."""

    job: Job
    units: list[Unit]
    targets: list[Any]
    held: list[Unit]
    tensors: dict[str, Tensor]
    class_weights: Tensor | None = None
    optimiser: torch.optim.Optimizer | None = None
    order: list[list[int]] = field(default_factory=list)
    step: int = 0
    stale: int = 0
    best: float = -float("inf")
    best_tensors: dict[str, Tensor] = field(default_factory=dict)
    probe: float = 0.0
    probe_tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    done: bool = False

    @property
    def metric(self) -> str:
        """What validation scores are: the task's metric, or how well the tokens of answers in text are predicted."""
        return PREDICTED if self.job.head.text else self.job.task.metric

    @property
    def head(self) -> dict[str, Tensor]:
        return {name.removeprefix("head/"): t for name, t in self.tensors.items() if name.startswith("head/")}

    @property
    def steps_an_epoch(self) -> int:
        return -(-len(self.units) // self.job.settings.batch)

    @property
    def steps(self) -> int:
        return self.steps_an_epoch * self.job.settings.rounds(self.steps_an_epoch)


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
    learners = [_prepare(backbone, job) for job in jobs]
    for i, learner in enumerate(learners):
        began = time.perf_counter()
        _probe(backbone, learner)
        learner.seconds = time.perf_counter() - began
        tell(Event("probe", i, score=learner.probe, seconds=learner.seconds, metric=learner.metric))
    moving = [learner for learner in learners if any(not n.startswith("head/") for n in learner.tensors)]
    for learner in learners:
        learner.done = learner not in moving
    if moving:
        Loop(backbone, learners, tell, folder, accelerator).run()
    return [
        Learned(
            tensors=learner.best_tensors,
            validation=learner.best,
            probe=learner.probe,
            probe_tensors=learner.probe_tensors,
            history=learner.history,
            seconds=learner.seconds,
            examples=learner.step * learner.job.settings.batch,
        )
        for learner in learners
    ]


def _prepare(backbone: Backbone, job: Job) -> Learner:
    task = job.task
    if not task.train:
        raise PolytaskError(f"task {task.name}: no training examples")
    unlabelled = next((e for e in task.train if e.output is None), None)
    if unlabelled is not None:
        raise PolytaskError(f"task {task.name}: training example {unlabelled.id} has no output")
    settings = job.settings
    first = heads.start(job.head, backbone.hidden_size, settings.seed)
    own = job.method.start(backbone, settings.seed, writing=job.head.text is not None)
    tensors = {f"head/{name}": t for name, t in first.items()} | own
    weights = None
    if settings.balanced and job.head.targets and not job.head.text:
        weights = heads.class_weights(job.head, [e.output for e in task.train if e.output is not None])
    return Learner(
        job=job,
        units=passes.encode(backbone, job.head, task.train, settings.tokens),
        targets=[] if job.head.text else [heads.encode(job.head, e.output) for e in task.train],
        held=passes.encode(backbone, job.head, task.validation, settings.tokens),
        tensors={name: t.to(backbone.device) for name, t in tensors.items()},
        class_weights=None if weights is None else weights.to(backbone.device),
    )


def _targets(learner: Learner, members: Sequence[int]) -> Tensor:
    """The targets of some training examples, in the shape of their logits."""
    reads = learner.job.head.reads
    if reads == "answer":
        return torch.tensor([token for i in members for token in learner.units[i].target or ()])
    if reads == "words":
        rows = zip((learner.targets[i] for i in members), (learner.units[i].starts or () for i in members), strict=True)
        found = [tag for tags, starts in rows for tag, at in zip(tags, starts, strict=True) if at >= 0]
    else:
        found = [learner.targets[i] for i in members]
    whole = learner.job.head.kind in ("classification", "tagging")
    return torch.tensor(found, dtype=torch.long if whole else torch.float32)


@torch.no_grad()
def _probe(backbone: Backbone, learner: Learner) -> None:
    """Fit the head on frozen features: the baseline, and where training starts. Where answers are in text, what the
    backbone alone makes of them."""
    head = learner.job.head
    if head.text:
        seat = Seat(head, {})
        log_p = passes.logprobs(Plan(backbone, []), [seat], learner.held, [0] * len(learner.held))
        learner.probe = learner.best = _fit(log_p)
        learner.best_tensors = {name: t.clone() for name, t in learner.tensors.items()}
        return
    q = learner.tensors.get("head/q")
    joined = torch.stack if head.kind != "tagging" else torch.cat
    φ = joined(passes.features(backbone, head, learner.units, q))
    held_φ = joined(passes.features(backbone, head, learner.held, q)) if learner.held else φ[:0]
    y = _targets(learner, range(len(learner.units))).to(backbone.device)

    def validate(p: dict[str, Tensor]) -> float:
        outputs, _ = heads.decode(head, heads.logits(p, held_φ))
        if head.kind == "tagging":
            given = iter(outputs)
            outputs = [
                tuple(str(next(given)) if at >= 0 else head.targets[0] for at in unit.starts or ())
                for unit in learner.held
            ]
        return _score(learner, outputs)

    with torch.enable_grad():
        tagging = head.kind == "tagging"
        p = probe.fit(
            head,
            φ,
            y,
            learner.head,
            validate,
            weights=learner.class_weights,
            penalties=probe.PENALTIES[1:3] if tagging else probe.PENALTIES,
            steps=30 if tagging else 60,
        )
    learner.probe = learner.best = validate(p)
    learner.probe_tensors = {f"head/{name}": t.detach().clone() for name, t in p.items()}
    learner.best_tensors = {n: t.clone() for n, t in (learner.tensors | learner.probe_tensors).items()}
    softer = SOFTER if head.targets else 1.0
    learner.tensors |= {name: softer * t for name, t in learner.probe_tensors.items()}


def _penalise(learner: Learner) -> None:
    """Add the gradients of what the method itself adds to the loss."""
    method = learner.job.method
    terms = [method.penalty(dict(p)) for p in Active.of(method, learner.tensors).at.values()]
    found = [term for term in terms if term is not None]
    if found:
        torch.stack(found).sum().backward()  # type: ignore[no-untyped-call]


def _fit(log_p: Sequence[Tensor]) -> float:
    """How well answers are predicted: the geometric mean of their tokens' probabilities, exp(−loss)."""
    return math.exp(float(torch.cat([*log_p]).mean())) if log_p else 0.0


def _score(learner: Learner, outputs: Sequence[Any]) -> float:
    if not learner.held:
        return 0.0
    return score(learner.job.task, outputs, learner.job.task.validation, resamples=0).value


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
        self.start = self._first_block()
        for learner in learners:
            if not learner.done:
                self._open(learner)
        if folder is not None and checkpoint.found(folder):
            checkpoint.restore(folder, learners, backbone.fingerprint)
        else:
            torch.manual_seed(learners[0].job.settings.seed)
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

    def _open(self, learner: Learner) -> None:
        """Make the learner's tensors trainable and give them an optimiser."""
        settings = learner.job.settings
        method = learner.job.method
        own = {name: t.requires_grad_() for name, t in learner.tensors.items() if method.trains(name)}
        inner = [t for name, t in own.items() if not name.startswith("head/")]
        outer = [t for name, t in own.items() if name.startswith("head/")]
        rate = settings.rate(method.name, self.backbone.hidden_size)
        learner.optimiser = torch.optim.AdamW(
            [
                {"params": inner, "lr": rate, "peak": rate, "weight_decay": settings.weight_decay},
                {"params": outer, "lr": settings.head_lr, "peak": settings.head_lr, "weight_decay": 0.0},
            ],
            fused=True,
        )

    def _step(self, active: list[Learner]) -> None:
        plan, seats = self._plan(active, training=True)
        units: list[Unit] = []
        which: list[int] = []
        index: list[int] = []
        count: list[int] = []
        for s, learner in enumerate(active):
            batch = self._next(learner)
            count.append(self._loss_terms(learner, batch))
            mine = batch[self._rank :: self._world]
            units += [learner.units[i] for i in mine]
            which += [s] * len(mine)
            index += mine
            learner.losses.append(0.0)
        for pack in passes.schedule(seats, units, which, packable=self.backbone.packable):
            total = torch.zeros((), device=self.backbone.device)
            for s, members, z in passes.forward(
                plan, seats, [units[i] for i in pack], [which[i] for i in pack], self.start
            ):
                learner = active[s]
                y = _targets(learner, [index[pack[j]] for j in members]).to(z.device)
                if learner.job.head.reads == "words":
                    z, y = z[y != heads.IGNORED], y[y != heads.IGNORED]
                loss = heads.losses(learner.job.head, z, y, learner.class_weights).sum() / count[s]
                learner.losses[-1] += float(loss.detach())
                total = total + loss
            total.backward()  # type: ignore[no-untyped-call]
        for learner in active:
            if self._rank == 0:
                _penalise(learner)
            self._update(learner)

    def _loss_terms(self, learner: Learner, batch: Sequence[int]) -> int:
        if learner.job.head.reads == "sequence":
            return len(batch)
        return max(1, int((_targets(learner, batch) != heads.IGNORED).sum()))

    def _update(self, learner: Learner) -> None:
        assert learner.optimiser is not None
        settings = learner.job.settings
        own = list(learner.tensors.values())
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
        learner.optimiser.step()
        learner.optimiser.zero_grad(set_to_none=True)

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
        adapters = [Active.of(learner.job.method, learner.tensors) for learner in learners]
        one = torch.eye(len(learners))
        seats = [Seat(learner.job.head, learner.head, one[i]) for i, learner in enumerate(learners)]
        return Plan(self.backbone, adapters, training=training), seats

    @torch.no_grad()
    def _evaluate(self, learners: list[Learner]) -> None:
        plan, seats = self._plan(learners, training=False)
        began = time.perf_counter()
        values = self._values(learners, plan, seats)
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
            learner.done = learner.step >= learner.steps or learner.stale >= learner.job.settings.patience
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
                values[s] = _fit(own) if written else _score(learners[s], [output for output, _ in own])
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
            for name in learner.tensors:
                site = name.rpartition("/")[0].removeprefix(prefix)
                if learner.done or site == "head":
                    continue
                number = site.partition(".")[0]
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
