"""T-Few: the losses over right and wrong options by hand, their gradients against a copy of the model, the recipe."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from torch import Tensor
from writers import clean, refused, tokenizer, writer

from polytask.adapters import Adapter
from polytask.adapters.store import DESCRIPTION
from polytask.backbones import Backbone, heads, text
from polytask.backbones.frame import start_token
from polytask.inference import Engine
from polytask.methods import build, passes
from polytask.methods.passes import Seat, Unit
from polytask.recipes import tfew as recipe
from polytask.recipes.adapt import Plan as Wish
from polytask.recipes.adapt import adapt, adapt_many, request
from polytask.tasks import Example, Label, Task
from polytask.tasks.templates import templates
from polytask.training import Event, Job, Settings, loop, tfew, train
from polytask.training.learner import PREDICTED, prepare

FAMILIES = ("llama", "t5")
SAYS = {"cat": "the mat", "dogs": "run", "noon": "home at noon", "two": "no"}


@cache
def backbone_of(family: str) -> Backbone:
    small = {"num_hidden_layers": 2, **({"num_decoder_layers": 2} if family == "t5" else {})}
    return writer(family, max_position_embeddings=256, tie_word_embeddings=True, **small)


@pytest.fixture(autouse=True)
def untouched():
    yield
    for family in FAMILIES:
        clean(backbone_of(family))


def choices(n: int, first: int = 0, held: int = 0) -> Task:
    """What a word says, among two to four options of several lengths."""

    def row(i: int) -> Example:
        key = [*SAYS][i % 4]
        others = [said for said in SAYS.values() if said != SAYS[key]][: 1 + i % 3]
        options = [*others[: i % 2], SAYS[key], *others[i % 2 :]]
        said = " ".join(["sat", "on", key] + ["and"] * (i % 5))
        return Example(str(i), said, SAYS[key], extra={"options": tuple(options)})

    rows = [row(first + i) for i in range(n + 2 * held)]
    splits = tuple(rows[:n]), tuple(rows[n : n + held]), tuple(rows[n + held :])
    return Task("pick", "choice", *splits, instruction="Pick one.", metric="accuracy")


def labelled(n: int = 12, held: int = 4) -> Task:
    rows = [Example(str(i), f"sat on {[*SAYS][i % 4]}", [*SAYS][i % 4]) for i in range(n + held)]
    return Task("which", "classification", tuple(rows[:n]), tuple(rows[n:]), labels=tuple(map(Label, SAYS)))


def card(task: Task, **more: Any) -> Any:
    return text.design(task, decide="likelihood", objective="tfew", **more)


def of_options(backbone: Backbone, head: Any, example: Example, model: Any) -> list[Tensor]:
    """log p of each option's tokens from the Hugging Face model, the right option first."""
    options = [str(example.output), *(o for o in text.options(head, example) if o != example.output)]
    found = []
    for option in options:
        [asked] = text.encode(backbone, head, [text.ask(head, replace(example, output=option))])
        target = asked.target or []
        if backbone.kind == "encoder-decoder":
            begun = torch.tensor([[start_token(backbone), *target[:-1]]])
            z = model(input_ids=torch.tensor([asked.ids]), decoder_input_ids=begun).logits[0]
        else:
            z = model(input_ids=torch.tensor([[*asked.ids, *target[:-1]]])).logits[0, len(asked.ids) - 1 :]
        found.append(z.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)])
    return found


