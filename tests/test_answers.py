"""Answers in text, from the prompt's tokens to the adapter that was trained on them: every probability, loss and choice
is worked out a second time from the model's own logits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F
from writers import clean, refused, tensors_of, tokenizer, writer

from polytask.adapters import Adapter, Card, HeadCard
from polytask.adapters.expression import mix
from polytask.backbones import Backbone, heads, text
from polytask.backbones.frame import start_token
from polytask.errors import PolytaskError
from polytask.inference import Ask, Engine, Request
from polytask.inference.answers import Options, choose_normalisation
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt as Row
from polytask.inference.writing import Sampling
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat
from polytask.recipes.adapt import Plan as Wish
from polytask.recipes.adapt import adapt, adapt_many, predict
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Label, Task, TaskCard
from polytask.tasks.templates import Prompt, Template, template, templates
from polytask.training import Event, Job, Settings, train

FAMILIES = ("llama", "t5")
SAYS = {"cat": "mat", "dogs": "run", "noon": "home", "two": "no"}  # each a token of its own


@cache
def backbone_of(family: str) -> Backbone:
    small = {"num_hidden_layers": 2, **({"num_decoder_layers": 2} if family == "t5" else {})}
    return writer(family, max_position_embeddings=256, tie_word_embeddings=True, **small)


@pytest.fixture(autouse=True)
def untouched():
    yield
    for family in FAMILIES:
        clean(backbone_of(family))


def log_p(backbone: Backbone, ids: list[int], target: list[int], model: Any = None) -> Tensor:
    """log p of each target token, from the Hugging Face model alone."""
    model = model or backbone.model
    with torch.no_grad():
        if backbone.kind == "encoder-decoder":
            begun = torch.tensor([[start_token(backbone), *target[:-1]]])
            z = model(input_ids=torch.tensor([ids]), decoder_input_ids=begun).logits[0]
        else:
            z = model(input_ids=torch.tensor([[*ids, *target[:-1]]])).logits[0, len(ids) - 1 :]
    return z.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]


def encode(said: str) -> list[int]:
    return tokenizer()(said)["input_ids"]


def adapter_of(backbone: Backbone, method: str, head: HeadCard | None = None, seed: int = 0) -> Adapter:
    made = build(method)
    card = Card(name=method, task=TaskCard(name="none", kind="generation"))
    tensors = tensors_of(backbone, method, seed)
    return Adapter(method, made.hyperparameters(), tensors, backbone.card(), card, head)


END = tokenizer().eos_token_id
GENERATION = Task("say", "generation", instruction="Say it.")
CHOICE = Task("pick", "choice", instruction="Pick one.")


# -- prompts and answers as tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(templates()))
def test_prompt_and_answer_are_the_whole_text_and_its_end(name: str) -> None:
    backbone = backbone_of("llama")
    head = text.design(GENERATION, name)
    for said, written in [("the cat", "sat on the mat"), ("no", "1"), ("café\n\n日本", "yes, two dogs"), ("", " a")]:
        prompt = text.ask(head, Example("", said, written))
        [asked] = text.encode(backbone, head, [prompt])
        if name == "chat":
            whole = f"<|user|>\nSay it.\n\n{said}\n<|assistant|>\n"
            assert asked.ids == encode(whole)
        else:
            whole = prompt.text + prompt.lead
            assert whole.endswith("Output: ")
            assert asked.ids == encode(prompt.text)
        assert asked.target is not None
        assert [*asked.ids, *asked.target] == [*encode(whole + written.strip()), END]
        assert text.prompt_ids(backbone, prompt.text) == encode(prompt.text)
        [open_] = text.encode(backbone, head, [text.ask(head, Example("", said))])
        assert (open_.ids, open_.target) == (asked.ids, None)
        [own] = text.encode(backbone_of("t5"), head, [prompt])
        assert (own.ids, own.target) == (asked.ids, [*encode(written.strip()), END])


def test_without_a_chat_template_the_turns_are_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer(), "chat_template", None)
    head = text.design(GENERATION, "chat")
    [asked] = text.encode(backbone_of("llama"), head, [text.ask(head, Example("", "the cat", "sat"))])
    assert [*asked.ids, *(asked.target or [])] == [*encode("Say it.\n\nthe cat\n\nsat"), END]


def test_an_answer_that_would_join_the_prompts_last_token_keeps_its_own() -> None:
    """ "ca" and "t" are never "cat": the model is asked after "ca"."""
    assert len(encode("cat")) < len([*encode("ca"), *encode("t")])
    head = text.design(GENERATION)
    [asked] = text.encode(backbone_of("llama"), head, [Prompt("ca", "t")])
    assert (asked.ids, asked.target) == (encode("ca"), [*encode("t"), END])


def test_tokens_that_a_tokenizer_puts_around_a_text() -> None:
    """A first token stays, an end token goes: a decoder goes on from there."""
    user = tokenizer().convert_tokens_to_ids("<|user|>")
    own = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<|endoftext|>")
    kept = tokenizer().backend_tokenizer.post_processor
    around = processors.TemplateProcessing(
        single="<|user|> $A <|endoftext|>", special_tokens=[("<|user|>", user), ("<|endoftext|>", END)]
    )
    own.backend_tokenizer.post_processor = around
    try:
        assert own("the cat")["input_ids"] == [
            user,
            *tokenizer()("the cat", add_special_tokens=False)["input_ids"],
            END,
        ]
        head = text.design(GENERATION)
        for family, right in [("llama", [user, *encode_bare("the cat")]), ("t5", [user, *encode_bare("the cat"), END])]:
            backbone = Backbone(backbone_of(family).model, own, family, precision="fp32", device="cpu")
            [asked] = text.encode(backbone, head, [Prompt("the cat", "sat", " ")])
            assert asked.ids == right
            first = [] if family == "llama" else [user]
            said = " sat" if family == "llama" else "sat"
            assert asked.target == [*first, *encode_bare(said), END]
    finally:
        own.backend_tokenizer.post_processor = kept


def encode_bare(said: str) -> list[int]:
    return tokenizer()(said, add_special_tokens=False)["input_ids"]


def test_a_long_prompt_keeps_its_beginning_and_end_and_a_long_answer_its_beginning() -> None:
    head = text.design(GENERATION, limit=40)
    long = Prompt("the cat sat on " * 20, "and saw two dogs run home " * 9, " ")
    whole, said = encode(long.text), encode(long.text + long.target)[len(encode(long.text)) :]
    for family in FAMILIES:
        backbone = backbone_of(family)
        target = said if family == "llama" else encode(long.answer or "")
        [asked] = text.encode(backbone, head, [long])
        assert asked.target == target[:20]  # half of the limit; no end, as it goes on
        room = 20 if family == "llama" else 40
        front = {20: 15, 40: 30}[room]
        assert asked.ids == whole[:front] + whole[len(whole) - room + front :]
        [short] = text.encode(backbone, head, [replace(long, answer="no")])
        assert short.target is not None
        assert short.target[-1] == END
        assert len(short.ids) == (40 - len(short.target) if family == "llama" else 40)
        # Unanswered, it leaves room for what may be written.
        [open_] = text.encode(backbone, text.with_room(head, 12), [replace(long, answer=None)])
        assert len(open_.ids) == (28 if family == "llama" else 40)
        [fits] = text.encode(backbone, text.with_room(head, 12), [Prompt("the cat", None)])
        assert fits.ids == encode("the cat")
    assert text.with_room(head, 12).text.max_tokens == 12
    assert text.with_room(head, 30).text.max_tokens == 20


def test_a_prompt_is_not_lost_where_the_model_is_shorter_than_the_cards_limit() -> None:
    backbone = writer("llama", max_position_embeddings=64)
    head = text.design(GENERATION)
    for card in (head, text.with_room(head, 200)):
        [asked] = text.encode(backbone, card, [Prompt("the cat sat on the mat and saw two dogs", None)])
        assert asked.ids == encode("the cat sat on the mat and saw two dogs")
        [long] = text.encode(backbone, card, [Prompt("the cat " * 60, None)])
        assert len(long.ids) == 32


def test_cards_that_cannot_be_made() -> None:
    refused(lambda: text.design(GENERATION, "nosuch"), "no template 'nosuch'; the templates are chat, plain, superni")
    refused(lambda: text.design(GENERATION, decide="likelihood"), "cannot be listed")
    refused(lambda: text.design(Task("find", "retrieval")), "not answered in text")
    refused(
        lambda: text.encode(backbone_of("llama"), HeadCard(kind="classification"), [Prompt("a", "b")]), "writes nothing"
    )
    labels = Task("which", "classification", labels=(Label("cat", "an animal"), Label("car")))
    card = text.design(labels).text
    assert card is not None
    assert (card.decide, card.stop, card.template) == ("write", ("\n\n",), "plain")
    assert text.design(CHOICE).text.decide == "likelihood"
    assert text.design(labels, decide="likelihood").targets == ("cat", "car")


# -- likelihoods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "t5", "bart"])
def test_log_probabilities_are_the_models(family: str) -> None:
    begin = {"decoder_start_token_id": 9} if family in ("t5", "bart") else {}
    backbone = writer(family, max_position_embeddings=256, **begin)
    asks = [Ask("the cat sat"), Ask("no"), Ask("the cat sat on the mat and saw two dogs run home"), Ask("the cat sat")]
    answers = [" on the mat", "on", " at noon", " café"]
    found = Engine(backbone).logprobs(asks, answers)
    for ask, said, one in zip(asks, answers, found, strict=True):
        seq2seq = backbone.kind == "encoder-decoder"
        ids = encode(str(ask.prompt))
        target = encode(said.lstrip()) if seq2seq else encode(f"{ask.prompt}{said}")[len(ids) :]
        right = log_p(backbone, ids, [*target, END])
        torch.testing.assert_close(one, right, atol=1e-4, rtol=0.0)
    for one, cut in zip(found, Engine(backbone).logprobs(asks, answers, end=False), strict=True):
        torch.testing.assert_close(cut, one[:-1], atol=1e-4, rtol=0.0)
    turns = [{"role": "user", "content": "the cat"}]
    [chat] = Engine(backbone).logprobs([Ask(turns)], ["meow"])
    [same] = Engine(backbone).logprobs([Ask("<|user|>\nthe cat\n<|assistant|>\n")], ["meow"])
    assert torch.equal(chat, same)


def test_log_probabilities_by_adapters_are_those_of_changed_weights() -> None:
    """Rows of one batch: LoRA as W + s B A, (IA)³ as scaled rows, full differences, and mixtures of them; ties too."""
    backbone = writer("gpt2", max_position_embeddings=256)
    assert backbone.model.lm_head.weight is backbone.model.transformer.wte.weight
    lora, full = (adapter_of(backbone, name) for name in ("lora", "full"))
    engine = Engine(backbone, adapters=[lora, full])

    def changed(shares: dict[str, float]) -> Any:
        import copy

        model: Any = copy.deepcopy(backbone.model)
        with torch.no_grad():
            for name, t in full.tensors.items():
                path, _, parameter = name.removeprefix(":").rpartition("/")
                getattr(model.transformer.get_submodule(path), parameter).add_(t, alpha=shares.get("full", 0.0))
            s = lora.hyperparameters["alpha"] / lora.hyperparameters["r"]
            for name in backbone.sites:
                if f"{name}/A" in lora.tensors:
                    block, part = int(name.split(".")[0]), "qkv".index(name[-1])
                    Δ = s * lora.tensors[f"{name}/B"] @ lora.tensors[f"{name}/A"]
                    weight = model.transformer.h[block].attn.c_attn.weight
                    weight[:, 32 * part : 32 * part + 32] += shares.get("lora", 0.0) * Δ.T
        return model

    who = [{}, {"lora": 1.0}, {"full": 1.0}, {"lora": 0.5, "full": 0.5}, {"full": -0.3}]
    asks = [Ask("the cat", mix(w) if w else None) for w in who]
    found = engine.logprobs(asks, [" sat on the mat"] * len(who))
    for shares, one in zip(who, found, strict=True):
        right = log_p(backbone, encode("the cat"), [*encode(" sat on the mat"), END], changed(shares))
        torch.testing.assert_close(one, right, atol=1e-4, rtol=0.0)
    assert len({round(float(one.sum()), 3) for one in found}) == len(who)


def test_what_cannot_be_weighed() -> None:
    for family in FAMILIES:
        engine = Engine(backbone_of(family))
        refused(lambda e=engine: e.logprobs([Ask("the cat " * 300)], [" sat"]), "shorten it")
        refused(lambda e=engine: e.logprobs([Ask("the cat")], [" sat" * 300]), "shorten it")
    backbone = backbone_of("llama")
    labels = HeadCard(kind="classification", targets=("a", "b"))
    tensors = {f"head/{n}": t for n, t in heads.start(labels, backbone.hidden_size, 0).items()}
    one = replace(adapter_of(backbone, "head", labels), tensors=tensors)
    engine = Engine(backbone, adapters=[one, adapter_of(backbone, "lora", text.design(CHOICE))])
    refused(lambda: engine.weigh([Request("x", adapter=one.id)]), "does not answer in text")
    refused(lambda: engine.weigh([Request("x")]), "adapter")
    refused(lambda: engine.weigh([Request("x", adapter="lora")]), "no options")
    refused(lambda: engine.answer([Request("x", adapter="lora")]), "no options")
    bare = Engine(backbone, adapters=[adapter_of(backbone, "lora")])
    refused(lambda: bare.answer([Request("x", adapter="lora")]), "has no head")


# -- choices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_choice_by_likelihood_worked_out_by_hand(family: str) -> None:
    backbone, options = backbone_of(family), ("the cat", "dogs run home")
    head = text.design(CHOICE)
    engine = Engine(backbone, adapters=[adapter_of(backbone, "head", head)])
    listed = "Options:\n(A) the cat\n(B) dogs run home\nOutput:"
    given, alone, tokens = [], [], []
    for option in options:
        for said, where in (
            (f"Pick one.\n\nInput: on the mat\n{listed}", given),
            (f"Pick one.\n\nInput: \n{listed}", alone),
        ):
            target = encode(option) if family == "t5" else encode(f"{said} {option}")[len(encode(said)) :]
            where.append(float(log_p(backbone, encode(said), [*target, END]).sum()))
        tokens.append(len(target) + 1)
    request = Request("on the mat", adapter="head", options=options)
    [weighed] = engine.weigh([request])
    assert weighed.log_p.tolist() == pytest.approx(given, abs=1e-4)
    assert weighed.log_p_alone.tolist() == pytest.approx(alone, abs=1e-4)
    assert (weighed.names, weighed.tokens.tolist()) == (options, tokens)
    scores = {
        "raw": given,
        "length": [a / n for a, n in zip(given, tokens, strict=True)],
        "pmi": [a - b for a, b in zip(given, alone, strict=True)],
    }
    for way, each in scores.items():
        assert head.text is not None
        card = head.model_copy(update={"text": head.text.model_copy(update={"normalise": way})})
        [found] = Engine(backbone, adapters=[adapter_of(backbone, "head", card)]).answer([request])
        total = sum(map(math.exp, each))
        best = max(range(2), key=lambda i: each[i])
        assert found.output == options[best]
        assert found.probability == pytest.approx(math.exp(each[best]) / total, abs=1e-4)
        assert found.mass == pytest.approx(sum(map(math.exp, given)), rel=1e-3)


def test_ways_of_comparing_by_hand() -> None:
    """One long option is likely for its length, one whatever is asked."""
    log, names = math.log, ("a", "b", "c")
    one = Options(
        names,
        torch.tensor([log(0.4), log(0.2), log(0.1)]),
        torch.tensor([log(0.8), log(0.2), log(0.02)]),
        torch.tensor([1, 4, 2]),
    )
    assert [one.best(way).output for way in ("raw", "length", "pmi")] == ["a", "b", "c"]
    assert one.mass == pytest.approx(0.7)
    assert one.best("raw").probability == pytest.approx(4 / 7)
    root = [0.4, 0.2**0.25, 0.1**0.5]
    assert one.best("length").probability == pytest.approx(root[1] / sum(root))
    assert one.best("pmi").probability == pytest.approx(5 / 6.5)
    assert choose_normalisation([one], ["a"]) == "raw"
    assert choose_normalisation([one], ["b"]) == "length"
    assert choose_normalisation([one], ["c"]) == "pmi"
    assert choose_normalisation([one], ["d"]) == "raw"
    assert choose_normalisation([one, one], ["c", "b"]) == "length"  # as good, and simpler
    assert choose_normalisation([one, one, one], ["c", "b", "c"]) == "pmi"


def test_labels_by_likelihood_and_options_as_letters() -> None:
    backbone = backbone_of("llama")
    labels = Task("which", "classification", instruction="Which?", labels=(Label("cat", "meows"), Label("dog")))
    head = text.design(labels, decide="likelihood")
    asked = "Which?\n\nLabels:\n- cat: meows\n- dog\n\nInput: it sat\nOutput:"
    [found] = Engine(backbone, adapters=[adapter_of(backbone, "head", head)]).weigh([Request("it sat", adapter="head")])
    right = [float(log_p(backbone, encode(asked), [*encode(f" {name}"), END]).sum()) for name in ("cat", "dog")]
    assert found.log_p.tolist() == pytest.approx(right, abs=1e-4)
    form = templates()["plain"](letters=True)
    head = text.design(CHOICE, form)
    asked = "Pick one.\n\nInput: it sat\nOptions:\n(A) cat\n(B) dog\nOutput:"
    request = Request("it sat", adapter="head", options=("cat", "dog"))
    [found] = Engine(backbone, adapters=[adapter_of(backbone, "head", head)]).weigh([request])
    right = [float(log_p(backbone, encode(asked), [*encode(f" {letter}"), END]).sum()) for letter in "AB"]
    assert found.log_p.tolist() == pytest.approx(right, abs=1e-4)
    assert found.names == ("cat", "dog")


def test_a_batch_of_choices_texts_and_adapters_is_answered_as_each_alone() -> None:
    backbone = backbone_of("llama")
    made = [
        adapter_of(backbone, "lora", text.design(CHOICE), 1),
        adapter_of(backbone, "full", text.design(CHOICE, "chat"), 2),
        adapter_of(backbone, "ia3", text.with_room(text.design(GENERATION), 9), 3),
        adapter_of(backbone, "bottleneck", text.with_room(text.design(GENERATION, "superni"), 7), 4),
    ]
    engine = Engine(backbone, adapters=made)
    requests = [
        Request("on the mat", adapter="lora", options=("cat", "two dogs")),
        Request("on the mat", adapter="full", options=("cat", "two dogs", "no")),
        Request("at noon", adapter="ia3"),
        Request("at noon", adapter="bottleneck"),
        Request("at home", adapter=mix({"ia3": 0.6, "full": 0.4})),
        Request("at home", adapter=mix({"lora": 0.5, "full": 0.5}), options=("yes", "no")),
        Request("at home", adapter="ia3", sampling=Sampling(max_tokens=3, temperature=1.0, seed=4)),
        Request("on the mat", adapter="lora", options=("cat", "no", "a café")),
    ]
    together = engine.answer(requests)
    for request, found in zip(requests, together, strict=True):
        [alone] = Engine(backbone, adapters=made).answer([request])
        assert found.output == alone.output
        assert found.probability == pytest.approx(alone.probability, abs=1e-4)
        assert found.mass == (None if alone.mass is None else pytest.approx(alone.mass, rel=1e-3))
        assert (found.mass is None) == (not request.options)
        assert (found.adapter, found.name) == (alone.adapter, alone.name)


def test_what_is_written_is_the_text_that_follows_the_prompt() -> None:
    """The answer and its probability are those of `generate` on the prompt, with the card's limit and stop texts."""
    backbone = backbone_of("llama")
    head = text.with_room(text.design(GENERATION), 9)
    engine = Engine(backbone, adapters=[adapter_of(backbone, "lora", head)])
    [found] = engine.answer([Request("at noon", adapter="lora")])
    rule = Sampling(max_tokens=9, stop=("\n\n",))
    [written] = engine.generate([Ask("Say it.\n\nInput: at noon\nOutput:", "lora", rule)])
    assert found.output == written.text.strip()
    assert found.probability == pytest.approx(math.exp(written.logprob), rel=1e-3)


