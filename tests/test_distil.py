"""Several adapters taught into one: how alike tasks are, what counts as a target, and the way to it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from commands import FRUIT, TOOLS, run, write_table
from jobs import TOKENS, job_of, task_of
from made import one_line

import polytask as pt
import polytask.backbones
from polytask.adapters import Adapter
from polytask.adapters.expression import Name
from polytask.backbones import Backbone, heads
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request
from polytask.library import Library
from polytask.methods import passes
from polytask.recipes import distil as module
from polytask.recipes.distil import distil, parc, weigh
from polytask.tasks import Task
from polytask.training import Event, loop, probe
from polytask.training.learner import SOFTER


@cache
def base() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


@cache
def teachers() -> tuple[Adapter, ...]:
    """One that leaves the words' states as they are for the most part, and one that spoils them."""
    made = []
    for seed, (name, noise) in enumerate((("good", 0.05), ("bad", 9.0))):
        one = pt.adapt(base(), replace(task_of(seed=seed), name=name), "lora", settings=pt.Settings(epochs=1))
        draw = torch.Generator().manual_seed(seed)
        moved = {n: t + noise * torch.randn(t.shape, generator=draw) for n, t in one.tensors.items() if "attn" in n}
        made.append(replace(one, tensors={**one.tensors, **moved}))
    return tuple(made)


