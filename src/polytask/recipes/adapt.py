"""From a task to an adapter: design a head, train, measure on the test split, and write the card.

`auto` trains the frozen-features head, and LoRA on every linear map, which starts from it; it keeps LoRA only where
that answers the validation split better, since the head costs nothing to serve. Of `FEW` training examples or less one
training learns by chance more than another, and costs little: there LoRA at a higher rate and parallel adapters are
trained too, and the best of the three by the validation split stands for LoRA. `race` does so with the winner of
`polytask.recipes.race`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polytask
from polytask.adapters import Adapter, Card, HeadCard, Lineage, ScoreCard
from polytask.adapters.expression import Name
from polytask.backbones import Backbone, heads
from polytask.backbones.quantised import QUANTISED
from polytask.composition.compose import Composer, sites, source
from polytask.composition.routing.nearest_task import Profile
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Answer, Engine, Request
from polytask.inference.answers import choose_normalisation
from polytask.inference.roster import Source
from polytask.methods import build, passes, selectors
from polytask.methods.composed import Composed
from polytask.methods.lifting import Active, Terms
from polytask.methods.method import COMPOSED
from polytask.methods.reprogram import Reprogram
from polytask.recipes.race import Candidate, Won, candidates, race
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Task
from polytask.tasks.scorers import score
from polytask.tasks.task import Output
from polytask.training import Event, Job, Learned, Settings, train

# The rate of answers in text: at most, and times the model's width. On the demo's requests with the embedded decoder,
# 256 wide, six epochs at 1.5e-3, 3e-3, 5e-3 and 7e-3 gave exact match of 0.28, 0.54, 0.58 and 0.66 on the validation
# split; at 1e-2 it does not learn.
IN_TEXT = (5e-3, 1.3)
# What this gains and costs with 128 examples: `bench.auto`. In trials the best of several by validation was as good as
# the mean of their weights or of their answers, which takes more room or more passes.
FEW = 256
PROFILED = 2000  # training inputs that a task's mean embedding is taken over


@dataclass(frozen=True)
class _Others:
    """What a plan's adapter is made of or stands on, as an engine gets it."""

    plan: Plan

    def get(self, ref: str) -> Adapter:
        return self.plan.composer().get(ref)


@dataclass(frozen=True)
class Plan:
    """What to do with one task: a method by name (or `auto`, `race`), with a selector as in `full@lottery`, the
    hyperparameters of both (`select.share`), how to train, and how the answer is read. `begin` is an adapter whose
    tensors training begins with, by its method and hyperparameters where the method is `auto`. `above` are adapters,
    lowest first, that act below it in training and ever after, and stay as they are; `over` are what a composed method
    is made of; `library` gives whatever these are made of in turn. `soft` stands for the outputs: see `Job`."""

    task: Task
    method: str = "auto"
    hyperparameters: Mapping[str, Any] | None = None
    settings: Settings = field(default_factory=Settings)
    reading: Reading = field(default_factory=Reading)
    begin: Adapter | None = None
    above: Sequence[Adapter] = ()
    over: Sequence[Adapter] = ()
    library: Source | None = None
    soft: Tensor | None = field(default=None, compare=False)

    def composer(self) -> Composer:
        """Makes the adapters beside it ready to run, still."""
        known = {one.id: one for one in (*self.above, *self.over)}

        def get(ref: str) -> Adapter:
            if ref in known:
                return known[ref]
            if self.library is None:
                raise UsageError(f"adapter {ref}, which another is made of, is not here: give the library that has it")
            return self.library.get(ref)

        def active(adapter: Adapter) -> Active:
            return Active.of(build(adapter.method, adapter.hyperparameters), adapter.tensors, still=True)

        return Composer(get, active)


