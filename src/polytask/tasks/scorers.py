"""How well predictions fit: one number, its 95 % interval, and what else is usually reported beside it.

The number is scikit-learn's, seqeval's or scipy's; those of texts are in `text_scorers`. The interval is a percentile
bootstrap over examples: each metric is a function of sums over examples (right answers, counts per label, moments), so
a resample costs one row of a matrix product and no call of the reference library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polytask.errors import PolytaskError, UsageError
from polytask.tasks.resampling import Floats, Measured, draws, ratio
from polytask.tasks.tables import near
from polytask.tasks.task import Example, Kind, Output, Task
from polytask.tasks.text_scorers import written

METRICS: dict[str, tuple[Kind, ...]] = {
    # share of right answers; for multilabel, of rows whose set of labels is right as a whole
    "accuracy": ("classification", "multilabel", "choice"),
    # F1 of each label of the task that occurs in the answers or the predictions, averaged over these labels
    "macro_f1": ("classification", "multilabel"),
    # F1 over all (row, label) decisions
    "micro_f1": ("multilabel",),
    # F1 over spans, micro-averaged, as conlleval and seqeval's default mode count them: an I- without its B- opens a
    # span (seqeval's strict mode would drop it)
    "span_f1": ("tagging",),
    # share of tokens with the right tag
    "token_accuracy": ("tagging",),
    # rank correlation; 0 where all predictions are equal, since they order nothing
    "spearman": ("regression", "similarity"),
    # linear correlation; 0 where all predictions are equal
    "pearson": ("regression", "similarity"),
    # share of texts equal to one of the accepted answers, up to white space; the default
    "exact_match": ("generation",),
    # the same after SQuAD's normalisation: lower case, no punctuation, no a, an, the
    "squad_exact_match": ("generation",),
    # F1 of two bags of words after SQuAD's normalisation, averaged over texts
    "token_f1": ("generation",),
    # share of the reference's words that are in the answer, and of the answer's words that are in its passage
    "token_recall": ("generation",),
    "k_precision": ("generation",),
    # F of the longest common subsequence of stems, averaged over texts
    "rouge_l": ("generation",),
    # n-grams of words and of characters over all texts together; sacrebleu's number / 100
    "bleu": ("generation",),
    "chrf": ("generation",),
    # F1 over (slot, value) pairs of texts like "city = Rome; date = 5 May", micro-averaged
    "slot_f1": ("generation",),
    # share of texts whose last number is that of the reference
    "numeric_match": ("generation",),
}
_ALIASES = {
    "em": "exact_match",
    "squad_em": "squad_exact_match",
    "squad_f1": "token_f1",
    "rougel": "rouge_l",
    "sacrebleu": "bleu",
    "chrf2": "chrf",
}
_DEFAULTS: dict[str, str] = {
    "classification": "accuracy",
    "multilabel": "micro_f1",
    "tagging": "span_f1",
    "regression": "spearman",
    "similarity": "spearman",
    "generation": "exact_match",
    "choice": "accuracy",
}


@dataclass(frozen=True, slots=True)
class Score:
    """`value` of `metric` over `n` examples, its 95 % interval, and the kind's other metrics."""

    metric: str
    value: float
    low: float
    high: float
    n: int
    others: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def default_metric(kind: str) -> str:
    """The metric of a kind that names none. BIO tags are meant by "tagging"; plain tags take token_accuracy."""
    if kind not in _DEFAULTS:
        raise UsageError(f"no metric for tasks of kind {kind!r}; there is one for {', '.join(_DEFAULTS)}")
    return _DEFAULTS[kind]


def metric_name(text: str, kind: str) -> str:
    """The metric that `text` means for tasks of this kind: "Macro-F1", "token accuracy", "slot_f1 (or exact match)".

    Of several, the first that is known counts. UsageError where none is, or where it does not fit the kind.
    """
    names = [
        re.sub(r"[\s_-]+", "_", part.strip().casefold())
        for part in re.split(r"[(),;/]|\bor\b|\band\b", text.casefold())
    ]
    names = [_ALIASES.get(name, name) for name in names]
    known = [name for name in names if name in METRICS]
    fitting = [name for name in known if kind in METRICS[name]]
    if fitting:
        return fitting[0]
    fit = ", ".join(name for name, kinds in METRICS.items() if kind in kinds)
    if known:
        raise UsageError(f"metric {known[0]!r} does not fit a {kind} task; one of {fit}")
    raise UsageError(f"no metric {text!r}{near(names[0], METRICS)}; for a {kind} task one of {fit}")


