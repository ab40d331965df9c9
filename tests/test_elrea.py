"""ELREA: weights by hand, gradients against one backward pass each, and what is made, kept and asked."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import FRUIT, TOOLS, run
from jobs import TOKENS, task_of
from torch import Tensor
from torch.nn import functional as F
from writers import clean, refused, writer

import polytask as pt
from polytask.adapters import Adapter
from polytask.adapters.expression import Mix, Name
from polytask.backbones import Backbone
from polytask.composition import elrea as theirs
from polytask.composition.elrea import Elrea, centroids, clusters, conflict, gradients, pooled, weights
from polytask.errors import PolytaskError
from polytask.inference import Engine, Request
from polytask.inference.requests import parted
from polytask.library import Library
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat
from polytask.recipes.elrea import Experts, elrea
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Task
from polytask.training import Settings

QUICK = Settings(epochs=2, batch=16, lr=5e-3)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_weights_are_a_softmax_of_standardised_cosines() -> None:
    """δ = [1, 0.5] / √1.25 has the cosines 0.8944, 0.4472 and −0.8944, with mean 0.1491 and deviation 0.7601: 0.9806,
    0.3922 and −1.3728, of which the softmax is 0.6060, 0.3365 and 0.0576."""
    three = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = weights(torch.tensor([[1.0, 0.5], [0.0, 0.0]]), three)
    assert found[0].tolist() == pytest.approx([0.6060, 0.3365, 0.0576], abs=1e-4)
    assert found[1].tolist() == pytest.approx([1 / 3] * 3)  # of nothing all cosines are 0
    assert weights(torch.tensor([[1.0, 0.5]]), three[:1]).tolist() == [[1.0]]


def test_logits_are_averaged_and_not_probabilities() -> None:
    """(1 · [2, 0] + ¾ · [0, 4] + ¼ · [4, 0]) / 2 = [1.5, 1.5]."""
    z = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([4.0, 0.0])]
    assert pooled(z, [1.0, 0.75, 0.25]).tolist() == [1.5, 1.5]


def test_conflict_is_the_mean_cosine_of_pairs() -> None:
    """Rows 0 and 1 at 60°, row 2 opposite to row 0: within {0, 1} ½; between, −1 and −½."""
    δ = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [-1.0, 0.0]])
    assert conflict(δ, torch.tensor([0, 0, 1])) == pytest.approx((0.5, -0.75))
    assert conflict(δ, torch.tensor([0, 0, 0])) == (pytest.approx(-1 / 3), None)
    assert conflict(δ, torch.tensor([0, 1, 2])) == (None, pytest.approx(-1 / 3))


def test_clusters_are_of_one_direction() -> None:
    draw = torch.Generator().manual_seed(0)
    axes = torch.eye(8)[:3].repeat(5, 1)
    δ = F.normalize(axes + 0.1 * torch.randn(15, 8, generator=draw), dim=-1)
    which = clusters(δ, 3)
    assert [*which.view(5, 3).eq(which[:3]).all(0).tolist(), len(which.unique())] == [True, True, True, 3]
    assert torch.allclose(centroids(δ, which)[which[0]], F.normalize(δ[::3].sum(0), dim=0))
    refused(lambda: clusters(δ, 16), "16 clusters of 15 examples")


# -- gradients ---------------------------------------------------------------------------------------------------------


@cache
def encoder() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


@cache
def decoder() -> Backbone:
    return writer("llama")


@pytest.fixture(autouse=True)
def untouched() -> Any:
    yield
    assert torch.is_grad_enabled()
    for backbone in (encoder(), decoder()):
        clean(backbone)


@cache
def task(kind: str = "classification") -> Task:
    made = task_of(kind, n=40, length=6, held=12)
    return replace(made, test=made.validation)


@cache
def made(kind: str = "classification") -> Experts:
    return elrea(encoder(), task(kind), hyperparameters={"clusters": 3, "features": 64, "r": 2}, settings=QUICK)


IN_TEXT = {"write": Reading(in_text="yes", decide="write"), "likelihood": Reading(in_text="yes", decide="likelihood")}
SAID = Task(
    "said",
    "classification",
    tuple(
        Example(str(i), f"{who} {does}", does)
        for i, (who, does) in enumerate([("cat", "sat"), ("two dogs", "run")] * 8)
    ),
    test=(Example("t", "the cat", "sat"), Example("u", "dogs at noon", "run")),
    labels=(pt.tasks.task.Label("sat"), pt.tasks.task.Label("run")),
    metric="accuracy",
)


@cache
def told(decide: str) -> Experts:
    hyper = {"clusters": 2, "features": 64, "r": 2}
    return elrea(decoder(), SAID, hyperparameters=hyper, settings=QUICK, reading=IN_TEXT[decide])


def alone(backbone: Backbone, root: Adapter, example: Example, features: int, seed: int) -> Tensor:
    """δ of one example by one backward pass through the LoRA itself, and P written out."""
    its = build(root.method, root.hyperparameters)
    θ = {n: t.clone().requires_grad_() for n, t in sorted(root.tensors.items()) if not n.startswith("head/")}
    head = {n.removeprefix("head/"): t for n, t in root.tensors.items() if n.startswith("head/")}
    assert root.head is not None
    plan = Plan(backbone, [Active.of(its, θ)])
    if root.head.text:
        [asked] = pt.backbones.text.encode(
            backbone, root.head, [pt.backbones.text.ask(root.head, replace(example, output=None))]
        )
        batch = backbone.collate([asked.ids])
        at = torch.tensor([[0, t] for t in range(len(asked.ids) - 1)])
        z = plan.logits(batch, torch.ones(1, 1), at)
        L = -z.log_softmax(-1)[range(len(at)), asked.ids[1:]].mean()
    else:
        units = passes.encode(backbone, root.head, [example])
        [(_, _, z)] = passes.forward(plan, [Seat(root.head, head, torch.ones(1))], units, [0])
        r = torch.randn(z.shape[1], generator=torch.Generator().manual_seed(seed))
        if root.head.kind in ("classification", "tagging"):
            r = r - r.mean()
        L = (z @ r).sum()
    g = torch.cat([s.flatten() for s in torch.autograd.grad(L, [*θ.values()])])
    rows, signs = theirs._projection(len(g), features, seed)
    P = torch.zeros(features, len(g)).index_put_((rows, torch.arange(len(g))), signs)
    return F.normalize(P @ g, dim=0)


@pytest.mark.parametrize("kind", ["classification", "tagging", "multilabel", "regression", "similarity"])
def test_gradients_are_those_of_one_backward_pass_each(kind: str) -> None:
    root, examples = made(kind).support[0], task(kind).train[:9]
    δ = gradients(encoder(), root, examples, 32, 5)
    for row, example in zip(δ, examples, strict=True):
        assert torch.allclose(row, alone(encoder(), root, example, 32, 5), atol=1e-5)
    blind = [replace(e, output=None) for e in examples]
    assert torch.equal(gradients(encoder(), root, blind, 32, 5), δ)


@pytest.mark.parametrize("decide", ["write", "likelihood"])
def test_a_decoder_is_asked_for_its_prompt(decide: str) -> None:
    root = told(decide).support[0]
    δ = gradients(decoder(), root, SAID.train[:4], 32, 5)
    for row, example in zip(δ, SAID.train[:4], strict=True):
        assert torch.allclose(row, alone(decoder(), root, example, 32, 5), atol=1e-4)


def test_an_encoder_decoder_has_no_loss_for_its_prompt() -> None:
    refused(
        lambda: elrea(writer("t5"), SAID, hyperparameters={"clusters": 2}, settings=QUICK, reading=IN_TEXT["write"]),
        "the loss of a prompt's tokens, which tiny-t5 does not predict",
    )


def test_the_projection_keeps_cosines() -> None:
    """1,000 pairs at 60° of 4,000 numbers, hashed to 2,000: the cosine is ½ in the mean, within about 1 / √2000."""
    draw = torch.Generator().manual_seed(1)
    a, b = F.normalize(torch.randn(2, 1000, 4000, generator=draw), dim=-1)
    c = F.normalize(0.5 * a + 0.75**0.5 * F.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1), dim=-1)
    rows, signs = theirs._projection(4000, 2000, 0)
    pa, pc = (torch.zeros(1000, 2000).index_add_(1, rows, signs * t) for t in (a, c))
    cos = F.cosine_similarity(pa, pc)
    assert float(cos.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(cos.std()) < 0.03


# -- what is made ------------------------------------------------------------------------------------------------------


def test_experts_begin_with_the_base_and_its_head_and_see_their_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of nearly 0 they are the base. At another, an expert is what its cluster alone makes of it, whatever
    is learnt beside it."""
    given = {"clusters": 3, "features": 64, "r": 2}
    still = elrea(encoder(), task(), hyperparameters=given, settings=replace(QUICK, lr=1e-12, head_lr=1e-12))
    root, *experts = still.support
    for expert in experts:
        assert expert.tensors.keys() == root.tensors.keys()
        for name, tensor in expert.tensors.items():
            assert torch.allclose(tensor, root.tensors[name], atol=1e-8), name

    first, *learnt = made().support
    assert sum(made().sizes) == len(task().train)
    assert len({one.id for one in made().support}) == 4
    assert all(one.card.lineage.parents == (first.id,) for one in learnt)
    assert [one.name for one in made().support] == [f"{task().name}.{n}" for n in ("base", "1", "2", "3")]
    assert not any(n.startswith("task/") for one in made().support for n in one.tensors)
    δ = gradients(encoder(), first, task().train, 64, 0)
    which = torch.unique(clusters(δ, 3), return_inverse=True)[1]
    assert tuple(torch.bincount(which).tolist()) == made().sizes
    assert (made().within, made().between) == pytest.approx(conflict(δ, which))
    assert torch.allclose(made().adapter.tensors["task/clusters"], centroids(δ, which))

    # Others' labels do not matter to the expert of cluster 0.
    def other(δ: Tensor, count: int, seed: int) -> Tensor:
        return torch.where(which == 0, 0, 1 + torch.arange(len(which)) % 2)

    again = elrea(encoder(), task(), hyperparameters=given, settings=QUICK, partition=other)
    for name, tensor in again.support[1].tensors.items():
        assert torch.allclose(tensor, learnt[0].tensors[name], atol=1e-5), name
    assert any(not torch.allclose(t, learnt[1].tensors[n], atol=1e-4) for n, t in again.support[2].tensors.items())


