"""Paired tests: numbers worked out by hand, scipy's, and how often they say that two equal systems differ."""

from __future__ import annotations

from fractions import Fraction
from math import comb, sqrt

import numpy as np
import pytest
from made import one_line
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import f1_score

from polytask.errors import PolytaskError, UsageError
from polytask.evaluation.significance import bootstrap, bootstrap_metric, compare, mcnemar
from polytask.tasks import Example, Label, Task
from polytask.tasks.resampling import ratio
from polytask.tasks.scorers import score

# -- McNemar -----------------------------------------------------------------------------------------------------------


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[int], list[int]]:
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return a, b


def test_mcnemar_by_hand() -> None:
    # 8 items on which they differ, 7 for the first: p = 2 · (1 + 8) / 2⁸
    found = mcnemar(*answers(20, 7, 1, 12))
    assert found.p == pytest.approx(18 / 256)
    assert (found.first, found.second, found.n) == (27 / 40, 21 / 40, 40)
    assert found.difference == pytest.approx(6 / 40)
    # Agresti and Min: cells 20.5, 7.5, 1.5, 12.5 of 42
    middle, spread = 6 / 42, 1.959964 * sqrt((7.5 + 1.5) - (7.5 - 1.5) ** 2 / 42) / 42
    assert found.low == pytest.approx(middle - spread, abs=1e-6)
    assert found.high == pytest.approx(middle + spread, abs=1e-6)
    assert str(found) == "accuracy 0.675 − 0.525 = +0.150 [+0.010, +0.276], p = 0.070 (exact McNemar, n=40)"


def test_mcnemar_does_not_care_who_is_first_nor_where_they_agree() -> None:
    a, b = answers(5, 9, 2, 3)
    forth, back = mcnemar(a, b), mcnemar(b, a)
    assert forth.p == back.p == mcnemar(*answers(500, 9, 2, 300)).p == pytest.approx(binomtest(9, 11).pvalue)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    assert forth.p == pytest.approx(float(2 * sum(Fraction(comb(11, k), 2**11) for k in range(3))))


@pytest.mark.parametrize("cells", [(0, 0, 0, 4), (4, 0, 0, 0), (1, 3, 3, 1)])
def test_mcnemar_of_equals(cells: tuple[int, int, int, int]) -> None:
    found = mcnemar(*answers(*cells))
    assert found.p == 1.0
    assert found.difference == 0.0
    assert -1 <= found.low < 0 < found.high <= 1


def test_mcnemar_takes_truth_values_and_nothing_between() -> None:
    assert mcnemar([True, False], [False, False]).first == 0.5
    with pytest.raises(PolytaskError, match=r"0\.5 is neither right") as error:
        mcnemar([1, 0.5], [0, 1])
    one_line(error.value)


# -- bootstrap ---------------------------------------------------------------------------------------------------------


def test_the_bootstrap_of_two_items_by_hand() -> None:
    # Differences 1 and 0: a resample of two has δ* = 0, ½, 1 with probabilities ¼, ½, ¼, and |δ* − ½| ≥ ½ in half.
    found = bootstrap([1.0, 0.5], [0.0, 0.5], resamples=20_000)
    assert found.difference == 0.5
    assert found.p == pytest.approx(0.5, abs=0.015)
    assert (found.low, found.high) == (0.0, 1.0)
    assert (found.test, found.metric, found.n) == ("paired bootstrap", "mean", 2)


def test_a_difference_that_no_resample_undoes() -> None:
    # All three differences are 1, so δ* = 1 always, and p is the least that 999 resamples can say.
    found = bootstrap([1, 2, 3], [0, 1, 2], resamples=999)
    assert found.p == 1 / 1000
    assert (found.low, found.high) == pytest.approx((1.0, 1.0))


def test_a_system_does_not_differ_from_itself() -> None:
    x = np.random.default_rng(0).normal(size=30)
    found = bootstrap(x, x, resamples=100)
    assert (found.p, found.low, found.high) == (1.0, 0.0, 0.0)