def by_hand(options: Sequence[Tensor]) -> Tensor:
    right, wrong = options[0], options[1:]
    unlikely = sum((-(1.01 - t.exp()).log().sum() for t in wrong), torch.zeros(()))
    β = [t.sum() / len(t) for t in options]
    share = β[0].exp() / sum(b.exp() for b in β)
    return -right.sum() / len(right) + unlikely / sum(len(t) for t in wrong) - share.log()


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_a_worked_example() -> None:
    """The right answer's tokens have p = ½, ¼, a wrong one's ⅕, ½, ⅒."""
    right, wrong = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.2, 0.5, 0.1]).log()
    L_LM = (math.log(2) + math.log(4)) / 2
    L_UL = -(math.log(0.81) + math.log(0.51) + math.log(0.91)) / 3
    β = -math.log(8) / 2, -math.log(100) / 3
    L_LN = -math.log(math.exp(β[0]) / (math.exp(β[0]) + math.exp(β[1])))
    for found, right_one in ((L_LM, 1.0397), (L_UL, 0.3261), (L_LN, 0.4758)):
        assert found == pytest.approx(right_one, abs=1e-4)
    assert float(tfew.loss([right, wrong])) == pytest.approx(L_LM + L_UL + L_LN)
    assert float(tfew.loss([right])) == pytest.approx(L_LM)
    # All tokens of all wrong options are one mean; each option is one summand of the softmax.
    L_UL = -(math.log(0.81) + math.log(0.51) + math.log(0.91) + math.log(0.41)) / 4
    L_LN = -math.log(math.exp(β[0]) / (math.exp(β[0]) + math.exp(β[1]) + 0.6))
    more = tfew.loss([right, wrong, torch.tensor([0.6]).log()])
    assert float(more) == pytest.approx(L_LM + L_UL + L_LN)


def test_a_wrong_token_that_is_certain_has_a_finite_loss_and_gradient() -> None:
    z = torch.tensor([[0.0, 0.0], [200.0, 0.0]], requires_grad=True)
    each = tfew.losses(z, [[0], [0]], [3, 3])
    assert float(each.detach()) == pytest.approx(math.log(2) - math.log(0.01) + math.log(3), rel=1e-4)
    each.sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_options_come_one_after_another_and_inputs_between_each_other() -> None:
    z = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    targets, inputs = [[1, 2], [0], [4], [3, 3], [2]], [8, 5, 8, 5, 8]
    at = iter(z.log_softmax(-1))
    parts = [torch.stack([next(at)[token] for token in target]) for target in targets]
    right = [by_hand([parts[0], parts[2], parts[4]]), by_hand([parts[1], parts[3]])]
    assert tfew.losses(z, targets, inputs).tolist() == pytest.approx([float(one) for one in right], rel=1e-5)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_copy_of_the_model(family: str) -> None:
    """Every weight, over a batch whose options fill several passes and share rows where the backbone can."""
    backbone, task = backbone_of(family), choices(24)
    head = card(task)
    learner = prepare(backbone, Job(task, build("full"), head))
    opened = loop.Loop(backbone, [learner], lambda event: None, None, None)
    batch = [*range(1, 24)]
    assert sum(unit.length for i in batch for unit in [learner.units[i], *learner.wrong[i]]) > passes.TOKENS_A_PASS
    opened.backward([learner], [batch])
    model: Any = copy.deepcopy(backbone.model).requires_grad_()
    each = [by_hand(of_options(backbone, head, task.train[i], model)) for i in batch]
    mean = torch.stack(each).mean()
    assert learner.losses[-1] == pytest.approx(float(mean.detach()), rel=1e-4)
    mean.backward()
    base = getattr(model, "base_model", model)
    for name, t in learner.tensors.items():
        path, _, parameter = name.removeprefix(":").rpartition("/")
        right = base.get_submodule(path).get_parameter(parameter).grad
        assert t.grad is not None, name
        torch.testing.assert_close(t.grad, right, atol=1e-4 * float(right.abs().max()) + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["ia3", "high"])
def test_the_first_loss_by_hand(family: str, method: str) -> None:
    """Also where only a high block is trained, below which hidden states might be kept."""
    backbone, task = backbone_of(family), labelled()
    head = card(task)
    made = build("ia3") if method == "ia3" else build("lora", {"sites": ["-1.attn.q"]})
    events: list[Event] = []
    [learned] = train(backbone, [Job(task, made, head, Settings(epochs=1, batch=12))], on_event=events.append)
    with torch.no_grad():
        options = [of_options(backbone, head, e, backbone.model) for e in task.train]
        held = torch.cat([of_options(backbone, head, e, backbone.model)[0] for e in task.validation])
    assert all(len(own) == 4 for own in options)
    first = next(e for e in events if e.kind == "step")
    assert first.loss == pytest.approx(sum(float(by_hand(own)) for own in options) / 12, rel=1e-4)
    # Validation scores are those of every answer in text: how probable right answers are.
    assert learned.probe == pytest.approx(math.exp(float(held.mean())), rel=1e-4)
    assert first.metric == PREDICTED


