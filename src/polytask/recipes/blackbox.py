"""Adapting without gradients: an adapter's few numbers are searched for, by what it scores on labelled examples.

    u* = argmax over u in [−1, 1]^D of score(p₀ + reach · u)

p₀ are the tensors of an adapter as it starts, so u = 0 is tried first and the result is never worse than that. The
search is Bayesian: a Gaussian process with a Matérn kernel (ν = 5/2) is fitted to all scores so far, and the next point
is that of the greatest expected improvement over the best one, among points all over the cube and near the best. Scores
cost forward passes only, so the backbone may be anything that answers.

As TaRot finds its rotations (Singh, Dutta, Chakraborty 2024, arXiv 2410.04277): 10 to 20 labelled examples, 4 random
points and 120 steps, reach π/6 or π/4, and the score is the mean probability of the right answer. Theirs is an
infinitely wide network's kernel. Length scales in proportion to √D keep the process informative in many dimensions
(Hvarfner, Hellsten, Nardi 2024, arXiv 2402.02229); points near the best one differ from it in some 20 of its numbers
(Eriksson, Pearce, Gardner, Turner, Poloczek 2019, arXiv 1910.01739); improvements are compared by their logarithms
(Ament, Daulton, Eriksson, Balandat, Bakshy 2023, arXiv 2310.20708).
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import polytask
from polytask.adapters import Adapter, Card, Lineage
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine
from polytask.methods import build
from polytask.recipes.adapt import adapt, request
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Task
from polytask.tasks.scorers import score as scored
from polytask.training import Settings

Floats = NDArray[np.float64]

BUDGET = 125  # scores: the start, 4 random points, and TaRot's 120 steps
RANDOM = 4
MOST = 500  # dimensions, beyond which a hundred scores say nothing
CANDIDATES = 1024  # points of each kind that the improvement is computed at
MOVED = 20  # numbers that differ from the best point's, on average


@dataclass(frozen=True)
class Found:
    """The best point [D], its score, and all scores in order."""

    point: Floats
    score: float
    scores: tuple[float, ...]


def search(
    objective: Callable[[Floats], float],
    dimensions: int,
    *,
    budget: int = BUDGET,
    seed: int = 0,
    on_score: Callable[[int, float], None] | None = None,
) -> Found:
    """The point of the cube [−1, 1]^dimensions with the largest objective, after `budget` calls of it.

    The first point is 0. `on_score` gets the number of each call and its score. Raises UsageError for a budget or
    dimensions that make no search, PolytaskError where the objective is no finite number.
    """
    if not 1 <= dimensions <= MOST:
        raise UsageError(f"{dimensions} numbers to search for: from 1 to {MOST} can be found without gradients")
    if budget < 1:
        raise UsageError(f"budget = {budget}: at least one score is needed")
    draw = np.random.default_rng(seed)
    points = [np.zeros(dimensions), *draw.uniform(-1, 1, (RANDOM, dimensions))][:budget]
    scores: list[float] = []
    while True:
        for point in points[len(scores) :]:
            score = float(objective(point))
            if not math.isfinite(score):
                raise PolytaskError(f"score {len(scores) + 1} of the search is {score}; it has to be a finite number")
            scores.append(score)
            if on_score:
                on_score(len(scores), score)
        if len(scores) >= budget:
            best = int(np.argmax(scores))
            return Found(points[best], scores[best], tuple(scores))
        points.append(_next(np.stack(points), np.array(scores), draw))


def _next(X: Floats, y: Floats, draw: np.random.Generator) -> Floats:
    """The candidate of the greatest expected improvement over y [n] at X [n, D]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    from threadpoolctl import threadpool_limits

    D = X.shape[1]
    length = math.sqrt(D)
    smooth = Matern(length, (length / 10, 10 * length), nu=2.5)
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * smooth + WhiteKernel(1e-4, (1e-8, 1e-1))
    moved = draw.random((CANDIDATES, D)) < MOVED / D
    moved[np.arange(CANDIDATES), draw.integers(D, size=CANDIDATES)] = True
    step = np.exp(draw.uniform(math.log(1e-3), math.log(0.5), (CANDIDATES, 1))) * draw.normal(size=(CANDIDATES, D))
    near = np.clip(X[y.argmax()] + moved * step, -1, 1)
    candidates = np.concatenate([near, draw.uniform(-1, 1, (CANDIDATES, D))])
    # Over matrices so small, threads wait for each other ten times as long as they compute.
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is an answer too
        process = GaussianProcessRegressor(kernel, normalize_y=True).fit(X, y)
        μ, σ = process.predict(candidates, return_std=True)
    σ = np.maximum(σ, 1e-12)
    chosen: Floats = candidates[int(np.argmax(np.log(σ) + log_gain((μ - y.max()) / σ)))]
    return chosen


