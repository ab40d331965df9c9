"""One job of a training: its data as units, its tensors, and the head it starts from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, heads, perfect, text
from polytask.composition.compose import stack
from polytask.errors import PolytaskError, UsageError
from polytask.methods import passes
from polytask.methods.lifting import Active, Plan, Terms, planned
from polytask.methods.method import Method
from polytask.methods.passes import Seat, Unit
from polytask.methods.selectors.selector import Penalty
from polytask.tasks.scorers import score
from polytask.training import probe
from polytask.training.settings import Job

# Training starts from the probe's logits times this. A probe that separates its training data has a loss, and so a
# gradient, near zero, and the method would learn nothing.
SOFTER = 0.3
EMBEDDED = 2000  # training inputs that are shown to a method before it starts
CACHE_BYTES = 512 << 20  # hidden states of a frozen prefix are kept up to this size
PREDICTED = "p(token)"  # the geometric mean of the probabilities of the answers' tokens


@dataclass(eq=False)
class Learner:
    """One job's data, tensors and state."""

    job: Job
    units: list[Unit]
    targets: list[Any]
    held: list[Unit]
    tensors: dict[str, Tensor]
    method: Method
    sources: tuple[Active, ...] = ()
    """What a composed method is made of."""
    above: tuple[Terms, ...] = ()
    """What it stands on."""
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

    def terms(self, method: Method | None = None, tensors: Mapping[str, Tensor] | None = None) -> Terms:
        """What its rows ask for, with these instead of its own method and tensors."""
        method = (method or self.method).annealed(min(1.0, self.step / self.steps))
        own = Active.of(method, self.tensors if tensors is None else tensors, self.sources)
        return stack([*self.above, tuple((1.0, part) for part in own.parts)])

    @property
    def elsewhere(self) -> bool:
        """Whether it starts where a head on frozen features does not stand, so that this one's score is not its own."""
        return self.method.elsewhere or self.job.begin is not None

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


def prepare(backbone: Backbone, job: Job, place: int = 0) -> Learner:
    """`place`: how many before it share tensors with it. What is its own starts at a seed of its own, or jobs of one
    seed would pull what they share the same way."""
    task = job.task
    if not task.train:
        raise PolytaskError(f"task {task.name}: no training examples")
    unlabelled = next((e for e in task.train if e.output is None), None)
    if unlabelled is not None and job.soft is None:
        raise PolytaskError(f"task {task.name}: training example {unlabelled.id} has no output")
    settings = job.settings
    room = backbone.max_length - job.method.slots - sum(a.method.slots for part in job.above for _, a in part)
    first = heads.start(job.head, backbone.hidden_size, settings.seed)
    units = passes.encode(backbone, job.head, task.train, min(settings.tokens, room))
    own = job.method.start(backbone, settings.seed, writing=job.head.text is not None)
    if place:
        other = job.method.start(backbone, settings.seed + place, writing=job.head.text is not None)
        own |= {name: t for name, t in other.items() if name.rpartition("/")[2] not in job.method.common}
    own = {**job.method.shown(own, lambda: _embedded(backbone, job, units))}
    begun = _begun(job, own)
    tensors = {f"head/{name}": t for name, t in first.items()} | own | begun
    weights = None
    if settings.balanced and job.head.targets and not job.head.text:
        weights = heads.class_weights(job.head, [e.output for e in task.train if e.output is not None])
    return Learner(
        job=job,
        units=units,
        targets=[] if job.head.text or job.soft is not None else [heads.encode(job.head, e.output) for e in task.train],
        held=passes.encode(backbone, job.head, task.validation, min(settings.tokens, room)),
        tensors={name: t.to(backbone.device) for name, t in tensors.items()},
        method=job.method,
        sources=job.sources,
        above=job.above,
        wrong=passes.wrong(backbone, job.head, task.train) if job.head.text and job.head.text.objective else [],
        class_weights=None if weights is None else weights.to(backbone.device),
    )


def _embedded(backbone: Backbone, job: Job, units: Sequence[Unit]) -> Tensor:
    """Mean-pooled last states [N, d] of the training inputs, of at most EMBEDDED that are drawn by the seed."""
    rows = [Unit((ids,)) for unit in units for ids in unit.ids if ids]
    drawn = torch.Generator().manual_seed(job.settings.seed)
    chosen = torch.randperm(len(rows), generator=drawn)[:EMBEDDED].tolist()
    plain = HeadCard(kind="classification", causal=job.head.causal)
    return torch.stack(passes.features(backbone, plain, [rows[i] for i in chosen])).cpu()


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


