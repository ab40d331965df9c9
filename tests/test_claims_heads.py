"""Claims about heads and what stands before them: what is compared on tiny models, and what verdicts make of rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import write_tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import polytask as pt
from claims import P144_crosstune, P315_experts, P364_kadapter, claim, short
from polytask.backbones import Backbone
from polytask.inference import Answer
from polytask.training import probe

CACHED = (short.whole, P315_experts.untrained, P315_experts.searched, P364_kadapter.facts, P364_kadapter.adapter)


@cache
def encoder() -> Backbone:
    return tiny.backbone("bert", tokenizer=tiny.words(*"abcdefgh"))


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks of a few words in place of the real ones, and a tiny model."""
    write_tasks(tmp_path / "tasks", sorted({*short.TASKS, *P144_crosstune.TASKS}), n=60)
    folder = tmp_path / "tasks" / "function_vectors" / "abstractive"
    folder.mkdir(parents=True)
    for letters, name in zip(("abcd", "efgh"), P364_kadapter.SETS.values(), strict=True):
        rows = [{"input": f"{a} {b}", "output": f"{name} {a}"} for a in letters for b in letters]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    monkeypatch.setenv("POLYTASK_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(short, "base", encoder)
    for module, values in (
        (short, {"EXAMPLES": 24, "HELD": 8, "TEST": 8, "EPOCHS": 1}),
        (P144_crosstune, {"SHOTS": 4, "LABELS": 3}),
        (probe, {"STEPS": 10}),
        (P315_experts, {"SEARCH": 1}),
        (P364_kadapter, {"PEOPLE": 14, "TRAIN": 6, "HELD": 3, "TELLINGS": 1, "EPOCHS": 1}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    for one in CACHED:
        one.cache_clear()
    yield
    for one in CACHED:
        one.cache_clear()


def judged(module: Any, monkeypatch: pytest.MonkeyPatch, **measured: Callable[..., dict[str, Any]]) -> claim.Verdict:
    """The verdict on rows that were never measured."""
    for name, row in measured.items():
        monkeypatch.setattr(module, name, row)
    found: claim.Verdict = module.measure(claim.Rows("P0"))
    return found


# ------------------- labels that attend


def test_as_many_of_each_label_are_learnt_from_as_are_chosen_by() -> None:
    name = "cr_polarity"
    drawn = P144_crosstune.shots(name, 0)
    given = {e.id for e in short.whole(name).train}
    for split in (drawn.train, drawn.validation):
        assert sorted(str(e.output) for e in split) == sorted("abc" * 4)  # the first three labels
        assert {e.id for e in split} <= given
    assert not {e.id for e in drawn.train} & {e.id for e in drawn.validation}
    assert {e.output for e in drawn.test} <= {*"abc"}
    assert drawn.train != P144_crosstune.shots(name, 1).train


def test_labels_of_few_examples_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = short.whole("scicite")
    rare = replace(
        whole, train=(*(e for e in whole.train if e.output != "a"), *[e for e in whole.train if e.output == "a"][:7])
    )
    monkeypatch.setattr(short, "whole", lambda name: rare)
    assert [label.name for label in P144_crosstune.shots("scicite", 0).labels] == [*"bcd"]


def test_labels_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(P144_crosstune.TASKS, "scicite", {"b": "e f"})
    described = {label.name: label.description for label in P144_crosstune.shots("scicite", 0).labels}
    assert described == {"a": "", "b": "e f", "c": ""}


def test_misnamed_labels_are_the_next_ones() -> None:
    task = P144_crosstune.shots("scicite", 0)
    wrong = P144_crosstune.misnamed(task)
    for split in ("train", "validation", "test"):
        pairs = {
            (e.input, e.output, f.input, f.output) for e, f in zip(task.split(split), wrong.split(split), strict=True)
        }
        assert {(b, d) for a, b, c, d in pairs if a == c} <= {("a", "b"), ("b", "c"), ("c", "a")}
        assert all(a == c for a, _, c, _ in pairs)
    assert wrong.labels == task.labels


def test_both_heads_stand_on_the_same_frozen_states() -> None:
    d, labels = encoder().hidden_size, 3
    rows = {way: P144_crosstune.run("scicite", way, 0) for way in P144_crosstune.WAYS}
    assert rows["linear"]["parameters"] == labels * d + labels
    assert rows["labels"]["parameters"] == rows["misnamed"]["parameters"] == 4 * d * d + labels
    assert {row["metric"] for row in rows.values()} == {"accuracy"}


@pytest.mark.parametrize(("labels", "holds"), [(0.73, True), (0.71, False), (0.6, False)])
def test_labels_have_to_beat_a_linear_head(labels: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    score = {"linear": 0.7, "labels": labels, "misnamed": 0.65}
    found = judged(P144_crosstune, monkeypatch, run=lambda name, way, seed: {"test": score[way]})
    assert found.holds == holds
    assert f"({100 * labels - 70:+.1f} points" in found.measured
    assert "wrong name 65.0" in found.measured


# ------------------- gates


def test_one_expert_in_each_layer_reads_and_no_other_ever_does() -> None:
    first, last = P315_experts.untrained("cr_polarity", 0), P315_experts.searched("cr_polarity", 0, P315_experts.GENTLE)
    assert len(P315_experts.places(first.tensors)) == len(encoder().blocks)
    assert P315_experts.places(last.tensors) == P315_experts.places(first.tensors)
    assert {*P315_experts.places(P315_experts.untrained("cr_polarity", 1).tensors).items()} != {
        *P315_experts.places(first.tensors).items()
    }
    for site, place in P315_experts.places(last.tensors).items():
        before, after = (one.tensors[f"{site}/D"].view(4, -1) for one in (first, last))
        assert not torch.equal(before[place], after[place])
        assert bool(last.tensors[f"{site}/b_U"].any(-1).all())  # the others do learn what they can
        assert not torch.equal(first.tensors[f"{site}/alpha"], last.tensors[f"{site}/alpha"])


def test_what_gates_choose_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = P315_experts.searched("cr_polarity", 0, P315_experts.GENTLE)
    reads = P315_experts.places(mixture.tensors)
    gates = {f"{site}/alpha": 3.0 * torch.eye(4)[(place + (site == "1.mlp")) % 4] for site, place in reads.items()}
    monkeypatch.setattr(
        P315_experts, "searched", lambda n, s, r: replace(mixture, tensors={**mixture.tensors, **gates})
    )
    row = P315_experts.search("cr_polarity", 0, 1e-3)
    assert (row["layers"], row["kept"]) == (3, 2)
    high, low = (float(x) for x in torch.tensor([3.0, 0.0, 0.0, 0.0]).softmax(0)[:2])
    assert row["gate"] == pytest.approx((2 * high + low) / 3)


def test_what_is_pruned_is_trained_on_from_where_it_is() -> None:
    rows = {way: P315_experts.trained(way, "cr_polarity", 1e-3, 0) for way in ("mixture", "pruned")}
    d, layers = encoder().hidden_size, len(encoder().blocks)
    one = 2 * d * (d // 12) + d // 12 + d
    assert rows["mixture"]["parameters"] == layers * 4 * (one + 1)
    assert rows["pruned"]["parameters"] == layers * one
    assert rows["mixture"]["head"] == rows["pruned"]["head"]
    mixture = P315_experts.searched("cr_polarity", 0, P315_experts.GENTLE)
    left = P315_experts.cut(mixture)
    assert left.method == "parallel"
    assert torch.equal(left.tensors["head/W"], mixture.tensors["head/W"])
    P315_experts.search("cr_polarity", 0, P315_experts.GENTLE)
    assert P315_experts.searched.cache_info().misses == 1  # searched once for all of this


@pytest.mark.parametrize(
    ("kept", "pruned", "holds"), [(6, 0.796, True), (5, 0.8, False), (6, 0.79, False), (6, 0.82, True)], ids=str
)
def test_gates_have_to_find_it_and_pruning_to_cost_little(
    kept: int, pruned: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(way: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        test, numbers = (pruned, 10) if way == "pruned" else (0.8, 44)
        return {"test": test, "validation": rate, "head": 0.5, "parameters": numbers}

    def search(name: str, seed: int, rate: float) -> dict[str, Any]:
        return {"layers": 6, "kept": 1 if rate == P315_experts.HASTY else kept}

    found = judged(P315_experts, monkeypatch, trained=trained, search=search)
    assert found.holds == holds
    assert f"{6 * kept} of 36 layers keep the expert that reads (3 of 18 after a search at 0.003)" in found.measured
    assert f"pruned {100 * pruned:.1f} with 10 numbers" in found.measured


# ------------------- adapters of facts


def test_questions_are_in_other_words_and_of_other_people_than_those_tested() -> None:
    task = P364_kadapter.asked(0, *P364_kadapter.SETS)
    people = [{e.id for e in rows} for rows in (task.train, task.validation, task.test)]
    assert [len(ids) for ids in people] == [12, 6, 10]
    assert len(set.union(*people)) == 28
    said = {e.input for of in P364_kadapter.SETS for e in P364_kadapter.told(of).train}
    assert len(said) == 3 * 28
    assert not said & {e.input for e in (*task.train, *task.validation, *task.test)}
    assert [label.name for label in task.labels] == sorted({str(e.output) for e in (*task.train, *task.test)})
    assert people != [{e.id for e in rows} for rows in (P364_kadapter.asked(1, *P364_kadapter.SETS).train,)]


def test_an_adapter_knows_facts_of_its_set_alone() -> None:
    facts = {of: P364_kadapter.facts(of) for of in P364_kadapter.SETS}
    for of, file in P364_kadapter.SETS.items():
        told = P364_kadapter.told(of)
        assert {e.output for e in told.train} == {*facts[of].values()}
        assert {str(e.output).split()[0] for e in told.train} == {file}
        assert [e.output for e in told.train] == [*facts[of].values()] * 3
    assert not facts["musicians"].keys() & facts["athletes"].keys()


def test_a_blank_adapter_hands_on_the_states_of_the_backbone() -> None:
    blank = P364_kadapter.blank(1)
    head = replace(
        blank, method="head", hyperparameters={}, tensors={n: t for n, t in blank.tensors.items() if n[:5] == "head/"}
    )
    rows = [pt.Request(text, adapter=one.id) for one in (blank, head) for text in ("a b", "c d")]
    answers = pt.Engine(encoder(), adapters=[blank, head]).answer(rows)
    assert [a.probability for a in answers[:2]] == pytest.approx([a.probability for a in answers[2:]], abs=1e-5)
    assert P364_kadapter.blank(0).id != blank.id


def test_all_arms_train_as_many_numbers_and_leave_adapters_as_they_are() -> None:
    before = P364_kadapter.adapter("musicians")
    kept = {n: t.clone() for n, t in before.tensors.items()}
    rows = {arm: P364_kadapter.joined(arm, 1e-2, 0) for arm in ("none", "both")}
    d, classes = encoder().hidden_size, len(P364_kadapter.asked(0, *P364_kadapter.SETS).labels)
    assert {row["parameters"] for row in rows.values()} == {2 * d * d + d + classes * d + classes}
    assert all(row["same"] for row in rows.values())
    assert all(t.equal(kept[n]) for n, t in P364_kadapter.adapter("musicians").tensors.items())
    for row in rows.values():
        assert row["test"] == pytest.approx((row["musicians"] + row["athletes"]) / 2)


def test_an_adapter_that_answers_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = P364_kadapter.answers, []

    def answers(of: str, seed: int, beside: Any = ()) -> list[Answer]:
        calls.append(of)
        found = real(of, seed, beside)
        return found if not beside else [replace(found[0], probability=2.0), *found[1:]]

    monkeypatch.setattr(P364_kadapter, "answers", answers)
    assert not P364_kadapter.joined("both", 1e-2, 0)["same"]
    assert calls == ["musicians", "athletes", "musicians"]


@pytest.mark.parametrize(
    ("none", "both", "same", "holds"),
    [(0.3, 0.8, True, True), (0.3, 0.74, True, False), (0.51, 0.8, True, False), (0.3, 0.8, False, False)],
    ids=str,
)
def test_both_have_to_beat_each_and_to_change_none(
    none: float, both: float, same: bool, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = {"none": none, "musicians": 0.55, "athletes": 0.5, "both": both}

    def joined(arm: str, rate: float, seed: int) -> dict[str, Any]:
        return {"test": score[arm], "validation": rate, "musicians": 0.9, "athletes": 0.8, "same": same}

    found = judged(P364_kadapter, monkeypatch, joined=joined, learnt=lambda of: {"asked": 0.99})
    assert found.holds == holds
    assert f"both {100 * both:.1f} ({100 * both - 55:+.1f} points" in found.measured
    assert ("as before" in found.measured) == same
