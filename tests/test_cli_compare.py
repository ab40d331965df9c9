"""`polytask compare`, its page, and `polytask demo`."""

from __future__ import annotations

import importlib
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from commands import run, run_alone, write_table

from polytask.adapters import BackboneCard, ScoreCard
from polytask.evaluation import Comparison, Trial
from polytask.evaluation.charts import Axis, Point, axis, scatter, short
from polytask.evaluation.compare_page import page
from polytask.tasks import TaskCard

NAMES = ("head", "lora", "bottleneck", "pfeiffer", "ia3", "full", "prefix", "prompt", "dora", "kasa", "lofit", "reft")


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of turn or not at all."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("div", "p", "script")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def comparison(names: tuple[str, ...] = NAMES, seeds: int = 1, task: str = "tickets") -> Comparison:
    trials = []
    for i, (name, seed) in enumerate(itertools.product(names, range(seeds))):
        value = 0.7 + 0.01 * (i % 5) + 0.001 * seed
        history = tuple(
            {"epoch": e, "loss": 1.0 / e, "score": value - 0.1 / e, "seconds": 1.0 * e} for e in range(1, 6)
        )
        card = ScoreCard(metric="macro_f1", value=value, low=value - 0.05, high=value + 0.04, n=72)
        trials.append(
            Trial(
                method=name,
                seed=seed,
                hyperparameters={},
                lr=1e-3,
                scores={"test": card, "validation": card},
                history=() if name == "head" else history,
                trained_parameters=3000 if name == "head" else 50_000 + 1000 * i,
                seconds=1.0 + i,
                bytes=200_000,
            )
        )
    return Comparison(
        task=TaskCard(name=task, kind="classification", metric="macro_f1", sizes={"train": 224, "test": 72}),
        backbone=BackboneCard(
            name="minilm", fingerprint="a" * 64, family="bert", hidden_size=384, parameters=22_713_216
        ),
        precision="float32",
        settings={"epochs": 10},
        date="2026-01-01T00:00:00+00:00",
        version="0.1.0",
        trials=tuple(trials),
    )


