"""Claims that are measured on short texts: what their rows hold on tiny models, and what the verdict makes of them."""

from __future__ import annotations

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
from writers import writer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import polytask as pt
from claims import P055_graft, P102_half, P249_lottery, P258_rotation, P304_perfect, P316_aligner, claim, short
from polytask.backbones import Backbone
from polytask.recipes.adapt import predict

TASKS = {*short.TASKS, *P249_lottery.TASKS, *P258_rotation.TASKS}


@cache
def encoder() -> Backbone:
    tokens = tiny.words(*"abcdefgh", "[MASK]")
    tokens.mask_token = "[MASK]"
    return tiny.backbone("bert", tokenizer=tokens)


@cache
def decoder() -> Backbone:
    return writer("llama", max_position_embeddings=256)


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks of a few words in place of the real ones, and tiny models."""
    write_tasks(tmp_path / "tasks", sorted(TASKS))
    monkeypatch.setenv("POLYTASK_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(short, "base", encoder)
    for name, value in {"EXAMPLES": 24, "HELD": 8, "TEST": 8, "EPOCHS": 1}.items():
        monkeypatch.setattr(short, name, value)
    short.whole.cache_clear()
    yield
    short.whole.cache_clear()


def judged(module: Any, monkeypatch: pytest.MonkeyPatch, **measured: Callable[..., dict[str, Any]]) -> claim.Verdict:
    """The verdict on rows that were never measured."""
    for name, row in measured.items():
        monkeypatch.setattr(module, name, row)
    claim.Rows("P0").path.unlink(missing_ok=True)
    found: claim.Verdict = module.measure(claim.Rows("P0"))
    return found


# ------------------- what they share


def test_few_examples_are_of_all_labels_alike_and_of_the_training_split() -> None:
    name = short.TASKS[0]
    drawn = short.few(name, 10, seed=0)
    counts = sorted([e.output for e in drawn.train].count(label) for label in "abcd")
    assert counts == [2, 2, 3, 3]
    assert {e.id for e in drawn.train} <= {e.id for e in short.whole(name).train}
    assert drawn.train == short.few(name, 10, seed=0).train != short.few(name, 10, seed=1).train


def test_the_rate_is_picked_by_validation_on_one_task_at_the_first_seed() -> None:
    seen = []

    def row(name: str, rate: float, seed: int) -> dict[str, Any]:
        seen.append((name, rate, seed))
        return {"validation": rate, "test": 1 - rate}

    rate, found = short.picked((0.1, 0.3), row)
    assert rate == 0.3
    assert short.points(found) == pytest.approx(70)
    assert {key[1] for key in seen if key[0] != short.PICKED_ON or key[2] != short.SEEDS[0]} == {0.3}


# ------------------- half fine-tuning


def test_a_round_begins_where_the_last_one_ended() -> None:
    """The backbone after an adapter answers, with the adapter's head, as the backbone does with the adapter."""
    task, base = short.task(short.TASKS[0]), encoder()
    last = replace(task, validation=())  # its last tensors are kept
    hyper = {"weights": short.BLOCKS}
    adapter = pt.adapt(base, last, "full@half", hyperparameters=hyper, settings=short.settings(1e-2, 0))
    moved = P102_half.after(base, adapter)
    expected = predict(base, adapter, task.test)
    assert predict(moved, P102_half.reader(adapter, moved), task.test) == expected
    changed = {n for n, p in moved.model.named_parameters() if not torch.equal(p, base.model.get_parameter(n))}
    assert changed
    assert not any("embeddings" in n for n in changed)


def test_what_is_forgotten_is_of_earlier_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(P102_half, "EPOCHS", 2)
    row = P102_half.run("full@half", 1e-3, 0)
    earlier = [row["first"][name] - row["test"][name] for name in short.TASKS[:-1]]
    assert row["forgotten"] == pytest.approx(sum(earlier) / 2)
    assert row["first"][short.TASKS[-1]] == row["test"][short.TASKS[-1]]
    assert row["seconds"] > 0


