"""FLARE: the equation by hand, a parallel text in whole models, and a task with translations from end to end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run, write_pairs
from peft import LoraConfig, get_peft_model
from torch import Tensor
from writers import writer

import polytask as pt
from polytask.adapters import HeadCard
from polytask.backbones import Backbone, Batch, heads
from polytask.errors import UsageError
from polytask.inference import Engine, Request
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat
from polytask.recipes.compare import schedule
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Label, Task
from polytask.training import Job, Settings, loop, train

TOKENS = tiny.words(*"abcdefgh", *"ABCDEFGH")


@pytest.mark.parametrize(("phi", "expected"), [("add_relu", [2.5, 2.0]), ("add", [2.0, 1.0]), ("mul", [0.0, -2.0])])
def test_by_hand(phi: str, expected: list[float]) -> None:
    """s = [1, −1, .5] and t = [−.5, 2, 1] with B = [1 0 1; 0 1 0]: relu(s) + relu(t) = [1, 2, 1.5], s + t = [.5, 1,
    1.5], s ∘ t = [−.5, −2, .5]; and B t = [.5, 2] without s."""
    m = build("flare", {"r": 3, "alpha": 3, "phi": phi})
    p = {"A": torch.eye(3), "B": torch.tensor([[1.0, 0, 1], [0, 1, 0]])}
    x, x_S, y = torch.tensor([[-0.5, 2.0, 1.0]]), torch.tensor([[1.0, -1.0, 0.5]]), torch.zeros(1, 2)
    assert m.delta(p, x, y, x_S).tolist() == [expected]  # type: ignore[call-arg]
    assert m.delta(p, x, y).tolist() == [[0.5, 2.0]]


def shaken(backbone: Backbone, seed: int = 0, **hyper: Any) -> tuple[Any, dict[str, Tensor]]:
    m, draw = build("flare", hyper), torch.Generator().manual_seed(seed)
    return m, {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, 0).items()}


def test_without_a_parallel_text_it_is_pefts_lora() -> None:
    backbone, batch = tiny.backbone("bert"), tiny.batch(3)
    m, tensors = shaken(backbone)
    model = get_peft_model(
        tiny.make("bert", attn_implementation="eager"),
        LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]),
    )
    with torch.no_grad():
        for i in range(3):
            for letter, module in (("q", "query"), ("v", "value")):
                theirs: Any = model.get_submodule(f"base_model.model.encoder.layer.{i}.attention.self.{module}")
                theirs.lora_A.default.weight.copy_(tensors[f"{i}.attn.{letter}/A"])
                theirs.lora_B.default.weight.copy_(tensors[f"{i}.attn.{letter}/B"])
        expected = model(batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        found = Plan(backbone, [Active.of(m, tensors)]).hidden(batch)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-5, atol=1e-5)


def step_by_step(backbone: Backbone, ids: list[int], change: Callable[[str, Tensor, bool], Tensor | None]) -> Tensor:
    """A pass of the model over one text [T, d] that adds change(site, x, first) to what maps put out; `first` is False
    where a map runs once more, on relative positions."""
    seen: set[str] = set()

    def hook(name: str, _module: Any, args: Any, y: Tensor) -> Tensor:
        part = backbone.sites[name].part
        Δ = change(name, args[0], name not in seen)
        seen.add(name)
        if Δ is None:
            return y
        return y + Δ if part is None else part.put(y, part.take(y) + Δ)

    names = [name for name in backbone.reader_sites if name.endswith((".attn.q", ".attn.v"))]
    handles = [
        backbone.model.get_submodule(backbone.sites[n].path).register_forward_hook(partial(hook, n)) for n in names
    ]
    with torch.no_grad():
        out = backbone.reader(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
    for handle in handles:
        handle.remove()
    return out.last_hidden_state[0]


def expected_states(backbone: Backbone, at: Any, ids: list[int], other: list[int]) -> Tensor:
    """What each map reads of the parallel text is written down in one pass, and added as the equation has it in the
    next."""
    read: dict[str, Tensor] = {}

    def write_down(name: str, x: Tensor, first: bool) -> None:
        if first:
            read[name] = x

    def fused(name: str, x: Tensor, first: bool) -> Tensor:
        A, B = at[name]["A"], at[name]["B"]
        h = x @ A.T
        if first and name in read:
            s = torch.zeros_like(h)
            n = min(s.shape[1], read[name].shape[1])
            s[:, :n] = (read[name] @ A.T)[:, :n]
            h = s.relu() + h.relu()
        return 2.0 * h @ B.T

    if other:
        step_by_step(backbone, other, write_down)
    return step_by_step(backbone, ids, fused)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta-v2", "t5"])
def test_the_parallel_text_is_what_the_frozen_model_reads_there(family: str) -> None:
    """One text at a time and without padding, by hooks of the test's own."""
    backbone = tiny.backbone(family)
    m, tensors = shaken(backbone)
    one = Active.of(m, tensors)
    texts, parallel = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]], [[20, 21, 22], [23, 24, 25, 26, 27, 28], []]
    batch = replace(backbone.collate(texts), beside=backbone.collate(parallel))
    with torch.no_grad():
        found = Plan(backbone, [one]).hidden(batch)
        lora = Plan(backbone, [one]).hidden(replace(batch, beside=None))
    for i, (ids, other) in enumerate(zip(texts, parallel, strict=True)):
        expected = expected_states(backbone, one.at, ids, other)
        torch.testing.assert_close(found[i, : len(ids)], expected, rtol=1e-5, atol=2e-5)
    assert (found - lora)[:2][batch.mask[:2]].abs().max() > 1e-2
    torch.testing.assert_close(found[2, :4], lora[2, :4])


