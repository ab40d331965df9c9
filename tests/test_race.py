"""A race of methods: who goes on, that the winner is what it would be alone, and that it may be stopped."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import run, write_table
from jobs import LORA, same, task_of

from polytask.adapters import Adapter
from polytask.backbones import Backbone, heads
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build
from polytask.recipes import adapt
from polytask.recipes import race as recipe
from polytask.recipes.adapt import Plan, adapt_many
from polytask.recipes.race import Candidate, Won, candidates, race
from polytask.training import Event, Job, Learned, Settings, train

TASK = task_of(n=40, held=32)
adapting = importlib.import_module("polytask.recipes.adapt")  # the package's `adapt` is the function
HEAD = heads.design(TASK, pool="mean", pair="separate")
SETTINGS = Settings(epochs=4, batch=16, patience=99)
ENTERED = (
    Candidate("lora", LORA, 5e-3),
    Candidate("lora", LORA, 2e-2),
    Candidate("bitfit", {}, 2e-2),
    Candidate("ia3", {}, 1e-2),
)


def ran(backbone: Backbone, **more: Any) -> Won:
    return race(backbone, TASK, HEAD, more.pop("entered", ENTERED), SETTINGS, **more)


def scores(won: Won) -> list[tuple[int, list[tuple[str, float | None]]]]:
    return [(rung.epochs, [*rung.scores.items()]) for rung in won.rungs]


class Known:
    """A start whose heats' scores after each epoch are known; they note until which epoch they were run."""

    def __init__(self, curves: dict[float, list[float | None]]) -> None:
        self.curves, self.asked, self.seconds = curves, [], 1.0
        self.over: dict[float, int] = {}

    def heat(self, method: Any, settings: Settings, folder: Path, on_event: object) -> Any:
        lr, known = settings.lr, self
        assert lr is not None

        class Heat:
            @property
            def seconds(self) -> float:
                return 10.0 * known.over.get(lr, 0)

            @property
            def epochs(self) -> int:
                return known.over.get(lr, 0)

            def run(self, epochs: int) -> float:
                known.asked.append((lr, epochs))
                known.over[lr] = epochs
                curve = known.curves[lr][:epochs]
                if None in curve:
                    raise PolytaskError("the loss became nan")
                return max(curve)

        return Heat()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[float, list[float | None]]], tuple[Won, Known]]:
    def run(curves: dict[float, list[float | None]]) -> tuple[Won, Known]:
        start = Known(curves)

        def to_the_end(base: object, jobs: list[Job], **_: object) -> list[Learned]:
            history = [{"epoch": float(e)} for e in range(1, 9)]
            return [Learned(jobs[0].method, {}, 0, 0.9, 0.1, {}, history, 80.0, 0)]

        monkeypatch.setattr(recipe, "Start", lambda *_: start)
        monkeypatch.setattr(recipe, "train", to_the_end)
        entered = [Candidate("lora", {}, lr) for lr in curves]
        task = task_of(n=16)
        return race(None, task, HEAD, entered, replace(SETTINGS, epochs=8), folder=Path("nowhere")), start  # type: ignore[arg-type]

    return run


def test_the_better_half_goes_on_a_worked_example(known: Any) -> None:
    # E = 8, n = 4, k = 2: rungs after 8/4 = 2 and 8/2 = 4 epochs. After 2: .5, .6, .7, .4, so 3 and 2 go on; after 4
    # the best scores of 3 and 2 are .7 and .8, so 2 wins, and is trained to the end. 2 + 2 + 4 + 8 = 16 epochs, 2 · 8.
    curves = {1.0: [0.3, 0.5], 2.0: [0.6, 0.5, 0.7, 0.8], 3.0: [0.2, 0.7, 0.6, 0.6], 4.0: [0.4, 0.4]}
    won, start = known(curves)
    assert start.asked == [(1.0, 2), (2.0, 2), (3.0, 2), (4.0, 2), (3.0, 4), (2.0, 4)]
    assert scores(won) == [
        (2, [("lora at 3", 0.7), ("lora at 2", 0.6), ("lora at 1", 0.5), ("lora at 4", 0.4)]),
        (4, [("lora at 2", 0.8), ("lora at 3", 0.7)]),
    ]
    assert won.job.settings.lr == 2.0
    assert won.cost == 2.0
    assert [rung.seconds for rung in won.rungs] == [80.0, 40.0]
    # The winner's 80, the others' 20 + 40 + 20, and the head's fit, twice.
    assert won.learned.seconds == 80 + 80 + 2
    assert str(won.rungs[1]) == "race, epoch 4 (40.0 s): lora at 2 0.800, lora at 3 0.700"


