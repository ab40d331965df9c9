"""Several methods trained as one adapter, against the same methods side by side; and the invertible adapter's inverse
before an output embedding that is the input's, against the coupling undone by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from jobs import TOKENS, job_of, task_of
from torch import Tensor
from writers import clean, drawn, refused, tensors_of, writer

import polytask as pt
from polytask.adapters import Adapter
from polytask.adapters.expression import mix
from polytask.adapters.store import load, save
from polytask.backbones import Backbone, Batch
from polytask.backbones.frame import unembed
from polytask.backbones.text import Asked
from polytask.composition import compose
from polytask.composition.low_rank import as_lora
from polytask.errors import UsageError
from polytask.evaluation import latency
from polytask.inference import Engine, Request
from polytask.inference.engine import WRITER
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat
from polytask.recipes.adapt import predict
from polytask.training.learner import prepare
from polytask.training.loop import Loop, train

UNIONS = ("lora+bitfit", "invertible+pfeiffer", "prefix+parallel", "full+ia3", "kasa+compacter")


def shaken(m: Any, backbone: Backbone, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, seed).items()}


def invertible(backbone: Backbone, seed: int, name: str = "invertible") -> Active:
    return Active.of(build(name), tensors_of(backbone, name, seed))


# -- a union -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("name", UNIONS)
def test_a_union_is_its_methods_side_by_side(family: str, name: str) -> None:
    """With the tensors that each has alone, the numbers of all, and gradients of nothing else."""
    backbone, batch = tiny.backbone(family), tiny.batch(3)
    union = build(name)
    apart = [build(one) for one in name.split("+")]
    own = shaken(union, backbone)
    kept = {
        one.name: {n.replace(f"/{one.name}.", "/"): t for n, t in own.items() if f"/{one.name}." in n} for one in apart
    }
    for one in apart:
        made = one.start(backbone, 0)
        assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in kept[one.name].items()}
        assert [n for n in made if one.trains(n)] == [
            n.replace(f"/{one.name}.", "/") for n in own if union.trains(n) and f"/{one.name}." in n
        ]
    beside = Plan(backbone, [Active.of(one, kept[one.name]) for one in apart])
    whole = Active.of(union, own)
    with torch.no_grad():
        expected = beside.hidden(batch, torch.ones(3, len(apart)))
        assert torch.equal(Plan(backbone, whole.parts).hidden(batch, torch.ones(3, len(apart))), expected)
    assert not torch.allclose(expected, backbone.hidden(batch), atol=1e-3)

    live = {n: t.clone().requires_grad_(union.trains(n)) for n, t in own.items()}
    parts = Active.of(union, live).parts
    Plan(backbone, parts, training=True).hidden(batch, torch.ones(3, len(parts)))[batch.mask].pow(2).sum().backward()
    assert all((t.grad is not None and bool(t.grad.any())) == union.trains(n) for n, t in live.items())
    clean(backbone)


def test_training_gives_each_method_its_own_rate() -> None:
    job = job_of(task_of(), "lora+bitfit", {"lora.r": 2}, lr=None)
    backbone = tiny.backbone("bert", tokenizer=TOKENS)
    learner = prepare(backbone, job)
    loop = Loop(backbone, [learner], lambda event: None, None, None)
    assert loop.learners[0].optimiser is not None
    rates = {id(t): group["peak"] for group in loop.learners[0].optimiser.param_groups for t in group["params"]}
    for name, t in learner.tensors.items():
        if not name.startswith("head/"):
            assert rates[id(t)] == (2e-3 if "/lora." in name else 1e-2), name
    assert job.settings.rate("lora+bitfit") == 2e-3  # of the two, where one is to stand for both


@pytest.mark.parametrize("name", ["lora+bitfit", "invertible+pfeiffer", "prefix+parallel"])
def test_a_union_is_learnt_kept_and_answers(tmp_path, name: str) -> None:
    """Read from disk and in a batch with others it answers as where it was trained."""
    backbone = tiny.backbone("bert", tokenizer=TOKENS)
    task = task_of(n=64, held=24)
    task = replace(task, name="union", validation=(), test=task.validation)
    settings = pt.Settings(epochs=6, batch=16, lr=3e-2)
    made = pt.adapt(backbone, task, name, settings=settings)
    other = pt.adapt(backbone, replace(task, name="other"), "lora", settings=settings)
    assert made.method == name
    losses = [row["loss"] for row in made.card.recipe["history"]]
    assert losses[-1] < 0.8 * losses[0]
    assert made.card.recipe["settings"]["lr"] == dict.fromkeys(name.split("+"), 3e-2)
    union = build(name)
    for n, t in union.start(backbone, 0).items():
        assert torch.equal(made.tensors[n], t) != union.trains(n), n
    save(made, tmp_path / "one")
    read = load(tmp_path / "one")
    assert read.id == made.id
    engine = Engine(backbone, adapters=[read, other])
    who = ("union", "other", mix({"union": 0.5, "other": 0.5}))
    asked = [Request(e.input, adapter=one) for e in task.test for one in who]
    mixed = engine.answer(asked)
    assert [a.output for a in mixed[::3]] == predict(backbone, made, task.test)
    assert [a.output for a in mixed[1::3]] == predict(backbone, other, task.test)
    assert len({a.probability for a in mixed[:3]}) == 3
    clean(backbone)


def test_the_latency_of_a_union_is_that_of_all_its_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny.backbone("bert", tokenizer=TOKENS)
    task = task_of(n=16, held=8)
    made = pt.adapt(backbone, replace(task, name="union"), "lora+bitfit", settings=pt.Settings(epochs=1))
    counted: set[tuple[int, tuple[float, ...]]] = set()

    def forward(plan: Plan, seats: list[Seat], *rest: Any) -> Any:
        counted.add((len(plan.adapters), tuple(seats[0].weights.tolist())))
        return original(plan, seats, *rest)

    original = passes.forward
    monkeypatch.setattr(passes, "forward", forward)
    assert latency.added(backbone, made, task.validation).rows == 8
    assert counted == {(2, (1.0, 1.0)), (0, ())}


def test_a_union_begins_where_another_ended() -> None:
    backbone = tiny.backbone("bert", tokenizer=TOKENS)
    task = task_of()
    first = pt.adapt(backbone, task, "lora+bitfit", settings=pt.Settings(epochs=1))
    [learned] = train(backbone, [replace(job_of(task, "lora+bitfit", epochs=1, lr=1e-9), begin=first)])
    for name, t in learned.tensors.items():
        if not name.startswith("head/"):
            torch.testing.assert_close(t.detach(), first.tensors[name], rtol=0, atol=1e-6)


def test_a_union_of_weights_is_exported_as_a_lora() -> None:
    """LoRA and a difference of whole weights at the same maps add up; a bias has no place in it."""
    backbone = tiny.backbone("llama")
    m = build("lora+full", {"lora.sites": "*.attn.q", "full.weights": "*.q_proj.weight"})
    adapter = made_of(backbone, "lora+full", shaken(m, backbone), m.hyperparameters())
    lora, off = as_lora(backbone, adapter, 32)
    assert off.whole < 1e-6
    batch, one = tiny.batch(2), torch.ones(2, 1)
    parts = Active.of(m, adapter.tensors).parts
    with torch.no_grad():
        expected = Plan(backbone, parts).hidden(batch, torch.ones(2, 2))
        found = Plan(backbone, [Active.of(build(lora.method, lora.hyperparameters), lora.tensors)]).hidden(batch, one)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-4, atol=1e-4)
    refused(lambda: pt.merge(backbone, [adapter, adapter], "average"), "are several methods in one")


def made_of(backbone: Backbone, method: str, tensors: dict[str, Tensor], hyper: dict[str, Any]) -> Adapter:
    from made import adapter

    return adapter("union", method=method, tensors=tensors, hyperparameters=hyper, backbone=backbone.card())


@pytest.mark.parametrize(
    ("name", "hyper", "says"),
    [
        ("lora+lora", {}, r"lora\+lora: a method twice"),
        ("lora+nothing", {}, "no method 'nothing'; the methods are aligner"),
        ("lora+", {}, "no method ''"),
        ("lora+head", {}, "head is trained alone"),
        ("lora+kadapter", {}, "kadapter is trained alone"),
        ("lora+lofit", {}, "lofit is trained alone"),
        ("lora+mtl_lora", {}, "mtl_lora is trained alone"),
        ("prompt+prefix", {}, "the virtual tokens of prompt and prefix would stand in one place"),
        ("lora+bitfit", {"r": 4}, "has no hyperparameter 'r': say whose it is, as in lora.r"),
        ("lora+bitfit", {"ia3.sites": "x"}, "has no hyperparameter 'ia3.sites'"),
        ("lora+bitfit", {"lora.rank": 4}, "lora has no hyperparameter 'rank'"),
    ],
)
def test_what_is_no_union_is_refused(name: str, hyper: dict[str, Any], says: str) -> None:
    refused(lambda: build(name, hyper), says, UsageError)


def test_a_union_says_what_it_was_made_with() -> None:
    m = build("lora+pfeiffer", {"lora.r": "4", "pfeiffer.reduction": 8})
    said = m.hyperparameters()
    assert (said["lora.r"], said["pfeiffer.reduction"]) == (4, 8)
    assert build("lora+pfeiffer", said) == m
    assert build("lora+pfeiffer") != m


# -- the inverse before an output embedding ----------------------------------------------------------------------------


def places(batch: Batch) -> Tensor:
    return batch.mask.nonzero()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "t5", "bart"])
def test_what_is_read_through_the_coupling_is_said_through_its_inverse(family: str) -> None:
    """Logits are those of hidden states whose coupling has been undone, and gradients come through both."""
    backbone = writer(family, tie_word_embeddings=True)
    assert backbone.tied
    at = "dec.embed" if backbone.kind == "encoder-decoder" else "embed"
    batch = tiny.batch(3)
    if backbone.kind == "encoder-decoder":
        batch = replace(batch, written=batch.ids)
    adapter = invertible(backbone, 0)
    live = {site: {n: t.clone().requires_grad_() for n, t in p.items()} for site, p in adapter.at.items()}
    plan = Plan(backbone, [replace(adapter, at=live)], training=True)
    z = plan.logits(batch, torch.ones(3, 1), places(batch))
    hidden = plan.hidden(batch, torch.ones(3, 1))[batch.mask]
    by_hand = unembed(backbone, adapter.method.inverse(live[at], hidden))  # type: ignore[attr-defined]
    torch.testing.assert_close(z, by_hand, rtol=1e-5, atol=1e-5)
    assert (z - unembed(backbone, hidden)).abs().max() > 1e-2
    parameters = [*live[at].values()]
    y = z.argmin(-1)
    for a, b in zip(
        torch.autograd.grad(torch.nn.functional.cross_entropy(z, y), parameters),
        torch.autograd.grad(torch.nn.functional.cross_entropy(by_hand, y), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    clean(backbone)


def test_an_output_embedding_of_its_own_stays_as_it_is() -> None:
    backbone = writer("llama", tie_word_embeddings=False)
    assert not backbone.tied
    batch, plan = tiny.batch(3), Plan(backbone, [invertible(backbone, 0)])
    with torch.no_grad():
        hidden = plan.hidden(batch, torch.ones(3, 1))[batch.mask]
        assert torch.equal(plan.logits(batch, torch.ones(3, 1), places(batch)), unembed(backbone, hidden))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_write_through_the_inverse_of_their_own(family: str, beams: int) -> None:
    """Two invertible adapters, one with another beside it, a mixture and the backbone in one batch: each row what it
    writes alone, with the probability that a whole pass gives it."""
    backbone = writer(family, tie_word_embeddings=True)
    adapters = [invertible(backbone, 0), invertible(backbone, 1), invertible(backbone, 2, "bottleneck")]
    plan, draw = Plan(backbone, adapters), torch.Generator().manual_seed(0)
    who = [[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1], [0.5, 0.5, 0], [0, 0, 1]]
    prompts = [
        Prompt(drawn(3 + 2 * i, draw), torch.tensor(who[i % 6], dtype=torch.float), Sampling(max_tokens=8, beams=beams))
        for i in range(9)
    ]
    prompts += [replace(prompts[k], ids=drawn(4, draw)) for k in (0, 0, 1)]  # which may share a row with their like
    together = generate(plan, prompts, places=30)
    for prompt, found in zip(prompts, together, strict=True):
        [alone] = generate(plan, [prompt])
        assert found.tokens == alone.tokens
        asked = passes.answered(backbone, [Asked([*prompt.ids], [*found.tokens])])
        [log_p] = passes.logprobs(plan, [Seat(WRITER, {}, prompt.weights)], asked, [0])
        assert found.logprob == pytest.approx(float(log_p.sum()), abs=1e-3)
    assert len({found.tokens for found in together}) > 5
    clean(backbone)


def test_rows_that_change_weights_and_rows_that_do_not_are_said_apart() -> None:
    """They take passes of their own, each with the inverse of its rows."""
    backbone, batch = writer("gpt2"), tiny.batch(4)
    plan = Plan(backbone, [invertible(backbone, 0), invertible(backbone, 1), invertible(backbone, 2, "full")])
    w = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 1]])
    with torch.no_grad():
        found = plan.logits(batch, w, places(batch))
        for row in range(4):
            alone = plan.logits(
                batch.rows(torch.tensor([row])), w[row : row + 1], places(batch.rows(torch.tensor([row])))
            )
            torch.testing.assert_close(found[places(batch)[:, 0] == row], alone, rtol=1e-4, atol=1e-4)


def test_a_task_above_a_language_keeps_the_language_s_inverse() -> None:
    """Both have bottlenecks at the same sites, so that they are stacked there; the embeddings are the language's."""
    backbone, batch = writer("gpt2"), tiny.batch(3)
    union = build("invertible+bottleneck")
    language = Active.of(union, shaken(union, backbone, 1)).parts
    task = invertible(backbone, 2, "bottleneck")
    terms = compose.stack([tuple((1.0, part) for part in language), ((1.0, task),)])
    assert sorted(active.method.name for _, active in terms) == ["invertible", "stack"]
    plan = Plan(backbone, [active for _, active in terms])
    w = torch.ones(3, len(terms))
    with torch.no_grad():
        found = plan.logits(batch, w, places(batch))
        undone = language[0].method.inverse(language[0].at["embed"], plan.hidden(batch, w)[batch.mask])  # type: ignore
        torch.testing.assert_close(found, unembed(backbone, undone), rtol=1e-5, atol=1e-5)
