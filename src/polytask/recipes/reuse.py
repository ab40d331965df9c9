"""A new task from what a library knows: ways to use it, tried in the order of what they cost, and the best one kept.

    s_w = (1/n) Σ_i log p_w(y_i | x_i; what w learns without i's fold)        a way w's score, over n examples

1. `features`: a new head on the frozen backbone.
2. `on NAME`: a new head on what one adapter makes of the text, for each adapter of the library.
3. `on A + B + ...`: a new head on the mean of the best two, three or five of them.
4. `lora`: LoRA from nothing, with its head, and again from another seed; and `lora from NAME`, from the LoRA whose head
   did best.
5. `lora and lora again and lora from NAME`, where one label is to be chosen: the mean of their probabilities.

All are compared by cross-validation on the task's own examples, so that a handful will do, and by log-likelihood, which
tells ways apart where accuracies of eight answers do not. Still the best of twenty on eight examples is often lucky. So
what is taken is the mean, or LoRA from nothing where there is none, unless another way is better than that by more than
`MARGIN` standard errors of the difference, example by example; and that way is not taken in the place of the mean, but
beside it, with half of the weight, since it is the luckiest of many and loses less so where it was luck. Without any
example, the adapter whose training inputs lie nearest to the task's instruction answers, if its labels are the task's.

Heads on features of related tasks: the linear probe of Kornblith, Shlens, Le 2019 (arXiv 1805.08974); choosing among
many sources by a probe on few labels: Poth, Pfeiffer, Rücklé, Gurevych 2021 (arXiv 2104.08247); the mean of several
models in place of the one that looks best: Caruana, Niculescu-Mizil, Crew, Ksikes 2004.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.model_selection import KFold, StratifiedKFold
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import Adapter, HeadCard
from polytask.adapters.expression import Ensemble, Expression, Mix, Name
from polytask.backbones import Backbone, heads, text
from polytask.composition.kept import keep
from polytask.errors import UsageError
from polytask.inference.roster import Source
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Terms, planned
from polytask.methods.lifting import Plan as Run
from polytask.methods.passes import Seat, Unit
from polytask.recipes.adapt import Plan, adapt, automatic, measure
from polytask.recipes.reading import Reading
from polytask.tasks import Task
from polytask.training import Job, Settings, probe, train
from polytask.training.learner import targets_of

MARGIN = 2.0  # standard errors of the difference
FOLDS = 5
MIXED = (2, 3, 5)  # how many of the best adapters are mixed
LOOKED_AT = 32  # adapters of a library whose features are tried: those of the nearest tasks


@dataclass(frozen=True, eq=False)
class Way:
    """A way to answer: a method on top of what `below` does, which begins with the adapter `begin` and has a seed that
    is greater by `seed`; or the mean of `members`, which may be means. `score` is s_w, `each` [n] its terms, `seconds`
    what they took."""

    name: str
    below: Expression | None
    method: str
    each: Tensor
    seconds: float
    begin: str | None = None
    seed: int = 0
    members: tuple[Way, ...] = ()

    @classmethod
    def mean(cls, members: Sequence[Way]) -> Way:
        """Of probabilities, which their terms are the logarithms of."""
        each = torch.stack([way.each for way in members]).logsumexp(0) - math.log(len(members))
        name = " and ".join(f"({way.name})" if way.members else way.name for way in members)
        return cls(name, None, "", each, 0.0, members=tuple(members))

    def weighed(self) -> dict[Way, float]:
        """The ways that it is made of in the end, and how much each counts; they add up to 1."""
        if not self.members:
            return {self: 1.0}
        found: dict[Way, float] = defaultdict(float)
        for member in self.members:
            for way, weight in member.weighed().items():
                found[way] += weight / len(self.members)
        return found

    @property
    def score(self) -> float:
        return float(self.each.mean())

    def better_than(self, other: Way) -> bool:
        """By more than MARGIN standard errors of the difference."""
        d = self.each - other.each
        error = float(d.std()) / math.sqrt(len(d)) if len(d) > 1 else 0.0
        return float(d.mean()) > MARGIN * error


@dataclass(frozen=True)
class Reused:
    """The new adapter; `support` are adapters that were made for it and go into the library with it; the ways that were
    tried, in order, and the one that was taken."""

    adapter: Adapter
    support: tuple[Adapter, ...]
    ways: tuple[Way, ...]
    taken: str


def reuse(
    base: Backbone,
    task: Task,
    library: Sequence[Adapter],
    *,
    settings: Settings | None = None,
    reading: Reading | None = None,
    source: Source | None = None,
    tell: Callable[[str], None] = lambda said: None,
) -> Reused:
    """An adapter for the task, by whatever way does best on its own examples.

    `library`: the adapters to try; those of other weights, and those that cannot stand below a head, are left out.
    `source` has what these are made of. The validation split is used like further training examples.

    Raises UsageError for a task whose answer is in text, and for one without examples that no adapter answers.
    """
    settings, reading = settings or Settings(), reading or Reading()
    known = [one for one in library if one.backbone.fingerprint == base.fingerprint]
    examples = tuple(e for e in (*task.train, *task.validation) if e.output is not None)
    if not examples:
        return _untrained(base, task, known)
    task = replace(task, train=examples, validation=())
    head = reading.design(base, task, settings.limit)
    if head.text:
        raise UsageError(f"task {task.name}: its answer is in text; --reuse is for tasks that a head answers")
    trial = _Trial(base, task, head, settings, known, source)

    ways = [trial.on_top("features", None)]
    tell(_said(ways[0]))
    near = trial.near(LOOKED_AT)
    singles = [trial.on_top(f"on {one.name}", Name(one.id)) for one in near]
    singles.sort(key=lambda way: -way.score)
    for way in singles[:3]:
        tell(_said(way))
    ways += singles
    for k in MIXED:
        if k <= len(singles):
            mean = Mix(tuple((1 / k, way.below) for way in singles[:k] if way.below))
            ways.append(trial.on_top(f"on {' + '.join(way.name.removeprefix('on ') for way in singles[:k])}", mean))
            tell(_said(ways[-1]))
    ready = [one for one in near if one.method == "lora" and not one.needs]
    best = next((one for way in singles for one in ready if way.below == Name(one.id)), None)
    begun = [(f"lora from {best.name}", best.id, 0)] if best else []
    trained = trial.trained(("lora", None, 0), ("lora again", None, 1), *begun)
    if task.kind == "classification":
        trained.append(Way.mean(trained))
    for way in trained:
        tell(_said(way))
    ways += trained
    taken = _chosen(ways)
    tell(f"taken: {taken.name}")

    notes = (f"reuse took {taken.name!r} of {len(ways)} ways: {', '.join(map(_said, _shown(ways, taken)))}",)
    if not taken.members:
        adapter, support = trial.made(taken, task, reading)
    else:
        weighed = taken.weighed()
        made = [trial.made(way, replace(task, name=f"{task.name}.{i}"), reading) for i, way in enumerate(weighed, 1)]
        profile = {n: t for n, t in made[0][0].tensors.items() if n.startswith("task/")}
        # Inputs are routed to the mean, and not to its members.
        members = [replace(one, tensors={n: t for n, t in one.tensors.items() if n not in profile}) for one, _ in made]
        support = [*members, *(one for _, more in made for one in more)]
        known_ = _Known(trial.get, support)
        even = len(set(weighed.values())) == 1
        parts = (
            Name(one.id) if even else Mix(((weight, Name(one.id)),))
            for one, weight in zip(members, weighed.values(), strict=True)
        )
        adapter = keep(Ensemble(tuple(parts)), known_.get, None, task.name)
        adapter = replace(adapter, tensors=profile)
        test = [e for e in task.test if e.output is not None]
        scores = {"test": measure(base, adapter, task, test, settings.tokens, known_)} if test else {}
        card = adapter.card.model_copy(update={"task": task.card(), "scores": scores})
        adapter = replace(adapter, card=card)
    card = adapter.card.model_copy(update={"notes": (*adapter.card.notes, *notes)})
    return Reused(replace(adapter, card=card), tuple(support), tuple(ways), taken.name)


@dataclass(frozen=True)
class _Known:
    """Adapters by id, those that were just made among them."""

    find: Callable[[str], Adapter]
    made: Sequence[Adapter]

    def get(self, ref: str) -> Adapter:
        return next((one for one in self.made if one.id == ref), None) or self.find(ref)


class _Trial:
    """The task's examples in folds, and what each way makes of those that it did not learn from."""

    def __init__(
        self,
        base: Backbone,
        task: Task,
        head: HeadCard,
        settings: Settings,
        known: Sequence[Adapter],
        source: Source | None,
    ) -> None:
        self.base, self.task, self.head, self.settings = base, task, head, settings
        self.known, self.source = {one.id: one for one in known}, source
        self.units: list[Unit] = passes.encode(base, head, task.train, settings.tokens)
        self.y = [heads.encode(head, e.output) for e in task.train]
        self.folds = _folds(task)
        self.composer = Plan(task, over=[*known], library=source).composer()

    def get(self, ref: str) -> Adapter:
        if ref in self.known:
            return self.known[ref]
        if self.source is None:
            raise UsageError(f"adapter {ref}, which another is made of, is not here: give the library that has it")
        return self.source.get(ref)

    def near(self, most: int) -> list[Adapter]:
        """Adapters that can stand below a head, those of the nearest tasks first."""
        fit = [one for one in self.known.values() if self._terms(Name(one.id)) is not None]
        inputs = F.normalize(passes.gist(self.base, [e.text for e in self.task.train]).mean(0), dim=0)
        return sorted(fit, key=lambda one: -_nearness(inputs, one))[:most]

    def _terms(self, below: Expression | None) -> Terms | None:
        """None for an adapter that does nothing below a head: a head of its own alone, or PEFT's layers."""
        if below is None:
            return ()
        terms = self.composer.terms(below)
        return terms if any(a.at and not a.method.opaque and not a.method.slots for _, a in terms) else None

    def on_top(self, name: str, below: Expression | None) -> Way:
        """A head on the states that `below` leaves; the penalty on it that does best."""
        began = time.perf_counter()
        joined = torch.cat if self.head.kind == "tagging" else torch.stack
        φ = passes.features(self.base, self.head, self.units, terms=self._terms(below) or ())
        best: Tensor | None = None
        first = heads.start(self.head, self.base.hidden_size, self.settings.seed)
        for λ in probe.PENALTIES:
            each = torch.zeros(len(self.units))
            for taught, held in self.folds:
                with torch.enable_grad():
                    p = probe.fit(
                        self.head,
                        joined([φ[i] for i in taught]).clone(),
                        self._targets(taught),
                        first,
                        lambda _: 0.0,
                        penalties=(λ,),
                    )
                for i in held:
                    each[i] = self._fit(p, φ[i], i)
            if best is None or each.mean() > best.mean():
                best = each
        assert best is not None
        return Way(name, below, "head", best, time.perf_counter() - began)

    def trained(self, *each: tuple[str, str | None, int]) -> list[Way]:
        """LoRAs by their names, what they begin with, and their seeds, trained once for each fold, all at once."""
        began = time.perf_counter()
        jobs = []
        for _, begin, seed in each:
            start = self.get(begin) if begin else None
            for number, (taught, _) in enumerate(self.folds):
                part = replace(
                    self.task, name=f"{self.task.name}-{number}", train=tuple(self.task.train[i] for i in taught)
                )
                plan = self.plan(part, "lora", start, seed)
                method = build("lora", plan.hyperparameters)
                jobs.append(Job(part, method, self.head, plan.settings, begin=start))
        found = iter(train(self.base, jobs))
        ways = []
        for name, begin, seed in each:
            terms = torch.zeros(len(self.units))
            for _, held in self.folds:
                learned = next(found)
                p = {n.removeprefix("head/"): t for n, t in learned.tensors.items() if n.startswith("head/")}
                order, weights = planned([((1.0, Active.of(learned.method, learned.tensors)),)])
                seat = Seat(self.head, p, weights[0])
                z = passes.logits(Run(self.base, order), [seat], [self.units[i] for i in held], [0] * len(held))
                for i, own in zip(held, z, strict=True):
                    terms[i] = self._loss(own, i)
            seconds = (time.perf_counter() - began) / len(each)
            ways.append(Way(name, None, "lora", terms, seconds, begin, seed))
        return ways

    def plan(self, task: Task, method: str, begin: Adapter | None, seed: int = 0) -> Plan:
        """What the way's training is told."""
        settings = replace(self.settings, seed=self.settings.seed + seed)
        plan = Plan(task, method, settings=settings, begin=begin)
        if method != "lora":
            return plan
        whole = automatic(self.base, plan)
        return whole if begin is None else replace(whole, hyperparameters=dict(begin.hyperparameters))

    def made(self, way: Way, task: Task, reading: Reading) -> tuple[Adapter, list[Adapter]]:
        """The way's adapter, from all examples, and what was made for it."""
        above: list[Adapter] = []
        support: list[Adapter] = []
        if isinstance(way.below, Name):
            above = [self.get(way.below.name)]
        elif way.below is not None:
            above = support = [keep(way.below, self.get, None, f"{task.name}.below")]
        begin = self.get(way.begin) if way.begin else None
        plan = self.plan(task, way.method, begin, way.seed)
        adapter = adapt(
            self.base,
            task,
            way.method,
            hyperparameters=plan.hyperparameters,
            settings=plan.settings,
            reading=reading,
            begin=begin,
            above=above,
            library=_Known(self.get, support),
        )
        return adapter, support

    def _targets(self, members: Sequence[int]) -> Tensor:
        return targets_of(self.head, [self.units[i] for i in members], [self.y[i] for i in members])

    def _fit(self, p: dict[str, Tensor], φ: Tensor, i: int) -> float:
        with torch.no_grad():
            return self._loss(heads.read(self.head, p, φ), i)

    def _loss(self, z: Tensor, i: int) -> float:
        """log p of example i, per word where it is tagged; minus the squared error of a number."""
        y = self._targets([i])
        z = z if self.head.kind == "tagging" else z[None]
        seen = y != heads.IGNORED if self.head.kind == "tagging" else slice(None)
        each = heads.losses(self.head, z[seen].float(), y[seen])
        return -float(each.mean()) if each.numel() else 0.0