@pytest.mark.parametrize("family", FAMILIES)
def test_beside_other_jobs_as_alone(family: str) -> None:
    backbone = backbone_of(family)
    quick = Settings(epochs=2, batch=8, lr=3e-3)
    says = Task("say", "generation", tuple(replace(e, extra={}) for e in choices(16).train))
    wishes = [
        Wish(choices(16), "ia3", settings=quick, reading=recipe.READING),
        Wish(says, "lora", settings=quick),
        Wish(labelled(), "lora", settings=quick),
        Wish(labelled(), "bottleneck", settings=quick, reading=recipe.READING),
    ]
    together = adapt_many(backbone, wishes)
    for wish, found in zip(wishes, together, strict=True):
        [alone] = adapt_many(backbone, [wish])
        losses = [[h["loss"] for h in a.card.recipe["history"]] for a in (found, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_options_of_one_input_come_in_one_pass_in_order() -> None:
    def unit(length: int) -> Unit:
        return Unit(([1] * length,), [0], [1])

    seats = [Seat(card(choices(1)), {}), Seat(text.design(Task("say", "generation")), {})]
    units = [unit(8) for _ in range(9)]
    bound = {0: "a", 1: "a", 3: "b", 4: "b", 5: "b", 7: "c", 8: "c"}
    which = [1 if i in (2, 6) else 0 for i in range(9)]
    for packable in (True, False):
        found = [*passes.schedule(seats, units, which, 40, packable=packable, bound=bound)]
        assert [pack for pack in found if pack[0] in bound] == [[0, 1, 3, 4, 5], [7, 8]]
        assert sorted(i for pack in found if pack[0] not in bound for i in pack) == [2, 6]
        tight = [*passes.schedule(seats, units, which, 9, packable=packable, bound=bound)]
        assert [pack for pack in tight if pack[0] in bound] == [[0, 1], [3, 4, 5], [7, 8]]


def test_wrong_answers_are_the_other_options_once_each() -> None:
    backbone, task = backbone_of("llama"), choices(1)
    twice = replace(task.train[0], output="b", extra={"options": ("a", "b", "c", "a", "b")})

    def said(head: Any, option: str) -> list[int]:
        [asked] = text.encode(backbone, head, [text.ask(head, replace(twice, output=option))])
        return asked.target or []

    for form in (templates()["plain"](), templates()["plain"](letters=True)):
        head = text.design(task, form, objective="tfew")
        [found] = passes.wrong(backbone, head, [twice])
        assert [unit.target for unit in found] == [said(head, "a"), said(head, "c")]


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_a_thousand_steps_whatever_the_task() -> None:
    one = recipe.settings(32)
    assert (one.epochs, one.batch, one.lr, one.weight_decay, one.warmup, one.clip) == (250, 8, 3e-3, 0.0, 0.06, 1.0)
    assert one.patience == one.epochs
    assert one.rate("ia3", 4096) == 3e-3
    steps = {n: recipe.settings(n).epochs * -(-n // 8) for n in (1, 5, 20, 70, 500, 20_000)}
    assert steps == {1: 1000, 5: 1000, 20: 999, 70: 999, 500: 1008, 20_000: 2500}
    assert recipe.settings(32, batch=16).epochs == 500
    other = recipe.settings(32, epochs=3, lr=1e-2, seed=4)
    assert (other.epochs, other.patience, other.lr, other.seed, other.batch) == (3, 3, 1e-2, 4, 8)
    refused(lambda: recipe.settings(32, batch=0), "batch = 0: at least 1")


def test_a_choice_is_learned_and_made_by_likelihood_per_token() -> None:
    backbone, task = backbone_of("llama"), choices(48, held=12)
    settings = recipe.settings(48, epochs=10, lr=1e-2)
    skill = adapt(backbone, task, "full", settings=settings, reading=recipe.READING)
    assert skill.head is not None
    assert skill.head.text is not None
    assert (skill.head.text.objective, skill.head.text.normalise) == ("tfew", "length")
    assert not any("options are compared" in note for note in skill.card.notes)
    assert len(skill.card.recipe["history"]) == 10
    scores = skill.card.scores
    assert scores["baseline"].value < 0.8
    assert scores["test"].value == 1.0
    engine = Engine(backbone, adapters=[skill])
    asked = [request(e, skill) for e in task.test]
    for one, answer in zip(engine.weigh(asked), engine.answer(asked), strict=True):
        per_token = one.log_p / one.tokens
        assert answer.output == one.names[int(per_token.argmax())]
    # Right options stand out more than where they alone are trained.
    plain = adapt(backbone, task, "full", settings=settings, reading=replace(recipe.READING, objective="likelihood"))
    assert plain.head is not None
    assert plain.head.text is not None
    assert plain.head.text.objective is None

    def share(skill: Adapter) -> float:
        weighed = Engine(backbone, adapters=[skill]).weigh([request(e, skill) for e in task.test])
        each = [one.scores("length").softmax(0) for one in weighed]
        return sum(float(p[one.names.index(str(e.output))]) for p, one, e in zip(each, weighed, task.test, strict=True))

    assert share(skill) > share(plain)


def test_where_nothing_is_kept_back_the_last_step_stays() -> None:
    backbone, task = backbone_of("llama"), choices(8)
    skill = adapt(backbone, task, recipe.METHOD, settings=recipe.settings(8, epochs=3), reading=recipe.READING)
    assert skill.method == "ia3"
    [learned] = train(backbone, [Job(task, build("ia3"), card(task), recipe.settings(8, epochs=3))])
    assert all(torch.equal(t, skill.tensors[n]) for n, t in learned.tensors.items())
    assert any(float((t - 1).abs().max()) > 1e-3 for n, t in learned.tensors.items() if n.endswith("/l"))


def test_tasks_that_have_no_or_too_many_options() -> None:
    backbone = backbone_of("llama")

    def learn(task: Task, **how: Any) -> Callable[[], object]:
        return lambda: adapt(backbone, task, "ia3", reading=replace(recipe.READING, **how))

    says = Task("say", "generation", (Example("1", "a", "b"),))
    refused(learn(says), "cannot be listed")
    refused(learn(says, decide="write"), "objective tfew is for answers by likelihood")
    refused(learn(labelled(), decide="terms"), "not terms for them")
    refused(learn(labelled(), in_text="no"), "objective tfew is for answers in text")
    many = replace(labelled(), labels=tuple(Label(f"label {i}") for i in range(25)))
    refused(learn(many), "at most 24 labels, and there are 25")


def test_the_recipe_on_the_command_line(tmp_path: Path) -> None:
    backbone_of("llama").model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"text": f"the {['cat', 'dogs'][i % 2]} sat {i}", "label": ["run", "home"][i % 2]} for i in range(24)]
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ("adapt", data, "--base", tmp_path / "base", "--library", tmp_path / "skills", "--json")
    done = run(*command, "--recipe", "tfew", "--epochs", "2")
    assert done.status == 0, done.err
    assert done.json["method"] == "ia3"
    saved = json.loads(next((tmp_path / "skills").rglob(DESCRIPTION)).read_text(encoding="utf-8"))
    assert saved["head"]["text"]["objective"] == "tfew"
    assert saved["head"]["text"]["normalise"] == "length"
    settings = saved["card"]["recipe"]["settings"]
    assert (settings["batch"], settings["lr"], settings["epochs"], settings["weight_decay"]) == (8, 3e-3, 2, 0.0)
    done = run(*command, "--recipe", "tfew", "--epochs", "1", "--lr", "0.01", "--method", "lora")
    assert done.status == 0, done.err
    assert done.json["method"] == "lora"
    assert "--recipe often: tfew is the only one" in run(*command, "--recipe", "often").error
    assert "is for answers by likelihood" in run(*command, "--recipe", "tfew", "--decide", "write").error
    assert "add --text" in run(*command, "--recipe", "tfew", "--head").error


def test_cards_without_the_objective_are_as_they_were() -> None:
    plain = text.design(labelled(), decide="likelihood")
    assert "objective" not in plain.model_dump(mode="json", exclude_none=True)["text"]
    assert heads.start(plain, 32, 0) == {}