def labels(svg: str) -> list[tuple[str, float, float]]:
    """(text, x, y) of the names in a chart."""
    found = re.findall(r'<text class="name" x="([-\d.]+)" y="([-\d.]+)">([^<]*)</text>', svg)
    return [(name, float(x), float(y)) for x, y, name in found]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_is_whole_and_needs_nothing_else(seeds: int) -> None:
    text = page(comparison(seeds=seeds, task="a & <b>"))
    parsed = Balanced(text)
    assert parsed.links == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "a & <b>: 12 methods compared" in parsed.texts
    rows = re.findall(r"<tr.*?</tr>", text)
    assert len(rows) == 1 + len(NAMES)
    charts = re.findall(r'<svg viewBox="0 0.*?</svg>', text, re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        assert sorted(name for name, _, _ in labels(chart)) == sorted(NAMES)
    said = " ".join(parsed.texts)
    for fact in ("22,713,216", "224 train, 72 test", "epochs = 10", "polytask 0.1.0", "2026-01-01", "float32"):
        assert fact in said
    assert "prefers-color-scheme: dark" in text
    assert "NaN" not in text


def test_names_in_charts_do_not_lie_over_each_other() -> None:
    text = page(comparison())
    lines, *others = re.findall(r'<svg viewBox="0 0.*?</svg>', text, re.DOTALL)
    ends = sorted(y for _, _, y in labels(lines))
    assert all(below - above >= 14 for above, below in itertools.pairwise(ends))
    for chart in others:
        for (a, ax, ay), (b, bx, by) in itertools.combinations(labels(chart), 2):
            apart = abs(ay - by) >= 12 or ax + 6 * len(a) <= bx or bx + 6 * len(b) <= ax
            assert apart, (a, b)


def test_axes_are_marked_at_round_numbers() -> None:
    assert [text for _, text in Axis("", 0.61, 0.83).ticks()] == ["0.65", "0.70", "0.75", "0.80"]
    assert [text for _, text in Axis("", 2e3, 3e7, log=True).ticks()] == ["10k", "100k", "1M", "10M"]
    assert Axis("", 1.0, 100.0, log=True).share(10.0) == pytest.approx(0.5)
    assert [short(v) for v in (3, 999, 1500, 22_713_216, 5e9)] == ["3", "999", "1.5k", "22.7M", "5G"]
    same = axis("", [0.5, 0.5])
    assert same.low < 0.5 < same.high
    assert "nan" not in scatter("", "", "", [Point("one", 10.0, 0.5, 0.5, 0.5)])


def test_rows_are_means_over_seeds() -> None:
    [row] = comparison(("lora",), seeds=3).rows
    assert row.seeds == 3
    assert row.score == pytest.approx((0.70 + 0.711 + 0.722) / 3)
    assert row.low == pytest.approx(row.score - 0.05)
    assert row.spread == pytest.approx(0.011)
    assert row.seconds == 2.0


@pytest.fixture
def one_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import cache

    import polytask.backbones

    monkeypatch.setattr("polytask.backbones.load", cache(polytask.backbones.load))


@pytest.mark.usefixtures("one_backbone")
def test_compare_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import polytask.recipes.compare as recipe

    table = write_table(tmp_path / "things.csv")
    command = ["compare", table, "--methods", "head,ia3,head", "--epochs", "1", "--seeds", "2"]
    command += ["--runs", tmp_path / "runs", "--html", tmp_path / "page.html", "--json"]
    real, calls = recipe.adapt, []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(recipe, "adapt", stopping)
    stopped = run(*command)
    assert (stopped.status, stopped.out) == (1, "")
    assert "goes on" in stopped.error
    assert not (tmp_path / "page.html").exists()

    done = run(*command)
    assert done.err == ""
    assert calls == ["head", "head", "ia3", "ia3", "ia3"]
    said = done.json
    assert [row["method"] for row in said["methods"]] == ["head", "ia3"]
    assert (said["task"], said["base"], said["metric"], said["split"]) == ("things", "minilm", "accuracy", "test")
    head, ia3 = said["methods"]
    assert ia3["seeds"] == 2
    assert ia3["interval"][0] <= ia3["score"] <= ia3["interval"][1]
    assert ia3["trainable_params"] == 6 * (384 + 384 + 1536) + 2 * 385
    assert len(ia3["trials"][0]["history"]) == 1
    assert head["trials"][0]["history"] == []
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert {"head", "ia3"} <= set(Balanced(text).texts)

    # A result that is damaged is measured again, the others are not; another setting is other work.
    [folder] = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["head-0.json", "head-1.json", "ia3-0.json", "ia3-1.json"]
    (folder / "head-1.json").write_text("{")
    table_shown = run(*command[:-1])
    assert calls[5:] == ["head"]
    assert "ia3, seed 0: found in" in table_shown.err
    assert re.search(r"ia3 +\d\.\d{3} \[", table_shown.out)
    monkeypatch.setattr(recipe, "adapt", real)
    other = run("compare", table, "--methods", "head", "--balanced", "--runs", tmp_path / "runs", "--quiet")
    assert (other.status, other.err) == (0, "")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_compare_refuses_a_method_before_it_trains(tmp_path: Path) -> None:
    done = run("compare", write_table(tmp_path / "things.csv"), "--methods", "head,lorra", "--runs", tmp_path / "runs")
    assert done.status == 2
    assert "'lorra'" in done.error
    assert not (tmp_path / "runs").exists()


def check_demo(said: Any) -> None:
    assert [row["task"] for row in said["adapters"]] == ["tickets", "calendar", "questions"]
    for row in said["adapters"]:
        assert row["split"] == "test"
        assert row["baseline"] is not None
    answers = said["answers"]
    assert len(answers) == 10
    for answer in answers:
        assert (answer["name"] == "questions") == (answer["pair"] is not None)
    assert [answer["name"] for answer in answers].count("tickets") == 3
    assert [answer["name"] for answer in answers].count("calendar") == 3
    assert answers[-1]["output"] is None


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen features alone: the way is the same, and short."""
    recipe = importlib.import_module("polytask.recipes.adapt")  # the package's `adapt` is the function
    real = recipe.adapt_many

    def fitted(base: Any, plans: Any, **options: Any) -> Any:
        return real(base, [replace(plan, method="head") for plan in plans], **options)

    monkeypatch.setattr(recipe, "adapt_many", fitted)


@pytest.mark.usefixtures("one_backbone", "no_training")
def test_demo_walks_the_whole_way(tmp_path: Path) -> None:
    done = run("demo", "--library", tmp_path / "skills")
    assert done.status == 0, done.err
    assert "tickets: frozen features, macro_f1 0." in done.err
    for row in ("tickets +head +macro_f1 0", "calendar +head +span_f1 0", "questions +head +accuracy 0"):
        assert re.search(row, done.out)
    # Whoever answers is on the first line of an input's row.
    for beginning, name in (
        ("The blender you sent", "tickets"),
        ("You took the money", "tickets"),
        ("I can't sign in", "tickets"),
        ("How do I get candle wax", "questions"),
        ("How often should I water", "questions"),
        ("Can I freeze cooked rice", "questions"),
        ("put the school play", "calendar"),
        ("move my eye test", "calendar"),
        ("Block two hours", "calendar"),
        ("The eigenvalues", "none of these"),
    ):
        assert name in next(line for line in done.out.splitlines() if beginning in line)
    assert len(run("library", "list", "-l", tmp_path / "skills", "--json").json) == 3


@pytest.mark.slow
def test_demo_as_a_user_runs_it(tmp_path: Path) -> None:
    done = run_alone("demo", "--library", tmp_path / "skills", "--json")
    assert (done.status, done.err) == (0, "")
    check_demo(done.json)
    assert done.json["seconds"] < 180
    for row in done.json["adapters"]:
        assert row["score"] >= row["baseline"]