def _folds(task: Task) -> list[tuple[list[int], list[int]]]:
    """(taught, held) by number: five, or as many as the rarest label has examples, or one for each example."""
    n = len(task.train)
    if n < 2:
        raise UsageError(f"task {task.name}: {n} example; to choose among ways at least two are needed")
    outputs = [str(e.output) for e in task.train]
    rarest = min(outputs.count(o) for o in set(outputs))
    if task.kind == "classification" and len(set(outputs)) > 1 and rarest > 1:
        parts = StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=0).split(np.zeros(n), outputs)
    else:
        parts = KFold(min(FOLDS, n), shuffle=True, random_state=0).split(np.zeros(n))
    return [(taught.tolist(), held.tolist()) for taught, held in parts]


def _untrained(base: Backbone, task: Task, known: Sequence[Adapter]) -> Reused:
    """The adapter that has the task's labels and whose inputs lie nearest to its instruction."""
    names = tuple(label.name for label in task.labels)
    same = [one for one in known if one.head and one.head.kind == task.kind and set(one.head.targets) == set(names)]
    if not same or not names:
        raise UsageError(
            f"task {task.name}: no examples, and no adapter of the library answers with its labels "
            f"({', '.join(names) or 'none'}); give some examples"
        )
    [said] = passes.gist(base, [" ".join([task.instruction, *map(text.described, task.labels)])])
    nearest = max(same, key=lambda one: _nearness(said, one))
    return Reused(nearest, (), (), f"{nearest.name} as it is")


def _nearness(e: Tensor, one: Adapter) -> float:
    """The cosine of a gist of unit length to an adapter's mean; −1 where it keeps none, or an earlier polytask's."""
    mean = one.at("task").get("mean")
    return float(e @ mean) if mean is not None and mean.shape == e.shape else -1.0


def _chosen(ways: Sequence[Way]) -> Way:
    """The mean, and beside it another way that is better by more than chance; where there is no mean, LoRA from
    nothing, or that other way."""
    safe = next((way for way in ways if way.members), None) or next(way for way in ways if way.name == "lora")
    best = max(ways, key=lambda way: way.score)
    if not best.better_than(safe):
        return safe
    return Way.mean([best, safe]) if safe.members else best


def _shown(ways: Sequence[Way], taken: Way) -> list[Way]:
    """The way that was taken and the best of the others."""
    return [taken, *sorted((way for way in ways if way is not taken), key=lambda way: -way.score)[:4]]


def _said(way: Way) -> str:
    return f"{way.name} {way.score:.3f}"
