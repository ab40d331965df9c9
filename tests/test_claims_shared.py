"""Claims about projections, ranks and budgets that are shared: what rows hold on tiny models, and the verdicts."""

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import P268_smora, P296_mtl_lora, P297_elastic, P301_mor1e, claim, short
from polytask.adapters import Adapter
from polytask.backbones import Backbone
from polytask.methods import build

TASKS = {*short.TASKS, *P296_mtl_lora.TOGETHER, *P296_mtl_lora.NEW, *P301_mor1e.TASKS}
FIVE = len(P296_mtl_lora.TOGETHER)  # of which tests take three
RATE = 1e-2


@cache
def encoder() -> Backbone:
    return tiny.backbone("bert", tokenizer=tiny.words(*"abcdefgh"))


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks of a few words in place of the real ones, and a tiny model."""
    write_tasks(tmp_path / "tasks", sorted(TASKS))
    monkeypatch.setenv("POLYTASK_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(short, "base", encoder)
    for name, value in {"EXAMPLES": 24, "HELD": 8, "TEST": 8, "EPOCHS": 1}.items():
        monkeypatch.setattr(short, name, value)
    monkeypatch.setattr(P296_mtl_lora, "TOGETHER", P296_mtl_lora.TOGETHER[:3])
    monkeypatch.setattr(P297_elastic, "TRIES", 3)
    cached = (short.whole, P296_mtl_lora.together, P297_elastic.fit, P301_mor1e.mixed)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


def judged(module: Any, monkeypatch: pytest.MonkeyPatch, **measured: Callable[..., dict[str, Any]]) -> claim.Verdict:
    """The verdict on rows that were never measured."""
    for name, row in measured.items():
        monkeypatch.setattr(module, name, row)
    found: claim.Verdict = module.measure(claim.Rows("P0"))
    return found


def own(one: Adapter, *parameters: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors of these parameters, beside its head and profile."""
    rest = {n: t for n, t in one.tensors.items() if not n.startswith(("head/", "task/"))}
    return {n: t for n, t in rest.items() if n.rpartition("/")[2] in parameters}


# ------------------- MTL-LoRA


def test_tasks_together_share_projections_and_mix_them_each_in_its_own_way() -> None:
    first, *others = P296_mtl_lora.together("mtl", RATE, 0)
    assert len(others) + 1 == len(P296_mtl_lora.TOGETHER)
    for other in others:
        assert all(torch.equal(t, other.tensors[n]) for n, t in own(first, "A", "B").items())
        apart = torch.stack([t - other.tensors[n] for n, t in own(first, "w").items()])
        assert apart.abs().mean() > 0.2  # three steps move w by less than 0.03
    for n, t in own(first, "B").items():
        assert (t[0] - t[1]).norm() > 0.1 * t[0].norm(), n
    one, *rest = P296_mtl_lora.together("shared", RATE, 0)
    assert all(torch.equal(t, other.tensors[n]) for other in rest for n, t in own(one, "A", "B").items())


def test_a_shared_lora_has_no_fewer_numbers_and_hardly_more() -> None:
    """At MiniLM's width; numbers that all tasks share count once."""
    wide = tiny.backbone("bert", hidden_size=384, num_hidden_layers=1)
    count = {}
    for way, (method, hyper) in P296_mtl_lora.WAYS.items():
        m = build(method, hyper)
        made = m.start(wide, 0)
        common = sum(t.numel() for n, t in made.items() if n.rpartition("/")[2] in m.common)
        each = sum(t.numel() for t in made.values()) - common
        count[way] = common + FIVE * each
    assert count["mtl"] == 4 * (8 * 384 + 3 * 384 * 8 + FIVE * (8 * 8 + 3))
    assert count["mtl"] <= count["shared"] <= 1.05 * count["mtl"]
    row = P296_mtl_lora.joint("mtl", RATE, 0)
    assert row["numbers"] == 3 * 4 * (8 * 32 + 3 * 32 * 8 + 3 * (8 * 8 + 3))
    assert row["by_task"].keys() == {*P296_mtl_lora.TOGETHER}
    assert row["test"] == pytest.approx(sum(row["by_task"].values()) / 3)


def test_a_new_task_learns_its_own_part_from_scratch_over_projections_that_stay() -> None:
    trained = P296_mtl_lora.together("mtl", RATE, 0)[0]
    begin = P296_mtl_lora.fresh(trained)
    assert all(torch.equal(t, torch.eye(8)) for t in own(begin, "L").values())
    assert all(torch.equal(t, trained.tensors[n]) for n, t in own(begin, "A", "B").items())
    assert not any(torch.equal(t, torch.eye(8)) for t in own(trained, "L").values())
    name = P296_mtl_lora.NEW[0]
    core = P296_mtl_lora.new(name, "core", RATE, 0, projections=RATE)
    lora = P296_mtl_lora.new(name, "lora", RATE, 0, projections=RATE)
    assert core["numbers"] == 3 * 4 * (8 * 8 + 3)
    assert lora["numbers"] == 3 * 4 * 8 * (32 + 32)
    assert core["head"] == lora["head"]


