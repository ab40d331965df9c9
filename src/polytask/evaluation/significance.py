"""Is one system better than another on the same items? Paired tests of the difference.

Right or wrong answers: the exact McNemar test. Of n items, b are right by the first system alone and c by the second
alone; where neither is better, b ~ Binomial(b + c, ½), whatever the items on which they agree. Its interval is Agresti
and Min's, with half an item added to each of the four cells; the exact test is the more careful of the two, so p may
stay above 0.05 where the interval just leaves 0 out.

Anything else: the paired bootstrap. Items are drawn with replacement, both systems' metrics are taken over the same
draw, and δ* is their difference. The 95 % interval is the percentiles of δ*. Since δ* scatters around the observed δ as
δ would around 0 if neither were better, p = (1 + #{|δ* − δ| ≥ |δ|}) / (1 + resamples). A metric of a whole corpus
(macro F1, span F1, BLEU) is computed anew from each draw, by the resampling that its scorer has.

Sources: McNemar 1947 (Psychometrika 12); Dietterich 1998 (Neural Computation 10), which recommends McNemar's test for
two classifiers and one test set; Agresti, Min 2005 (Statistics in Medicine 24); Koehn 2004 (EMNLP) for the paired
bootstrap; Berg-Kirkpatrick, Burkett, Klein 2012 (EMNLP) for its p. All of them say how far other items of this kind
could move the difference, and nothing of other training runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polytask.errors import PolytaskError, UsageError
from polytask.tasks import Example, Task
from polytask.tasks.resampling import CELLS, Floats, Resample, draws, ratio
from polytask.tasks.scorers import MEASURES, metric_name, score
from polytask.tasks.task import Output
from polytask.tasks.text_scorers import written

RESAMPLES = 10_000
RIGHT_OR_WRONG = ("accuracy", "exact_match", "squad_exact_match", "numeric_match")  # shares of items
_Z = 1.959963984540054  # of a normal distribution, 95 % lie within ±z


@dataclass(frozen=True, slots=True)
class Difference:
    """Two systems' values of `metric` over the same `n` items, the 95 % interval of first − second, and the two-sided
    p of the `test` that neither is better."""

    metric: str
    first: float
    second: float
    low: float
    high: float
    p: float
    n: int
    test: str

    @property
    def difference(self) -> float:
        return self.first - self.second

    def __str__(self) -> str:
        p = f"p = {self.p:.3f}" if self.p >= 0.0005 else "p < 0.001"
        return (
            f"{self.metric} {self.first:.3f} − {self.second:.3f} = {self.difference:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}], {p} ({self.test}, n={self.n})"
        )


def compare(
    task: Task,
    first: Sequence[Output | None],
    second: Sequence[Output | None],
    examples: Sequence[Example],
    *,
    metric: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Two systems' predictions for the same examples, by the task's metric or another that fits its kind.

    McNemar's test where the metric is a share of right answers, the paired bootstrap elsewhere. Errors are those of
    `polytask.tasks.scorers.score`; PolytaskError too where the predictions differ in number.
    """
    _same_length(first, second)
    also = () if metric is None else (metric,)
    found = score(task, first, examples, resamples=0, also=also)
    name = found.metric if metric is None else metric_name(metric, task.kind)
    n = len(examples)
    a, b = (_resample(task, name, predicted, examples) for predicted in (first, second))
    if name in RIGHT_OR_WRONG:
        return mcnemar(_each(a, n), _each(b, n), metric=name)
    return bootstrap_metric(a, b, n, metric=name, resamples=resamples, seed=seed)


def mcnemar(
    first: Sequence[float] | Floats, second: Sequence[float] | Floats, *, metric: str = "accuracy"
) -> Difference:
    """The exact test for two systems' right (1, True) and wrong (0, False) answers to the same items.

    PolytaskError where they differ in number, are none, or are something else than 0 and 1.
    """
    from scipy.stats import binomtest

    a, b = _scores(first, second)
    other = [float(x) for x in np.concatenate([a, b]) if x not in (0.0, 1.0)]
    if other:
        raise PolytaskError(f"{other[0]:g} is neither right (1) nor wrong (0); take the paired bootstrap")
    n = len(a)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    apart = only_a + only_b
    p = float(binomtest(only_a, apart, 0.5).pvalue) if apart else 1.0
    middle = (only_a - only_b) / (n + 2)
    spread = _Z * float(np.sqrt((apart + 1) / (n + 2) - middle**2) / np.sqrt(n + 2))
    low, high = max(-1.0, middle - spread), min(1.0, middle + spread)
    return Difference(metric, float(a.mean()), float(b.mean()), low, high, p, n, "exact McNemar")


def bootstrap(
    first: Sequence[float] | Floats,
    second: Sequence[float] | Floats,
    *,
    metric: str = "mean",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The paired bootstrap of the mean of any score that each item has.

    PolytaskError where the two differ in number, are none, or are not finite.
    """
    a, b = _scores(first, second)
    one = np.ones(len(a))
    return bootstrap_metric(ratio(a, one), ratio(b, one), len(a), metric=metric, resamples=resamples, seed=seed)


def bootstrap_metric(
    first: Resample, second: Resample, n: int, *, metric: str, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """The paired bootstrap of any metric over `n` items: each system's is a function from how often each item is drawn,
    (resamples, n), to the metric, (resamples,)."""
    if resamples < 1:
        raise UsageError(f"resamples = {resamples}: at least 1 is needed")
    if n < 1:
        raise PolytaskError("no items to compare two systems on")
    whole = np.ones((1, n))
    a, b = float(first(whole)[0]), float(second(whole)[0])
    δ = a - b
    drawn = np.concatenate([first(w) - second(w) for w in draws(np.random.default_rng(seed), n, resamples)])
    low, high = (float(x) for x in np.percentile(drawn, [2.5, 97.5]))
    # Sums in another order differ in their last digits, and a tie counts against the difference.
    beyond = np.abs(drawn - δ) >= abs(δ) - 1e-9 * max(1.0, abs(a), abs(b))
    p = (1 + int(beyond.sum())) / (1 + resamples)
    return Difference(metric, a, b, min(low, δ), max(high, δ), p, n, "paired bootstrap")


def _resample(task: Task, metric: str, predicted: Sequence[Output | None], examples: Sequence[Example]) -> Resample:
    """The metric of these predictions under any weighting of the examples."""
    if task.kind == "generation":
        return written(task, predicted, examples, (metric,))[1][metric]
    return MEASURES[task.kind](task, predicted, examples)[1][metric]


def _each(resample: Resample, n: int) -> Floats:
    """Each item's own score [n]: the metric of a draw that is this item alone."""
    found = []
    for start in range(0, n, block := max(1, CELLS // n)):
        rows = min(block, n - start)
        alone = np.zeros((rows, n))
        alone[np.arange(rows), start + np.arange(rows)] = 1.0
        found.append(resample(alone))
    return np.concatenate(found)


def _scores(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    _same_length(first, second)
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or b.ndim != 1:
        raise PolytaskError(f"scores of shape {list(a.shape)} and {list(b.shape)}: give one number for each item")
    if not len(a):
        raise PolytaskError("no items to compare two systems on")
    strange = np.flatnonzero(~(np.isfinite(a) & np.isfinite(b)))
    if len(strange):
        raise PolytaskError(f"item {strange[0]}: a score is no finite number; leave the item out for both")
    return a, b


def _same_length(first: Sequence[object] | Floats, second: Sequence[object] | Floats) -> None:
    if len(first) != len(second):
        raise PolytaskError(f"{len(first)} items by the first system, {len(second)} by the second; give both the same")