def test_the_interval_is_scipys() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=80)
    b = 0.8 * a + rng.normal(scale=0.5, size=80) - 0.1
    found = bootstrap(a, b, resamples=20_000)
    theirs = scipy_bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=2,
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_same_seed_is_the_same_result() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 25))
    assert bootstrap(a, b, seed=3) == bootstrap(a, b, seed=3) != bootstrap(a, b, seed=4)


def test_pairing_counts() -> None:
    """Two systems that differ by little on items that differ by much: unpaired draws would drown it."""
    items = np.random.default_rng(3).normal(scale=10, size=100)
    better = items + np.random.default_rng(4).normal(0.3, 0.5, size=100)
    assert bootstrap(better, items).p < 0.001


@pytest.mark.parametrize("n", [40, 300])
def test_equal_systems_are_told_apart_one_time_in_twenty(n: int) -> None:
    """Scores of two systems with the same distribution, correlated over items."""
    rng = np.random.default_rng(5)
    trials, by_bootstrap, by_mcnemar = 600, 0, 0
    for _ in range(trials):
        hard = rng.normal(size=n)
        x, y = hard + rng.normal(size=n), hard + rng.normal(size=n)
        by_bootstrap += bootstrap(x, y, resamples=400).p < 0.05
        by_mcnemar += mcnemar(x > 0, y > 0).p < 0.05
    # Three standard errors are 0.027. The exact test of discrete counts may only be less often wrong.
    assert 0.025 < by_bootstrap / trials < 0.08
    assert 0.01 < by_mcnemar / trials < 0.07


def test_the_interval_covers_the_true_difference() -> None:
    rng = np.random.default_rng(6)
    trials, covered = 500, 0
    for _ in range(trials):
        both = rng.choice(4, p=[0.6, 0.2, 0.08, 0.12], size=150)  # both right, first alone, second alone, neither
        found = mcnemar(both <= 1, (both == 0) | (both == 2))
        covered += found.low <= 0.12 <= found.high
    assert 0.92 < covered / trials < 0.98


# -- the metrics of tasks ----------------------------------------------------------------------------------------------

LABELS = ("x", "y", "z")


def drawn(n: int, seed: int) -> tuple[list[Example], list[str], list[str]]:
    rng = np.random.default_rng(seed)
    gold = [str(x) for x in rng.choice(LABELS, n, p=[0.6, 0.3, 0.1])]

    def noisy(rate: float) -> list[str]:
        return [str(rng.choice(LABELS)) if rng.random() < rate else g for g in gold]

    return [Example(str(i), "text", g) for i, g in enumerate(gold)], noisy(0.3), noisy(0.5)


def test_accuracy_goes_to_mcnemar_and_macro_f1_to_the_bootstrap() -> None:
    examples, a, b = drawn(60, 0)
    task = Task("t", "classification", labels=tuple(map(Label, LABELS)))
    found = compare(task, a, b, examples)
    gold = [e.output for e in examples]
    right = [[int(p == g) for p, g in zip(x, gold, strict=True)] for x in (a, b)]
    assert found == mcnemar(*right)

    macro = compare(task, a, b, examples, metric="Macro-F1", resamples=300, seed=7)
    assert (macro.metric, macro.test) == ("macro_f1", "paired bootstrap")
    assert macro.first == pytest.approx(score(task, a, examples, resamples=0).others["macro_f1"])
    # The same draws, by scikit-learn.
    draw = np.random.default_rng(7).integers(0, 60, (300, 60))

    def f1(guess: list[str], at: np.ndarray) -> float:
        g, p = np.array(gold)[at], np.array(guess)[at]
        return float(f1_score(g, p, labels=sorted({*g, *p}), average="macro", zero_division=0))

    deltas = np.array([f1(a, at) - f1(b, at) for at in draw])
    low, high = np.percentile(deltas, [2.5, 97.5])
    assert (macro.low, macro.high) == pytest.approx((low, high), abs=1e-9)
    δ = macro.difference
    assert macro.p == pytest.approx((1 + (np.abs(deltas - δ) >= abs(δ) - 1e-9).sum()) / 301)