def asked(found: Experts, backbone: Backbone, examples: list[Example]) -> Tensor:
    """w of each example."""
    δ = gradients(backbone, found.support[0], examples, 64, 0)
    return weights(δ, found.adapter.tensors["task/clusters"])


@pytest.mark.parametrize("kind", ["classification", "tagging", "multilabel", "similarity"])
def test_an_input_is_answered_by_its_own_weights(kind: str) -> None:
    found, examples = made(kind), [*task(kind).test[:6]]
    engine = Engine(encoder(), source=found, adapters=[found.adapter])
    requests = [Request(e.input, e.pair, found.adapter.id) for e in examples]
    answers = engine.answer(requests)
    head = found.adapter.head
    assert head is not None
    for e, request, answer, w in zip(examples, requests, answers, asked(found, encoder(), examples), strict=True):
        units = passes.encode(encoder(), head, [e])
        z = []
        for one in found.support:
            plan = Plan(encoder(), [Active.of(build(one.method, one.hyperparameters), one.tensors)])
            params = {n.removeprefix("head/"): t for n, t in one.tensors.items() if n.startswith("head/")}
            z += passes.logits(plan, [Seat(head, params, torch.ones(1))], units, [0])
        whole = (z[0] + sum(w_c * z_c for w_c, z_c in zip(w, z[1:], strict=True))) / 2
        output, sure = passes.decoded(head, units[0], whole)
        assert answer.output == (pytest.approx(output, abs=1e-4) if isinstance(output, float) else output)
        assert answer.probability == (None if sure is None else pytest.approx(sure, abs=1e-4))
        assert (answer.adapter, answer.name) == (found.adapter.id, found.adapter.name)
        assert len(answer.parts) == 4
        [single] = engine.answer([request])
        assert single.output == (pytest.approx(answer.output, abs=1e-4) if isinstance(output, float) else output)