@pytest.mark.parametrize(("family", "form"), [("llama", "plain"), ("llama", "chat"), ("t5", "plain"), ("t5", "chat")])
def test_a_constrained_answer_begins_as_a_learned_one_does(family: str, form: str) -> None:
    """Its first token is one of those that an answer to learn begins with: with the space where the template has one
    that belongs to it, without where a chat template or an encoder-decoder's answer has none."""
    pytest.importorskip("llguidance")
    from polytask.inference.decoding.constraints import Constraint

    backbone = backbone_of(family)
    head = text.design(GENERATION, form)
    engine = Engine(backbone, adapters=[adapter_of(backbone, "head", head)])
    rule = Sampling(max_tokens=20, constraint=Constraint.choice(["sat", "home"]))
    [found] = engine.answer([Request("the cat", adapter="head", sampling=rule)])
    [asked] = text.encode(backbone, head, [text.ask(head, Example("", "the cat"))])
    lead = " " if (family, form) == ("llama", "plain") else ""
    plan = Plan(backbone, [])
    [right] = generate(plan, [Row(asked.ids, None, rule, lead)])
    assert found.output == right.text
    assert found.probability == pytest.approx(math.exp(right.logprob), rel=1e-3)


# -- training ----------------------------------------------------------------------------------------------------------