def score(
    task: Task,
    predicted: Sequence[Output | None],
    examples: Sequence[Example],
    *,
    seed: int = 0,
    resamples: int = 1000,
    also: Sequence[str] = (),
) -> Score:
    """Measure `predicted` against the outputs of `examples` by the task's metric.

    `resamples=0` leaves the bootstrap out: low and high are the value. `also` names metrics that `others` must hold
    too; for texts it has only the cheap ones without being asked (see `polytask.tasks.text_scorers`). A label that the
    task does not know, or None for no answer, counts as wrong. PolytaskError where the two differ in length, where an
    example has no output, where tags and tokens differ in number, or where a number is not finite.
    """
    if len(predicted) != len(examples):
        raise PolytaskError(f"{len(predicted)} predictions for {len(examples)} examples; give one for each")
    if not examples:
        raise PolytaskError(f"task {task.name!r}: no examples to score")
    unknown = next((e.id for e in examples if e.output is None), None)
    if unknown is not None:
        raise PolytaskError(f"example {unknown!r} has no output to score against; leave it out")
    metric = task.metric or ("token_accuracy" if task.kind == "tagging" and not task.bio else default_metric(task.kind))
    wanted = (metric, *(metric_name(name, task.kind) for name in also))
    if task.kind == "generation":
        values, resample = written(task, predicted, examples, wanted)
    else:
        values, resample = MEASURES[task.kind](task, predicted, examples)
    for name in wanted:
        if name not in values or name not in METRICS:
            fit = ", ".join(name for name, kinds in METRICS.items() if task.kind in kinds)
            raise UsageError(f"metric {name!r} does not fit task {task.name!r}; one of {fit}")
    if resamples == 0:
        value = values.pop(metric)
        return Score(metric, value, value, value, len(examples), values)
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([resample[metric](w) for w in draws(rng, len(examples), resamples)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = values.pop(metric)
    # Resampling a macro F1 loses rare labels, which can push the whole interval to one side of its own value.
    return Score(metric, value, min(float(low), value), max(float(high), value), len(examples), values)


def _labelled(task: Task, predicted: Sequence[Any], examples: Sequence[Example]) -> Measured:
    """Classification, multilabel and choice: every row is a set of labels."""
    from scipy.sparse import csr_array
    from sklearn.metrics import accuracy_score, f1_score

    many = task.kind == "multilabel"
    gold = [e.output if isinstance(e.output, tuple) else (str(e.output),) for e in examples]
    if many:
        guess = [() if p is None else (p,) if isinstance(p, str) else tuple(p) for p in predicted]
    else:
        guess = [() if p is None else (p if isinstance(p, str) else str(p),) for p in predicted]
    if task.kind == "choice":
        right = [float(g == p) for g, p in zip(gold, guess, strict=True)]
        return {"accuracy": float(np.mean(right))}, {"accuracy": ratio(right, np.ones(len(right)))}

    names = list(dict.fromkeys([*(label.name for label in task.labels), *(x for row in gold for x in row)]))
    number = {name: i for i, name in enumerate(names)}
    n, k = len(examples), len(names)

    def matrix(rows: Sequence[tuple[str, ...]]) -> Any:
        # A label that the task does not know takes the last column: it is never right.
        cells = {(i, number.get(x, k)) for i, row in enumerate(rows) for x in row}
        at = np.array(sorted(cells), dtype=np.int64).reshape(-1, 2)
        return csr_array((np.ones(len(at)), (at[:, 0], at[:, 1])), shape=(n, k + 1))

    g, p = matrix(gold), matrix(guess)
    hit = g * p  # element by element
    right = (hit.sum(axis=1) == np.maximum(g.sum(axis=1), p.sum(axis=1))).astype(np.float64)

    columns = [m[:, :k].T.tocsr() for m in (hit, g + p)]

    def macro(w: Floats) -> Floats:
        tp, both = ((column @ w.T).T for column in columns)
        f1 = np.divide(2 * tp, both, out=np.zeros_like(tp), where=both > 0)
        seen = (both > 0).sum(axis=1)
        mean: Floats = np.divide(f1.sum(axis=1), seen, out=np.zeros(len(w)), where=seen > 0)
        return mean

    seen = np.flatnonzero(np.asarray((g + p).sum(axis=0))[:k])
    if many:
        truth, answer = g.toarray().astype(int), p.toarray().astype(int)
    else:
        truth = np.array([number[row[0]] for row in gold])
        answer = np.array([number.get(row[0], k) if row else k for row in guess])
    values = {"accuracy": float(accuracy_score(truth, answer)), "macro_f1": 0.0}
    if len(seen):
        values["macro_f1"] = float(f1_score(truth, answer, labels=seen, average="macro", zero_division=0))
    resample = {"accuracy": ratio(right, np.ones(n)), "macro_f1": macro}
    if many:
        values["micro_f1"] = float(f1_score(truth, answer, average="micro", zero_division=0))
        resample["micro_f1"] = ratio(2 * hit.sum(axis=1), (g + p).sum(axis=1))
    return values, resample


def _tagged(task: Task, predicted: Sequence[Any], examples: Sequence[Example]) -> Measured:
    from seqeval.metrics import f1_score
    from seqeval.metrics.sequence_labeling import get_entities
    from sklearn.metrics import accuracy_score

    gold = [list(e.output) if isinstance(e.output, tuple) else [str(e.output)] for e in examples]
    guess = [["" for _ in g] if p is None else [str(tag) for tag in p] for g, p in zip(gold, predicted, strict=True)]
    for g, p, e in zip(gold, guess, examples, strict=True):
        if len(g) != len(p):
            raise PolytaskError(f"example {e.id!r}: {len(p)} predicted tags for {len(g)} tokens; give one for each")
    right = [sum(a == b for a, b in zip(g, p, strict=True)) for g, p in zip(gold, guess, strict=True)]
    flat = [tag for tags in gold for tag in tags], [tag for tags in guess for tag in tags]
    values = {"token_accuracy": float(accuracy_score(*flat))}
    resample = {"token_accuracy": ratio(right, [len(g) for g in gold])}
    if not task.bio:
        return values, resample
    # What is no BIO tag opens no span; seqeval would take its first letter for a prefix.
    guess = [[tag if re.fullmatch(r"[BI]-.+", tag) else "O" for tag in tags] for tags in guess]
    spans = [(set(get_entities(g)), set(get_entities(p))) for g, p in zip(gold, guess, strict=True)]
    values["span_f1"] = float(f1_score(gold, guess, zero_division=0))
    resample["span_f1"] = ratio([2 * len(g & p) for g, p in spans], [len(g) + len(p) for g, p in spans])
    return values, resample


def _measured(task: Task, predicted: Sequence[Any], examples: Sequence[Example]) -> Measured:
    """Regression and similarity: correlations of two columns of numbers."""
    from scipy.stats import pearsonr, spearmanr

    x, y = np.zeros(len(examples)), np.zeros(len(examples))
    for i, (p, e) in enumerate(zip(predicted, examples, strict=True)):
        try:
            x[i], y[i] = p, e.output
        except (TypeError, ValueError):
            x[i] = np.nan
        if not np.isfinite(x[i]):
            raise PolytaskError(f"example {e.id!r}: the prediction {p!r} is no finite number") from None
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        values = {"spearman": 0.0, "pearson": 0.0}
    else:
        values = {"spearman": float(spearmanr(x, y).statistic), "pearson": float(pearsonr(x, y).statistic)}
    ranks = _ranks(x), _ranks(y)
    x, y = ((v - v.mean()) / (np.ptp(v) or 1.0) for v in (x, y))
    return values, {
        "pearson": lambda w: _correlation(w, x[None], y[None]),
        "spearman": lambda w: _correlation(w, ranks[0](w), ranks[1](w)),
    }


def _ranks(values: Floats) -> Callable[[Floats], Floats]:
    """Weights (resamples, n) -> the mean rank, (resamples, n), of each value within each resample.

    No resample is sorted: all of them have the order of `values`, so ranks are running sums of weights.
    """
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))

    def ranks(w: Floats) -> Floats:
        ties = np.add.reduceat(w[:, order], starts, axis=1)
        mean: Floats = (np.cumsum(ties, axis=1) - (ties - 1) / 2)[:, group]
        return mean

    return ranks


def _correlation(w: Floats, x: Floats, y: Floats) -> Floats:
    """Weighted linear correlation of each row of `x` and `y`; 0 where one of them does not vary."""
    total = w.sum(axis=1, keepdims=True)
    x = x - (w * x).sum(axis=1, keepdims=True) / total
    y = y - (w * y).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((w * x * x).sum(axis=1) * (w * y * y).sum(axis=1))
    enough = spread > 1e-12 * total[:, 0]
    r: Floats = np.divide((w * x * y).sum(axis=1), spread, out=np.zeros(len(w)), where=enough)
    return r


MEASURES: dict[str, Callable[[Task, Sequence[Any], Sequence[Example]], Measured]] = {
    "classification": _labelled,
    "multilabel": _labelled,
    "choice": _labelled,
    "tagging": _tagged,
    "regression": _measured,
    "similarity": _measured,
}
