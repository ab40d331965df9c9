"""Claims about merging: what their rows hold on a tiny model, and what the verdict makes of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from jobs import TOKENS, write_tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import P044_breadcrumbs, P057_adamerging, P176_ties, P292_supermerge, claim, library, merging, short
from polytask.recipes.adapt import predict

CLAIMS = (P044_breadcrumbs, P057_adamerging, P176_ties, P292_supermerge)


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks of a few words in place of the real ones, and a tiny model."""
    write_tasks(tmp_path / "tasks", merging.SIX)
    monkeypatch.setenv("POLYTASK_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    encoder = tiny.backbone("bert", tokenizer=TOKENS)
    monkeypatch.setattr(short, "base", lambda: encoder)
    for name, value in {"EXAMPLES": 16, "HELD": 8, "TEST": 8, "EPOCHS": 1}.items():
        monkeypatch.setattr(short, name, value)
    for kept in (short.whole, library.skill):
        kept.cache_clear()
    yield
    for kept in (short.whole, library.skill):
        kept.cache_clear()


def test_a_row_is_the_mean_over_tasks_through_their_own_heads() -> None:
    names = merging.SIX[:2]
    rows = claim.Rows("P0")
    found = merging.row(rows, names, "supermerge", {"steps": 2, "examples": 4}, "test")
    assert found["points"] == pytest.approx(50 * sum(found["by_task"].values()))
    assert found["notes"][0].startswith("coefficients by the loss on 8 examples")
    assert claim.Rows("P0").rows == rows.rows
    own = merging.alone(rows, names)["by_task"][names[0]]
    task, skill = short.task(names[0]), library.skill(names[0], "lora")
    right = [a == e.output for a, e in zip(predict(short.base(), skill, task.test), task.test, strict=True)]
    assert own == pytest.approx(sum(right) / len(right))
    # One adapter merged alone answers as itself.
    assert merging.row(rows, names[:1], "average", {}, "test")["by_task"][names[0]] == own


@pytest.mark.parametrize("module", CLAIMS)
def test_choices_are_made_on_validation_and_scores_are_of_the_test_split(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ = 0.6 is best on validation and gets the test score; the verdict turns with a margin of its own."""
    asked: list[tuple[Sequence[str], str, str]] = []
    ours = {"P176": "ties", "P044": "breadcrumbs", "P057": "adamerging", "P292": "supermerge"}[
        module.__name__.rpartition(".")[2].partition("_")[0]
    ]
    leads = [0.5, 3.5]

    def row(
        rows: Any, names: Sequence[str], rule: str, hyper: Mapping[str, Any], split: str, most: int = 300
    ) -> dict[str, Any]:
        asked.append((names, rule, split))
        points = 70 + leads[0] * (rule == ours) - 100 * abs(hyper.get("scale", 0.6) - 0.6)
        return {"points": points, "hyper": {"scale": hyper.get("scale", 0)}}

    monkeypatch.setattr(merging, "row", row)
    monkeypatch.setattr(module, "row", row)
    monkeypatch.setattr(module, "alone", lambda rows, names: {"points": 80.0})
    verdicts = []
    while leads:
        verdicts.append(module.measure(claim.Rows("P0")))
        leads.pop(0)
    assert [verdict.holds for verdict in verdicts] == [False, True]
    assert "73.5" in verdicts[1].measured
    assert "+3.5 points" in verdicts[1].measured
    tests = [rule for _, rule, split in asked if split == "test"]
    assert len(tests) == 2 * len(set(tests))
    if module is P044_breadcrumbs:
        assert {len(names) for names, _, split in asked if split == "validation"} == {2}
        assert {len(names) for names, _, split in asked if split == "test"} == {6}