def test_options_are_weighed_by_the_mean_of_logs() -> None:
    found, example = told("likelihood"), SAID.test[0]
    engine = Engine(decoder(), source=found, adapters=[found.adapter])
    [answer] = engine.answer([Request(example.input, adapter=found.adapter.id)])
    [w] = asked(found, decoder(), [example])
    head = found.adapter.head
    assert head is not None
    assert head.text is not None
    each = [engine.weigh([Request(example.input, adapter=one.id)])[0] for one in found.support]
    scores = [one.best(head.text.normalise).scores for one in each]
    whole = pooled([one for one in scores if one is not None], [1.0, *w.tolist()])
    assert answer.probability == pytest.approx(float(whole.softmax(-1).max()), abs=1e-4)
    assert answer.output == SAID.targets[int(whole.argmax())]


def test_written_answers_are_of_a_mixture() -> None:
    found, examples = told("write"), [*SAID.test]
    engine = Engine(decoder(), source=found, adapters=[found.adapter])
    answers = engine.answer([Request(e.input, adapter=found.adapter.id) for e in examples])
    root, *experts = found.support
    for e, answer, w in zip(examples, answers, asked(found, decoder(), examples), strict=True):
        terms = [(0.5, Name(root.id)), *((float(w_c) / 2, Name(one.id)) for w_c, one in zip(w, experts, strict=True))]
        [right] = engine.answer([Request(e.input, adapter=Mix(tuple(terms), root.id))])
        assert (answer.output, answer.name) == (right.output, found.adapter.name)
        assert answer.probability == pytest.approx(right.probability, rel=1e-3)


