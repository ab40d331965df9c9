"""Several methods on one task: each is trained as `adapt` trains it, at the same number of learning rates.

Each result is kept as JSON in a folder as it comes, so that work that was stopped goes on where it was. Latency is
measured at the end, when nothing else runs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import polytask
from polytask.adapters import Adapter
from polytask.backbones import Backbone, heads
from polytask.errors import PolytaskError, UsageError
from polytask.evaluation import Comparison, Failure, Trial
from polytask.evaluation.latency import added
from polytask.methods import methods as known
from polytask.methods import selectors
from polytask.recipes.adapt import adapt
from polytask.recipes.processes import Crew
from polytask.recipes.reading import Reading
from polytask.tasks import Task
from polytask.training import Event, Settings

# Each selector with the method that it was published for; `lofit` brings its own.
PUBLISHED = ("full@lottery", "full@half", "full@graft", "full@fisher", "bottleneck@snip")
FACTORS = (1.0, 1 / 3, 3.0, 1 / 9, 9.0)  # learning rates to try, over the default one


@dataclass(frozen=True)
class Work:
    """A method to be trained once, at a learning rate."""

    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.method}-{self.lr:.4g}-{self.seed}"


@dataclass(frozen=True)
class Schedule:
    """What a comparison trains: each method with seed 0 at its learning rates (`tries`, the default rate first), then
    with the other seeds at the best of them. `left_out` says of the other methods why. `ranked`: best method first."""

    tries: tuple[Work, ...]
    seeds: int
    factors: tuple[float, ...]
    settings: Settings
    reading: Reading
    left_out: Mapping[str, str]
    ranked: bool

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(work.method for work in self.tries))

    @property
    def titles(self) -> list[str]:
        """All trainings, in order; those of seeds other than 0 behind the tries."""
        several = len(self.factors) > 1
        first = [
            f"{w.method} at {w.lr:.3g}" if several else w.method + (", seed 0" if self.seeds > 1 else "")
            for w in self.tries
        ]
        return first + [f"{method}, seed {seed}" for method in self.methods for seed in range(1, self.seeds)]


class OnTrial(Protocol):
    """Told about each result by its number in `Schedule.titles`: a trial, `new` or found in the folder, or why there is
    none."""

    def __call__(self, at: int, trial: Trial | str, *, new: bool) -> None: ...


def schedule(
    base: Backbone,
    task: Task,
    methods: Sequence[str] | None,
    *,
    seeds: int = 1,
    tries: int = 1,
    settings: Settings | None = None,
    reading: Reading | None = None,
) -> Schedule:
    """What is to be trained for these methods, or for all that fit the backbone and the way the task is answered.

    Raises UsageError for a method that is unknown or does not fit, PolytaskError where there is nothing to measure on.
    """
    if (methods is not None and not methods) or seeds < 1:
        raise UsageError("a comparison needs at least one method and one seed")
    if not 1 <= tries <= len(FACTORS):
        raise UsageError(f"{tries} learning rates a method: from 1 to {len(FACTORS)} can be tried")
    if not task.test and not task.validation:
        raise PolytaskError(f"task {task.name}: no test and no validation examples to compare methods on")
    if tries > 1 and not task.validation:
        raise PolytaskError(f"task {task.name}: no validation examples to choose a learning rate by; try one a method")
    settings, reading = settings or Settings(), reading or Reading()
    writing = reading.writes(task)
    left_out: dict[str, str] = {}
    chosen: list[Work] = []
    for name in dict.fromkeys((*known(), *PUBLISHED) if methods is None else methods):
        try:
            method, _ = selectors.build(name)
            if writing and method.name == "head":
                raise UsageError("the answer is in text, which has no head to train")
            method.start(base, 0, writing=writing)
            if method.beside and task.pair:
                heads.beside(task, reading.design(base, task, settings.limit))
        except UsageError as error:
            if methods is not None:
                raise UsageError(f"{name}: {error}") from None
            left_out[name] = str(error)
            continue
        rate = settings.rate(method.name, base.hidden_size)
        factors = FACTORS[: 1 if method.name == "head" else tries]
        chosen += [Work(name, rate if f == 1 else float(f"{rate * f:.3g}"), 0) for f in factors]
    if not chosen:
        raise UsageError(f"no method fits {base.name} and the task {task.name}")
    return Schedule(tuple(chosen), seeds, FACTORS[:tries], settings, reading, left_out, methods is None)


def compare(
    base: Backbone,
    task: Task,
    planned: Schedule,
    *,
    folder: Path | None = None,
    jobs: int = 1,
    load: Callable[[], Backbone] | None = None,
    on_event: Callable[[int, Event], None] | None = None,
    on_trial: OnTrial | None = None,
) -> Comparison:
    """Train all that is planned and put the results side by side.

    `folder` keeps results and checkpoints, and must be of this task, backbone and settings: results in it are taken as
    they are. `jobs` processes share the work; each gets the backbone by `load`, which has to be picklable, and a script
    that starts them needs its `if __name__ == "__main__":`. A training that fails is told of and left out; raises
    PolytaskError where all do.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return compare(
                base, task, planned, folder=Path(name), jobs=jobs, load=load, on_event=on_event, on_trial=on_trial
            )
    jobs = min(jobs, len(planned.tries))
    found: dict[Work, Trial] = {}
    failures: dict[Work, str] = {}
    bench = Bench(task, planned.settings, planned.reading, folder)

    def run(works: Mapping[Work, int]) -> None:
        fresh: list[Work] = []
        for work, at in works.items():
            trial = bench.found(work)
            if trial is None:
                fresh.append(work)
                continue
            found[work] = trial
            if on_trial is not None:
                on_trial(at, trial, new=False)

        def tell(work: Work, event: Event) -> None:
            if on_event is not None:
                on_event(works[work], event)

        for work, result in crew.run(fresh, tell):
            if isinstance(result, Trial):
                found[work] = result
                mine = [w for w in planned.tries if w.method == work.method and w in found]
                for other in mine:
                    if other != _best(mine, found):
                        bench.drop(other)
            else:
                failures[work] = result
            if on_trial is not None:
                on_trial(works[work], result, new=True)

    with Crew(base, bench, jobs, load) as crew:
        run({work: at for at, work in enumerate(planned.tries)})
        kept = {
            method: _best(mine, found)
            for method in planned.methods
            if (mine := [w for w in planned.tries if w.method == method and w in found])
        }
        more = len(planned.tries)
        later: dict[Work, int] = {}
        for i, method in enumerate(planned.methods):
            for seed in range(1, planned.seeds if method in kept else 1):
                later[replace(kept[method], seed=seed)] = more + i * (planned.seeds - 1) + seed - 1
        run(later)
        lost = {w: planned.tries.index(w) for w in kept.values() if not (found[w].latency or bench.adapter(w).is_dir())}
        for work in lost:
            bench.forget(work)
        run(lost)
    if not kept:
        raise PolytaskError(f"task {task.name}: no method could be trained: {next(iter(failures.values()))}")
    for work in kept.values():
        found[work] = bench.timed(base, work, found[work])
    shutil.rmtree(bench.adapters, ignore_errors=True)
    order = [*kept]
    if planned.ranked:
        split = "test" if task.test else "validation"
        order.sort(key=lambda method: -found[kept[method]].scores[split].value)
    lacking = {w.method: reason for w, reason in failures.items() if w.method not in kept}
    settings, reading = planned.settings, planned.reading
    shared = {name: value for name, value in vars(settings).items() if name not in ("lr", "seed")}
    return Comparison(
        task=task.card(),
        backbone=base.card(),
        precision=base.precision,
        settings=shared | {name: value for name, value in vars(reading).items() if value != getattr(Reading, name)},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        version=polytask.__version__,
        trials=tuple(found[w] for m in order for w in (*planned.tries, *later) if w.method == m and w in found),
        factors=planned.factors,
        failures=tuple(Failure(w.method, w.lr, w.seed, reason) for w, reason in failures.items()),
        left_out=dict(planned.left_out) | lacking,
        jobs=jobs,
    )


