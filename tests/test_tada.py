"""Another way to write: what is aligned with what, what is kept, and adapters of tasks that stand on it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from commands import FRUIT, TOOLS, run, write_table
from jobs import task_of
from made import one_line

import polytask as pt
import polytask.backbones
from polytask.adapters import Adapter, HeadCard
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request
from polytask.library import Library
from polytask.methods import Method, build, passes
from polytask.methods.lifting import Active
from polytask.recipes import tada as module
from polytask.recipes.tada import Critic, tada
from polytask.tasks import Example, Task
from polytask.training import Event

UPPER = str.maketrans("abcdefgh", "ABCDEFGH")
TOKENS = tiny.words(*"abcdefgh", *"ABCDEFGH")


@cache
def base(family: str = "bert") -> Backbone:
    return tiny.backbone(family, tokenizer=TOKENS)


def loud(n: int = 48, held: int = 16) -> Task:
    """Texts in capitals, and the same as they are usually written."""
    own = task_of(n=n, held=held)
    pairs = [Example(e.id, e.text.translate(UPPER), e.text) for e in (*own.train, *own.validation)]
    return Task("loud", "generation", tuple(pairs[:n]), tuple(pairs[n:]), tuple(pairs[n:]))


@cache
def variety() -> Adapter:
    return tada(base(), loud(), hyperparameters={"reduction": 2}, settings=pt.Settings(epochs=20, lr=1e-2))


def pooled(texts: list[str], adapter: Adapter | None = None) -> torch.Tensor:
    """The mean of each text's states, by the backbone alone or with an adapter."""
    plain = HeadCard(kind="classification")
    terms = () if adapter is None else ((1.0, Active.of(method_of(adapter), adapter.tensors)),)
    units = passes.encode(base(), plain, [Example("", text) for text in texts])
    return torch.stack(passes.features(base(), plain, units, terms=terms))


def method_of(adapter: Adapter) -> Method:
    return build(adapter.method, adapter.hyperparameters)


def test_it_closes_most_of_the_distance_and_says_how_much():
    found, held = variety(), loud().test
    z = pooled([str(e.output) for e in held])
    h0, h = pooled([e.text for e in held]), pooled([e.text for e in held], found)
    share = 1 - float((z - h).square().sum() / (z - h0).square().sum())
    assert found.card.scores["test"].value == pytest.approx(share, rel=1e-4)
    assert share > 0.3
    assert found.card.scores["test"].low <= share <= found.card.scores["test"].high
    assert (found.method, found.head, found.above) == ("pfeiffer", None, ())
    assert not any(n.startswith(("head/", "task/")) for n in found.tensors)
    history = [row["score"] for row in found.card.recipe["history"]]
    assert found.card.scores["validation"].value == pytest.approx(max(history), rel=1e-4)


def test_pairs_that_are_the_same_leave_nothing_to_learn():
    """An adapter that begins at the backbone is aligned with it: L = 0 in the first step, and nothing moves."""
    losses: list[float] = []
    same = replace(loud(), train=tuple(replace(e, output=e.input) for e in loud().train))
    settings = pt.Settings(epochs=1, batch=16, weight_decay=0.0)
    made = tada(base(), same, settings=settings, on_event=lambda e: losses.append(e.loss) if e.kind == "step" else None)
    assert losses == pytest.approx([0.0] * 3, abs=1e-6)
    first = method_of(made).start(base(), 0)
    assert all(torch.allclose(t, first[n], atol=1e-6) for n, t in made.tensors.items() if n.endswith("/U"))


def test_the_first_loss_by_hand():
    """The mean over all pairs of Σ (z − h₀)² over features."""
    events: list[Event] = []
    tada(base(), loud(), settings=pt.Settings(epochs=1, batch=64), on_event=events.append)
    z, h = pooled([str(e.output) for e in loud().train]), pooled([e.text for e in loud().train])
    assert events[0].loss == pytest.approx(float((z - h).square().sum(1).mean()), rel=1e-4)


def test_a_task_adapter_that_never_saw_the_variety_stands_on_it():
    task = task_of(n=96, length=6, held=64, metric="accuracy")
    own = pt.adapt(base(), task, "lora", settings=pt.Settings(epochs=12, lr=1e-2))
    texts = [(e.text.translate(UPPER), e.output) for e in task.validation]
    engine = Engine(base(), adapters=[variety(), own])
    right = []
    for who in (own.id, pt.stack(variety().id, own.id)):
        answers = engine.answer([Request(x, adapter=who) for x, _ in texts])
        right.append(sum(a.output == y for a, (_, y) in zip(answers, texts, strict=True)))
    before, after = right
    assert after > before
    assert own.card.scores["validation"].value * 64 > before
    assert engine.answer([Request("A E F")])[0].adapter in (own.id, None)  # nothing is routed to it
    above = pt.adapt(base(), task, "lora", above=[variety()], settings=pt.Settings(epochs=1))
    assert above.above == (variety().id,)