def adapt(
    base: Backbone,
    task: Task,
    method: str = "auto",
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    reading: Reading | None = None,
    begin: Adapter | None = None,
    above: Sequence[Adapter] = (),
    over: Sequence[Adapter] = (),
    library: Source | None = None,
    folder: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Adapter:
    """Teach a task to a frozen backbone; the adapter's card says what was done and how well it does.

    `method` is a name of `polytask methods`, one with a selector as in `full@lottery`, `auto` or `race`. `folder` keeps
    checkpoints, and training goes on from the one it finds there. For `begin`, `above`, `over` and `library` see
    `Plan`. Raises UsageError for a task that this backbone cannot answer or an unknown method, PolytaskError where the
    data cannot be learned from.
    """
    plan = Plan(
        task, method, hyperparameters, settings or Settings(), reading or Reading(), begin, above, over, library
    )
    return adapt_many(base, [plan], folder=folder, on_event=on_event)[0]


def adapt_many(
    base: Backbone,
    plans: Sequence[Plan],
    *,
    folder: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    accelerator: Any = None,
) -> list[Adapter]:
    """Several adapters, trained at once over one frozen pass."""
    plans = [_continued(base, plan) if plan.begin is not None and plan.method == "auto" else plan for plan in plans]
    raced: dict[int, Won] = {}
    jobs: dict[int, Job] = {}
    rivals: dict[int, list[Job]] = {}
    for i, plan in enumerate(plans):
        head = plan.reading.design(base, plan.task, plan.settings.limit)
        if plan.method == "race":
            if accelerator is not None and accelerator.num_processes > 1:
                raise UsageError("a race runs in one process; name a method, or leave out the accelerator")
            raced[i] = _race(base, plan, head, None if folder is None else folder / f"race-{i}", _told(on_event, [i]))
            continue
        jobs[i] = _job(base, automatic(base, plan) if plan.method == "auto" else plan, head)
        if plan.method == "auto":
            rivals[i] = _rivals(base, plan, head)
    several = _told(on_event, [*jobs])
    learned = train(base, [*jobs.values()], on_event=several, folder=folder, accelerator=accelerator) if jobs else []
    found = {i: won.learned for i, won in raced.items()} | dict(zip(jobs, learned, strict=True))
    jobs |= {i: won.job for i, won in raced.items()}
    tried: dict[int, dict[str, float]] = {}
    for i, others in rivals.items():
        trained = [(jobs[i], found[i])]
        for n, job in enumerate(others):
            own = None if folder is None else folder / f"auto-{i}-{n}"
            with suppress(PolytaskError):  # the rate was too high; LoRA at its own is there
                [one] = train(base, [job], on_event=_told(on_event, [i]), folder=own, accelerator=accelerator)
                trained.append((job, one))
        jobs[i], best = max(trained, key=lambda each: each[1].validation)
        found[i] = replace(best, seconds=sum(one.seconds for _, one in trained))
        if others:
            tried[i] = {_said(base, job): one.validation for job, one in trained}
    return [_finish(base, plan, jobs[i], found[i], raced.get(i), tried.get(i)) for i, plan in enumerate(plans)]


def _said(base: Backbone, job: Job) -> str:
    return f"{job.method.name} at {job.settings.rate(job.method.name, base.hidden_size):g}"


def _job(base: Backbone, plan: Plan, head: HeadCard) -> Job:
    """The training that a plan with a method says."""
    composer = plan.composer()
    below = _below(base, plan, composer)
    given, sources = _joined(base, plan, composer)
    method, selector = selectors.build(plan.method, given)
    if method.composed and not sources:
        raise UsageError(f"{method.name} joins adapters: say which, with `over` (--over A,B,...)")
    if head.text and method.name == "head":
        raise UsageError(f"task {plan.task.name} is answered in text, which has no head to train")
    slots = method.slots + sum(active.method.slots for terms in below for _, active in terms)
    if head.text and slots:
        short = head.text.model_copy(update={"limit": min(head.text.limit, base.max_length - slots)})
        head = head.model_copy(update={"text": short})
    if isinstance(method, Reprogram) and not head.text:
        head = head.model_copy(update={"alphabet": method.alphabet})
    if method.beside and plan.task.pair:
        head = heads.beside(plan.task, head)
    return Job(plan.task, method, head, plan.settings, selector, plan.begin, below, sources, plan.soft)


def _rivals(base: Backbone, plan: Plan, head: HeadCard) -> list[Job]:
    """What `auto` trains beside LoRA where examples are few, unless it is told how to train it."""
    few = len(plan.task.train) <= FEW and plan.task.validation
    if not few or head.text or plan.hyperparameters or plan.settings.lr is not None:
        return []
    jobs = []
    for one in _candidates(base, plan, head)[1:3]:
        settings = replace(plan.settings, lr=one.lr)
        with suppress(UsageError):  # the backbone has none of its sites
            build(one.method, one.hyperparameters).start(base, 0)
            own = replace(plan, method=one.method, hyperparameters=one.hyperparameters, settings=settings)
            jobs.append(_job(base, own, head))
    return jobs


def _below(base: Backbone, plan: Plan, composer: Composer) -> tuple[Terms, ...]:
    """What the adapters that stand below do."""
    for one in (*plan.above, *plan.over):
        if one.backbone.fingerprint != base.fingerprint:
            raise UsageError(f"adapter {one.name} was trained on {one.backbone.name}, this is {base.name}")
    return tuple(composer.terms(Name(one.id), above=i > 0) for i, one in enumerate(plan.above))


def _joined(base: Backbone, plan: Plan, composer: Composer) -> tuple[dict[str, Any], tuple[Active, ...]]:
    """The hyperparameters of a composed method with its sources' ids and sites, and the sources."""
    given = dict(plan.hyperparameters or {})
    if not plan.over:
        return given, ()
    kind = COMPOSED.get(plan.method)
    if kind is None or not issubclass(kind, Composed):
        trained = ", ".join(name for name, one in COMPOSED.items() if issubclass(one, Composed) and one.learned)
        raise UsageError(f"{plan.method} is made of no other adapters; those that are: {trained}")
    if not kind.learned:
        raise UsageError(f"{kind.name} is not trained: `polytask compose` it, and train a head or more above it")
    if "sites" in given:
        raise UsageError(f"{plan.method} acts where the adapters act that it is made of: leave out sites")
    found = tuple(source(composer.terms(Name(one.id)), kind) for one in plan.over)
    reached = base.sites_for(writing=plan.reading.writes(plan.task))
    at = [site for site in sites(found) if site in reached]
    if kind.owned:
        own = (one.id for one in plan.over if one.card.task.name == plan.task.name)
        given = {"owner": next(own, "")} | given
    return {"sites": at} | given | {"over": [one.id for one in plan.over]}, found


def shares(method: str, hyperparameters: Mapping[str, Any] | None = None) -> str:
    """What trainings of a method have in common when they are of one `adapt_many`; nothing for most methods."""
    if method in ("auto", "race"):
        return ""
    return ", ".join(sorted(selectors.build(method, hyperparameters)[0].common))


def _told(on_event: Callable[[Event], None] | None, numbers: Sequence[int]) -> Callable[[Event], None] | None:
    """Tells of events with the numbers that their jobs have among all."""
    return None if on_event is None else lambda event: on_event(replace(event, job=numbers[event.job]))


def _race(
    base: Backbone, plan: Plan, head: HeadCard, folder: Path | None, on_event: Callable[[Event], None] | None
) -> Won:
    """See `polytask.recipes.race`."""
    for what, given in (("hyperparameters", plan.hyperparameters), ("lr", plan.settings.lr), ("begin", plan.begin)):
        if given:
            raise UsageError(f"a race finds its own method and rate: leave out {what}, or name a method")
    return race(base, plan.task, head, _candidates(base, plan, head), plan.settings, folder=folder, on_event=on_event)


def _candidates(base: Backbone, plan: Plan, head: HeadCard) -> list[Candidate]:
    auto = automatic(base, plan)
    assert auto.settings.lr is not None
    assert auto.hyperparameters is not None
    lora = Candidate("lora", auto.hyperparameters, auto.settings.lr)
    return candidates(lora, plan.settings, base.hidden_size, writing=head.text is not None)


def _continued(base: Backbone, plan: Plan) -> Plan:
    """The method and hyperparameters of the adapter that training begins with."""
    assert plan.begin is not None
    if plan.begin.backbone.fingerprint != base.fingerprint:
        raise UsageError(f"adapter {plan.begin.name} was trained on {plan.begin.backbone.name}, this is {base.name}")
    hyperparameters = dict(plan.begin.hyperparameters) | dict(plan.hyperparameters or {})
    return replace(plan, method=plan.begin.method, hyperparameters=hyperparameters)


def automatic(base: Backbone, plan: Plan) -> Plan:
    """What `auto` trains first: LoRA on every linear map of the blocks, at half of LoRA's own rate where a head reads,
    which has been fitted before; where the answer is in text, nothing has, and the rate is higher.

    Query and value alone, LoRA's default, learn tags slower: span F1 on snips_slots was 0.80 against 0.86 (full
    fine-tuning: 0.87) after four epochs of 2,000 examples.
    """
    maps = (*(f"{at}.{letter}" for at in ("attn", "cross") for letter in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    present = {".".join(site.split(".")[-2:]) for site in base.sites_for(writing=plan.reading.writes(plan.task))}
    hyperparameters = {"sites": tuple(f"*.{name}" for name in maps if name in present)} | dict(
        plan.hyperparameters or {}
    )
    rate = min(IN_TEXT[0], IN_TEXT[1] / base.hidden_size) if plan.reading.writes(plan.task) else 1e-3
    settings = plan.settings if plan.settings.lr is not None else replace(plan.settings, lr=rate)
    return replace(plan, method="lora", hyperparameters=hyperparameters, settings=settings)


def _finish(
    base: Backbone, plan: Plan, job: Job, learned: Learned, won: Won | None, tried: Mapping[str, float] | None
) -> Adapter:
    task, head = plan.task, job.head
    notes = list(task.notes)
    name, hyperparameters, tensors = learned.method.name, learned.method.hyperparameters(), learned.tensors
    if won is not None:
        notes += [str(rung) for rung in won.rungs]
    if plan.method in ("auto", "race"):
        metric = "geometric mean of token probabilities" if head.text else task.metric or "score"
        before = "backbone alone" if head.text else "head"
        each = ", ".join(f"{one} {score:.3f}" for one, score in (tried or {name: learned.validation}).items())
        said = f"{metric} on validation: {before} {learned.probe:.3f}, {each}"
        if won is not None:
            said += f"; all took {won.cost:.1f} times the epochs of {name}"
        if learned.validation > learned.probe:
            notes.append(f"{plan.method} chose {name}: {said}")
        else:
            name, tensors = "head", learned.probe_tensors
            hyperparameters = build("head").hyperparameters()
            notes.append(f"{plan.method} chose {before}: {said}")
    kept = {n: t.detach().float() if t.is_floating_point() else t for n, t in tensors.items()}
    kept = {n: t.cpu().contiguous() for n, t in kept.items()}
    baseline = {n: t.detach().float().cpu().contiguous() for n, t in learned.probe_tensors.items()}
    inputs = [e.text for e in task.train]
    if len(inputs) > PROFILED:
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:PROFILED]
        inputs = [inputs[i] for i in chosen.tolist()]
    limit = plan.settings.tokens
    rates = {one: job.settings.rate(one, base.hidden_size) for one in name.split("+")}
    profile = Profile.of(passes.gist(base, inputs, limit)).tensors()
    data = task.card()
    card = Card(
        name=task.name,
        task=data,
        lineage=Lineage(
            parents=tuple(one.id for one in (*([plan.begin] if plan.begin else []), *plan.above, *plan.over)),
            data=data.sha256,
            made_by=f"polytask {polytask.__version__}",
        ),
        licence=task.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        trained_parameters=sum(kept[n].numel() for n in kept if learned.method.trains(n))
        if name == "head"
        else learned.chosen,
        seconds=round(learned.seconds, 3),
        recipe={
            "recipe": "adapt",
            "method": plan.method,
            "selector": {"name": job.selector.name} | job.selector.hyperparameters() if job.selector else None,
            "settings": vars(job.settings) | {"lr": rates[name] if len(rates) == 1 else rates},
            "history": learned.history,
        }
        | ({"race": [asdict(rung) for rung in won.rungs]} if won else {})
        | ({"precision": base.precision} if base.precision in QUANTISED else {}),
        notes=tuple(notes),
    )
    adapter = Adapter(
        name, hyperparameters, kept | profile, base.card(), card, head, tuple(one.id for one in plan.above)
    )
    others = _Others(plan)
    if head.text and head.text.decide == "likelihood" and not head.text.objective and task.validation:
        adapter = _with_normalisation(base, adapter, task, others)
    probe = replace(adapter, method="head", hyperparameters=build("head").hyperparameters(), tensors=baseline | profile)
    scores: dict[str, ScoreCard] = {}
    for split, candidate, label in (
        ("validation", adapter, "validation"),
        ("test", adapter, "test"),
        ("test", probe, "baseline"),
    ):
        examples = [e for e in task.split(split) if e.output is not None]
        if examples:
            scores[label] = measure(base, candidate, task, examples, limit, others)
    return replace(adapter, card=adapter.card.model_copy(update={"scores": scores}))


def _with_normalisation(base: Backbone, adapter: Adapter, task: Task, others: Source | None) -> Adapter:
    """The adapter with the way of comparing options that gets most of the validation split right."""
    assert adapter.head is not None
    assert adapter.head.text is not None
    engine = Engine(base, others, adapters=[adapter])
    examples = [e for e in task.validation if e.output is not None]
    wanted = [e.output for e in examples if e.output is not None]
    way = choose_normalisation(engine.weigh([request(e, adapter) for e in examples]), wanted)
    card = adapter.head.text.model_copy(update={"normalise": way})
    note = f"options are compared by {way}: best on validation"
    return replace(
        adapter,
        head=adapter.head.model_copy(update={"text": card}),
        card=adapter.card.model_copy(update={"notes": (*adapter.card.notes, note)}),
    )


def request(example: Example, adapter: Adapter) -> Request:
    """The example's input, to be answered by the adapter."""
    return Request(example.input, example.pair, adapter.id, tuple(map(str, example.extra.get("options") or ())))


def predict(
    base: Backbone, adapter: Adapter, examples: Sequence[Example], limit: int = 256, library: Source | None = None
) -> list[Output]:
    """An adapter's answers to examples, in order; `library` has what it is made of or stands on."""
    return [a.output for a in _answers(base, adapter, examples, limit, library) if a.output is not None]


def _answers(
    base: Backbone, adapter: Adapter, examples: Sequence[Example], limit: int, library: Source | None
) -> list[Answer]:
    answers = Engine(base, library, [adapter]).answer([request(e, adapter) for e in examples], limit)
    missing = [e.id for e, a in zip(examples, answers, strict=True) if a.output is None]
    if missing:
        raise PolytaskError(f"no answer for {missing[0]} and {len(missing) - 1} more")
    return answers


def measure(
    base: Backbone,
    adapter: Adapter,
    task: Task,
    examples: Sequence[Example],
    limit: int = 256,
    library: Source | None = None,
) -> ScoreCard:
    """The task's metric over labelled examples, with its 95 % bootstrap interval; where options were chosen from, with
    the mean attentiveness beside it. `library` has what the adapter is made of or stands on."""
    answers = _answers(base, adapter, examples, limit, library)
    found = score(task, [a.output for a in answers], examples)
    masses = [a.mass for a in answers if a.mass is not None]
    return ScoreCard(
        metric=found.metric,
        value=found.value,
        low=found.low,
        high=found.high,
        n=found.n,
        others=dict(found.others) | ({"attentiveness": sum(masses) / len(masses)} if masses else {}),
    )