def log_gain(z: Floats) -> Floats:
    """log(φ(z) + z Φ(z)): the logarithm of the expected improvement of a point whose mean is z deviations above the
    best score, in deviations. Below −20, where the sum would come to 0, it is φ(z) / (z² + 3)."""
    from scipy.special import ndtr

    def log_φ(z: Floats) -> Floats:
        return np.asarray(-0.5 * z**2 - 0.5 * math.log(2 * math.pi))

    near, far = np.maximum(z, -20), np.minimum(z, -20)
    found: Floats = np.where(z > -20, np.log(np.exp(log_φ(near)) + near * ndtr(near)), log_φ(far) - np.log(far**2 + 3))
    return found


def begin(
    base: Backbone,
    task: Task,
    method: str = "rotation",
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    reading: Reading | None = None,
    seed: int = 0,
) -> Adapter:
    """An adapter as the search finds it: the method's first tensors, and a head fitted on the backbone's own features
    where the task is answered by one.

    Raises UsageError as `adapt` does.
    """
    reading = reading or Reading()
    chosen = build(method, hyperparameters)
    if not reading.writes(task):
        own = chosen.start(base, seed)
        fitted = adapt(base, task, "head", settings=Settings(seed=seed), reading=reading)
        card = fitted.card.model_copy(update={"scores": {}, "recipe": {}})
        tensors = dict(fitted.tensors) | own
        return replace(fitted, method=method, hyperparameters=chosen.hyperparameters(), tensors=tensors, card=card)
    head = reading.design(base, task)
    data = task.card()
    card = Card(
        name=task.name,
        task=data,
        lineage=Lineage(data=data.sha256, made_by=f"polytask {polytask.__version__}"),
        licence=task.licence,
    )
    own = chosen.start(base, seed, writing=True)
    return Adapter(method, chosen.hyperparameters(), own, base.card(), card, head)


def fit(
    adapter: Adapter,
    score: Callable[[Adapter], float],
    *,
    reach: float = math.pi / 6,
    budget: int = BUDGET,
    seed: int = 0,
    on_score: Callable[[int, float], None] | None = None,
) -> Adapter:
    """The adapter with those tensors, within `reach` of its own, for which `score` is largest; its head stays.

    Raises UsageError where the method has too many numbers to be searched for, or none.
    """
    began = time.perf_counter()
    method = build(adapter.method, adapter.hyperparameters)
    names = [n for n in sorted(adapter.tensors) if not n.startswith(("head/", "task/")) and method.trains(n)]
    first = [adapter.tensors[name] for name in names]
    D = sum(t.numel() for t in first)
    if not 1 <= D <= MOST:
        raise UsageError(
            f"a {adapter.method} of {D} numbers: from 1 to {MOST} can be found without gradients; give it fewer sites "
            "or numbers, or another method"
        )

    def at(u: Floats) -> Adapter:
        steps = torch.split(torch.from_numpy(reach * u).float(), [t.numel() for t in first])
        moved = {n: t + step.view_as(t).to(t) for n, t, step in zip(names, first, steps, strict=True)}
        return replace(adapter, tensors=dict(adapter.tensors) | moved)

    found = search(lambda u: score(at(u)), D, budget=budget, seed=seed, on_score=on_score)
    card = adapter.card.model_copy(
        update={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "trained_parameters": D,
            "seconds": round(time.perf_counter() - began, 3),
            "recipe": {
                "recipe": "blackbox",
                "reach": reach,
                "budget": budget,
                "seed": seed,
                "scores": list(found.scores),
            },
        }
    )
    return replace(at(found.point), card=card)


def probability(engine: Engine, examples: Sequence[Example]) -> Callable[[Adapter], float]:
    """A score: the mean probability of the right one among each example's options, for answers in text.

    Raises PolytaskError where an example's output is none of its options.
    """

    def score(adapter: Adapter) -> float:
        with _visiting(engine, adapter):
            weighed = engine.weigh([request(example, adapter) for example in examples])
        way = adapter.head.text.normalise if adapter.head and adapter.head.text else "raw"
        right = []
        for options, example in zip(weighed, examples, strict=True):
            if example.output not in options.names:
                raise PolytaskError(f"example {example.id}: its output {example.output!r} is none of its options")
            right.append(float(options.scores(way).softmax(-1)[options.names.index(example.output)]))
        return sum(right) / len(right)

    return score


def metric(engine: Engine, task: Task, examples: Sequence[Example]) -> Callable[[Adapter], float]:
    """A score: the task's metric, for answers of any kind. It has steps, which a few examples make large."""

    def score(adapter: Adapter) -> float:
        with _visiting(engine, adapter):
            answers = engine.answer([request(example, adapter) for example in examples])
        return scored(task, [answer.output for answer in answers], examples, resamples=0).value

    return score


@contextlib.contextmanager
def _visiting(engine: Engine, adapter: Adapter) -> Iterator[None]:
    """Have the engine know an adapter for a while; one that it has already stays."""
    stays = engine.adapter(adapter.id) is not None
    engine.add(adapter, routed=False)
    try:
        yield
    finally:
        if not stays:
            engine.drop(adapter.id)