def targets(learner: Learner, members: Sequence[int]) -> Tensor:
    """The targets of some training examples, in the shape of their logits."""
    if learner.job.head.text:
        return torch.tensor([token for i in members for token in learner.units[i].target or ()])
    if learner.job.soft is not None:
        return learner.job.soft[list(members)]
    return targets_of(learner.job.head, [learner.units[i] for i in members], [learner.targets[i] for i in members])


def targets_of(head: HeadCard, units: Sequence[Unit], encoded: Sequence[Any]) -> Tensor:
    """Encoded outputs in the shape of a head's logits."""
    found = list(encoded)
    if head.reads == "words":
        rows = zip(encoded, (unit.starts or () for unit in units), strict=True)
        found = [tag for tags, starts in rows for tag, at in zip(tags, starts, strict=True) if at >= 0]
    return torch.tensor(found, dtype=torch.long if head.kind in ("classification", "tagging") else torch.float32)


@torch.no_grad()
def fit_head(backbone: Backbone, learner: Learner) -> None:
    """Fit the head on frozen features: the baseline, and where training starts. Where answers are in text, what the
    backbone alone makes of them."""
    head = learner.job.head
    if head.text:
        order, weights = planned([stack(learner.above)])
        seat = Seat(head, {}, weights[0])
        log_p = passes.logprobs(Plan(backbone, order), [seat], learner.held, [0] * len(learner.held))
        learner.probe = predicted(log_p)
        learner.best = -math.inf if learner.elsewhere else learner.probe
        learner.best_tensors = {name: t.clone() for name, t in learner.tensors.items()}
        return
    if head.pool == "labels":
        _attend(backbone, learner)
        return
    q = learner.tensors.get("head/q")
    joined = torch.stack if head.kind != "tagging" else torch.cat
    below = stack(learner.above)
    φ = joined(passes.features(backbone, head, learner.units, q, terms=below))
    held_φ = joined(passes.features(backbone, head, learner.held, q, terms=below)) if learner.held else φ[:0]
    y = targets(learner, range(len(learner.units))).to(backbone.device)

    def validate(p: dict[str, Tensor]) -> float:
        outputs, _ = heads.decode(head, heads.read(head, p, held_φ))
        if head.kind == "tagging":
            given = iter(outputs)
            outputs = [
                tuple(str(next(given)) if at >= 0 else head.targets[0] for at in unit.starts or ())
                for unit in learner.held
            ]
        return scored(learner, outputs)

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
    below = stack(learner.above)
    φ = passes.features(backbone, head, [learner.units[i] for i in chosen], terms=below)
    held_φ = passes.features(backbone, head, learner.held, terms=below)
    y = targets(learner, chosen).to(backbone.device)
    E = passes.embed(backbone, [text.described(label) for label in task.labels], learner.job.settings.tokens)

    def validate(p: dict[str, Tensor]) -> float:
        with torch.no_grad():
            z = [probe.tokenwise(head, p, held_φ[i : i + 64]) for i in range(0, len(held_φ), 64)]
        return scored(learner, heads.decode(head, torch.cat(z))[0] if z else [])

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
    learner.probe = score
    learner.best = -math.inf if learner.elsewhere else score
    learner.probe_tensors = {f"head/{name}": t.detach().clone() for name, t in p.items()}
    learner.best_tensors = {n: t.clone() for n, t in (learner.tensors | learner.probe_tensors).items()}
    learner.tensors |= {name: softer * t for name, t in learner.probe_tensors.items()}


def penalise(learner: Learner) -> None:
    """Add the gradients of what the method and a selector's trial training add to the loss."""
    parts = Active.of(learner.method, learner.tensors).parts
    terms = [part.method.penalty(dict(p)) for part in parts for p in part.at.values()]
    if learner.penalty is not None:
        terms.append(learner.penalty(learner.tensors))
    found = [term for term in terms if term is not None]
    if found:
        torch.stack(found).sum().backward()  # type: ignore[no-untyped-call]


def predicted(log_p: Sequence[Tensor]) -> float:
    """How well answers are predicted: the geometric mean of their tokens' probabilities, exp(−loss)."""
    return math.exp(float(torch.cat([*log_p]).mean())) if log_p else 0.0


def scored(learner: Learner, outputs: Sequence[Any]) -> float:
    if not learner.held:
        return 0.0
    return score(learner.job.task, outputs, learner.job.task.validation, resamples=0).value