@pytest.mark.parametrize(("mtl", "core", "holds"), [(0.83, 0.69, True), (0.81, 0.69, False), (0.83, 0.67, False)])
def test_tasks_together_have_to_gain_and_a_new_one_to_come_close(
    mtl: float, core: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def joint(way: str, rate: float, seed: int) -> dict[str, Any]:
        return {"test": mtl if way == "mtl" else 0.8, "validation": -rate, "head": 0.6, "numbers": 1000}

    def new(name: str, way: str, rate: float, seed: int, projections: float) -> dict[str, Any]:
        assert projections == min(P296_mtl_lora.RATES)  # what was picked
        return {"test": core if way == "core" else 0.7, "validation": rate, "head": 0.5, "numbers": 10}

    found = judged(P296_mtl_lora, monkeypatch, joint=joint, new=new)
    assert found.holds == holds
    assert f"MTL-LoRA {100 * mtl:.1f} with 1,000 numbers, one LoRA 80.0" in found.measured
    assert f"their own part {100 * core:.1f} with 10 numbers, a LoRA 70.0 with 10 ({100 * core - 70:+.1f})" in (
        found.measured
    )


def test_rates_are_picked_by_all_tasks_at_the_first_seed() -> None:
    score = {(1e-3, 0): (0.9, 0.1), (3e-3, 0): (0.6, 0.6), (3e-3, 1): (0.2, 0.2)}
    best, found = P296_mtl_lora.picked((1e-3, 3e-3), lambda rate, seed: [{"validation": v} for v in score[rate, seed]])
    assert best == 3e-3
    assert [row["validation"] for row in found] == [0.6, 0.6, 0.2, 0.2]


# ------------------- SMoRA


def test_routed_ranks_and_a_lora_act_at_the_same_maps() -> None:
    rows = {way: P268_smora.run(way, RATE, 0) for way in P268_smora.WAYS}
    sites, lora = 3 * 2, 32 * (32 + 32)
    assert rows["LoRA"]["numbers"] == sites * lora
    assert rows["ranks"]["numbers"] == sites * (lora + 32 * 32)
    assert rows["pairs"]["numbers"] == sites * (lora + 16 * 32)
    assert len({row["head"] for row in rows.values()}) == 1


@pytest.mark.parametrize(("ranks", "pairs", "holds"), [(0.83, 0.84, True), (0.81, 0.8, False), (0.77, 0.76, False)])
def test_four_ranks_have_to_beat_all(ranks: float, pairs: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(way: str, rate: float, seed: int) -> dict[str, Any]:
        test = {"ranks": ranks, "pairs": pairs, "LoRA": 0.8}[way]
        return {"test": test, "validation": rate, "head": 0.7, "numbers": 1000}

    found = judged(P268_smora, monkeypatch, run=run)
    assert found.holds == holds
    assert f"4 of 32 ranks {100 * ranks:.1f}" in found.measured
    assert f"({100 * (ranks - pairs):+.1f} for the finer)" in found.measured
    assert f"{100 * ranks - 80:+.1f}), the head alone 70.0" in found.measured


# ------------------- elastic LoRA


def test_both_halves_are_cut_from_one_training() -> None:
    name = short.TASKS[0]
    whole, row = P297_elastic.learnt(name, RATE, 0), P297_elastic.halved(name, RATE, 0)
    assert P297_elastic.fit.cache_info().misses == 1
    assert row["alike numbers"] == whole["numbers"] / 2
    assert row["searched numbers"] <= row["alike numbers"]
    assert row["searched validation"] >= row["alike validation"]
    assert {*row["ranks"].values()} <= {8, 16, 24, 32}


def test_the_search_sees_the_validation_split_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks stay the same whatever the answers of the test split are."""
    name, plain = short.TASKS[0], short.task
    before = P297_elastic.halved(name, RATE, 0)

    def other(name: str) -> Any:
        given = plain(name)
        return replace(given, test=tuple(replace(e, output="a") for e in given.test))

    monkeypatch.setattr(short, "task", other)
    after = P297_elastic.halved(name, RATE, 0)
    assert P297_elastic.fit.cache_info().misses == 1
    assert (after["ranks"], after["searched validation"]) == (before["ranks"], before["searched validation"])
    assert (after["alike"], after["searched"]) != (before["alike"], before["searched"])


@pytest.mark.parametrize(
    ("searched", "alike", "holds"), [(0.797, 0.79, True), (0.794, 0.79, False), (0.797, 0.797, False)]
)
def test_searched_ranks_have_to_lose_little_and_beat_half_of_each(
    searched: float, alike: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learnt(name: str, rate: float, seed: int) -> dict[str, Any]:
        return {"test": 0.8, "validation": rate, "head": 0.5, "numbers": 2000}

    def halved(name: str, rate: float, seed: int) -> dict[str, Any]:
        assert rate == max(P297_elastic.RATES)
        both = {"searched": searched, "alike": alike, "searched validation": 0.9, "alike validation": 0.88}
        return {**both, "searched numbers": 990}

    found = judged(P297_elastic, monkeypatch, learnt=learnt, halved=halved)
    assert found.holds == holds
    assert f"searched for {100 * searched:.1f} with at most 990 ({100 * searched - 80:+.1f})" in found.measured
    assert f"({100 * (searched - alike):+.1f} for the search)" in found.measured
    assert "the head alone 50.0; on the validation split 90.0 and 88.0" in found.measured