def test_no_gradient_and_no_hook_of_the_parallel_pass_is_left() -> None:
    backbone = tiny.backbone("bert")
    m, tensors = shaken(backbone)
    batch = replace(tiny.batch(3), beside=tiny.batch(3, 5, seed=1))
    for t in tensors.values():
        t.requires_grad_()
    Plan(backbone, [Active.of(m, tensors)], training=True).hidden(batch).square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in tensors.values())
    assert "hidden" not in vars(backbone)
    assert not any(module._forward_hooks for module in backbone.model.modules())


def test_dropout_is_of_both_texts_and_in_training_alone() -> None:
    backbone = tiny.backbone("bert")
    m, tensors = shaken(backbone, dropout=1.0)
    batch = replace(tiny.batch(2), beside=tiny.batch(2, 7, seed=1))
    with torch.no_grad():
        dropped = Plan(backbone, [Active.of(m, tensors)], training=True).hidden(batch)
        kept = Plan(backbone, [Active.of(m, tensors)]).hidden(batch)
    plain = backbone.hidden(batch)
    torch.testing.assert_close(dropped[batch.mask], plain[batch.mask])
    assert (kept - plain)[batch.mask].abs().max() > 1e-2


# ------------------- tasks


@cache
def translated(n: int = 96, held: int = 48) -> Task:
    """A language where every word is e: only its translation says which of a and b is meant."""
    draw = random.Random(0)

    def row(i: int) -> Example:
        key = draw.choice("ab")
        words = [draw.choice("efgh") for _ in range(5)]
        words[draw.randrange(5)] = key
        return Example(str(i), "e e e e e", key, " ".join(words))

    rows = [row(i) for i in range(n + held)]
    return Task("translated", "classification", tuple(rows[:n]), tuple(rows[n:]), labels=(Label("a"), Label("b")))


def base() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


def settings(**more: Any) -> Settings:
    return Settings(**{"epochs": 12, "batch": 16, "lr": 2e-2, "patience": 99, **more})


def test_a_task_is_learnt_from_its_translations_and_answered_with_them() -> None:
    backbone, task = base(), translated()
    made = pt.adapt(backbone, task, "flare", hyperparameters={"r": 4}, settings=settings())
    assert made.head is not None
    assert made.head.pair == "beside"
    assert made.tensors["head/W"].shape == (2, 32)
    assert made.card.scores["validation"].value > 0.9
    lora = pt.adapt(backbone, replace(task, name="joint"), "lora", settings=settings(epochs=1))
    engine = Engine(backbone, adapters=[made, lora])
    first, second = task.validation[:2]
    asked = [Request("e e e e e", e.pair, who.id) for e in (first, second) for who in (made, lora)]
    asked.append(Request("e e e e e", None, made.id))  # no translation: the LoRA of its A and B
    together = engine.answer(asked)
    for one, answer in zip(asked, together, strict=True):
        [alone] = Engine(backbone, adapters=[made, lora]).answer([one])
        assert alone.output == answer.output
        assert alone.probability == pytest.approx(answer.probability, abs=1e-5)
    assert together[4].probability != pytest.approx(together[0].probability, abs=1e-3)