def test_it_is_routed_to_and_cannot_be_part_of_something_else() -> None:
    found = made()
    engine = Engine(encoder(), source=found, adapters=[found.adapter, *found.support])
    assert engine.known.ids == (found.adapter.id,)
    text = task().test[0].input
    from polytask.composition.routing.nearest_task import NearestTask

    [routed] = engine.answer([parted(Request(text))], router=NearestTask(threshold=float("inf")))
    [named] = engine.answer([Request(text, adapter=found.adapter.id)])
    assert (routed.output, routed.adapter) == (named.output, found.adapter.id)
    assert routed.probability == pytest.approx(named.probability)
    mixed = 0.5 * Name(found.adapter.id) + 0.5 * Name(found.support[0].id)
    refused(lambda: engine.answer([Request(text, adapter=mixed)]), "gives answers, so it cannot be part")
    torn = replace(found.adapter, tensors={n: t for n, t in found.adapter.tensors.items() if n != "task/clusters"})
    refused(
        lambda: Engine(encoder(), found, [torn]).answer([Request(text, adapter=torn.id)]),
        "its centroids are damaged; train it anew",
        PolytaskError,
    )


def test_wrong_use_is_said_before_training() -> None:
    refused(lambda: elrea(encoder(), task(), hyperparameters={"clusters": 41}), "41 clusters of 40 examples")
    refused(lambda: elrea(encoder(), task(), hyperparameters={"clusters": 0}), "at least 1")
    refused(lambda: elrea(encoder(), task(), hyperparameters={"ranks": 2}), "lora has no hyperparameter 'ranks'")
    refused(lambda: pt.adapt(encoder(), task(), "elrea"), "joins adapters")


def test_one_cluster_and_clusters_that_are_empty() -> None:
    given = {"clusters": 1, "features": 16, "r": 1}
    one = elrea(encoder(), task(), hyperparameters=given, settings=QUICK)
    assert (one.sizes, one.between, len(one.support)) == ((40,), None, 2)
    two = elrea(
        encoder(),
        task(),
        hyperparameters=given | {"clusters": 3},
        settings=QUICK,
        partition=lambda δ, count, seed: torch.tensor([2, 0] * 20),
    )
    assert two.sizes == (20, 20)
    assert Elrea.of(two.adapter.hyperparameters).clusters == 2


def test_training_goes_on_from_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"clusters": 3, "features": 64, "r": 2}
    kept = elrea(encoder(), task(), hyperparameters=given, settings=QUICK, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "experts"]
    from polytask.training.loop import Loop

    monkeypatch.setattr(Loop, "_step", lambda *_: pytest.fail("trained again"))
    again = elrea(encoder(), task(), hyperparameters=given, settings=QUICK, folder=tmp_path)
    assert again.adapter.id == kept.adapter.id


WORDS = {"fruit": FRUIT[:4], "tool": TOOLS[:4]}


def test_on_the_command_line(tmp_path: Path) -> None:
    table, library = tmp_path / "things.csv", tmp_path / "skills"
    rows = [(f"{said} {w}", about) for said in ("I bought a", "where is the") for about in WORDS for w in WORDS[about]]
    table.write_text("text,about\n" + "".join(f"{text},{label}\n" for text, label in rows))
    how = ["adapt", table, "-l", library, "--method", "elrea"]
    quick = ["--set", "clusters=2", "--set", "features=128", "--set", "r=1", "--epochs", "1"]
    assert "no hyperparameter 'k'" in run(*how, "--set", "k=2").error
    done = run(*how, *quick, "--json")
    assert done.status == 0, done.err
    assert done.json["method"] == "elrea"
    assert any(note.startswith("2 clusters of ") for note in done.json["notes"])
    assert any(note.startswith("the base LoRA alone: ") for note in done.json["notes"])
    names = {entry.name for entry in Library(library).list()}
    assert names == {"things", "things.base", "things.1", "things.2"}
    lines = b"I bought a melon\nwhere is the drill"
    routed = run("predict", "-l", library, "--router", "nearest-task", "--set", "threshold=inf", "--json", stdin=lines)
    asked = run("predict", "-l", library, "-a", "things", "--json", stdin=lines)
    for one, other in zip(routed.lines, asked.lines, strict=True):
        assert (one["name"], one["output"]) == (other["name"], other["output"]) == ("things", one["output"])
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
    assert "things" in run("library", "rm", "things.1", "-l", library).error