def half(n: int = 24, known: int = 8) -> Task:
    """A task of which `known` examples have an output, and its validation split is a test split too."""
    own = task_of(n=n, seed=50)
    train = tuple(e if i % (n // known) == 0 else replace(e, output=None) for i, e in enumerate(own.train))
    return replace(own, name="new", train=train, test=own.validation, metric="accuracy")


def test_parc_by_hand():
    """Distances of standardised rows over the pairs 10 20 21 30 31 32 rank 4 1 2 5 3 6, those of the labels 0 1 0 1
    4.5 1.5 4.5 4.5 1.5 4.5: Σ of products of deviations 9, of squares 17.5 and 12; 9 / √210."""
    φ = torch.tensor([[1.0, 0, 2, 1], [2, 1, 0, 1], [1, 0, 1.5, 1], [0, 3, 1, 2]])
    pairs = [(i, j) for i in range(4) for j in range(i)]
    Z = (φ - φ.mean(0)) / φ.std(0, correction=0)
    far = [1 - float(torch.corrcoef(Z)[i, j]) for i, j in pairs]
    assert [sorted(far).index(d) + 1 for d in far] == [4, 1, 2, 5, 3, 6]
    assert parc(φ, [0, 1, 0, 1]) == pytest.approx(9 / math.sqrt(210))


def test_parc_says_nothing_where_nothing_differs():
    φ = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert parc(φ, [1, 1, 1, 1]) == 0
    assert parc(torch.ones(4, 3), [0, 1, 0, 1]) == 0


def test_weights_by_hand():
    """.36 and .09 of .45."""
    e = [0.6, 0.3, -0.1]
    torch.testing.assert_close(weigh(e, 2.0), torch.tensor([0.8, 0.2, 0.0]))
    assert weigh(e, math.inf).tolist() == [1, 0, 0]
    torch.testing.assert_close(weigh(e, 0.0), torch.full((3,), 1 / 3))
    torch.testing.assert_close(weigh([-0.2, -0.1], 2.0), torch.full((2,), 1 / 2))


def test_the_loss_of_soft_targets_by_hand():
    """One batch of all rows at the softened probe, whose rows need not sum to 1 and need no output."""
    task = replace(task_of(n=24), train=tuple(replace(e, output=None) for e in task_of(n=24).train))
    t = torch.rand(24, 4, generator=torch.Generator().manual_seed(1))
    job = replace(job_of(task, batch=64, epochs=1), soft=t)
    events: list[Event] = []
    [learned] = loop.train(base(), [job], on_event=events.append)
    W, b = (SOFTER * learned.probe_tensors[f"head/{n}"] for n in "Wb")
    φ = torch.stack(passes.features(base(), job.head, passes.encode(base(), job.head, task.train)))
    wanted = -(t * (φ @ W.T + b).log_softmax(-1)).sum(-1).mean()
    assert next(e.loss for e in events if e.kind == "step") == pytest.approx(float(wanted), rel=1e-4)
    with pytest.raises(PolytaskError, match="has no output"):
        loop.train(base(), [replace(job, soft=None)])


def soft_of(task: Task, monkeypatch: pytest.MonkeyPatch, **hyper: object) -> torch.Tensor:
    """What the student is taught."""
    seen = []

    def noted(base, plans, **more):
        seen.append(plans[0])
        raise KeyError

    monkeypatch.setattr(module, "adapt_many", noted)
    with pytest.raises(KeyError):
        distil(base(), task, teachers(), hyperparameters=hyper)
    outputs = [e.output for e in seen[0].task.train]
    assert None not in outputs[:8]
    assert outputs[8:] == [None] * (len(outputs) - 8)
    return seen[0].soft


def test_targets_are_labels_and_the_teachers_probabilities(monkeypatch):
    """λ = .3 and 24 of 8: a labelled row has .3 · 3 at its label, and every row .7 of its teacher's probabilities."""
    task = half()
    known = [e for e in task.train if e.output is not None]
    y = torch.tensor(["abcd".index(str(e.output)) for e in known])
    labels_alone = soft_of(task, monkeypatch, labels=1.0)
    assert labels_alone[range(8), y].tolist() == [3.0] * 8
    assert float(labels_alone.sum()) == 24
    head = heads.design(task)
    ordered = [*known, *(e for e in task.train if e.output is None)]
    z = {}
    for one in teachers():
        composer = module.Plan(task, over=[one]).composer()
        units = passes.encode(base(), head, [*ordered, *task.validation])
        φ = torch.stack(passes.features(base(), head, units, terms=composer.terms(Name(one.id))))
        held = torch.tensor(["abcd".index(str(e.output)) for e in task.validation])

        def score(p, φ=φ, held=held):
            return -float(torch.nn.functional.cross_entropy(heads.logits(p, φ[24:]), held))

        p = probe.fit(head, φ[:8].clone(), y, heads.start(head, 32, 0), score)
        z[one.name] = parc(φ[:8], y.tolist()), heads.logits(p, φ[:24])
    nearest = max(z.values(), key=lambda each: each[0])[1]
    both = soft_of(task, monkeypatch, labels=0.3, power=math.inf, temperature=2.0)
    wanted = 0.7 * (nearest / 2).softmax(-1)
    wanted[range(8), y] += 0.3 * 3
    torch.testing.assert_close(both, wanted, rtol=1e-4, atol=1e-5)
    alike = soft_of(task, monkeypatch, labels=0.0, power=0.0, temperature=1.0)
    mean = torch.stack([each.softmax(-1) for _, each in z.values()]).mean(0)
    torch.testing.assert_close(alike, mean, rtol=1e-4, atol=1e-5)


def test_one_adapter_answers_and_says_who_taught_it():
    before = {n: t.clone() for n, t in teachers()[0].tensors.items()}
    given = {"student": "parallel", "reduction": 4, "power": 4}
    found = distil(base(), half(), teachers(), hyperparameters=given, settings=pt.Settings(epochs=3))
    assert (found.method, found.hyperparameters["reduction"], found.above) == ("parallel", 4, ())
    α = found.card.recipe["weights"]
    assert set(α) == {one.id for one in teachers()}
    assert sum(α.values()) == pytest.approx(1)
    assert [α[id] for id in found.card.recipe["parc"]] == pytest.approx(
        weigh([*found.card.recipe["parc"].values()], 4.0).tolist()
    )
    assert found.card.lineage.parents == tuple(id for id in α if α[id] > 0)
    assert any("distilled on 24 inputs, 8 of them with labels" in note for note in found.card.notes)
    assert found.card.scores["test"].n == 32
    assert all(torch.equal(t, before[n]) for n, t in teachers()[0].tensors.items())
    [answer] = Engine(base(), adapters=[found]).answer([Request("a e f")])  # without its teachers
    assert answer.output in {*"abcd"}


def test_a_student_learns_what_its_labels_do_not_say():
    """Sixteen labels, and an adapter that was taught the same by 192: through inputs without any, it passes that on."""
    task = task_of(n=192, length=6, seed=50, held=64, metric="accuracy")
    knows = pt.adapt(base(), task, "lora", settings=pt.Settings(epochs=12, lr=1e-2))
    few = tuple(e if i % 12 == 0 else replace(e, output=None) for i, e in enumerate(task.train))
    alone = replace(task, train=tuple(e for e in few if e.output is not None), test=task.validation)
    settings = pt.Settings(epochs=8, lr=5e-3)
    before = pt.adapt(base(), alone, "lora", settings=settings)
    taught = distil(base(), replace(alone, train=few), [knows], hyperparameters={"labels": 0.2}, settings=settings)
    assert taught.card.scores["test"].value > before.card.scores["test"].value + 0.03


@pytest.mark.parametrize(
    ("change", "hyper", "said"),
    [
        ({"train": tuple(replace(e, output=None) for e in task_of(n=4).train)}, {}, "no training example has an out"),
        ({}, {"power": -1}, "power = -1.0: a number 0 or more"),
        ({}, {"labels": 2}, "from 0 to 1"),
        ({}, {"temperature": 0}, "above 0"),
        ({}, {"student": "race"}, "name a method"),
        ({}, {"rank": 3}, "lora has no hyperparameter 'rank'"),
    ],
)
def test_what_cannot_be_distilled(change, hyper, said):
    with pytest.raises((UsageError, PolytaskError), match=said) as caught:
        distil(base(), replace(half(), **change), teachers(), hyperparameters=hyper)
    one_line(caught.value)


def test_what_it_is_not_for():
    with pytest.raises(UsageError, match="say which"):
        distil(base(), half(), [])
    with pytest.raises(UsageError, match="one label of a text"):
        distil(base(), task_of("tagging", 8), teachers())
    with pytest.raises(UsageError, match="one label of a text"):
        distil(base(), half(), teachers(), reading=pt.Reading(pool="labels"))
    other = [replace(one, backbone=tiny.backbone("bert", seed=3, tokenizer=TOKENS).card()) for one in teachers()]
    with pytest.raises(UsageError, match="was trained on"):
        distil(base(), half(), other)


def partly(path: Path) -> Path:
    """The table of fruit and tools, with more rows that nobody has labelled."""
    write_table(path)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"who took my {word},\n" for word in FRUIT + TOOLS)
    return path


def test_rows_without_an_output_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    path = partly(tmp_path / "things.csv")
    whole = Task.read(path, unlabelled=True)
    answered = Task.read(write_table(tmp_path / "all.csv"), name="things")
    without = [e for e in whole.train if e.output is None]
    assert [e.text for e in without] == [f"who took my {word}" for word in FRUIT + TOOLS]
    assert [e.text for e in whole.train if e.output is not None] == [e.text for e in answered.train]
    assert whole.train[-16:] == tuple(without)
    assert len({e.id for e in whole.train}) == len(whole.train)
    assert (whole.labels, whole.validation[0].text) == (answered.labels, answered.validation[0].text)
    with pytest.raises(PolytaskError, match="line 66: the output is missing"):
        Task.read(path)
    tags = tmp_path / "tags.jsonl"
    tags.write_text('{"tokens": ["a", "b"], "tags": ["O", "B-X"]}\n{"tokens": ["c", "d"], "tags": null}\n')
    assert Task.read(tags, unlabelled=True).train[-1].input == ("c", "d")


def test_distil_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polytask.backbones, "load", cache(polytask.backbones.load))
    skills = tmp_path / "skills"
    for name in ("one", "two"):
        source = write_table(tmp_path / f"{name}.csv")
        method = {"one": "lora", "two": "ia3"}[name]
        made = run("adapt", source, "-l", skills, "-m", method, "--epochs", "1", "-q")
        assert made.status == 0
    path = partly(tmp_path / "things.csv")
    said = ["adapt", path, "-l", skills, "--method", "distil", "--epochs", "1", "--json"]
    done = run(*said, "--over", "one,two", "--set", "power=inf", "--set", "r=2")
    assert done.status == 0, done.err
    kept = Library(skills)
    made = kept.get(done.json["adapter"])
    assert (made.method, made.hyperparameters["r"], made.card.recipe["distil"]["power"]) == ("lora", 2, "inf")
    e = made.card.recipe["parc"]
    assert e.keys() == {kept.entry(name).id for name in ("one", "two")}
    assert set(made.card.lineage.parents) == {id for id in e if e[id] == max(e.values())}  # the nearest alone
    train = done.json["sizes"]["train"]
    assert f"distilled on {train} inputs, {train - 16} of them with labels" in done.json["notes"][-1]
    assert run("predict", "-l", skills, "--adapter", "things", stdin=b"a new saw\n").status == 0
    assert "say which" in run(*said).error
    assert "--begin" in run(*said, "--over", "one,two", "--begin", "one").error
    assert "output is missing" in run("adapt", path, "-l", skills, "--method", "lora").error
