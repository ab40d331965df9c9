"""Claims about centroid routing and ELREA: what their data are, and what the verdicts make of rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import write_tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import P235_centroid, P238_lorahub, P242_elrea, claim, short
from claims.claim import Rows
from polytask.adapters.expression import Expression, Mix, Name


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks of a few words in place of the real ones."""
    write_tasks(tmp_path / "tasks", P242_elrea.TASKS, n=30)
    monkeypatch.setenv("POLYTASK_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    cached = (short.whole, P242_elrea.mixed)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


def test_labels_of_mixed_tasks_disagree() -> None:
    """The second label of the first task is B, that of the second C, and of the third A."""
    found = P242_elrea.mixed()
    assert [e.id.partition("/")[0] for e in found.train[:5]] == [*P242_elrea.TASKS, P242_elrea.TASKS[0]]
    by_task: dict[str, set[tuple[str, Any]]] = {}
    for e in (*found.train, *found.validation, *found.test):
        name, _, number = e.id.partition("/")
        given = {one.id: one for split in (short.task(name).train, short.task(name).test) for one in split}
        if number in given:
            by_task.setdefault(name, set()).add((str(given[number].output), e.output))
    first, second, third, _ = (dict(by_task[name]) for name in P242_elrea.TASKS)
    assert first == {"a": "A", "b": "B", "c": "C", "d": "A"}
    assert (second["b"], third["b"]) == ("C", "A")


def test_clusters_at_random_are_of_equal_sizes() -> None:
    found = P242_elrea.at_random(torch.zeros(10, 2), 4, 1)
    assert torch.bincount(found).tolist() == [3, 3, 2, 2]
    assert not torch.equal(found, P242_elrea.at_random(torch.zeros(10, 2), 4, 2))


@pytest.mark.parametrize(("chance", "longer", "holds"), [(0.77, 0.77, True), (0.79, 0.77, False), (0.77, 0.79, False)])
def test_experts_have_to_beat_both(monkeypatch: pytest.MonkeyPatch, chance: float, longer: float, holds: bool) -> None:
    def experts(way: str, seed: int) -> dict[str, Any]:
        return {"test": 0.8 if way == "gradients" else chance, "base": 0.7, "within": 0.5, "between": 0.25}

    monkeypatch.setattr(P242_elrea, "experts", experts)
    monkeypatch.setattr(P242_elrea, "one", lambda seed: {"test": longer})
    found = P242_elrea.measure(Rows("P0"))
    assert found.holds == holds
    assert "gradient clusters 80.0" in found.measured
    assert "within clusters 0.50, between 0.25" in found.measured


@pytest.mark.parametrize(
    ("single", "every", "holds"), [(0.69, 0.795, True), (0.71, 0.8, False), (0.5, 0.82, False), (0.5, 0.78, False)]
)
def test_centroids_have_to_beat_the_best_single(
    monkeypatch: pytest.MonkeyPatch, single: float, every: float, holds: bool
) -> None:
    class Made:
        def __init__(self, name: str) -> None:
            self.id = name

    def named(who: dict[str, Expression]) -> dict[str, Any]:
        several = {*map(str, who.values())}
        if len(several) > 1:
            assert {name: str(one) for name, one in who.items()} == {name: name for name in P235_centroid.TASKS}
            return {"right": 0.9}
        [one] = {*who.values()}
        assert isinstance(one, Name | Mix)
        return {"right": 0.1 if isinstance(one, Mix) else single if one.name == P235_centroid.TASKS[2] else 0.3}

    monkeypatch.setattr(P238_lorahub, "lora", Made)
    monkeypatch.setattr(P235_centroid, "named", named)
    monkeypatch.setattr(P235_centroid, "routed", lambda k: {"right": every if k == 1 else 0.8, "first": 0.5})
    found = P235_centroid.measure(Rows("P0"))
    assert found.holds == holds
    assert f"best single LoRA ({P235_centroid.TASKS[2]})" in found.measured