def test_equals_go_by_order_and_who_fails_is_out(known: Any) -> None:
    won, _ = known({1.0: [0.5] * 4, 2.0: [0.1, None], 3.0: [0.5] * 4, 4.0: [0.5] * 4})
    assert scores(won) == [
        (2, [("lora at 1", 0.5), ("lora at 3", 0.5), ("lora at 4", 0.5), ("lora at 2", None)]),
        (4, [("lora at 1", 0.5), ("lora at 3", 0.5)]),
    ]
    assert won.job.settings.lr == 1.0
    assert "lora at 2 failed" in str(won.rungs[0])
    with pytest.raises(PolytaskError, match="nobody could run the race: the loss became nan"):
        known({1.0: [None], 2.0: [None]})
    alone, start = known({1.0: [0.5] * 8})
    assert (alone.rungs, alone.cost, start.asked) == ((), 1.0, [])


def test_the_winner_is_what_it_would_be_alone(backbone: Backbone) -> None:
    won = ran(backbone)
    [alone] = train(backbone, [won.job])
    same(won.learned, alone)
    assert [epochs for epochs, _ in scores(won)] == [1, 2]
    assert [len(said) for _, said in scores(won)] == [4, 2]
    for candidate in ENTERED:
        [other] = train(
            backbone,
            [
                replace(
                    won.job,
                    method=build(candidate.method, candidate.hyperparameters),
                    settings=replace(SETTINGS, lr=candidate.lr),
                )
            ],
        )
        assert dict(scores(won)[0][1])[candidate.name] == other.history[0]["score"]
    again = ran(backbone)
    same(again.learned, won.learned)
    assert scores(again) == scores(won)


def stopped(begin: Callable[[Callable[[Event], None]], object], stop: int) -> None:
    """Begin a training, and stop it after so many steps."""
    steps = 0

    def on_event(event: Event) -> None:
        nonlocal steps
        steps += event.kind == "step"
        if steps == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(on_event)


@pytest.mark.parametrize("stop", [2, 7, 11, 16, 20])
def test_a_race_that_was_stopped_goes_on_to_the_same_end(backbone: Backbone, tmp_path: Path, stop: int) -> None:
    whole = ran(backbone)
    stopped(lambda told: ran(backbone, folder=tmp_path, on_event=told), stop)
    counted: list[Event] = []
    won = ran(backbone, folder=tmp_path, on_event=counted.append)
    same(won.learned, whole.learned)
    assert scores(won) == scores(whole)
    # 40 examples in batches of 16: 3 steps an epoch, (1 + 1 + 1 + 1) + (1 + 1) + 2 epochs. What was done stays done.
    assert sum(event.kind == "step" for event in counted) == 24 - stop // 3 * 3 + (3 if stop % 3 == 0 else 0)


def test_who_has_no_site_or_no_finite_loss_does_not_run(backbone: Backbone) -> None:
    entered = (Candidate("lora", {"sites": ["*.cross.q"]}, 1e-3), *ENTERED[:2])
    won = ran(backbone, entered=entered)
    assert [len(said) for _, said in scores(won)] == [2]
    with pytest.raises(PolytaskError, match=r"nobody could run the race: .*cross") as caught:
        ran(backbone, entered=entered[:1])
    assert "\n" not in str(caught.value)
    with pytest.raises(PolytaskError, match="needs validation examples"):
        race(backbone, replace(TASK, validation=()), HEAD, ENTERED, SETTINGS)