@pytest.mark.parametrize(
    ("half", "seconds", "holds"), [(0.10, 7.0, True), (0.10, 8.0, False), (0.30, 7.0, False)], ids=str
)
def test_half_has_to_forget_less_and_to_save_time(
    half: float, seconds: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(way: str, rate: float, seed: int) -> dict[str, Any]:
        lost, took = (0.2, 10.0) if way == "full" else (half, seconds)
        return {"test": {"a": 0.9 - lost}, "forgotten": lost, "validation": rate, "seconds": took}

    found = judged(P102_half, monkeypatch, run=run)
    assert found.holds == holds
    assert f"half forgets {100 * half:.1f} points" in found.measured
    assert f"half takes {100 * (1 - seconds / 10):.0f} % less time" in found.measured


# ------------------- sparse differences


def test_the_language_has_other_letters_and_pairs_of_texts_no_task_is_trained_on() -> None:
    example = short.task(P249_lottery.TASKS[0]).test[0]
    [said] = P249_lottery.foreign([example])
    assert (said.output, said.input) == (example.output, example.input.replace("a", "o"))
    pairs = P249_lottery.language()
    rows = [*pairs.train, *pairs.validation]
    assert len(rows) == 2 * (40 - short.EXAMPLES)
    trained = {e.input for name in P249_lottery.TASKS for e in short.task(name).train}
    assert {e.input for e in rows}.isdisjoint(trained - {e.input for n in TASKS for e in short.whole(n).train[24:]})
    for pair in rows:
        assert (pair.pair == pair.input.translate(P249_lottery.LETTERS)) == bool(pair.output)


def test_differences_are_added() -> None:
    P249_lottery.fit.cache_clear()
    name = P249_lottery.TASKS[0]
    learnt, row = P249_lottery.learnt("sparse", name, 1e-3), P249_lottery.added("sparse", name, 1e-3)
    everything = sum(t.numel() for n, t in P249_lottery.fit("sparse", name, 1e-3).tensors.items() if n.startswith(":"))
    P249_lottery.fit.cache_clear()
    assert learnt.keys() == {"test", "validation", "seconds"}
    assert 0 < row["numbers"] <= 0.08 * everything + 1
    assert 0 <= row["alone"] <= 1
    assert 0 <= row["added"] <= 1


@pytest.mark.parametrize(("sparse", "holds"), [(0.8, True), (0.65, False), (0.5, False)])
def test_sparse_sums_have_to_beat_the_task_alone_and_dense_sums(
    sparse: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def added(kind: str, name: str, rate: float) -> dict[str, Any]:
        assert rate == max(P249_lottery.RATES)
        return {"alone": 0.6, "added": sparse if kind == "sparse" else 0.7}

    found = judged(P249_lottery, monkeypatch, learnt=lambda k, n, r: {"validation": r, "test": 0.9}, added=added)
    assert found.holds == holds
    assert f"with the language {100 * sparse:.1f} ({100 * sparse - 60:+.1f} points)" in found.measured


# ------------------- grafts


def test_the_calibration_error_by_hand() -> None:
    """Bins 0.5–0.6: 0.5 and 0.6⁻, one of two right: |1 − 1.05|; 0.9–1: 0.9 and 1, both right: |2 − 1.9|."""
    error = P055_graft.calibration_error([0.5, 0.55, 0.9, 1.0], [True, False, True, True])
    assert error == pytest.approx((0.05 + 0.1) / 4)


def test_a_graft_is_a_hundredth_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    full = P055_graft.run(short.TASKS[0], "full", 1e-2, 0)
    graft = P055_graft.run(short.TASKS[0], "full@graft", 1e-2, 0)
    blocks = sum(p.numel() for n, p in encoder().model.named_parameters() if "encoder.layer" in n)
    assert 0 < graft["numbers"] <= 0.02 * blocks  # descent on the mask may take more than the hundredth it began with
    assert 0 <= graft["error"] <= 1
    assert full["head"] == graft["head"]


@pytest.mark.parametrize(
    ("graft", "error", "holds"), [(0.77, 0.1, True), (0.75, 0.1, False), (0.77, 0.3, False)], ids=str
)
def test_a_graft_has_to_keep_the_score_and_be_calibrated(
    graft: float, error: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, way: str, rate: float, seed: int) -> dict[str, Any]:
        kept, wrong = (0.8, 0.2) if way == "full" else (graft, error)
        return {"test": kept, "error": wrong, "validation": -rate, "head": 0.5, "numbers": 1000}

    found = judged(P055_graft, monkeypatch, run=run)
    assert found.holds == holds
    assert f"({graft / 0.8:.1%} kept)".replace("%", " %") in found.measured


# ------------------- rotations


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(P258_rotation, "base", decoder)
    monkeypatch.setattr(P258_rotation, "BUDGET", 7)
    monkeypatch.setattr(P258_rotation, "ROTATION", {"shared": 4, "sites": ("0.attn.heads",)})


def test_angles_are_searched_for_and_examples_are_shown(brief: None) -> None:
    name = P258_rotation.TASKS[0]
    row = P258_rotation.turned(name, 0)
    assert row["numbers"] == 4
    assert row["after"] >= row["before"] > 0
    plain, context = P258_rotation.alone(name), P258_rotation.shown(name, 0)
    assert {plain["metric"], context["metric"], row["metric"]} == {"accuracy"}
    assert 0 <= context["test"] <= 1


def test_as_many_examples_are_shown_as_fit(brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def none(self: Any, asks: Any, answers: Any) -> list[Any]:
        asked.extend(len(ask.prompt.split("Input:")) - 1 for ask in asks)
        return [torch.zeros(1) for _ in asks]

    monkeypatch.setattr("polytask.inference.Engine.logprobs", none)
    P258_rotation.shown(P258_rotation.TASKS[0], 0)
    assert 1 < min(asked) <= max(asked) <= P258_rotation.SHOWN + 1


@pytest.mark.parametrize(("turned", "holds"), [(0.7, True), (0.55, False), (0.45, False)])
def test_rotations_have_to_beat_both(turned: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"test": turned, "before": 0.5, "after": 0.6, "numbers": 128}
    found = judged(
        P258_rotation,
        monkeypatch,
        turned=lambda name, seed: row,
        alone=lambda name: {"test": 0.5},
        shown=lambda name, seed: {"test": 0.6},
    )
    assert found.holds == holds
    assert f"{100 * turned:.1f}, alone 50.0 ({100 * turned - 50:+.1f} points)" in found.measured


# ------------------- label embeddings at masks


@pytest.mark.parametrize("way", P304_perfect.WAYS)
def test_every_way_of_reading_learns_and_answers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(P304_perfect, "base", lambda name: encoder() if name == "minilm" else decoder())
    monkeypatch.setattr(P304_perfect, "EPOCHS", 1)
    row = P304_perfect.run(short.TASKS[0], way, P304_perfect.WAYS[way][2][0], 0)
    assert row["metric"] == "accuracy"
    assert 0 <= row["test"] <= 1
    assert row["parameters"] > 0


def test_answers_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(P304_perfect, "base", lambda name: encoder() if name == "minilm" else decoder())
    monkeypatch.setattr(P304_perfect, "EPOCHS", 1)
    monkeypatch.setattr(P304_perfect, "ROUNDS", 2)
    row = P304_perfect.answering(short.TASKS[0], {"masks": (1e-3, 1e-2), "written": (2e-3, 1e-3)})
    assert row["ms masks"] > 0
    assert row["faster"] == pytest.approx(row["ms written"] / row["ms masks"], rel=0.9)


@pytest.mark.parametrize(("masks", "faster", "holds"), [(0.8, 12.0, True), (0.72, 12.0, False), (0.8, 9.0, False)])
def test_masks_are_judged_by_what_they_are_better_than_a_head(
    masks: float, faster: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = {"masks": masks, "mean": 0.7, "written": 0.5, "last": 0.5}
    found = judged(
        P304_perfect,
        monkeypatch,
        run=lambda name, way, rates, seed: {"test": score[way], "validation": rates[0]},
        answering=lambda name, best: {"ms masks": 1.0, "ms written": faster, "faster": faster},
    )
    assert found.holds == holds
    assert f"({faster:.1f} times)" in found.measured


# ------------------- one token


def test_one_token_has_few_numbers() -> None:
    rows = {method: P316_aligner.run(short.TASKS[0], method, 1e-3, 0) for method in P316_aligner.WAYS}
    blocks, d = len(encoder().blocks), encoder().hidden_size
    assert rows["aligner"]["parameters"] == d + blocks * encoder().heads
    assert rows["prompt"]["parameters"] == 2 * d
    assert rows["lora"]["parameters"] == 2 * blocks * 2 * d * 8
    assert rows["aligner"]["head"] == rows["lora"]["head"]


@pytest.mark.parametrize(("score", "numbers", "holds"), [(0.66, 456, True), (0.64, 456, False), (0.66, 800, False)])
def test_one_token_has_to_be_comparable_and_small(
    score: float, numbers: int, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        test, parameters = (score, numbers) if method == "aligner" else (0.8, 73728)
        return {"test": test, "validation": rate, "head": 0.5, "parameters": parameters}

    found = judged(P316_aligner, monkeypatch, run=run)
    assert found.holds == holds
    assert f"Aligner {100 * score:.1f}" in found.measured
    assert "the head alone 50.0" in found.measured


def test_rows_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(name: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        seen.append((name, method, rate, seed))
        return {"test": 0.5, "validation": rate, "head": 0.5, "parameters": 1}

    first = judged(P316_aligner, monkeypatch, run=run)
    count = len(seen)
    assert count == len({*seen})
    assert P316_aligner.measure(claim.Rows("P0")) == first
    assert len(seen) == count
