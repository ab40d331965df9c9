"""Claims about adapters that other adapters, or the backbone itself, teach, on tiny models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from jobs import TOKENS, write_tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import P190_distil, P247_tada, claim, library, short
from claims.claim import Rows
from polytask.backbones import Backbone


@cache
def encoder() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks of a few words in place of the real ones, and a tiny encoder."""
    write_tasks(tmp_path / "tasks", library.SKILLS)
    monkeypatch.setenv("POLYTASK_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(short, "base", encoder)
    for module, values in (
        (short, {"EXAMPLES": 24, "HELD": 8, "TEST": 8, "EPOCHS": 1}),
        (P190_distil, {"LABELS": 8, "EPOCHS": 1}),
        (P247_tada, {"EACH": 6, "EPOCHS": 1}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    cached = (short.whole, library.skill, library.target, P247_tada.pairs)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


def test_students_and_few_shot_lora_see_the_same_labels() -> None:
    rows = Rows("P190")
    verdict = P190_distil.measure(rows)
    targets = len(library.TARGETS) * len(library.SEEDS)
    assert [row["way"] for row in rows.rows].count("weighted") == targets + 1  # a second rate, once
    assert len(rows.rows) == 3 * (targets + 1)
    assert all(sum(row["weights"]) == pytest.approx(1) for row in rows.rows if row["way"] != "few-shot LoRA")
    alike = [row["weights"] for row in rows.rows if row["way"] == "all alike"]
    assert all(weight == pytest.approx(1 / 7) for weights in alike for weight in weights)
    assert "8 labels, 7 teachers" in verdict.measured
    before = rows.path.read_text()
    assert P190_distil.measure(Rows("P190")) == verdict
    assert rows.path.read_text() == before


@pytest.mark.parametrize(("weighted", "holds"), [(0.52, True), (0.519, False)])
def test_a_student_has_to_be_two_points_ahead_of_both(
    weighted: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(test: float) -> dict[str, Any]:
        return {"test": test, "validation": test, "head": 0.1}

    monkeypatch.setattr(P190_distil, "alone", lambda n, s, r: scored(0.5))
    monkeypatch.setattr(P190_distil, "student", lambda n, s, r, p: scored(weighted if p else 0.3))
    assert P190_distil.measure(Rows("P190")).holds == holds


def test_the_dialect_by_rule() -> None:
    said = "The author thinks that I am not right, and you have my pack of nothing."
    assert P247_tada.dialect(said) == "audor dinks dat i be nah roit, and ya ave me pak of nodin."


def test_one_adapter_is_aligned_for_all_targets() -> None:
    rows = Rows("P247")
    verdict = P247_tada.measure(rows)
    own = {e.text for name in library.TARGETS for e in short.task(name).train}
    texts = [*P247_tada.pairs().train, *P247_tada.pairs().validation]
    assert len(texts) == 5 * 6
    assert len(rows.rows) == len(P247_tada.RATES) + len(library.SEEDS) - 1
    assert not {str(e.output) for e in texts} & own
    assert "3 tasks x 2 seeds, 27 pairs" in verdict.measured


@pytest.mark.parametrize(("stacked", "holds"), [(0.7, True), (0.69, False)])
def test_half_of_the_loss_has_to_come_back(stacked: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"standard": 0.8, "dialect": 0.6, "stacked": stacked + 1e-9}
    found = {f"{way} {name}": value for way, value in values.items() for name in library.TARGETS}
    monkeypatch.setattr(P247_tada, "row", lambda seed, rate: {"validation": rate, **found})
    verdict = P247_tada.measure(Rows("P247"))
    assert verdict.holds == holds
    assert ("50% of the loss" in verdict.measured) == holds
