"""Claims about routing by token, on tiny models: that they measure what they say and keep it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tiny
from jobs import TOKENS, write_tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import P222_arrow, P324_meteora, claim, library, short
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
    for name, value in {"EXAMPLES": 24, "HELD": 8, "TEST": 8, "EPOCHS": 1}.items():
        monkeypatch.setattr(short, name, value)
    for module, more in ((P222_arrow, {"EACH": 8, "FEW": 12}), (P324_meteora, {"EACH": 12, "EPOCHS": 1, "PAIRS": 2})):
        for name, value in more.items():
            monkeypatch.setattr(module, name, value)
    cached = (short.whole, library.skill, library.target)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


def test_arrow_over_clusters_and_over_the_other_ways_to_form_them() -> None:
    rows = Rows("P222")
    verdict = P222_arrow.measure(rows)
    groups = P222_arrow.found()
    assert sorted(name for group in groups for name in group) == sorted(P222_arrow.SOURCES)
    rest = P222_arrow.others(groups)
    assert all(sorted(map(len, way)) == sorted(map(len, groups)) for way in rest)
    assert frozenset(map(frozenset, groups)) not in {frozenset(map(frozenset, way)) for way in rest}
    assert len(rest) == {(2, 2): 2, (1, 3): 3}[tuple(sorted(map(len, groups)))]
    assert len(rows.rows) == 6 * (4 + len(rest))
    assert "Arrow over 4 LoRAs" in verdict.measured
    one = P222_arrow.joint(P222_arrow.SOURCES[:2])
    assert {label.name for label in one.card.task.labels} == {
        f"{name}: {label}" for name in P222_arrow.SOURCES[:2] for label in "abcd"
    }
    before = rows.path.read_text()
    assert P222_arrow.measure(Rows("P222")) == verdict
    assert rows.path.read_text() == before


def test_gates_are_one_for_all_tasks_and_are_scored_beside_each_own_adapter() -> None:
    rows = Rows("P324")
    verdict = P324_meteora.measure(rows)
    made = P324_meteora.gates()
    gates = [{n: t for n, t in one.tensors.items() if n.endswith("/G")} for one in made]
    assert len(made) == len(library.SKILLS)
    assert all(t.equal(gates[0][n]) for each in gates for n, t in each.items())
    assert [row["way"] for row in rows.rows] == ["own"] * 8 + ["gates"] * 8 + ["switching"] * 7
    assert 0 <= rows.rows[-1]["own"] <= 1
    assert "8 tasks: own LoRA" in verdict.measured
