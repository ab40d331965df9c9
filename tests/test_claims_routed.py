"""Claims about routing by input, on tiny models: what they count, and what the verdicts make of it."""

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

from claims import P337_lora_retriever, P394_dlp_lora, claim, library, routed, short
from claims.claim import Rows
from polytask.backbones import Backbone
from polytask.composition.routing.lora_retriever import LoraRetriever


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
    for name, value in {"EXAMPLES": 24, "HELD": 8, "TEST": 8, "EPOCHS": 1}.items():
        monkeypatch.setattr(short, name, value)
    cached = (short.whole, library.skill, routed.engine, routed.inputs)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


def test_inputs_are_mixed_and_counted_by_their_own_labels() -> None:
    assert [name for name, _, _ in routed.inputs()[:9]] == [*library.SKILLS, library.SKILLS[0]]
    assert len(routed.inputs()) == 8 * 8
    rows = Rows("P337")
    assert " own LoRA " in P337_lora_retriever.measure(rows).measured
    assert [row["way"] for row in rows.rows] == ["own", "mean of all", "the nearest", "mixture of 3", "fusion of 3"]
    own = rows.rows[0]
    assert (own["own"], own["nobody"]) == (1.0, 0.0)
    engine = routed.engine()
    answers = [engine.answer([routed.Request(r.input, r.pair, routed.own(n))])[0].output for n, r, _ in routed.inputs()]
    assert own["right"] == pytest.approx(
        sum(a == y for a, (_, _, y) in zip(answers, routed.inputs(), strict=True)) / 64
    )
    assert all(row["nobody"] == 0 for row in rows.rows)
    found = P394_dlp_lora.measure(Rows("P394"))
    assert " times the time" in found.measured


@pytest.mark.parametrize(
    ("right", "mean", "seconds", "retrieved", "classified"),
    [
        (0.77, 0.5, 1.9, True, True),
        (0.73, 0.5, 1.9, True, False),
        (0.77, 0.5, 2.1, True, False),
        (0.71, 0.5, 1.9, False, False),
        (0.79, 0.8, 1.9, False, False),
    ],
)
def test_verdicts(
    monkeypatch: pytest.MonkeyPatch, right: float, mean: float, seconds: float, retrieved: bool, classified: bool
) -> None:
    def row(score: float, **more: Any) -> dict[str, Any]:
        return {"right": score, "own": 0.9, "nobody": 0.0, "seconds": 1.0, **more}

    monkeypatch.setattr(routed, "named", lambda who: row(0.8 if who is routed.own else mean))
    monkeypatch.setattr(routed, "routed", lambda how: row(right if how.k == 3 else 0.1))
    monkeypatch.setattr(P394_dlp_lora, "dlp", lambda: LoraRetriever(k=3))
    monkeypatch.setattr(routed, "times", lambda how: [0.1, seconds, 9.0])
    assert P337_lora_retriever.measure(Rows("P0")).holds == retrieved
    assert P394_dlp_lora.measure(Rows("P1")).holds == classified