def rows_of(kind: str, n: int, seed: int = 0, first: int = 0) -> tuple[Example, ...]:
    """Which key stands among other words: what it says, which one it is, or where it stands."""
    draw = random.Random(seed)

    def row(i: int) -> Example:
        words = [draw.choice(["the", "sat", "on", "and"]) for _ in range(3)]
        key = draw.choice([*SAYS])
        words[draw.randrange(3)] = key
        said = " ".join(words)
        if kind == "tagging":
            return Example(str(i), tuple(words), tuple("B-key" if w == key else "O" for w in words))
        if kind == "choice":
            options = draw.sample([*SAYS.values()], 3)
            if SAYS[key] not in options:
                options[draw.randrange(3)] = SAYS[key]
            return Example(str(i), said, SAYS[key], extra={"options": tuple(options)})
        return Example(str(i), said, key if kind == "classification" else SAYS[key])

    return tuple(row(first + i) for i in range(n))


METRIC = {"generation": "exact_match", "choice": "accuracy", "classification": "accuracy", "tagging": "span_f1"}
FORM = {"generation": "plain", "choice": "chat", "classification": "superni", "tagging": "superni"}
LABELS = {"classification": [*SAYS], "tagging": ["key"]}


def task_of(kind: str, n: int = 160, held: int = 16) -> Task:
    labels = tuple(map(Label, LABELS.get(kind, [])))
    splits = rows_of(kind, n), rows_of(kind, held, 1, 1000), rows_of(kind, held, 2, 2000)
    return Task(kind, kind, *splits, instruction="Go.", labels=labels, metric=METRIC[kind])  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_the_first_loss_is_the_cross_entropy_of_the_answers_tokens(family: str) -> None:
    backbone = writer(family, max_position_embeddings=256)
    task = task_of("generation", 12, 5)
    head = text.design(task)
    asked = text.encode(backbone, head, [text.ask(head, e) for e in task.train])
    tokens = torch.cat([log_p(backbone, one.ids, one.target or []) for one in asked])
    assert len(tokens) == sum(len(one.target or []) for one in asked)
    held = text.encode(backbone, head, [text.ask(head, e) for e in task.validation])
    before = torch.cat([log_p(backbone, one.ids, one.target or []) for one in held])
    for method in ("lora", "full"):  # both start where the backbone is
        events: list[Event] = []
        settings = Settings(epochs=1, batch=12, lr=1e-3)
        [learned] = train(backbone, [Job(task, build(method), head, settings)], on_event=events.append)
        first = next(e for e in events if e.kind == "step")
        assert first.loss == pytest.approx(-float(tokens.mean()), rel=1e-4)
        assert learned.probe == pytest.approx(math.exp(float(before.mean())), rel=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_gradients_are_those_of_the_answers_tokens_alone(family: str) -> None:
    """Against a fine-tuned copy of the model, with a loss written down here; tied embeddings included."""
    import copy

    backbone = writer(family, max_position_embeddings=256)
    task = task_of("generation", 6, 0)
    head = text.design(task)
    asked = text.encode(backbone, head, [text.ask(head, e) for e in task.train])
    model: Any = copy.deepcopy(backbone.model).requires_grad_()
    total = torch.zeros(())
    for one in asked:
        target = one.target or []
        if family == "t5":
            begun = torch.tensor([[start_token(backbone), *target[:-1]]])
            z = model(input_ids=torch.tensor([one.ids]), decoder_input_ids=begun).logits[0]
        else:
            z = model(input_ids=torch.tensor([[*one.ids, *target[:-1]]])).logits[0, len(one.ids) - 1 :]
        total = total + F.cross_entropy(z, torch.tensor(target), reduction="sum")
    total.backward()
    method = build("full")
    tensors = {n: t.requires_grad_() for n, t in method.start(backbone, 0, writing=True).items()}
    plan = Plan(backbone, [Active.of(method, tensors)], training=True)
    units, seat = passes.answered(backbone, asked), Seat(head, {}, torch.ones(1))
    for _, members, z in passes.forward(plan, [seat], units, [0] * len(units)):
        y = torch.tensor([token for i in members for token in units[i].target or []])
        heads.losses(head, z, y).sum().backward()
    base = getattr(model, "base_model", model)
    for name, t in tensors.items():
        path, _, parameter = name.removeprefix(":").rpartition("/")
        right = base.get_submodule(path).get_parameter(parameter).grad
        assert t.grad is not None, name
        torch.testing.assert_close(t.grad, right, atol=1e-4 * float(right.abs().max()) + 1e-6, rtol=1e-3)
    clean(backbone)


def test_answers_in_text_and_heads_are_learned_beside_each_other_as_alone() -> None:
    backbone = backbone_of("llama")
    words, label = task_of("generation", 32, 8), task_of("classification", 32, 8)
    quick = Settings(epochs=2, batch=16, lr=3e-3)
    wishes = [
        Wish(words, "lora", settings=quick),
        Wish(label, "lora", settings=quick),
        Wish(label, "bottleneck", settings=quick, reading=Reading(in_text="yes")),
    ]
    together = adapt_many(backbone, wishes)
    for wish, found in zip(wishes, together, strict=True):
        [alone] = adapt_many(backbone, [wish])
        assert found.tensors.keys() == alone.tensors.keys()
        for name, t in found.tensors.items():
            torch.testing.assert_close(t, alone.tensors[name], atol=2e-3, rtol=0.0)
        losses = [[h["loss"] for h in a.card.recipe["history"]] for a in (found, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@cache
def labelled(family: str) -> Adapter:
    """Answers the same inputs by a head over hidden states."""
    task, settings = task_of("classification", 32), Settings(epochs=1, lr=1e-3)
    return adapt(backbone_of(family), replace(task, name="by a head"), "lora", settings=settings)


@pytest.mark.parametrize("kind", ["generation", "choice", "classification", "tagging"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_is_learned_in_text_kept_and_answered(family: str, kind: str, tmp_path: Path) -> None:
    backbone, task = backbone_of(family), task_of(kind)
    trained: list[bool] = []
    settings = Settings(epochs=12 if kind == "tagging" else 6, lr=1e-2, batch=16)
    reading = Reading(in_text="yes", template=FORM[kind])

    def look(_event: Event) -> None:
        trained.append(any(p.requires_grad or p.grad is not None for p in backbone.model.parameters()))

    skill = adapt(backbone, task, "full", settings=settings, reading=reading, on_event=look)
    assert len(trained) > 60
    assert not any(trained)
    scores = skill.card.scores
    assert scores["test"].metric == METRIC[kind]
    assert scores["baseline"].value < 0.6
    assert scores["test"].value > 0.9
    assert skill.head is not None
    assert skill.head.text is not None
    losses = [h["loss"] for h in skill.card.recipe["history"]]
    assert losses[-1] < 0.3 * losses[0]
    assert set(skill.tensors) == {*build("full").start(backbone, 0, writing=True), "task/mean", "task/spread"}
    # Kept, loaded, and answered in one batch with a head's adapter.
    skill.save(tmp_path / "skill")
    loaded = Adapter.load(tmp_path / "skill")
    assert (loaded.id, loaded.head, loaded.card) == (skill.id, skill.head, skill.card)
    before = predict(backbone, skill, task.test)
    assert sum(a == e.output for a, e in zip(before, task.test, strict=True)) > 0.9 * len(task.test)
    other = labelled(family)
    engine = Engine(backbone, adapters=[loaded, other])
    requests = []
    for e in task.test[:8]:
        requests.append(Request(e.input, adapter=loaded.id, options=tuple(e.extra.get("options", ()))))
        requests.append(Request(e.text, adapter=other.id))
    found = engine.answer(requests)
    assert [a.output for a in found[::2]] == before[:8]
    alone = Engine(backbone, adapters=[other]).answer(requests[1::2])
    for a, b in zip(found[1::2], alone, strict=True):
        assert a.output == b.output
        assert a.probability == pytest.approx(b.probability, abs=1e-4)
        assert a.output in SAYS
    if kind == "choice":
        assert all(a.mass is not None for a in found[::2])
        assert 0 < scores["test"].others["attentiveness"] <= 1.001
        assert any(f"options are compared by {skill.head.text.normalise}" in note for note in skill.card.notes)


def test_the_cards_room_is_that_of_the_longest_answer() -> None:
    backbone = backbone_of("llama")
    rows = (Example("1", "cat", "sat"), Example("2", "dog", "the cat sat on the mat and saw two dogs run home at noon"))
    longest = len(encode(" the cat sat on the mat and saw two dogs run home at noon"))
    task = Task("long", "generation", rows)
    assert Reading().design(backbone, task).text.max_tokens == round(1.5 * longest)
    assert Reading().design(backbone, replace(task, train=rows[:1])).text.max_tokens == 8
    assert Reading().design(backbone, task, limit=30).text.max_tokens == 15
    assert Reading().design(backbone, task, limit=30).text.limit == 30


def test_auto_takes_lora_where_it_helps_and_the_backbone_alone_where_not() -> None:
    backbone = backbone_of("llama")
    settings = Settings(epochs=3, lr=5e-3, batch=16)
    skill = adapt(backbone, task_of("generation", 96), settings=settings)
    assert skill.method == "lora"
    assert skill.hyperparameters["sites"] == [*(f"*.attn.{x}" for x in "qkvo"), "*.mlp.gate", "*.mlp.up", "*.mlp.down"]
    [note] = [n for n in skill.card.notes if n.startswith("auto")]
    assert note.startswith("auto chose lora: geometric mean of token probabilities on validation: backbone alone 0.0")
    none = adapt(backbone, task_of("generation", 48), settings=replace(settings, lr=1e-15))
    assert none.method == "head"
    assert set(none.tensors) == {"task/mean", "task/spread"}
    assert any(n.startswith("auto chose backbone alone: ") for n in none.card.notes)
    [found] = Engine(backbone, adapters=[none]).answer([Request("the cat", adapter=none.id)])
    rule = Sampling(max_tokens=none.head.text.max_tokens, stop=("\n\n",))
    [right] = Engine(backbone).generate([Ask("Go.\n\nInput: the cat\nOutput:", None, rule)])
    assert found.output == right.text.strip()


def test_an_encoder_decoder_that_writes_is_adapted_in_both_halves() -> None:
    backbone = backbone_of("t5")
    skill = adapt(backbone, task_of("generation", 32, 4), settings=Settings(epochs=1, lr=5e-3))
    sites = {name.rpartition("/")[0] for name in skill.tensors} - {"task"}
    for part in ("enc.0.attn.q", "dec.1.attn.v", "dec.1.cross.k", "dec.0.mlp.down"):
        assert part in sites
    assert labelled("t5").tensors.keys() & {"dec.0.attn.q/A"} == set()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_tasks_that_cannot_be_answered_in_text() -> None:
    backbone = backbone_of("llama")
    encoder = tiny.backbone("bert", tokenizer=tokenizer(), vocab_size=len(tokenizer()))
    task = task_of("generation", 8, 2)
    quick = Settings(epochs=1)

    def learn(base: Backbone, task: Task, method: str = "lora", **how: Any) -> Callable[[], object]:
        return lambda: adapt(base, task, method, settings=quick, reading=Reading(**how))

    refused(learn(encoder, task), "tiny-bert cannot write; name a decoder")
    refused(learn(encoder, task_of("classification", 8, 2), in_text="yes"), "cannot write")
    headless = Backbone(backbone.model, tokenizer(), "drawn", precision="fp32", device="cpu", headless=True)
    refused(learn(headless, task), "drawn cannot write")
    refused(learn(backbone, task, "head"), "no head to train")
    refused(learn(backbone, task, in_text="no"), "a generation task has no label head")
    refused(learn(backbone, task, template="nosuch"), "no template 'nosuch'")
    refused(learn(backbone, task, decide="likelihood"), "cannot be listed")
    bare = Task("pick", "choice", (Example("1", "x", "a"),), (Example("2", "y", "a"),))
    refused(learn(backbone, bare), "no options", PolytaskError)
    optionless = Task("pick", "choice", rows_of("choice", 8), (Example("2", "y", "mat"),))
    refused(learn(backbone, optionless), "no options", PolytaskError)
    refused(learn(backbone, Task("empty", "generation")), "no training examples", PolytaskError)
    rows = (Example("1", "x", "a"), Example("2", "y"))
    refused(learn(backbone, Task("half", "generation", rows)), "example 2 has no output", PolytaskError)


def test_a_strangers_template_is_taken_as_it_is() -> None:
    @template("shout", stop=("!",))
    class Shout(Template):
        times: int = 2

        def write(self, task: Task, example: Example, shown: object) -> Prompt:
            return Prompt(f"{example.text}{'?' * self.times}", None, lead="\n")

    try:
        backbone = backbone_of("llama")
        head = text.design(GENERATION, Shout(times=3))
        assert head.text.options["times"] == 3
        [asked] = text.encode(backbone, head, [text.ask(head, Example("", "cat", "sat"))])
        assert [*asked.ids, *(asked.target or [])] == [*encode("cat???\nsat"), END]
        assert head.text.stop == ("!",)
    finally:
        del templates.__globals__["TEMPLATES"]["shout"]
