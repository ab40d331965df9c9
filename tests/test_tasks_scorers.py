"""Every metric equals scikit-learn, seqeval or scipy, and numbers worked out by hand; intervals behave."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as span_f1
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from polytask.errors import PolytaskError, UsageError
from polytask.tasks import Example, Label, Task
from polytask.tasks.scorers import (
    METRICS,
    _labelled,
    _measured,
    _tagged,
    default_metric,
    metric_name,
    score,
)
from polytask.tasks.task import KINDS, Kind
from polytask.tasks.text_scorers import written


def task(kind: Kind, outputs: list[Any], labels: str = "", metric: str = "") -> tuple[Task, list[Example]]:
    """A task whose train split holds the examples; tagging inputs are as long as their tags."""
    rows = [
        Example(str(n), tuple("w" * len(o)) if kind == "tagging" else f"text {n}", o) for n, o in enumerate(outputs)
    ]
    return Task("t", kind, train=tuple(rows), labels=tuple(map(Label, labels.split())), metric=metric), rows


def test_accuracy_and_macro_f1_by_hand() -> None:
    t, rows = task("classification", list("aabc"), "a b c", "macro_f1")
    s = score(t, list("abbb"), rows)
    # a: tp 1, fn 1 -> 2/3; b: tp 1, fp 2 -> 1/2; c: never right -> 0
    assert_allclose(s.value, (2 / 3 + 1 / 2 + 0) / 3)
    assert s.others == {"accuracy": 0.5}
    assert (s.metric, s.n) == ("macro_f1", 4)


def test_unknown_labels_and_no_answer_are_wrong() -> None:
    t, rows = task("classification", list("aabb"), "a b", "accuracy")
    s = score(t, ["a", "banana", None, "b"], rows)
    assert s.value == 0.5
    assert_allclose(s.others["macro_f1"], 2 / 3)  # a and b: tp 1, fn 1; what is no label of the task has no F1
    assert score(t, ["x"] * 4, rows).value == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde")), min_size=1, max_size=30))
def test_classification_as_in_sklearn(pairs: list[tuple[str, str]]) -> None:
    gold, guess = [g for g, _ in pairs], [p for _, p in pairs]
    t, rows = task("classification", gold, "a b c d e", "macro_f1")
    s = score(t, guess, rows, resamples=50)
    assert_allclose(s.value, f1_score(gold, guess, average="macro", zero_division=0))
    assert_allclose(s.others["accuracy"], accuracy_score(gold, guess))
    assert s.low <= s.value <= s.high


sets = st.lists(st.sampled_from("abcd"), unique=True, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(sets, sets), min_size=1, max_size=30))
def test_multilabel_as_in_sklearn(pairs: list[tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
    gold, guess = [g for g, _ in pairs], [p for _, p in pairs]
    t, rows = task("multilabel", gold, "a b c d", "micro_f1")
    s = score(t, guess, rows, resamples=50)
    binary = MultiLabelBinarizer(classes=list("abcd"))
    y, p = binary.fit_transform(gold), binary.transform(guess)
    assert_allclose(s.value, f1_score(y, p, average="micro", zero_division=0))
    seen = np.flatnonzero((y + p).sum(0))
    macro = f1_score(y, p, labels=seen, average="macro", zero_division=0) if len(seen) else 0.0
    assert_allclose(s.others["macro_f1"], macro)
    assert_allclose(s.others["accuracy"], accuracy_score(y, p))


def test_multilabel_by_hand() -> None:
    t, rows = task("multilabel", [("a",), ("a", "b"), ()], "a b", "micro_f1")
    s = score(t, [("a",), ("b", "zzz"), ()], rows)
    assert_allclose(s.value, 2 * 2 / (3 + 3))  # two of three gold, two of three predicted
    assert_allclose(s.others["macro_f1"], (2 / 3 + 1) / 2)
    assert_allclose(s.others["accuracy"], 2 / 3)


def test_span_f1_by_hand() -> None:
    gold = [("B-X", "I-X", "O", "B-Y"), ("O", "O")]
    t, rows = task("tagging", gold, "X Y")
    s = score(t, [("B-X", "I-X", "O", "O"), ("B-Y", "O")], rows)
    assert_allclose(s.value, 2 * 1 / (2 + 2))
    assert_allclose(s.others["token_accuracy"], 4 / 6)
    assert s.metric == "span_f1"
    # seqeval's default mode, like conlleval, lets an I- without its B- open a span
    assert score(t, [("I-X", "I-X", "O", "B-Y"), ("O", "O")], rows).value == 1.0
    # no BIO tag: no span, and no crash
    assert_allclose(score(t, [("B-X", "I-X", "banana", "Y-B"), ("", "S-X")], rows).value, 2 * 1 / (2 + 1))
    assert score(t, [None, None], rows).value == 0.0


tags = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])
tag_rows = st.lists(st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.lists(tags, min_size=n, max_size=n)] * 2)), min_size=1, max_size=10)  # fmt: skip # noqa: E501


@settings(max_examples=60, deadline=None)
@given(tag_rows)
def test_span_f1_as_in_seqeval(pairs: list[tuple[list[str], list[str]]]) -> None:
    gold, guess = [("B-X", "O"), *(tuple(g) for g, _ in pairs)], [["B-X", "O"], *(p for _, p in pairs)]
    t, rows = task("tagging", gold, "X Y")
    s = score(t, [tuple(p) for p in guess], rows, resamples=50)
    assert_allclose(s.value, span_f1([list(g) for g in gold], guess))
    # the sums that the interval is made of give the same number when every example counts once
    assert_allclose(_tagged(t, guess, rows)[1]["span_f1"](np.ones((1, len(gold))))[0], s.value)


def test_plain_tags_take_token_accuracy() -> None:
    t, rows = task("tagging", [("NOUN", "VERB"), ("X",)], "NOUN VERB X")
    s = score(t, [("NOUN", "NOUN"), ("X",)], rows)
    assert (s.metric, s.others) == ("token_accuracy", {})
    assert_allclose(s.value, 2 / 3)


def test_correlations_by_hand() -> None:
    t, rows = task("similarity", [1.0, 2.0, 3.0, 4.0])
    s = score(t, [10.0, 20.0, 40.0, 30.0], rows)
    assert s.metric == "spearman"
    assert_allclose(s.value, 1 - 6 * 2 / (4 * 15))
    # covariance 20 over sqrt(5 * 500)
    assert_allclose(s.others["pearson"], (1.5 * 15 + 0.5 * 5 + 0.5 * 15 + 1.5 * 5) / math.sqrt(5 * 500))
    assert score(t, [1.0] * 4, rows).value == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30), st.integers(0, 99))
def test_resampled_correlations_as_in_scipy(pairs: list[tuple[int, int]], seed: int) -> None:
    gold, guess = [g / 3 for g, _ in pairs], [p / 7 for _, p in pairs]
    t, rows = task("regression", gold)
    drawn = np.random.default_rng(seed).integers(0, len(rows), len(rows))
    x, y = np.array(guess)[drawn], np.array(gold)[drawn]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return
    _, resample = _measured(t, guess, rows)
    w = np.bincount(drawn, minlength=len(rows)).astype(float)[None]
    assert_allclose(resample["spearman"](w)[0], spearmanr(x, y).statistic, atol=1e-9)
    assert_allclose(resample["pearson"](w)[0], pearsonr(x, y).statistic, atol=1e-9)


def test_exact_match() -> None:
    t, rows = task("generation", ["Bonn", ("yes", "y e s"), "no"])
    assert score(t, ["  Bonn\n", "y e  s", "No"], rows).value == 2 / 3
    assert score(t, [None, "yes", ""], rows).value == 1 / 3


def test_choice() -> None:
    t, rows = task("choice", ["a", "b"])
    assert score(t, ["a", "q"], rows).value == 0.5


# -- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "multilabel", "tagging", "generation"])
def test_resamples_are_the_metric_of_the_drawn_rows(kind: Kind) -> None:
    """The vectorised bootstrap equals calling the reference on the rows that were drawn."""
    rng = np.random.default_rng(0)
    names = ["B-X", "I-X", "O"] if kind == "tagging" else list("abcdefghijklmnopqrstuvwxyz")
    many = kind in ("multilabel", "tagging")
    one = lambda: tuple(rng.choice(names, 3, replace=kind == "tagging")) if many else str(rng.choice(names))  # noqa: E731
    gold, guess = [one() for _ in range(40)], [one() for _ in range(40)]
    guess = [g if n % 2 else p for n, (g, p) in enumerate(zip(gold, guess, strict=True))]
    t, rows = task(kind, gold, "X" if kind == "tagging" else " ".join(names))
    measure = {"tagging": _tagged, "generation": written}.get(kind, _labelled)
    _, resample = measure(t, guess, rows)
    for _ in range(20):
        drawn = rng.integers(0, 40, 40)
        w = np.bincount(drawn, minlength=40).astype(float)[None]
        part = [rows[i] for i in drawn]
        values, _ = measure(t, [guess[i] for i in drawn], part)
        for name in values:
            assert_allclose(resample[name](w)[0], values[name], err_msg=name)


def test_interval_width_and_seeds() -> None:
    gold = ["a", "b"] * 500
    guess = [g if n % 5 else "b" if g == "a" else "a" for n, g in enumerate(gold)]
    t, rows = task("classification", gold, "a b")
    s = score(t, guess, rows)
    assert s.value == 0.8
    # a binomial share of 0.8 over 1,000 rows has a standard error of 0.01265
    assert_allclose([s.low, s.high], [0.8 - 1.96 * 0.01265, 0.8 + 1.96 * 0.01265], atol=0.004)
    assert score(t, guess, rows) == s
    other = score(t, guess, rows, seed=1)
    assert other.value == s.value
    assert (other.low, other.high) != (s.low, s.high)
    perfect = score(t, gold, rows)
    assert (perfect.low, perfect.value, perfect.high) == (1.0, 1.0, 1.0)
    few = score(t, guess[:100], rows[:100])
    assert few.high - few.low > 2 * (s.high - s.low)


def test_the_interval_holds_its_value_even_where_resampling_is_biased() -> None:
    # Two rows a label, one of them wrong: most resamples lose one row of many labels, and their macro F1 is lower.
    gold = [f"l{n // 2}" for n in range(200)]
    t, rows = task("classification", gold, " ".join(dict.fromkeys(gold)), "macro_f1")
    s = score(t, [g if n % 2 else "l0" for n, g in enumerate(gold)], rows)
    assert s.low < s.value
    assert s.high == s.value


def test_no_label_anywhere() -> None:
    t, rows = task("multilabel", [(), ()], "a b", "macro_f1")
    s = score(t, [(), ()], rows)
    assert (s.value, s.low, s.high, s.others) == (0.0, 0.0, 0.0, {"accuracy": 1.0, "micro_f1": 0.0})


def test_blocks_of_resamples_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    t, rows = task("classification", list("ab") * 50, "a b")
    whole = score(t, list("ab" * 25 + "ba" * 25), rows)
    monkeypatch.setattr("polytask.tasks.resampling.CELLS", 730)
    assert score(t, list("ab" * 25 + "ba" * 25), rows) == whole


def test_the_interval_of_150_labels_holds_their_value() -> None:
    rng = np.random.default_rng(0)
    names = [f"label{n}" for n in range(150)]
    gold = [names[i] for i in rng.integers(0, 150, 1000)]
    guess = [g if rng.random() < 0.8 else names[rng.integers(150)] for g in gold]
    t, rows = task("classification", gold, " ".join(names), "macro_f1")
    s = score(t, guess, rows)
    assert s.low < s.value < s.high


# -- names and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("accuracy", "classification", "accuracy"),
        ("Macro-F1", "classification", "macro_f1"),
        ("macro_f1 (multi-label)", "multilabel", "macro_f1"),
        ("token accuracy", "tagging", "token_accuracy"),
        ("slot_f1 (or exact match)", "generation", "slot_f1"),
        ("average precision (binary) or spearman", "similarity", "spearman"),
        ("exact_match and rouge_l", "generation", "exact_match"),
    ],
)
def test_metric_names_of_data_files(text: str, kind: str, name: str) -> None:
    assert metric_name(text, kind) == name


def test_defaults_and_unknown_metrics() -> None:
    for kind in KINDS:
        if kind != "retrieval":
            assert kind in METRICS[default_metric(kind)]
    with pytest.raises(UsageError, match="retrieval"):
        default_metric("retrieval")
    with pytest.raises(UsageError, match=r"no metric 'acc'.*one of accuracy, macro_f1"):
        metric_name("acc", "classification")
    with pytest.raises(UsageError, match=r"'pearson' does not fit a tagging task; one of span_f1, token_accuracy"):
        metric_name("pearson", "tagging")


def test_refusals() -> None:
    t, rows = task("classification", list("ab"), "a b")
    with pytest.raises(PolytaskError, match="1 predictions for 2 examples"):
        score(t, ["a"], rows)
    with pytest.raises(PolytaskError, match="no examples to score"):
        score(t, [], [])
    with pytest.raises(PolytaskError, match="example 'u' has no output"):
        score(t, ["a"], [Example("u", "text")])
    t, rows = task("tagging", [("B-X", "O")], "X")
    with pytest.raises(PolytaskError, match="example '0': 1 predicted tags for 2 tokens"):
        score(t, [("O",)], rows)
    t, rows = task("regression", [1.0, 2.0])
    for bad in ("high", None, float("nan")):
        with pytest.raises(PolytaskError, match=r"example '1': the prediction .* is no finite number"):
            score(t, [1.0, bad], rows)