def test_critic_reads_real_tokens_alone():
    critic = Critic(24).eval()
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 24, generator=draw)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    other = states.clone()
    other[1, 3:] = 9.0
    torch.testing.assert_close(critic(states, mask), critic(other, mask))
    other[1, 1] = 9.0
    assert critic(states, mask)[1] != critic(other, mask)[1]


def test_an_adapter_with_a_critic_is_another_and_its_critic_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    made: list[Critic] = []
    real = module.Critic

    def noted(d: int) -> Critic:
        made.append(real(d))
        made[-1].first = [p.detach().clone() for p in made[-1].parameters()]
        return made[-1]

    monkeypatch.setattr(module, "Critic", noted)
    settings = pt.Settings(epochs=2, lr=1e-3)
    with_, without = (tada(base(), loud(), hyperparameters={"critic": γ}, settings=settings) for γ in (1.0, 0.0))
    assert with_.tensors.keys() == without.tensors.keys()
    assert with_.id != without.id
    moved = [any(not torch.equal(a, b) for a, b in zip(one.first, one.parameters(), strict=True)) for one in made]
    assert moved == [True, False]


def test_the_same_seed_gives_the_same_and_a_decoder_its_last_token():
    settings = pt.Settings(epochs=2, seed=3)
    one, other = (tada(base(), loud(), hyperparameters={"adapter": "lora", "r": 2}, settings=settings) for _ in "ab")
    assert one.id == other.id
    assert (one.method, one.hyperparameters["r"]) == ("lora", 2)
    wide = tada(base("llama"), loud(), settings=pt.Settings(epochs=3, lr=1e-2))
    assert wide.card.scores["test"].value > 0


@pytest.mark.parametrize(
    ("task", "hyper", "reading", "said"),
    [
        (task_of("regression", 8), {}, {}, "is no pair of texts"),
        (replace(loud(), train=()), {}, {}, "no training pairs"),
        (task_of(n=40), {}, {}, "40 outputs are 4 different ones, such as 'a': these are labels"),
        (loud(), {"adapter": "prompt"}, {}, "acts at sites is needed"),
        (loud(), {"adapter": "full"}, {}, "acts at sites is needed"),
        (loud(), {"adapter": "fusion"}, {}, "stands by itself"),
        (loud(), {"critic": -1}, {}, "0 or more"),
        (loud(), {"rank": 2}, {}, "pfeiffer has no hyperparameter 'rank'"),
        (loud(), {}, {"pool": "labels"}, "not by labels"),
    ],
)
def test_what_cannot_be_aligned(task, hyper, reading, said):
    with pytest.raises((UsageError, PolytaskError), match=said) as caught:
        tada(base(), task, hyperparameters=hyper, reading=pt.Reading(**reading))
    one_line(caught.value)


def test_tada_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polytask.backbones, "load", cache(polytask.backbones.load))
    skills = tmp_path / "skills"
    pairs = tmp_path / "pairs.csv"
    rows = [f"da {word} be mine,the {word} is mine\n" for word in FRUIT + TOOLS]
    pairs.write_text("dialect,standard\n" + "".join(rows), encoding="utf-8")
    said = ["adapt", pairs, "-l", skills, "--method", "tada", "--epochs", "2"]
    done = run(*said, "-i", "dialect", "-o", "standard", "--set", "reduction=32", "--json")
    assert done.status == 0, done.err
    assert (done.json["metric"], done.json["base"], done.json["kind"]) == ("distance closed", "minilm", "generation")
    assert Library(skills).get("pairs").head is None
    table = write_table(tmp_path / "things.csv")
    assert run("adapt", table, "-l", skills, "-m", "lora", "--epochs", "1", "-q").status == 0
    asked = run("predict", "-l", skills, "--adapter", "stack(pairs, things)", "--json", stdin=b"da saw be mine\n")
    assert asked.json["output"] in {"fruit", "tool"}
    assert run("adapt", table, "-l", skills, "-m", "lora", "--epochs", "1", "--above", "pairs", "-q").status == 0
    shown = run(*said, "--name", "again", "--lr", "0.002")
    assert "stack(again, TASK)" in shown.out
    assert "distance closed" in shown.err
    assert "--over" in run(*said, "--over", "things").error