def test_it_is_kept_and_read_from_disk(tmp_path: Path) -> None:
    made = pt.adapt(base(), translated(), "flare", settings=settings(epochs=1))
    read = pt.Adapter.load(made.save(tmp_path / "kept"))
    assert read.id == made.id
    assert read.head == made.head


def test_a_frozen_prefix_of_both_texts_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = base(), translated()
    some = replace(task, train=(*task.train[:-4], *(replace(e, pair=None) for e in task.train[-4:])))
    head = heads.beside(some, heads.design(some))
    job = Job(some, build("flare", {"sites": ["2.attn.q", "2.attn.v"]}), head, settings(epochs=2))
    begun: list[tuple[int, bool]] = []
    plain = Backbone.hidden

    def hidden(self: Backbone, batch: Batch, **more: Any) -> Tensor:
        begun.append((batch.start, batch.beside is None))
        return plain(self, batch, **more)

    monkeypatch.setattr(Backbone, "hidden", hidden)
    [once] = train(backbone, [job])
    assert {(2, False), (2, True)} <= {*begun}  # the texts, and what is beside them
    monkeypatch.undo()
    monkeypatch.setattr(loop, "CACHE_BYTES", 0)
    [anew] = train(backbone, [job])
    for name, t in once.tensors.items():
        torch.testing.assert_close(t, anew.tensors[name], rtol=1e-3, atol=1e-5)


def test_tags_are_read_of_the_first_text() -> None:
    backbone = base()
    example = Example("0", ("a", "e", "b"), ("B-X", "O", "B-X"), "A E B H")
    head = HeadCard(kind="tagging", targets=("O", "B-X", "I-X"), pair="beside")
    [unit] = passes.encode(backbone, head, [example])
    assert [len(ids) for ids in unit.ids] == [5, 6]
    [missing] = passes.encode(backbone, head, [replace(example, pair=None)])
    assert missing.ids[1] == []
    m, tensors = shaken(backbone)
    p = {"W": torch.randn(3, 32), "b": torch.zeros(3)}
    plan = Plan(backbone, [Active.of(m, tensors)])
    [z] = passes.logits(plan, [Seat(head, p, torch.ones(1))], [unit], [0])
    alone = replace(Batch(torch.tensor([unit.ids[0]]), torch.ones(1, 5, dtype=torch.bool)))
    beside = Batch(torch.tensor([unit.ids[1]]), torch.ones(1, 6, dtype=torch.bool))
    with torch.no_grad():
        h = plan.hidden(replace(alone, beside=beside))
    torch.testing.assert_close(z, (h[0, 1:4] @ p["W"].T), rtol=1e-4, atol=1e-4)


def test_from_the_command_line(tmp_path: Path) -> None:
    skills, source = tmp_path / "skills", write_pairs(tmp_path / "pairs.jsonl")
    columns = ["-i", "first", "--pair", "second", "-o", "same"]
    done = run("adapt", source, *columns, "-l", skills, "-m", "flare", "--epochs", "1", "--json")
    assert done.status == 0, done.err
    for text in (b"I bought a saw\tthe saw is mine\n", b"I bought a saw\n"):
        done = run("predict", "-l", skills, "--adapter", "pairs", stdin=text)
        assert done.status == 0, done.err


def test_what_is_about_both_texts_is_refused() -> None:
    task = translated()
    alike = Task("alike", "similarity", (Example("0", "a", 1.0, "b"), Example("1", "b", 0.0, "a")))
    with pytest.raises(UsageError, match="a similarity is of both"):
        pt.adapt(base(), alike, "flare", settings=settings())
    planned = schedule(base(), replace(alike, validation=alike.train), None)
    assert "a similarity is of both" in planned.left_out["flare"]
    assert "lora" in planned.methods
    with pytest.raises(UsageError, match="its prompt has both"):
        pt.adapt(writer("llama"), task, "flare", settings=settings(), reading=Reading(in_text="yes"))
    with pytest.raises(UsageError, match="one of add_relu, add, mul"):
        build("flare", {"phi": "matmul"})