def test_span_f1() -> None:
    task = Task("t", "tagging", labels=(Label("T"),), spans=True)
    gold = [("B-T", "O"), ("B-T", "I-T"), ("O", "O"), ("O", "B-T")]
    examples = [Example(str(i), ("a", "b"), tags) for i, tags in enumerate(gold)]
    missed = [("O", "O"), ("B-T", "I-T"), ("O", "O"), ("O", "B-T")]
    found = compare(task, gold, missed, examples, resamples=500)
    assert found.metric == "span_f1"
    assert (found.first, found.second) == (1.0, pytest.approx(2 * 2 / 5))
    # Without the first item both are right; with it alone the second has nothing.
    assert (found.low, found.high) == (0.0, pytest.approx(1.0, abs=0.5))


@pytest.mark.parametrize("metric", ["rouge_l", "token_f1", "bleu", "chrf"])
def test_metrics_of_texts(metric: str) -> None:
    task = Task("t", "generation", metric=metric)
    said = ["the cat sat on the mat", "two dogs ran home at noon", "a bird sang in the old tree", "it rained all day"]
    examples = [Example(str(i), "text", text) for i, text in enumerate(said)]
    worse = [text.replace("the", "one").replace("at", "by") for text in said]
    found = compare(task, said, worse, examples, resamples=200)
    assert found.metric == metric
    assert found.first == pytest.approx(score(task, said, examples, resamples=0).value) == pytest.approx(1.0)
    assert found.second == pytest.approx(score(task, worse, examples, resamples=0).value)
    assert 0 < found.low <= found.difference <= found.high


def test_exact_match_and_correlation() -> None:
    task = Task("t", "generation")
    examples = [Example(str(i), "text", "yes") for i in range(8)]
    found = compare(task, ["yes"] * 7 + ["no"], ["no"] * 7 + ["yes"], examples)
    assert (found.test, found.p) == ("exact McNemar", pytest.approx(18 / 256))

    numbers = Task("t", "regression", metric="pearson")
    rng = np.random.default_rng(8)
    truth = rng.normal(size=50)
    rows = [Example(str(i), "text", float(t)) for i, t in enumerate(truth)]
    close, far = (truth + rng.normal(scale=s, size=50) for s in (0.1, 2.0))
    found = compare(numbers, close.tolist(), far.tolist(), rows, resamples=500)
    assert found.first == pytest.approx(np.corrcoef(truth, close)[0, 1])
    assert found.p < 0.01


def test_what_each_item_scores_is_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    examples, a, b = drawn(23, 1)
    task = Task("t", "classification", labels=tuple(map(Label, LABELS)))
    whole = compare(task, a, b, examples)
    monkeypatch.setattr("polytask.evaluation.significance.CELLS", 50)
    assert compare(task, a, b, examples) == whole


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", [mcnemar, bootstrap])
def test_what_cannot_be_paired(test) -> None:  # type: ignore[no-untyped-def]
    for a, b, says in (
        ([1, 0, 1], [1, 0], "3 items by the first system, 2 by the second"),
        ([], [], "no items"),
        ([1, float("nan")], [1, 0], "item 1"),
        ([[1], [0]], [[0], [1]], "one number for each item"),
    ):
        with pytest.raises(PolytaskError, match=says) as error:
            test(a, b)
        one_line(error.value)


def test_other_errors() -> None:
    task = Task("t", "classification", labels=tuple(map(Label, LABELS)))
    examples, a, b = drawn(5, 0)
    with pytest.raises(PolytaskError, match="5 items by the first system, 4 by the second"):
        compare(task, a, b[:4], examples)
    with pytest.raises(PolytaskError, match="4 predictions for 5 examples"):
        compare(task, a[:4], b[:4], examples)
    with pytest.raises(UsageError, match="does not fit a classification task"):
        compare(task, a, b, examples, metric="span_f1")
    with pytest.raises(UsageError, match="resamples = 0"):
        bootstrap([1], [0], resamples=0)
    with pytest.raises(PolytaskError, match="no items"):
        bootstrap_metric(ratio([], []), ratio([], []), 0, metric="x")
