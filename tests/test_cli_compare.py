"""`polytask compare`, its page, and `polytask demo`."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import run, run_alone, start, write_table
from jobs import TOKENS, task_of
from writers import writer

from polytask.adapters import BackboneCard, ScoreCard
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.evaluation import Comparison, Failure, Trial, latency
from polytask.evaluation.charts import Axis, Point, axis, scatter, short
from polytask.evaluation.compare_page import page
from polytask.evaluation.comparison import front
from polytask.evaluation.latency import Latency, added
from polytask.recipes import Reading, adapt
from polytask.recipes.compare import PUBLISHED, Bench, Work, compare, schedule
from polytask.recipes.processes import serve
from polytask.tasks import Example, Task, TaskCard
from polytask.training import Event, Settings

NAMES = ("head", "lora", "bottleneck", "pfeiffer", "ia3", "full", "prefix", "prompt", "dora", "kasa", "lofit", "reft")
MANY = (*NAMES, *PUBLISHED, *(f"method-{i}" for i in range(20)))


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
    assert "default learning rate" in text
    charts = re.findall(r'<svg viewBox="0 0.*?</svg>', text, re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        assert sorted(name for name, _, _ in labels(chart)) == sorted(NAMES)
    said = " ".join(parsed.texts)
    for fact in ("22,713,216", "224 train, 72 test", "epochs = 10", "polytask 0.1.0", "2026-01-01", "float32"):
        assert fact in said
    assert "prefers-color-scheme: dark" in text
    assert "NaN" not in text


@pytest.mark.parametrize("names", [NAMES, MANY], ids=len)
def test_names_in_charts_do_not_lie_over_each_other(names: tuple[str, ...]) -> None:
    text = page(comparison(names))
    lines, *others = re.findall(r'<svg viewBox="0 0.*?</svg>', text, re.DOTALL)
    ends = sorted(y for _, _, y in labels(lines))
    assert all(below - above >= 14 for above, below in itertools.pairwise(ends))
    for chart in others:
        for (a, ax, ay), (b, bx, by) in itertools.combinations(labels(chart), 2):
            apart = abs(ay - by) >= 12 or ax + 6 * len(a) <= bx or bx + 6 * len(b) <= ax
            assert apart, (a, b)


def test_many_methods_can_be_told_apart() -> None:
    text = page(comparison(MANY))
    Balanced(text)
    lines, *others = re.findall(r'<svg viewBox="0 0.*?</svg>', text, re.DOTALL)
    for chart in others:  # colour and shape of each point
        shapes = re.findall(r'<path class="dot (c\d)" transform="[^"]*" d="([^"]*)"><title>', chart)
        assert len(shapes) == len(set(shapes)) == len(MANY)
    looks = re.findall(r'<path class="line (c\d)" d="[^"]*"( stroke-dasharray="[^"]*")?>', lines)
    assert len(looks) == len(set(looks)) == len(MANY)


def tried(names: tuple[str, ...] = ("head", "lora", "ia3")) -> Comparison:
    """The comparison with a third of each rate and three times it; of lora that is better, of ia3 one failed."""
    found = comparison(names, task="a & <b>")
    more = []
    for trial in found.trials:
        slower = Latency(ratio=1.1, low=1.05, high=1.2, pairs=9, rows=32)
        trial = trial.model_copy(update={"memory": 5_250_000, "latency": slower})
        more.append(trial)
        for factor, gain in ((1 / 3, -0.1), (3.0, 0.05)):
            if trial.method == "head" or (trial.method == "ia3" and factor > 1):
                continue
            scores = {split: s.model_copy(update={"value": s.value + gain}) for split, s in trial.scores.items()}
            more.append(trial.model_copy(update={"lr": trial.lr * factor, "scores": scores}))
    failure = Failure("ia3", 3e-3, 0, "the loss became nan; try a smaller lr than 0.003")
    return replace(
        found, trials=tuple(more), factors=(1.0, 1 / 3, 3.0), failures=(failure,), left_out={"peft": "needs a <type>"}
    )


def test_the_page_shows_all_tries_and_what_was_left_out() -> None:
    text = page(tried())
    parsed = Balanced(text)
    said = " ".join(parsed.texts)
    assert "Each method was trained at 3 learning rates, its default times 0.333, 1, 3, and the one of the best" in said
    assert "peft: needs a <type>" in said
    assert "ia3 at 0.003, seed 0: the loss became nan" in said
    table = text[text.index("<h2>Tries") : text.index("<h2>Learning")]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", table)[1:]]
    assert cells == [
        ["head", "", "<b>0.700</b>", ""],
        ["lora", "0.610 at 0.000333", "0.710 at 0.001", "<b>0.760 at 0.003</b>"],
        ["ia3", "0.620 at 0.000333", "<b>0.720 at 0.001</b>", "failed at 0.003"],
    ]
    scores = text[: text.index("<h2>Tries")]
    assert re.search(r"lora</td><td>●</td><td>0\.760</td>.*<td>5\.25 MB</td><td>0\.20 MB</td><td>0\.003</td>", scores)
    assert "how many times as long a forward pass of 32" in said


def test_the_front_of_a_worked_example() -> None:
    # Score, trained parameters, seconds. (b) is worse than (a) in score and no better elsewhere; (c) is cheapest; (d)
    # equals (a); (e) is best in score, and slow.
    points = [(0.8, -100, -5), (0.7, -100, -5), (0.6, -10, -5), (0.8, -100, -5), (0.9, -1000, -50)]
    assert front(points) == [True, False, True, True, True]
    assert front([]) == []
    found = comparison(("lora", "dora", "ia3", "full"))
    lora, dora, ia3, full = found.trials
    test = {"test": lora.scores["test"]}
    said = Latency(ratio=1.2, low=1.1, high=1.3, pairs=9, rows=32)
    trials = (
        lora.model_copy(update={"scores": test, "seconds": 5.0, "trained_parameters": 100, "latency": said}),
        # Nothing that shows is better: 5.04 is 5.0 s, 1.204 is 1.20.
        dora.model_copy(
            update={
                "scores": test,
                "seconds": 5.04,
                "trained_parameters": 200,
                "latency": said.model_copy(update={"ratio": 1.204}),
            }
        ),
        ia3.model_copy(update={"scores": test, "seconds": 9.0, "trained_parameters": 10, "latency": said}),
        full.model_copy(
            update={
                "scores": test,
                "seconds": 90.0,
                "trained_parameters": 9999,
                "latency": said.model_copy(update={"ratio": 1.0}),
            }
        ),
    )
    rows = replace(found, trials=trials).rows
    assert [(row.method, row.front) for row in rows] == [("lora", True), ("dora", False), ("ia3", True), ("full", True)]


def test_the_best_rate_on_validation_is_kept() -> None:
    found = tried()
    assert [(row.method, row.lr) for row in found.rows] == [("head", 1e-3), ("lora", 3e-3), ("ia3", 1e-3)]
    assert found.rows[1].score == pytest.approx(0.76)
    lora = found.report()["methods"][1]
    assert [round(t["validation"], 3) for t in lora["tries"]] == [0.61, 0.71, 0.76]
    assert [t["lr"] for t in lora["trials"]] == [3e-3]
    # Whatever the test split says.
    trials = tuple(
        t.model_copy(
            update={
                "scores": {"test": t.scores["test"], "validation": t.scores["test"].model_copy(update={"value": 0.5})}
            }
        )
        for t in found.trials
    )
    assert [row.lr for row in replace(found, trials=trials).rows] == [1e-3] * 3  # the first, the default, of equals


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
    command = ["compare", table, "--methods", "head,ia3,head", "--epochs", "1", "--seeds", "2", "--jobs", "1"]
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
    # All with seed 0 first, then the others; the third of them was stopped.
    assert calls == ["head", "ia3", "head", "head", "ia3"]
    said = done.json
    assert [row["method"] for row in said["methods"]] == ["head", "ia3"]
    assert (said["task"], said["base"], said["metric"], said["split"]) == ("things", "minilm", "accuracy", "test")
    head, ia3 = said["methods"]
    assert ia3["seeds"] == 2
    assert ia3["interval"][0] <= ia3["score"] <= ia3["interval"][1]
    assert ia3["trainable_params"] == 6 * (384 + 384 + 1536) + 2 * 385
    assert len(ia3["trials"][0]["history"]) == 1
    assert head["trials"][0]["history"] == []
    assert ia3["latency"]["ratio"] > 0
    assert ia3["latency"]["low"] <= ia3["latency"]["ratio"] <= ia3["latency"]["high"]
    # Trained numbers in fp32, their gradients, AdamW's two moments; and a step counter for each of its 20 tensors.
    assert ia3["memory"] == 16 * ia3["trainable_params"] + 4 * (6 * 3 + 2)
    assert (said["factors"], said["jobs"], said["failures"], said["left_out"]) == ([1.0], 1, [], {})
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert {"head", "ia3"} <= set(Balanced(text).texts)

    # A result that is damaged is measured again, the others are not; another setting is other work.
    [folder] = (tmp_path / "runs").iterdir()
    names = ["head-0.001-0.json", "head-0.001-1.json", "ia3-0.01-0.json", "ia3-0.01-1.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    (folder / "head-0.001-1.json").write_text("{")
    table_shown = run(*command[:-1])
    assert calls[5:] == ["head"]
    assert "ia3, seed 0: found in" in table_shown.err
    assert re.search(r"ia3 +(\* +)?\d\.\d{3} \[", table_shown.out)
    monkeypatch.setattr(recipe, "adapt", real)
    other = run("compare", table, "--methods", "head", "--balanced", "--runs", tmp_path / "runs", "--quiet", "-j", "1")
    assert (other.status, other.err) == (0, "")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_compare_refuses_a_method_before_it_trains(tmp_path: Path) -> None:
    done = run("compare", write_table(tmp_path / "things.csv"), "--methods", "head,lorra", "--runs", tmp_path / "runs")
    assert done.status == 2
    assert "'lorra'" in done.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "all,lora"), "all stands alone"),
        (("--tries", "0"), "--tries 0: at least 1"),
        (("--jobs", "0"), "--jobs 0: at least 1"),
        (("--seeds", "0"), "--seeds 0: at least 1"),
    ],
)
def test_compare_says_what_is_wrong_with_its_options(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = run("compare", write_table(tmp_path / "things.csv"), *options, "--runs", tmp_path / "runs")
    assert done.status == 2
    assert said in done.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("one_backbone")
def test_compare_tries_rates_and_says_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import polytask.recipes.compare as recipe

    known = {name: recipe.known()[name] for name in ("head", "ia3", "peft")}
    monkeypatch.setattr(recipe, "known", lambda: known)
    monkeypatch.setattr(recipe, "PUBLISHED", ())
    table = write_table(tmp_path / "things.csv")
    done = run("compare", table, "--methods", "all", "--epochs", "1", "--runs", tmp_path / "runs", "-j", "1")
    assert done.status == 0, done.err
    assert re.search(r"method +accuracy on test .*seconds +latency +memory +size +rate", done.out)
    assert "Left out: peft: " in done.out
    shown = run("compare", table, "--methods", "all", "--epochs", "1", "--runs", tmp_path / "runs", "-j", "1", "--json")
    said = shown.json
    assert said["factors"] == pytest.approx([1, 1 / 3, 3])
    by_name = {row["method"]: row for row in said["methods"]}
    assert {name: len(row["tries"]) for name, row in by_name.items()} == {"head": 1, "ia3": 3}
    scores = [row["score"] for row in said["methods"]]
    assert scores == sorted(scores, reverse=True)
    assert any(row["front"] for row in said["methods"])
    text = Path(said["html"]).read_text(encoding="utf-8")
    assert "<h2>Tries</h2>" in text
    Balanced(text)


LOADS = partial(tiny.backbone, "bert", tokenizer=TOKENS)
TASK = task_of(n=40, held=32, metric="accuracy")
QUICK = Settings(epochs=1, batch=16)


def told(found: Comparison) -> list[tuple[str, float, int, dict[str, ScoreCard], int]]:
    """What does not hang on the clock, as the size of a card with its seconds does."""
    return [(t.method, t.lr, t.seed, t.scores, t.trained_parameters) for t in found.trials]


def test_all_methods_that_fit(backbone: Backbone) -> None:
    planned = schedule(backbone, TASK, None, tries=3, seeds=2)
    assert {"lora", "prompt", "full", "head", *PUBLISHED} <= set(planned.methods)
    assert list(planned.left_out) == ["bitune", "peft", "reprogram"]
    assert planned.ranked
    by_method = {m: [w.lr for w in planned.tries if w.method == m] for m in planned.methods}
    assert by_method["lora"] == [2e-3, 6.67e-4, 6e-3]
    assert by_method["head"] == [1e-3]
    assert all(len(rates) == 3 for method, rates in by_method.items() if method != "head")
    assert len(planned.titles) == len(planned.tries) + len(planned.methods)
    # A decoder that writes: no head, and whatever has no place in it.
    written = schedule(tiny.backbone("llama", tokenizer=TOKENS), TASK, None, reading=Reading(in_text="yes"))
    assert "no head to train" in written.left_out["head"]
    assert "lora" in written.methods
    with pytest.raises(UsageError, match="head: the answer is in text"):
        schedule(backbone, TASK, ["lora", "head"], reading=Reading(in_text="yes"))
    for wrong, said in (
        ({"tries": 9}, "from 1 to 5"),
        ({"seeds": 0}, "at least one"),
        ({"methods": []}, "at least one"),
    ):
        with pytest.raises(UsageError, match=said):
            schedule(backbone, TASK, **{"methods": ["lora"], **wrong})  # type: ignore[arg-type]
    with pytest.raises(PolytaskError, match="no validation examples to choose"):
        schedule(backbone, replace(TASK, validation=(), test=TASK.validation), ["lora"], tries=2)


def test_rates_are_tried_with_seed_0_and_the_best_goes_on(backbone: Backbone, tmp_path: Path) -> None:
    planned = schedule(backbone, TASK, ["head", "lora"], tries=3, seeds=2, settings=QUICK)
    ends: list[tuple[str, bool]] = []
    events: set[int] = set()

    def on_trial(at: int, trial: Trial | str, *, new: bool) -> None:
        assert isinstance(trial, Trial)
        ends.append((planned.titles[at], new))

    def on_event(at: int, event: Event) -> None:
        events.add(at)

    found = compare(backbone, TASK, planned, folder=tmp_path, on_trial=on_trial, on_event=on_event)
    titles = ["head at 0.001", "lora at 0.002", "lora at 0.000667", "lora at 0.006", "head, seed 1", "lora, seed 1"]
    assert planned.titles == titles
    assert ends == [(title, True) for title in titles]
    assert events == set(range(6))
    tries = {t.lr: t.scores["validation"].value for t in found.tries("lora")}
    best = max(tries.values())
    kept = next(lr for lr in (2e-3, 6.67e-4, 6e-3) if tries[lr] == best)
    assert [(t.lr, t.seed) for t in found.kept("lora")] == [(kept, 0), (kept, 1)]
    alone = adapt(backbone, TASK, "lora", settings=replace(QUICK, lr=kept, seed=1))
    assert found.kept("lora")[1].scores == alone.card.scores
    # On disk: the adapter as it is saved; in memory: numbers, gradients, two moments, a counter for each tensor.
    saved = adapt(backbone, TASK, "lora", settings=replace(QUICK, lr=kept)).save(tmp_path / "saved")
    own = sum(path.stat().st_size for path in saved.iterdir())
    trial = found.kept("lora")[0]
    assert abs(trial.bytes - own) < 20  # the seconds on its card have other digits
    assert trial.memory == 16 * trial.trained_parameters + 4 * (3 * 2 * 2 + 2)
    assert [trial.latency is None for trial in found.kept("lora")] == [False, True]
    assert not (tmp_path / "adapters").exists()
    assert not (tmp_path / "training").exists()

    ends.clear()
    again = compare(backbone, TASK, planned, folder=tmp_path, on_trial=on_trial)
    assert again.trials == found.trials
    assert all(not new for _, new in ends)
    # A rate that was not kept has no adapter any more: where it is kept now, it is trained again for its latency.
    default = schedule(backbone, TASK, ["lora"], settings=QUICK)
    other = compare(backbone, TASK, default, folder=tmp_path)
    assert other.kept("lora")[0].latency is not None


def test_a_selector_is_charged_for_what_it_trains(backbone: Backbone, tmp_path: Path) -> None:
    planned = schedule(backbone, TASK, ["full", "full@lottery"], settings=QUICK)
    full, lottery = compare(backbone, TASK, planned, folder=tmp_path).rows
    assert lottery.trained_parameters < full.trained_parameters / 50
    assert full.memory is not None
    assert lottery.memory is not None
    assert lottery.memory > 0.95 * full.memory  # but for the norms


def test_what_fails_is_told_and_the_rest_compared(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import polytask.recipes.compare as recipe

    real = recipe.adapt

    def failing(base: Any, task: Any, method: str, **more: Any) -> Any:
        if method == "ia3" or more["settings"].lr > 5e-3:
            raise PolytaskError(f"task {task.name}: the loss became nan at step 1")
        return real(base, task, method, **more)

    monkeypatch.setattr(recipe, "adapt", failing)
    planned = schedule(backbone, TASK, ["lora", "ia3"], tries=3, settings=QUICK)
    said: list[str] = []

    def on_trial(at: int, trial: Trial | str, *, new: bool) -> None:
        said.extend([trial] if isinstance(trial, str) else [])

    found = compare(backbone, TASK, planned, folder=tmp_path, on_trial=on_trial)
    assert found.methods == ("lora",)
    assert [(f.method, f.lr) for f in found.failures] == [
        ("lora", 6e-3),
        ("ia3", 1e-2),
        ("ia3", 3.33e-3),
        ("ia3", 3e-2),
    ]
    assert [failure.reason for failure in found.failures] == said
    assert "became nan" in found.left_out["ia3"]
    Balanced(page(found))
    with pytest.raises(PolytaskError, match=r"no method could be trained: .* became nan"):
        compare(backbone, TASK, schedule(backbone, TASK, ["ia3"], settings=QUICK), folder=tmp_path)


def test_two_that_meet_measure_once(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import polytask.recipes.compare as recipe

    real, calls, both = recipe.adapt, [], threading.Event()

    def slow(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments[2])
        both.wait(5)
        return real(*arguments, **more)

    monkeypatch.setattr(recipe, "adapt", slow)
    bench, work = Bench(TASK, QUICK, Reading(), tmp_path), Work("head", 1e-3, 0)
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(bench.measure, backbone, work) for _ in range(2)]
        both.set()
        first, second = (result.result() for result in results)
    assert calls == ["head"]
    assert first == second


def test_processes_share_the_work(backbone: Backbone, tmp_path: Path) -> None:
    planned = schedule(backbone, TASK, ["head", "ia3", "lora", "full"], settings=QUICK)
    alone = compare(backbone, TASK, planned, folder=tmp_path / "alone")
    events: set[int] = set()

    def on_event(at: int, event: Event) -> None:
        events.add(at)

    shared = compare(backbone, TASK, planned, folder=tmp_path / "shared", jobs=2, load=LOADS, on_event=on_event)
    assert told(shared) == told(alone)
    assert (shared.jobs, alone.jobs) == (2, 1)
    assert events == {0, 1, 2, 3}
    assert all(trial.latency is not None for trial in shared.trials)
    assert multiprocessing.active_children() == []


def test_a_process_that_ends_is_one_line(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = schedule(backbone, TASK, ["head", "ia3"], settings=QUICK)
    said = r"a process ended while it trained (head|ia3) \(exit status 7; .*\); give fewer jobs"
    with pytest.raises(PolytaskError, match=said) as caught:
        compare(backbone, TASK, planned, folder=tmp_path, jobs=2, load=partial(os._exit, 7))
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []
    with pytest.raises(UsageError, match="need a way to load the backbone"):
        compare(backbone, TASK, planned, folder=tmp_path, jobs=2)
    # What goes wrong in it is told, in one line too.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    serve(theirs, partial(tiny.backbone, "nosuch"), Bench(TASK, QUICK, Reading(), tmp_path), 1)
    told_of = ours.recv()
    assert isinstance(told_of, PolytaskError)
    assert str(told_of) == "KeyError: 'nosuch'"


def test_answers_in_text_are_compared(tmp_path: Path) -> None:
    rows = tuple(Example(str(i), f"the {word} sat", word) for i, word in enumerate(("cat", "mat", "dogs", "noon") * 4))
    task = Task("last", "generation", rows, rows[:4], rows[4:8], metric="exact_match")
    base = writer("llama")
    planned = schedule(base, task, ["lora", "prefix"], tries=2, settings=replace(QUICK, batch=8))
    found = compare(base, task, planned, folder=tmp_path)
    assert found.methods == ("lora", "prefix")
    assert all(row.latency is not None and row.latency > 0 for row in found.rows)
    assert [len(found.tries(method)) for method in found.methods] == [2, 2]
    Balanced(page(found))


@pytest.mark.slow
def test_ctrl_c_stops_all_processes(tmp_path: Path) -> None:
    table = write_table(tmp_path / "things.csv")
    command = ["compare", table, "--methods", "all", "--jobs", "2", "--runs", tmp_path / "runs", "--epochs", "1"]
    process = start(*command, start_new_session=True)
    while not list((tmp_path / "runs").rglob("*.json")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == "polytask: stopped; the same command goes on from its checkpoint"
    assert "Traceback" not in err.decode()
    for _ in range(100):  # soon nobody of the session is left
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process goes on")


def test_latency_is_the_median_of_pairs(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapt(backbone, TASK, "prompt", settings=QUICK)
    clock = iter([2.0, 1.0, 3.0, 2.0, 4.0, 2.0, 5.0, 2.0, 9.0, 3.0, 4.0, 1.0, 5.0, 1.0])
    monkeypatch.setattr(latency, "_seconds", lambda run: (run(), next(clock))[1])
    monkeypatch.setattr(latency, "PAIRS", (7, 7))
    # 2, 1.5, 2, 2.5, 3, 4, 5: in order 1.5, 2, 2, 2.5, 3, 4, 5, the quartiles the second, fourth and sixth.
    found = added(backbone, adapter, TASK.validation)
    assert (found.low, found.ratio, found.high, found.pairs, found.rows) == (2.0, 2.5, 4.0, 7, 32)
    with pytest.raises(PolytaskError, match="no example"):
        added(backbone, adapter, ())


def test_latency_of_a_pass_that_has_more_to_do(backbone: Backbone) -> None:
    long = adapt(backbone, TASK, "prompt", hyperparameters={"n": 40}, settings=QUICK)  # before texts of 14 tokens
    assert added(backbone, long, TASK.validation).low > 1.2


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
        return real(base, [replace(plan, method="head", hyperparameters=None) for plan in plans], **options)

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
