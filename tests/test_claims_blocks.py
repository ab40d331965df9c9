"""Claims about blocks: BAM, CoFiTune and open blocks; what their sides are, and what the verdicts make of rows."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import TOKENS, task_of, write_tasks
from writers import writer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import polytask as pt
from claims import P140_unmasked, P164_bam, P342_cofitune, claim, short
from claims.claim import Rows
from polytask.adapters import Adapter
from polytask.backbones import Backbone


@cache
def encoder() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


@cache
def decoder() -> Backbone:
    return writer("llama", num_hidden_layers=4)


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tasks of a few words in place of the real ones, and tiny models."""
    write_tasks(tmp_path / "tasks", sorted({*P164_bam.DOMAINS, *P342_cofitune.TASKS}))
    write_tags(tmp_path / "tasks" / P140_unmasked.TASK)
    monkeypatch.setenv("POLYTASK_DATA", str(tmp_path))
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(short, "base", encoder)
    sizes: dict[Any, dict[str, Any]] = {
        short: {"EXAMPLES": 24, "HELD": 8, "TEST": 8, "EPOCHS": 1},
        P342_cofitune: {"TEST": 8},
        P140_unmasked: {"base": decoder, "EXAMPLES": 24, "HELD": 8, "TEST": 8, "EPOCHS": 1},
        P164_bam: {"base": decoder, "TEXTS": 12, "MIXED": 6, "HELD": 4, "TEST": 4, "EPOCHS": 1, "GIVEN": 2},
    }
    for module, values in sizes.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    cached = (short.whole, P164_bam.experts, P164_bam.averaged, P342_cofitune.old)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


def write_tags(folder: Path) -> None:
    folder.mkdir(parents=True)
    made = task_of("tagging", 32, length=6, held=12)
    said = {"name": folder.name, "kind": "tagging", "labels": ["X"], "metric": "span_f1"}
    (folder / "task.json").write_text(json.dumps(said))
    for split, rows in (("train", made.train), ("validation", made.validation), ("test", made.validation)):
        lines = [json.dumps({"id": f"{split}-{e.id}", "tokens": e.input, "tags": e.output}) for e in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Adapter]:
    """What is adapted, in order."""
    found: list[Adapter] = []
    adapt = pt.adapt

    def noted(*args: Any, **more: Any) -> Adapter:
        found.append(adapt(*args, **more))
        return found[-1]

    monkeypatch.setattr(pt, "adapt", noted)
    return found


# ------------------- BAM


def test_texts_are_continued_and_routers_see_new_ones() -> None:
    name = P164_bam.DOMAINS[0]
    first, second = P164_bam.texts(name, "train", 0, 12), P164_bam.texts(name, "train", 12, 6)
    [given] = [e for e in short.whole(name).train if f"{name}/{e.id}" == first[0].id]
    assert f"{first[0].input} {first[0].output}" == given.text
    assert len(str(first[0].input).split()) == 2
    assert len(first) == 12
    assert {e.id for e in first}.isdisjoint({e.id for e in second})


def test_attention_is_routed_or_averaged(made: list[Adapter]) -> None:
    base, experts = decoder(), P164_bam.experts()
    both, one = (P164_bam.joined(way, 1e-2, 0) for way in P164_bam.WAYS)
    mean = P164_bam.averaged()
    at = {n.rpartition("/")[0] for n in experts[0].tensors if n.endswith("/A")}
    attention = {site for site in at if ".attn." in site}
    assert len(attention) == 4 * len(base.blocks)
    assert len(at - attention) == 3 * len(base.blocks)
    for site in attention:
        each = [2 * e.tensors[f"{site}/B"] @ e.tensors[f"{site}/A"] for e in experts]  # α / r
        found = mean.tensors[f"{site}/B"] @ mean.tensors[f"{site}/A"]
        torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)
    assert {n.rpartition("/")[0] for n in mean.tensors} == attention
    routed = [
        {n.rpartition("/")[0]: t for n, t in x.tensors.items() if n.endswith(("R_a", "R_f"))} for x in (both, one)
    ]
    assert routed[0].keys() == at
    assert routed[1].keys() == at - attention
    assert one.above == (mean.id,)
    assert [x.card.trained_parameters for x in (both, one)] == [sum(t.numel() for t in R.values()) for R in routed]
    assert both.card.recipe["settings"] == one.card.recipe["settings"]
    assert both.card.lineage.data == one.card.lineage.data
    assert len(made) == len(experts) + 2


def test_the_loss_is_that_of_the_words_that_were_not_given() -> None:
    base, name = decoder(), P164_bam.DOMAINS[0]
    losses = []
    for e in P164_bam.texts(name, "test", 0, 4):
        ids = base.tokenizer(f"Input: {e.input}\nOutput: {e.output}")["input_ids"] + [base.tokenizer.eos_token_id]
        given = len(base.tokenizer(f"Input: {e.input}\nOutput:")["input_ids"])
        with torch.no_grad():
            log_p = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(log_p[i - 1, ids[i]]) for i in range(given, len(ids))]
    assert P164_bam.loss(None, name, "test", 4) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_row_of_a_mixture_and_one_of_what_it_is_made_of() -> None:
    before = P164_bam.before()
    row = P164_bam.run(P164_bam.WAYS[1], 1e-2, 0)
    assert row["test"].keys() == before["own"].keys() == {*P164_bam.DOMAINS}
    assert len({row["test"][P164_bam.DOMAINS[0]], *(found[P164_bam.DOMAINS[0]] for found in before.values())}) == 4


