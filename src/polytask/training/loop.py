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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.backbones import Backbone, heads, perfect, text
from polytask.errors import PolytaskError, UsageError
from polytask.methods import passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.method import Method
from polytask.methods.passes import Seat, Unit
from polytask.methods.selectors.selector import Penalty
from polytask.tasks.scorers import score
from polytask.training import checkpoint, probe, tfew
from polytask.training.look import Looking
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


@dataclass(eq=False)
class Learner:
    """One job's data, tensors and state."""

    job: Job
    units: list[Unit]
    targets: list[Any]
    held: list[Unit]
    tensors: dict[str, Tensor]
    method: Method
    wrong: list[list[Unit]] = field(default_factory=list)
    """Each training example's wrong answers, where they are trained too (`tfew`)."""
    shares: dict[str, Tensor] = field(default_factory=dict)
    """See `Choice.shares`."""
    penalty: Penalty | None = None
    """Added to the loss, beside what the method itself adds."""
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
    owner: Learner | None = None
    """The one whose optimiser moves the tensors that are shared with it."""

    @property
    def over(self) -> bool:
        """Whether it has learnt what it can."""
        return self.step >= self.steps or self.stale >= self.job.settings.patience

    @property
    def common(self) -> list[str]:
        """The names of the tensors that are shared with others."""
        return [n for n in self.tensors if n.rpartition("/")[2] in self.method.common and not n.startswith("head/")]

    @property
    def chosen(self) -> int:
        """How many numbers are trained."""
        own = {n: t for n, t in self.tensors.items() if self.method.trains(n)}
        return sum(int(self.shares[n].count_nonzero()) if n in self.shares else t.numel() for n, t in own.items())

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
    begun = _begun(job, own)
    tensors = {f"head/{name}": t for name, t in first.items()} | own | begun
    weights = None
    if settings.balanced and job.head.targets and not job.head.text:
        weights = heads.class_weights(job.head, [e.output for e in task.train if e.output is not None])
    return Learner(
        job=job,
        units=passes.encode(
            backbone, job.head, task.train, min(settings.tokens, backbone.max_length - job.method.slots)
        ),
        targets=[] if job.head.text else [heads.encode(job.head, e.output) for e in task.train],
        held=passes.encode(
            backbone, job.head, task.validation, min(settings.tokens, backbone.max_length - job.method.slots)
        ),
        tensors={name: t.to(backbone.device) for name, t in tensors.items()},
        method=job.method,
        wrong=passes.wrong(backbone, job.head, task.train) if job.head.text and job.head.text.objective else [],
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
    if head.pool == "labels":
        _attend(backbone, learner)
        return
    q = learner.tensors.get("head/q")
    joined = torch.stack if head.kind != "tagging" else torch.cat
    φ = joined(passes.features(backbone, head, learner.units, q))
    held_φ = joined(passes.features(backbone, head, learner.held, q)) if learner.held else φ[:0]
    y = _targets(learner, range(len(learner.units))).to(backbone.device)

    def validate(p: dict[str, Tensor]) -> float:
        outputs, _ = heads.decode(head, heads.read(head, p, held_φ))
        if head.kind == "tagging":
            given = iter(outputs)
            outputs = [
                tuple(str(next(given)) if at >= 0 else head.targets[0] for at in unit.starts or ())
                for unit in learner.held
            ]
        return _score(learner, outputs)

    if head.masks:
        p = learner.head | {"c": perfect.prototypes(φ, y, len(head.targets))}
    else:
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
    _begin(learner, p, validate(p), SOFTER if head.targets and not head.masks else 1.0)


def _attend(backbone: Backbone, learner: Learner) -> None:
    """Fit a head whose labels attend to tokens, on frozen features: those of as many training examples, drawn by the
    seed, as CACHE_BYTES hold."""
    head, task = learner.job.head, learner.job.task
    drawn = torch.Generator().manual_seed(learner.job.settings.seed)
    order = torch.randperm(len(learner.units), generator=drawn).tolist()
    used = itertools.accumulate(4 * backbone.hidden_size * len(learner.units[i].ids[0]) for i in order)
    chosen = sorted(i for i, size in zip(order, used, strict=True) if size <= CACHE_BYTES or i == order[0])
    φ = passes.features(backbone, head, [learner.units[i] for i in chosen])
    held_φ = passes.features(backbone, head, learner.held)
    y = _targets(learner, chosen).to(backbone.device)
    E = passes.embed(backbone, [text.described(label) for label in task.labels], learner.job.settings.tokens)

    def validate(p: dict[str, Tensor]) -> float:
        with torch.no_grad():
            z = [probe.tokenwise(head, p, held_φ[i : i + 64]) for i in range(0, len(held_φ), 64)]
        return _score(learner, heads.decode(head, torch.cat(z))[0] if z else [])

    with torch.enable_grad():
        p = probe.descend(
            head,
            φ,
            y,
            learner.head | {"E": E.to(backbone.device)},
            validate if learner.held else None,
            weights=learner.class_weights,
            seed=learner.job.settings.seed,
        )
    _begin(learner, p, validate(p))


def _begin(learner: Learner, p: dict[str, Tensor], score: float, softer: float = 1.0) -> None:
    """Have the learner start from a head that was fitted on frozen features, its logits times `softer`."""
    learner.probe = learner.best = score
    learner.probe_tensors = {f"head/{name}": t.detach().clone() for name, t in p.items()}
    learner.best_tensors = {n: t.clone() for n, t in (learner.tensors | learner.probe_tensors).items()}
    learner.tensors |= {name: softer * t for name, t in learner.probe_tensors.items()}


def _begun(job: Job, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that training begins with instead of the method's own: those of the job's adapter, but for its
    head."""
    if job.begin is None:
        return {}
    given = {n: t for n, t in job.begin.tensors.items() if not n.startswith(("head/", "task/"))}
    wrong = sorted(n for n in given.keys() ^ own.keys() if n in given or n in own) or [
        n for n, t in given.items() if t.shape != own[n].shape
    ]
    if wrong:
        raise UsageError(
            f"task {job.task.name}: {job.method.name} with these hyperparameters cannot begin with adapter "
            f"{job.begin.name} ({job.begin.method}): they differ in {wrong[0]}; give those it was made with"
        )
    return {n: t.detach().clone().float() for n, t in given.items()}


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
    learner.best_tensors = {n: t.clone() for n, t in (learner.tensors | learner.probe_tensors).items()}
    if choice.done:
        learner.done = True
        learner.best, learner.best_tensors = look.score(choice.method, choice.tensors), choice.tensors


def _penalise(learner: Learner) -> None:
    """Add the gradients of what the method and a selector's trial training add to the loss."""
    method = learner.method
    terms = [method.penalty(dict(p)) for p in Active.of(method, learner.tensors).at.values()]
    if learner.penalty is not None:
        terms.append(learner.penalty(learner.tensors))
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
        inner = [t for name, t in own.items() if not name.startswith("head/") and name not in others]
        outer = [t for name, t in own.items() if name.startswith("head/")]
        rate = settings.rate(method.name, self.backbone.hidden_size)
        # The matrices of labels that attend start where their fit ended, and bear no higher rate than it had.
        head_rate = min(settings.head_lr, probe.RATE) if learner.job.head.pool == "labels" else settings.head_lr
        learner.optimiser = torch.optim.AdamW(
            [
                {"params": inner, "lr": rate, "peak": rate, "weight_decay": settings.weight_decay},
                {"params": outer, "lr": head_rate, "peak": head_rate, "weight_decay": 0.0},
            ],
            fused=True,
        )

    def _step(self, active: list[Learner]) -> None:
        self.backward(active, [self._next(learner) for learner in active])
        for learner in active:
            if self._rank == 0:
                _penalise(learner)
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
                    y = _targets(learner, examples).to(z.device)
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
        return max(1, int((_targets(learner, batch) != heads.IGNORED).sum()))

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
        adapters = [Active.of(learner.method, learner.tensors) for learner in learners]
        one = torch.eye(len(learners))
        reads = heads.taught if training else dict
        seats = [Seat(learner.job.head, reads(learner.head), one[i]) for i, learner in enumerate(learners)]
        return Plan(self.backbone, adapters, training=training), seats

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
        adapter = Active.of(learner.method, learner.tensors)
        h = passes.features(self.backbone, learner.job.head, learner.units, adapter=adapter, start=self.start)
        y = _targets(learner, range(len(learner.units))).to(h[0].device)
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
            if (learner.method.slots or learner.wrong) and not learner.done:
                return 0
            for name in learner.tensors:
                site = name.rpartition("/")[0].removeprefix(prefix)
                if learner.done or site in ("head", "shared"):
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