def test_adapt_says_why_it_chose(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(n=40, held=32, length=40, metric="accuracy")
    adapter = adapt(backbone, task, "race", settings=replace(SETTINGS, epochs=8))
    first, second, chose = adapter.card.notes
    assert first.startswith("race, epoch 2 (")
    assert all(name in first for name in ("lora at 0.001", "lora at 0.003", "parallel at 0.001", "bitfit at 0.01"))
    assert second.startswith("race, epoch 4 (")
    assert f"race chose {adapter.method}: accuracy on validation: head 0." in chose
    assert chose.endswith(f"all took 2.0 times the epochs of {adapter.method}")
    recorded = adapter.card.recipe
    assert [rung["epochs"] for rung in recorded["race"]] == [2, 4]
    assert recorded["method"] == "race"
    winner = next(iter(recorded["race"][1]["scores"]))
    assert winner == f"{adapter.method} at {recorded['settings']['lr']:g}"
    json.dumps(recorded)
    # Where nobody beats the head, the head it is.
    still = replace(SETTINGS, head_lr=1e-12, epochs=1)
    monkeypatch.setattr(adapting, "candidates", lambda *_, **__: [Candidate("ia3", {}, 1e-12)])
    kept = adapt(backbone, task, "race", settings=still)
    assert kept.method == "head"
    assert "race chose head: " in kept.card.notes[-1]


def test_a_race_beside_others(backbone: Backbone, tmp_path: Path) -> None:
    events: list[Event] = []
    plans = [Plan(TASK, "ia3", settings=SETTINGS), Plan(TASK, "race", settings=SETTINGS)]
    both = adapt_many(backbone, plans, folder=tmp_path, on_event=events.append)
    alone = [adapt(backbone, TASK, plan.method, settings=SETTINGS) for plan in plans]
    assert [a.id for a in both] == [a.id for a in alone]
    assert {event.job for event in events} == {0, 1}
    assert max(event.step for event in events if event.job == 0) == 4 * 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hyperparameters": {"r": 4}}, "leave out hyperparameters"),
        ({"settings": Settings(lr=1e-3)}, "leave out lr"),
    ],
)
def test_a_race_is_told_nothing_of_methods(backbone: Backbone, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        adapt(backbone, TASK, "race", **more)


def test_candidates_of_answers_in_text_learn_faster_ones() -> None:
    lora = Candidate("lora", {}, 6e-3)
    settings = Settings()
    read, written = (candidates(lora, settings, 256, writing=writing) for writing in (False, True))
    assert [c.method for c in read] == [c.method for c in written] == ["lora", "lora", "parallel", "bitfit"]
    assert [c.lr for c in read] == pytest.approx([6e-3, 1.8e-2, 1e-3, 1e-2])
    assert [c.lr for c in written] == pytest.approx([6e-3, 2e-3, 2.5e-3, 2.5e-2])


def test_the_command_line_races(tmp_path: Path) -> None:
    table = write_table(tmp_path / "things.csv")
    wrong = run("adapt", table, "--method", "race", "--set", "r=2", "--library", tmp_path / "skills", "-q")
    assert wrong.status == 2
    assert "leave out hyperparameters" in wrong.error
    done = run("adapt", table, "--method", "race", "--epochs", "1", "--library", tmp_path / "skills", "--json")
    assert done.status == 0, done.err
    assert any(note.startswith("race, epoch 1 ") for note in done.json["notes"])
    assert not (tmp_path / "skills" / ".training").exists()
    kept = [Adapter.load(path.parent) for path in (tmp_path / "skills").rglob("adapter.json")]
    assert [adapter.method for adapter in kept] == [done.json["method"]]


# -- auto, where examples are few --------------------------------------------------------------------------------------


def tried(adapter: Adapter) -> dict[str, float]:
    """Who was trained, and their validation scores, as the note of `auto` has them."""
    [note] = [n for n in adapter.card.notes if n.startswith("auto chose ")]
    pairs = (part.rsplit(" ", 1) for part in note.partition("on validation: ")[2].split(", "))
    return {name: float(score) for name, score in pairs}


def test_auto_keeps_the_best_of_three_where_examples_are_few(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, epochs=6)
    task = task_of(n=40, held=32, length=40, seed=2, metric="accuracy")
    lora = Candidate("lora", {"r": 2}, 1e-3)
    entered = [lora, replace(lora, lr=2e-2), Candidate("parallel", {}, 3e-2), Candidate("bitfit", {}, 1e-2)]
    monkeypatch.setattr(adapting, "candidates", lambda *_, **__: entered)
    made = adapt(backbone, task, settings=settings)
    found = tried(made)
    assert list(found) == ["head", "lora at 0.001", "lora at 0.02", "parallel at 0.03"]
    all_maps = adapting.automatic(backbone, Plan(task)).hyperparameters
    ways = (("lora", all_maps, 1e-3), ("lora", {"r": 2}, 2e-2), ("parallel", {}, 3e-2))
    alone = [
        adapt(backbone, task, method, hyperparameters=hyper, settings=replace(settings, lr=lr))
        for method, hyper, lr in ways
    ]
    scores = [one.card.scores["validation"].value for one in alone]
    assert [found[name] for name in [*found][1:]] == pytest.approx(scores, abs=6e-4)
    assert max(scores) > max(scores[0], found["head"])  # a rival, and so the test can fail
    assert made.id == alone[scores.index(max(scores))].id
    assert made.method in made.card.notes[-1]
    steps: list[Event] = []
    adapting.adapt(backbone, task, settings=settings, on_event=steps.append)
    assert sum(event.kind == "step" for event in steps) == 3 * 6 * 3
    assert {event.job for event in steps} == {0}


@pytest.mark.parametrize(
    ("more", "few"),
    [({"hyperparameters": {"r": 2}}, True), ({"settings": replace(SETTINGS, lr=1e-3)}, True), ({}, False)],
)
def test_auto_trains_lora_alone_where_it_is_told_how_or_has_many_examples(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], few: bool
) -> None:
    monkeypatch.setattr(adapting, "FEW", 40 if few else 39)
    assert list(tried(adapt(backbone, TASK, **({"settings": SETTINGS} | more)))) == ["head", "lora"]
    assert len(tried(adapt(backbone, TASK, settings=SETTINGS))) == (4 if few else 2)


def test_auto_goes_without_rivals_that_cannot_be_trained(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere, infinite = Candidate("lora", {"sites": ["*.cross.q"]}, 1e-3), Candidate("lora", {"alpha": 1e38}, 9.0)
    monkeypatch.setattr(adapting, "candidates", lambda lora, *_, **__: [lora, nowhere, infinite])
    assert list(tried(adapt(backbone, TASK, settings=SETTINGS))) == ["head", "lora at 0.001"]


@pytest.mark.parametrize("stop", [5, 14, 20])
def test_auto_that_was_stopped_goes_on_to_the_same_end(backbone: Backbone, tmp_path: Path, stop: int) -> None:
    whole = adapt(backbone, TASK, settings=SETTINGS)
    stopped(lambda told: adapt(backbone, TASK, settings=SETTINGS, folder=tmp_path, on_event=told), stop)
    counted: list[Event] = []
    made = adapt(backbone, TASK, settings=SETTINGS, folder=tmp_path, on_event=counted.append)
    assert made.id == whole.id
    assert tried(made) == tried(whole)
    # 40 examples in batches of 16: 3 steps an epoch, of four epochs for each of the three.
    assert sum(event.kind == "step" for event in counted) == 36 - stop // 3 * 3
