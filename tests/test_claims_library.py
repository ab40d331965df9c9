"""Claims about compositions: what their rows hold on tiny models, and what the verdict makes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from jobs import TOKENS, write_tasks
from writers import writer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import polytask as pt
from claims import P033_atlas, P226_adapter_fusion, P238_lorahub, P407_scalearn, claim, library, short
from polytask.backbones import Backbone

SITES = 3  # blocks of the tiny encoder
LINEAR = 2 * SITES  # queries and values


@cache
def encoder() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


@cache
def decoder() -> Backbone:
    return writer("llama", max_position_embeddings=256, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks of a few words in place of the real ones, and tiny models."""
    write_tasks(tmp_path / "tasks", library.SKILLS)
    folder = tmp_path / "tasks" / "function_vectors" / "extractive"
    folder.mkdir(parents=True)
    for name in (*P238_lorahub.SOURCES, *P238_lorahub.TARGETS):
        pairs = [{"input": f"{word}, no, {i}", "output": word} for i in range(6) for word in ("cat", "dog", "mat")]
        (folder / f"{name}.json").write_text(json.dumps(pairs))
    monkeypatch.setenv("POLYTASK_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(short, "base", encoder)
    monkeypatch.setattr(P238_lorahub, "base", decoder)
    for module, values in (
        (short, {"EXAMPLES": 16, "HELD": 8, "TEST": 8, "EPOCHS": 1}),
        (library, {"EPOCHS": 1}),
        (P226_adapter_fusion, {"FEW": 8}),
        (P407_scalearn, {"FEW": 8}),
        (P238_lorahub, {"TRAINED": 8, "TEST": 4, "FEW": 3, "BUDGET": 3, "EPOCHS": 1}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    for kept in (short.whole, library.skill, library.own, library.target):
        kept.cache_clear()
    for found in (P238_lorahub.rows_of, P238_lorahub.lora, P238_lorahub.target):
        found.cache_clear()
    yield
    for kept in (short.whole, library.skill, library.own, library.target):
        kept.cache_clear()
    for found in (P238_lorahub.rows_of, P238_lorahub.lora, P238_lorahub.target):
        found.cache_clear()


def judged(module: Any, monkeypatch: pytest.MonkeyPatch, **measured: Callable[..., Any]) -> claim.Verdict:
    """The verdict on rows that were never measured."""
    for name, row in measured.items():
        monkeypatch.setattr(module, name, row)
    claim.Rows("P0").path.unlink(missing_ok=True)
    found: claim.Verdict = module.measure(claim.Rows("P0"))
    return found


def scored(test: float, **more: Any) -> dict[str, Any]:
    return {"test": test, "validation": test, "head": 0.1, "parameters": 8, **more}


# ------------------- what they share


def test_a_library_is_trained_once_and_is_of_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.others("cr_polarity", "pfeiffer")
    assert [one.name for one in first] == [name for name in library.SKILLS if name != "cr_polarity"]
    library.skill.cache_clear()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(pt, "adapt", never)
    assert [one.id for one in library.others("cr_polarity", "pfeiffer")] == [one.id for one in first]
    assert (claim.RESULTS / ".library" / ".gitignore").read_text() == "*\n"


def test_the_rate_is_picked_by_validation_on_the_first_target() -> None:
    seen = []

    def at(name: str, seed: int, rate: float) -> dict[str, Any]:
        seen.append((name, seed, rate))
        return {"validation": -rate, "test": rate}

    found = library.every(claim.Rows("P0"), (0.3, 0.1), at, way="x")
    assert [row["rate"] for row in found] == [0.1] * len(library.TARGETS) * len(library.SEEDS)
    assert len(seen) == len(found) + 1
    assert library.points(found) == pytest.approx(10)


# ------------------- AdapterFusion and ScaLearn


def test_eight_sources_are_fused_scaled_averaged_and_chosen_from() -> None:
    rows = claim.Rows("P226")
    fused = P226_adapter_fusion.fused(rows, "cr_polarity", 0, 1e-3)
    d = encoder().hidden_size
    assert fused["unchanged"]
    assert fused["parameters"] == SITES * (3 * d * d + 2 * d)
    scaled = P407_scalearn.scaled(rows, "cr_polarity", 0, 1e-2)
    assert scaled["parameters"] == 8
    own = P226_adapter_fusion.sources(rows, "cr_polarity", 0)
    assert [one.name for one in own][-1] == "cr_polarity"
    assert len({one.id for one in own}) == 8
    assert P407_scalearn.mean_of(rows, "cr_polarity", 0)["parameters"] == 0
    best = P407_scalearn.best_of(rows, "cr_polarity", 0)
    assert best["source"] in library.SKILLS


@pytest.mark.parametrize(("fusion", "same", "holds"), [(0.72, True, True), (0.71, True, False), (0.8, False, False)])
def test_fusion_has_to_gain_two_points_and_to_leave_its_sources(
    fusion: float, same: bool, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judged(
        P226_adapter_fusion,
        monkeypatch,
        fused=lambda *a: scored(fusion, unchanged=same),
        alone=lambda *a: scored(0.699),
    )
    assert found.holds == holds
    assert f"fusion {100 * fusion:.1f}" in found.measured


@pytest.mark.parametrize(
    ("ours", "mean", "best", "holds"), [(0.7, 0.6, 0.6, True), (0.7, 0.7, 0.6, False), (0.68, 0.6, 0.6, False)]
)
def test_scales_have_to_beat_mean_and_best_near_fusion(
    ours: float, mean: float, best: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judged(
        P407_scalearn,
        monkeypatch,
        fusion=lambda rows: [scored(0.705)],
        scaled=lambda *a: scored(ours),
        mean_of=lambda *a: scored(mean),
        best_of=lambda *a: scored(best),
    )
    assert found.holds == holds
    assert f"8 scales {100 * ours:.1f}, fusion 70.5" in found.measured


# ------------------- aTLAS


def test_blocks_have_more_coefficients_than_adapters() -> None:
    blocks, whole = (P033_atlas.composed(way, "cr_polarity", 0, 1e-2) for way in ("blocks", "whole"))
    assert (blocks["parameters"], whole["parameters"]) == (4 * LINEAR, 4)
    assert "cr_polarity" not in [one.name for one in P033_atlas.sources("cr_polarity")]


@pytest.mark.parametrize(("more", "holds"), [(0.031, True), (0.029, False)])
def test_blocks_have_to_gain_three_points(more: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(P033_atlas, monkeypatch, composed=lambda way, *a: scored(0.5 + more * (way == "blocks")))
    assert found.holds == holds


# ------------------- LoraHub


def test_few_examples_are_drawn_apart_from_those_of_the_test() -> None:
    first, second = (P238_lorahub.target("choose_last_of_5", seed) for seed in (0, 1))
    assert (len(first.train), len(first.test)) == (3, 4)
    assert not {e.input for e in first.train} & {e.input for e in first.test}
    assert first.train != second.train


def test_found_weights_and_equal_ones_are_scored_alike() -> None:
    row = P238_lorahub.searched("choose_last_of_5", 0)
    assert (row["metric"], len(row["weights"])) == ("exact_match", 8)
    for each in (0.125, 0.0):
        assert P238_lorahub.mixed("choose_last_of_5", 0, each).keys() == {"metric", "test"}


@pytest.mark.parametrize(("ours", "holds"), [(0.26, True), (0.24, False)])
def test_found_weights_have_to_gain_five_points(ours: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(
        P238_lorahub,
        monkeypatch,
        searched=lambda *a: {"test": ours},
        mixed=lambda name, seed, each: {"test": 0.1 if each == 0 else 0.2},
    )
    assert found.holds == holds
    assert f"found weights {100 * ours:.1f}" in found.measured