@pytest.mark.parametrize(("both", "holds"), [(3.9, True), (4.0, False), (4.1, False)])
def test_attention_experts_need_a_lower_perplexity(monkeypatch: pytest.MonkeyPatch, both: float, holds: bool) -> None:
    def nats(of: float) -> dict[str, float]:
        return dict.fromkeys(P164_bam.DOMAINS, of)

    def run(way: str, rate: float, seed: int) -> dict[str, Any]:
        loss = both if way == P164_bam.WAYS[0] else 4.0
        right = rate == P164_bam.RATES[1]  # the others look better on the test split alone
        return {"validation": 4 - right, "test": nats(loss if right else 1), "parameters": 9}

    monkeypatch.setattr(P164_bam, "run", run)
    monkeypatch.setattr(P164_bam, "before", lambda: {"alone": nats(6), "mean": nats(5), "own": nats(3)})
    found = P164_bam.measure(Rows("P0"))
    assert found.holds == holds
    assert f"perplexity {math.exp(both):.1f} with attention experts" in found.measured
    assert f"each on its own domain {math.exp(3):.1f}" in found.measured


# ------------------- CoFiTune


def test_ways_have_as_many_settings_to_choose_from() -> None:
    assert len({len({*tries}) for tries in P342_cofitune.WAYS.values()}) == 1


@pytest.mark.parametrize(("blocks", "kept"), [("lower middle", {0}), ("upper half", {1, 2})])
def test_cofitune_trains_feed_forward_maps_of_its_blocks(blocks: str, kept: set[int], made: list[Adapter]) -> None:
    row = P342_cofitune.run("full@cofitune", P342_cofitune.TASKS[0], blocks, 1e-3, 0)
    tuned = next(one for one in made if one.method == "full")
    maps = {n.rpartition("/")[0] for n in tuned.tensors if n.startswith(":")}
    assert maps == {f":encoder.layer.{i}.{m}.dense" for i in kept for m in ("intermediate", "output")}
    assert 0 < row["numbers"] < sum(p.numel() for p in encoder().model.parameters()) / 2


def test_what_is_left_is_what_old_heads_score_on_the_changed_model() -> None:
    name = P342_cofitune.TASKS[0]
    still, moved = (P342_cofitune.run("full", name, "all", rate, 0) for rate in (1e-12, 0.5))
    assert still["old"] == still["before"] == moved["before"]
    assert moved["old"] < moved["before"]
    heads = [P342_cofitune.old(other).card.scores["test"].value for other in P342_cofitune.TASKS[1:]]
    assert still["before"] == pytest.approx(sum(heads) / 2)


@pytest.mark.parametrize(("old", "new", "holds"), [(0.7, 0.79, True), (0.69, 0.8, False), (0.75, 0.77, False)])
def test_cofitune_has_to_keep_the_old_and_learn_the_new(
    old: float, new: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(way: str, name: str, blocks: str, rate: float, seed: int) -> dict[str, Any]:
        seen.append((way, name, blocks, rate, seed))
        at = {"new": 0.8, "old": 0.595} if way == "full" else {"new": new, "old": old}
        return {**at, "before": 0.9, "validation": (blocks == "upper half") - rate, "new validation": rate}

    monkeypatch.setattr(P342_cofitune, "run", run)
    found = P342_cofitune.measure(Rows("P0"))
    assert found.holds == holds
    assert "CoFiTune (upper half, 0.0002)" in found.measured
    assert f"({100 * (old - 0.595):+.1f} points)" in found.measured
    assert f"({100 * (new - 0.8):+.1f})" in found.measured
    assert f"alone picks, {100 * old:.1f} and 59.5 are left" in found.measured
    assert len(seen) == len({*seen}) == 2 * (4 + 3)


# ------------------- open blocks


@pytest.mark.parametrize("pattern", P140_unmasked.PATTERNS)
def test_patterns_open_what_they_say(pattern: str, made: list[Adapter]) -> None:
    row = P140_unmasked.run(pattern, 0)
    [adapter] = made
    assert adapter.head is not None
    assert adapter.head.causal == pattern
    opened = {"all causal": [], "upper half open": [2, 3], "lower half open": [0, 1], "all open": [0, 1, 2, 3]}
    assert [i for i, one in enumerate(decoder().opened(pattern)) if one] == opened[P140_unmasked.PATTERNS[pattern]]
    assert row["metric"] == "span_f1"
    assert 0 <= row["test"] <= 1


@pytest.mark.parametrize(("worst", "holds"), [(0.5, True), (0.495, True), (0.485, False)])
def test_the_pattern_that_is_picked_may_be_a_point_below(
    worst: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last seed all open looks best on the validation split; at the others all causal does."""

    def run(pattern: str, seed: int) -> dict[str, Any]:
        if seed == P140_unmasked.SEEDS[-1] and pattern == "11":
            return {"validation": 0.9, "test": worst}
        return {"validation": 0.6 if pattern == "00" else 0.5, "test": 0.5 if pattern == "00" else 0.2}

    monkeypatch.setattr(P140_unmasked, "run", run)
    found = P140_unmasked.measure(Rows("P0"))
    assert found.holds == holds
    assert f"all causal (+0.0), all causal (+0.0), all open ({100 * worst - 50:+.1f}) points" in found.measured
