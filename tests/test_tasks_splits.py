"""Made splits: sizes, labels, duplicates, seeds. Given splits: left alone, their leaks told."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.tasks import Example, Task
from polytask.tasks.splits import duplicate_key, holdout_size, leaks, make_splits


def examples(labels: list[str], texts: list[str] | None = None) -> list[Example]:
    texts = texts or [f"text {n}" for n in range(len(labels))]
    return [Example(str(n), text, label) for n, (text, label) in enumerate(zip(texts, labels, strict=True))]


@pytest.mark.parametrize(
    ("n", "size"), [(4, 0), (5, 1), (50, 10), (100, 20), (150, 30), (300, 30), (1000, 100), (10**6, 2000)]
)
def test_sizes(n: int, size: int) -> None:
    assert holdout_size(n) == size


def test_a_thousand_rows_split_by_label() -> None:
    labels = ["a"] * 700 + ["b"] * 200 + ["c"] * 100
    splits, notes = make_splits({"train": examples(labels)}, "classification")
    assert {name: Counter(e.output for e in part) for name, part in splits.items()} == {
        "train": {"a": 560, "b": 160, "c": 80},
        "validation": {"a": 70, "b": 20, "c": 10},
        "test": {"a": 70, "b": 20, "c": 10},
    }
    assert notes == [
        "validation (100 rows) and test (100 rows) made out of the 1000 rows of train, seed 0, stratified by label"
    ]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 60)), min_size=1, max_size=150),
    st.integers(0, 5),
    st.sampled_from(["classification", "generation"]),
)
def test_properties(rows: list[tuple[str, int]], seed: int, kind: str) -> None:
    spaces = [" ", "  ", "\n"]
    texts = [f"Text{spaces[n % 3]}NUMBER {x}" if n % 2 else f"text number {x}" for n, (_, x) in enumerate(rows)]
    data = examples([label for label, _ in rows], texts)
    splits, _ = make_splits({"train": data}, kind, seed=seed)  # type: ignore[arg-type]
    ids = [e.id for part in splits.values() for e in part]
    assert sorted(ids) == sorted(e.id for e in data), "every row in one split"
    keys = {name: {duplicate_key(e) for e in part} for name, part in splits.items()}
    assert len(set.union(*keys.values())) == sum(map(len, keys.values())), "duplicates stay together"
    assert leaks(splits) == []
    assert splits["train"]
    for part in splits.values():
        assert [int(e.id) for e in part] == sorted(int(e.id) for e in part), "the order of the file is kept"
    if kind == "classification" and len({duplicate_key(e) for e in data}) == len(data):
        assert {e.output for e in splits["train"]} == {e.output for e in data}
        size = holdout_size(len(data))
        assert len(splits["test"]) <= size
        assert len(splits["validation"]) <= size


def test_shares_add_up_with_many_small_labels() -> None:
    splits, _ = make_splits({"train": examples([f"l{n % 100}" for n in range(1500)])}, "classification")
    assert (len(splits["validation"]), len(splits["test"])) == (150, 150)
    assert set(Counter(e.output for e in splits["test"]).values()) == {1, 2}
    assert set(Counter(e.output for e in splits["train"]).values()) <= {11, 12, 13}


def test_the_last_group_of_duplicates_of_a_label_stays_in_train() -> None:
    texts = [f"text {n}" for n in range(140)] + ["one text"] * 30 + ["another text"] * 30
    splits, _ = make_splits({"train": examples(["a"] * 140 + ["b"] * 60, texts)}, "classification")
    assert {name: sum(e.output == "b" for e in part) for name, part in splits.items()} == {
        "train": 30,
        "validation": 0,
        "test": 30,
    }


def test_the_seed_decides_and_the_order_of_rows_does_not() -> None:
    data = examples([f"l{n % 7}" for n in range(400)])
    one, _ = make_splits({"train": data}, "classification", seed=3)
    again, _ = make_splits({"train": data}, "classification", seed=3)
    other, _ = make_splits({"train": data}, "classification", seed=4)
    shuffled = random.Random(0).sample(data, len(data))
    mixed, _ = make_splits({"train": shuffled}, "classification", seed=3)
    assert one == again
    assert one["test"] != other["test"]
    assert {e.id for e in one["test"]} == {e.id for e in mixed["test"]}


def test_multilabel_goes_by_the_rarest_label() -> None:
    data = [Example(str(n), f"t {n}", ("common", "rare") if n % 10 == 0 else ("common",)) for n in range(1000)]
    splits, _ = make_splits({"train": data}, "multilabel")
    assert sum("rare" in e.output for e in splits["test"]) == 10  # type: ignore[operator]


def test_given_splits_stay(tmp_path: Path) -> None:
    train, test = examples(["a", "b"] * 50), [Example("x", "other", "a"), Example("y", " TEXT  7 ", "b")]
    splits, notes = make_splits({"train": train, "test": test}, "classification")
    assert splits["test"] == tuple(test)
    assert (len(splits["train"]), len(splits["validation"])) == (80, 20)
    assert notes == ["validation (20 rows) made out of the 100 rows of train, seed 0, stratified by label"]
    full = {"train": train, "validation": test[:1], "test": test}
    splits, notes = make_splits(full, "classification")
    assert (splits, notes) == ({name: tuple(part) for name, part in full.items()}, [])
    assert leaks(splits) == [
        "one input of test also in train, which flatters scores; ids: y",
        "one input of test also in validation, which flatters scores; ids: x",
    ]
    more = [Example(f"z{n}", f"text {n}", "a") for n in range(5)]
    assert leaks({"train": train, "test": more}) == [
        "5 of 5 inputs of test also in train, which flatters scores; ids: z0, z1, z2"
    ]


def test_leaks_are_in_the_notes_of_a_task(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nhello there,x\nbye,y\n")
    (tmp_path / "test.csv").write_text("text,label\nHello  THERE,x\n")
    task = Task.read(tmp_path)
    assert "one input of test also in train, which flatters scores; ids: test-1" in task.notes


def test_too_few_rows_and_no_train() -> None:
    splits, notes = make_splits({"train": examples(["a", "b", "a", "b"])}, "classification")
    assert (len(splits["train"]), len(splits["test"])) == (4, 0)
    assert notes == ["no test and no validation split: 4 rows are too few to hold any out"]
    splits, notes = make_splits({"test": examples(["a", "b"] * 50)}, "classification")
    assert (len(splits["train"]), len(splits["test"]), notes) == (0, 100, [])
