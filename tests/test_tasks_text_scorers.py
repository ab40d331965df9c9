"""Scores of texts equal rouge-score, sacrebleu and numbers worked out by hand; resamples equal the drawn rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from polytask.errors import PolytaskError, UsageError
from polytask.tasks import Example, Task
from polytask.tasks.scorers import METRICS, metric_name, score
from polytask.tasks.text_scorers import numbers, numeric_match, slots, squad_words, written

TEXTS = [name for name, kinds in METRICS.items() if "generation" in kinds]


def task(outputs: list[Any], metric: str = "", extra: list[dict[str, Any]] | None = None) -> tuple[Task, list[Example]]:
    rows = [Example(str(n), f"text {n}", o, extra=extra[n] if extra else {}) for n, o in enumerate(outputs)]
    return Task("t", "generation", train=tuple(rows), metric=metric), rows


def value(metric: str, answers: list[Any], outputs: list[Any], **more: Any) -> float:
    t, rows = task(outputs, metric, **more)
    return score(t, answers, rows, resamples=0).value


# -- words -------------------------------------------------------------------------------------------------------------


def test_squad_numbers_by_hand() -> None:
    assert squad_words("The U.S., a  co-op!") == ["us", "coop"]
    assert squad_words("an Anthem") == ["anthem"]
    answers, outputs = ["The Eiffel tower.", "in Paris, France", "Rome"], ["eiffel Tower", "Paris", ("Roma", "Rome")]
    assert value("exact_match", answers, outputs) == 1 / 3
    assert value("squad_exact_match", answers, outputs) == 2 / 3
    # 1; one word of three and of one shared: 2 * 1 / (3 + 1); 1 by the second reference
    assert_allclose(value("token_f1", answers, outputs), (1 + 0.5 + 1) / 3)
    assert_allclose(value("token_recall", ["Paris and Rome"], [("Rome Bonn Paris Kyiv", "Oslo")]), 0.5)
    # repeated words count as often as both have them: 2 * 2 / (4 + 3)
    assert_allclose(value("token_f1", ["x x x y"], ["x x z"]), 4 / 7)


def test_nothing_left_after_normalisation() -> None:
    assert value("token_f1", ["the", "the", "x"], ["an!", "x", "a"]) == 1 / 3
    assert value("token_recall", ["x"], ["the"]) == 1.0
    for metric in ("squad_exact_match", "token_f1", "token_recall"):
        assert value(metric, [None, "a"], ["the", "the"]) == 0.5  # no answer is never right


def test_recall_k_precision_and_verbosity_of_the_papers_example() -> None:
    extra = [{"passage": "Paris is the capital and largest city"}]
    t, rows = task(["Paris"], "token_recall", extra)
    s = score(t, ["The capital is Paris, in France"], rows)
    assert s.value == 1.0
    assert s.others["exact_match"] == s.others["squad_exact_match"] == 0.0
    assert_allclose(s.others["token_f1"], 1 / 3)
    assert_allclose(s.others["k_precision"], 3 / 5)
    assert (s.others["answer_words"], s.others["verbosity"]) == (6.0, 6.0)


def test_passages_and_their_absence() -> None:
    extra: list[dict[str, Any]] = [{"passages": ["red fox", "blue dog"]}, {"context": "green"}]
    assert_allclose(value("k_precision", ["blue fox fox", "red"], ["x", "y"], extra=extra), (2 / 3 + 0) / 2)
    assert value("k_precision", ["", None], ["x", "y"], extra=extra) == 0.0
    t = Task("t", "generation", metric="k_precision")
    assert score(t, ["dog red"], [Example("1", "who?", "dog", pair="the dog sat")]).value == 0.5
    with pytest.raises(PolytaskError, match="example '1' has no passage for k_precision"):
        value("k_precision", ["a", "b"], ["a", "b"], extra=[{"passage": "a"}, {}])
    t, rows = task(["a", "b"], extra=[{"passage": "a"}, {}])
    assert "k_precision" not in score(t, ["a", "b"], rows).others


# -- libraries ---------------------------------------------------------------------------------------------------------

vocabulary = ["the", "cat", "cats", "sat", "running", "runs", "on", "mats", "mat", ".", ",", "it's"]
words = st.lists(st.sampled_from(vocabulary), max_size=8).map(" ".join)
answered = st.lists(st.tuples(words, st.lists(words.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(answered)
def test_rouge_l_as_in_rouge_score(rows: list[tuple[str, list[str]]]) -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    wanted = np.mean([max(scorer.score(r, answer)["rougeL"].fmeasure for r in refs) for answer, refs in rows])
    assert_allclose(value("rouge_l", [a for a, _ in rows], [tuple(refs) for _, refs in rows]), wanted)


def test_rouge_l_by_hand_and_by_language() -> None:
    # stems: run cat sleep / run cat eat sleep: a subsequence of 3, 2 * 3 / (3 + 4)
    assert_allclose(value("rouge_l", ["running cats slept!"], ["Runs cat eating slept"]), 6 / 7)
    assert value("rouge_l", ["да"], ["да"]) == 0.0  # rouge-score's words are a-z and 0-9
    rows = [Example("1", "x", "да нет")]
    assert_allclose(score(Task("t", "generation", metric="rouge_l", language="ru"), ["да"], rows).value, 2 / 3)
    assert score(Task("t", "generation", metric="rouge_l", language="en"), ["да"], rows).value == 0.0


@settings(max_examples=60, deadline=None)
@given(answered)
def test_bleu_and_chrf_as_in_sacrebleu(rows: list[tuple[str, list[str]]]) -> None:
    answers = [a for a, _ in rows]
    most = max(len(refs) for _, refs in rows)
    streams = [[refs[n] if n < len(refs) else None for _, refs in rows] for n in range(most)]
    for name, metric in (("bleu", BLEU(force=True)), ("chrf", CHRF())):
        wanted = metric.corpus_score(answers, streams).score  # type: ignore[arg-type]
        assert_allclose(100 * value(name, answers, [tuple(refs) for _, refs in rows]), wanted, atol=1e-9)


def test_bleu_by_hand() -> None:
    # precisions 5/6, 3/5, 1/4 and, of no 4-gram of 3, smoothed to 1 / (2 * 3); no brevity penalty
    answer, reference = "the cat sat on the mat", "the cat lay on the mat"
    assert_allclose(value("bleu", [answer], [reference]), (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)


# -- slots and numbers -------------------------------------------------------------------------------------------------


def test_slots_of_both_forms() -> None:
    assert slots("pickup time = 12:30; Where To =  San  Jose") == {
        ("pickup time", "12:30"): 1,
        ("where to", "san jose"): 1,
    }
    assert slots("intent: BookRestaurant; city: a = b\nrate: 5") == slots(
        "city: A = B; rate = 5; intent = bookrestaurant"
    )
    assert slots(r"BookRestaurant; title: one\; two;") == {("", "bookrestaurant"): 1, ("title", "one; two"): 1}
    assert slots(" None ") == slots("") == {}


def test_slot_f1_by_hand() -> None:
    gold = ["a = 1; b = 2", ("c = 3", "c = 3; d = 4"), "none"]
    # right: a; c and d by the second reference; predicted: 2 + 2 + 1, true: 2 + 2 + 0
    assert_allclose(value("slot_f1", ["a = 1; b = 9", "d: 4; c: 3", "none of these"], gold), 2 * 3 / (5 + 4))
    assert_allclose(value("slot_f1", ["a = 1; a = 1", None, ""], gold), 2 * 1 / (2 + 3))  # said twice, right once
    assert_allclose(value("slot_f1", ["", "b = 2"], [("a = 1", "none"), "b = 2"]), 1.0)
    assert value("slot_f1", ["b=2 ; a=1", "c: 3", "None"], gold) == 1.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 3 + 4 = 7 dollars.", ["3", "4", "7"]),
        ("$1,234.50 and 1,000,000!", ["1234.50", "1000000"]),
        ("1, 2,3", ["1", "2", "3"]),
        ("12,34 1234,567", ["12", "34", "1234", "567"]),
        ("10-3 is −7, -.5 or 2e-3", ["10", "3", "-7", "-.5", "2e-3"]),
        ("A4, x2 and v1.2", []),
        ("3rd 50%", ["3", "50"]),
    ],
)
def test_numbers(text: str, found: list[str]) -> None:
    assert numbers(text) == found


def test_numeric_match() -> None:
    assert numeric_match("She has 5 of 12, so #### 1,080.", "1080") == 1.0
    assert numeric_match("18.00", "18") == 1.0
    assert numeric_match("18 of 20", "18") == 0.0
    assert numeric_match("1000001", "1000000") == 0.0  # whole numbers are exact
    assert numeric_match("0.33333", "0.333334") == 1.0
    assert numeric_match("0.3333", "0.3343") == 0.0
    assert numeric_match("2.5 then 18.0", "18") == 1.0
    assert numeric_match("-5", "5") == 0.0
    assert numeric_match("9" * 5000, "9" * 5000) == 1.0
    assert numeric_match("none", " none ") == 1.0
    assert numeric_match("none 4", "none") == numeric_match("none", "4") == 0.0
    t, rows = task(["18", "1,000"])
    assert score(t, ["It is 18.", "1000"], rows).others["numeric_match"] == 1.0  # all references are numbers
    t, rows = task(["18", "x"])
    assert "numeric_match" not in score(t, ["18", "x"], rows).others


# -- the door ----------------------------------------------------------------------------------------------------------


def test_resamples_are_the_metric_of_the_drawn_rows() -> None:
    rng = np.random.default_rng(0)
    say = lambda: " ".join(rng.choice(["a=1", "cats", "sat;", "b=2", "on", "17"], rng.integers(1, 7)))  # noqa: E731
    outputs = [(say(), say()) if n % 3 else say() for n in range(30)]
    answers = [outputs[n] if n % 4 == 0 and n % 3 == 0 else say() for n in range(30)]
    answers[7] = None
    t, rows = task(outputs, extra=[{"passage": say()} for _ in outputs])
    _, resample = written(t, answers, rows, TEXTS)
    assert set(resample) == {*TEXTS, "answer_words", "verbosity"}
    for _ in range(5):
        drawn = rng.integers(0, 30, 30)
        values, _ = written(t, [answers[i] for i in drawn], [rows[i] for i in drawn], TEXTS)
        w = np.bincount(drawn, minlength=30).astype(float)[None]
        for name in values:
            assert_allclose(resample[name](w)[0], values[name], err_msg=name, rtol=1e-9)


@pytest.mark.parametrize("metric", TEXTS)
def test_bounds_and_intervals(metric: str) -> None:
    outputs = [f"slot = value {n} of it" for n in range(40)]
    t, rows = task(outputs, metric, [{"passage": o} for o in outputs])
    best = score(t, outputs, rows, resamples=50)
    assert_allclose([best.low, best.value, best.high], 1.0)
    worst = score(t, [None] * 40, rows, resamples=50)
    assert_allclose([worst.low, worst.value, worst.high], 0.0, atol=1e-9)
    half = score(t, [o if n % 2 else "xyz" for n, o in enumerate(outputs)], rows, resamples=200)
    assert 0 < half.low < half.value < half.high < 1
    assert half == score(t, [o if n % 2 else "xyz" for n, o in enumerate(outputs)], rows, resamples=200)


def test_costly_metrics_only_where_asked() -> None:
    t, rows = task(["a b c d"], "exact_match")
    cheap = {"squad_exact_match", "token_f1", "token_recall", "answer_words", "verbosity"}
    assert set(score(t, ["a b"], rows).others) == cheap
    assert set(score(t, ["a b"], rows, also=("ROUGE-L", "chrF")).others) == cheap | {"rouge_l", "chrf"}
    with pytest.raises(UsageError, match="metric 'spearman' does not fit a generation task"):
        score(t, ["a b"], rows, also=("spearman",))
    t, rows = task(["a b c d"], "verbosity")
    with pytest.raises(UsageError, match="metric 'verbosity' does not fit task 't'; one of exact_match"):
        score(t, ["a b"], rows)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rouge_l", "rouge_l"),
        ("ROUGE-L", "rouge_l"),
        ("rougeL", "rouge_l"),
        ("slot_f1 (or exact match)", "slot_f1"),
        ("exact_match and rouge_l", "exact_match"),
        ("sacreBLEU", "bleu"),
        ("chrF", "chrf"),
        ("SQuAD F1", "token_f1"),
        ("K-Precision", "k_precision"),
    ],
)
def test_names_in_the_data(text: str, name: str) -> None:
    assert metric_name(text, "generation") == name