def _best(tries: Sequence[Work], found: Mapping[Work, Trial]) -> Work:
    return max(tries, key=lambda work: found[work].validation)


@dataclass(frozen=True)
class Bench:
    """How one training is measured, and the folder where its result is kept: `<work>.json`; checkpoints are in
    `training` while it runs, adapters in `adapters` until their latency is measured."""

    task: Task
    settings: Settings
    reading: Reading
    folder: Path

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    def adapter(self, work: Work) -> Path:
        return self.adapters / work.name

    def kept(self, work: Work) -> Path:
        return self.folder / f"{work.name}.json"

    def found(self, work: Work) -> Trial | None:
        """A result that was kept; None where there is none or it is damaged, and then it is measured again."""
        try:
            return Trial.model_validate_json(self.kept(work).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def forget(self, work: Work) -> None:
        self.kept(work).unlink(missing_ok=True)

    def drop(self, work: Work) -> None:
        """Remove an adapter whose latency is not wanted."""
        shutil.rmtree(self.adapter(work), ignore_errors=True)

    def measure(self, base: Backbone, work: Work, on_event: Callable[[Event], None] | None = None) -> Trial:
        """Train, unless another process did so meanwhile, and keep the result."""
        training = self.folder / "training" / work.name
        with _alone(training):
            if (trial := self.found(work)) is not None:
                return trial
            settings = replace(self.settings, lr=work.lr, seed=work.seed)
            with _watched() as memory:
                adapter = adapt(
                    base,
                    self.task,
                    work.method,
                    settings=settings,
                    reading=self.reading,
                    folder=training,
                    on_event=on_event,
                )
            saved = adapter.save(self.adapter(work))
            card = adapter.card
            trial = Trial(
                method=work.method,
                seed=work.seed,
                hyperparameters=dict(adapter.hyperparameters),
                lr=work.lr,
                scores=dict(card.scores),
                history=tuple(card.recipe["history"]),
                trained_parameters=card.trained_parameters,
                seconds=card.seconds,
                bytes=sum(path.stat().st_size for path in saved.iterdir()),
                memory=memory() or None,
                threads=torch.get_num_threads(),
            )
            if work.seed:
                self.drop(work)
            self._keep(trial, work)
            shutil.rmtree(training, ignore_errors=True)
            with suppress(OSError):  # another training is there
                training.parent.rmdir()
            return trial

    def timed(self, base: Backbone, work: Work, trial: Trial) -> Trial:
        """The trial with its adapter's latency, which is measured if it is not there."""
        trial = self.found(work) or trial  # another command may have measured it
        if trial.latency is not None:
            return trial
        labelled = [e for e in (*self.task.test, *self.task.validation) if e.output is not None]
        latency = added(base, Adapter.load(self.adapter(work)), labelled, self.settings.tokens)
        trial = trial.model_copy(update={"latency": latency})
        self._keep(trial, work)
        return trial

    def _keep(self, trial: Trial, work: Work) -> None:
        path = self.kept(work)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(trial.model_dump_json(indent=1), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PolytaskError(f"{path}: the result could not be kept: {error.strerror}") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works in the folder; it may be gone then. Where the system has no such locks, do not
    wait."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems of networks have none
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


@contextmanager
def _watched() -> Iterator[Callable[[], int]]:
    """Gives the most bytes that an optimiser's tensors, their gradients and its state took after its first step."""
    most = 0
    seen: WeakSet[Optimizer] = WeakSet()

    def look(optimiser: Optimizer, *_: Any) -> None:
        nonlocal most
        if optimiser in seen:
            return
        seen.add(optimiser)
        own = [t for group in optimiser.param_groups for t in group["params"]]
        gradients = [t.grad for t in own if t.grad is not None]
        most = max(most, sum(t.nbytes for t in (*own, *gradients, *_tensors(list(optimiser.state.values())))))

    hook = register_optimizer_step_post_hook(look)
    try:
        yield lambda: most
    finally:
        hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
