"""Centroid routing: weights by hand, and weights that follow what a decoder writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import run
from torch import Tensor
from writers import clean, refused, tensors_of, tokenizer, writer

import polytask as pt
from polytask.adapters import Adapter, Card, HeadCard, TextCard
from polytask.adapters.expression import read
from polytask.backbones import Backbone, heads
from polytask.backbones.frame import unembed
from polytask.composition.routing.centroid import Centroid
from polytask.composition.routing.nearest_task import Profile
from polytask.composition.routing.router import Following, Known, build
from polytask.inference import Answer, Engine, Request
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling, Steering
from polytask.methods import build as method_of
from polytask.methods.lifting import Active, Plan
from polytask.tasks import TaskCard

EVERY = math.inf  # a threshold by which nothing is foreign
NEVER = 1000  # written tokens, more than any answer has


def known(*μ: list[float], alone: str = "") -> Known:
    N = len(μ)
    ids = tuple(map(str, range(N)))
    directions = torch.nn.functional.normalize(torch.tensor(μ), dim=-1)
    no = torch.zeros(N, dtype=torch.bool)
    apart = torch.tensor([i in alone for i in ids])
    return Known(ids, ids, directions, torch.full((N,), 0.9), torch.full((N,), 0.1), no, apart, no.long())


def chosen(those: Known, x: list[float], **how: float) -> dict[str, float]:
    router = Centroid(**{"threshold": EVERY, **how})  # type: ignore[arg-type]
    [found] = router.choose(those, torch.tensor([x]), torch.ones(1, len(those.ids), dtype=torch.bool))
    return dict(found.weights)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_weights_are_a_softmax_of_cosines() -> None:
    """h = [1, 1] has the cosines 0.7071, 0.7071 and 0, at T = 0.5 1.4142, 1.4142 and 0: e^1.4142 = 4.1133, and 4.1133 /
    9.2265 = 0.4458."""
    found = chosen(known([1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]), [1.0, 1.0], boost=1.0, temperature=0.5)
    assert found == pytest.approx({"0": 0.4458, "1": 0.4458, "2": 0.1084}, abs=1e-4)


def test_the_greatest_cosine_counts_four_times() -> None:
    """h = [0.8, 0.6]: 3.2, 0.6 and 0 have the exponentials 24.53, 1.822 and 1, together 27.35."""
    found = chosen(known([1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]), [0.8, 0.6])
    assert found == pytest.approx({"0": 0.8968, "1": 0.0666, "2": 0.0366}, abs=1e-4)
    assert [*found] == ["0", "1", "2"]
    # −0.2 and −0.6: the greatest is moved up, to −0.2 + 3 · 0.2 = 0.4, and the two are 1 apart.
    two = Centroid().weights(torch.tensor([[-0.2, -0.6]]))
    assert two.tolist() == [pytest.approx([0.7311, 0.2689], abs=1e-4)]


def test_the_nearest_answer_as_far_as_they_mix() -> None:
    plane = known([1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0])
    assert [*chosen(plane, [1.0, 0.1], most=2)] == ["0", "1"]
    assert [*chosen(plane, [1.0, 0.1])] == ["0", "1", "2", "3"]
    assert chosen(replace(plane, alone=torch.eye(4)[0].bool()), [1.0, 0.1]) == {"0": 1.0}
    assert [*chosen(replace(plane, alone=torch.eye(4)[1].bool()), [1.0, 0.1])] == ["0", "2", "3"]
    [far] = Centroid().choose(plane, torch.tensor([[-0.6, -0.8]]), torch.ones(1, 4, dtype=torch.bool))
    assert far.weights == {}
    assert 0 < far.sure <= 1
    [unfit] = Centroid(threshold=EVERY).choose(plane, torch.ones(1, 2), torch.zeros(1, 4, dtype=torch.bool))
    assert unfit.weights == {}
    assert Centroid().choose(known(), torch.ones(1, 2), torch.ones(1, 0, dtype=torch.bool))[0].weights == {}


def test_following_weighs_those_that_were_chosen() -> None:
    """Of adapters 2 and 0 in that order: the cosines of [0.6, 0.8] are 0.8 and 0.6."""
    plane = known([1.0, 0.0], [-1.0, 0.0], [0.0, 1.0])
    router = Centroid()
    assert isinstance(router, Following)
    w = router.follow(plane, ("2", "0"), torch.tensor([[0.6, 0.8], [3.0, 0.0]]))
    assert w.tolist() == [pytest.approx([0.9309, 0.0691], abs=1e-4), pytest.approx([0.0180, 0.9820], abs=1e-4)]


def test_by_name() -> None:
    assert build("centroid", {"every": "1", "temperature": "0.1"}) == Centroid(every=1, temperature=0.1)
    refused(lambda: build("centroid", {"every": "0"}), "at least 1")
    refused(lambda: build("centroid", {"temperature": "0"}), "a number above 0")


# -- written rows ------------------------------------------------------------------------------------------------------

METHODS = ("lora", "bottleneck", "ia3", "full")
WEIGHTS = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.2, 0.3, 0], [0, 0, 0.7, 0.3], [0, 0, 0, 0]])


@cache
def backbone_of(family: str) -> Backbone:
    return writer(family)


@pytest.fixture(autouse=True)
def untouched() -> object:
    yield
    for family in ("llama", "gpt2", "t5"):
        clean(backbone_of(family))


@cache
def plan_of(family: str) -> Plan:
    backbone = backbone_of(family)
    return Plan(backbone, [Active.of(method_of(name), tensors_of(backbone, name, k)) for k, name in enumerate(METHODS)])


def mean_of(backbone: Backbone, ids: list[int]) -> Tensor:
    """What following is done by: the mean of the states of the backbone alone."""
    with torch.no_grad():
        return backbone.hidden(backbone.collate([ids]))[0, : len(ids)].mean(0)


def rows(n: int, family: str) -> list[Prompt]:
    """Short and long ones, with weights of all kinds, and inputs that are parts of the prompts."""
    draw = torch.Generator().manual_seed(2)
    made = []
    for i in range(n):
        length = int(torch.randint(2, 20, (), generator=draw))
        ids = torch.randint(4, len(tokenizer()), (length,), generator=draw).tolist()
        rule = Sampling(max_tokens=3 + 5 * i % 14, temperature=0.3 * (i % 2), seed=i)
        made.append(Prompt(ids, WEIGHTS[i % len(WEIGHTS)], rule))
    return made


def steered(prompt: Prompt, backbone: Backbone, weigh: object, every: int) -> Prompt:
    ids = [*prompt.ids][1:]
    return replace(prompt, steering=Steering(ids, mean_of(backbone, ids), weigh, every))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_weights_that_stay_write_the_same(family: str) -> None:
    """Beside rows that follow nothing, with more rows than places; full changes the weights and t5 has an encoder, so
    these keep theirs."""
    plan, prompts = plan_of(family), rows(13, family)
    follow = [
        p if i % 4 == 3 else steered(p, plan.backbone, lambda mean, w=p.weights: w, 1 + i % 3)
        for i, p in enumerate(prompts)
    ]
    for a, b in zip(generate(plan, follow, places=4), generate(plan, prompts, places=4), strict=True):
        assert (a.tokens, a.text, a.ended) == (b.tokens, b.text, b.ended)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_followed_is_the_mean_of_input_and_answer(family: str) -> None:
    plan = plan_of(family)
    seen: dict[int, list[Tensor]] = {}
    prompts = [p for p in rows(13, family) if p.weights is not None and not p.weights[3]]
    follow = []
    for i, p in enumerate(prompts):

        def weigh(mean: Tensor, i: int = i) -> Tensor:
            seen.setdefault(i, []).append(mean)
            return WEIGHTS[len(seen[i]) % 3]

        follow.append(steered(p, plan.backbone, weigh, 1 + i % 3))
    written = generate(plan, follow, places=4)
    several = 0
    for i, (p, found) in enumerate(zip(follow, written, strict=True)):
        assert p.steering is not None
        k = p.steering.every
        said = found.tokens if found.ended == "end" else found.tokens[:-1]
        means = seen.get(i, [])
        assert len(means) == len(said) // k
        for n, mean in enumerate(means, 1):
            right = mean_of(plan.backbone, [*p.steering.ids, *found.tokens[: n * k]])
            assert torch.allclose(mean, right, atol=1e-4)
            several += 1
    assert several > 20


def test_new_weights_are_those_of_the_next_tokens() -> None:
    """The adapters act behind the last keys and values, so that each token is what a whole pass with its weights gives:
    the first two with those it began with, and then in turns of two."""
    backbone = backbone_of("llama")
    method = method_of("bottleneck", {"sites": ["-1.mlp"]})
    draw = torch.Generator().manual_seed(0)
    made = [
        {n: t + 0.5 * torch.randn(t.shape, generator=draw) for n, t in method.start(backbone, k, writing=True).items()}
        for k in range(2)
    ]
    plan = Plan(backbone, [Active.of(method, tensors) for tensors in made])
    turns = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    ids = [9, 14, 31, 7]
    calls: list[Tensor] = []

    def weigh(mean: Tensor) -> Tensor:
        calls.append(mean)
        return turns[len(calls) % 2]

    prompt = steered(Prompt(ids, turns[0], Sampling(max_tokens=8)), backbone, weigh, 2)
    [found] = generate(plan, [prompt])
    assert len(found.tokens) == 8
    # The state that a token is chosen from is that of the token before it, so weights worked out after the second token
    # are those of the third.
    text = [*ids]
    for t, token in enumerate(found.tokens):
        with torch.no_grad():
            hidden = plan.hidden(backbone.collate([text]), turns[t // 2 % 2][None])[0, len(text) - 1]
            assert int(unembed(backbone, hidden).argmax()) == token
        text.append(token)
    [still] = generate(plan, [replace(prompt, steering=None)])
    assert still.tokens[:2] == found.tokens[:2]
    assert still.tokens != found.tokens


def test_one_way_is_followed() -> None:
    plan = plan_of("llama")
    prompt = steered(rows(1, "llama")[0], plan.backbone, lambda mean: WEIGHTS[0], 1)
    many = replace(prompt, sampling=Sampling(max_tokens=4, beams=2))
    refused(lambda: generate(plan, [many]), "beams = 2: weights that follow an answer")
    assert generate(plan, [replace(many, weights=WEIGHTS[3])])  # whole weights do not follow


# -- through the engine ------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat", "two dogs run home at noon", "a café in the noon", "cat and dogs"]


@cache
def engine() -> Engine:
    """Writing adapters with random tensors, each with a profile of one of the texts."""
    backbone = backbone_of("llama")
    head = HeadCard(kind="generation", text=TextCard(template="plain", max_tokens=9))
    made = []
    for k, text in enumerate(TEXTS[:3]):
        profile = Profile.of(Engine(backbone).embed([text])).tensors()
        card = Card(name=f"w{k}", task=TaskCard(name=f"w{k}", kind="generation"))
        method = method_of("lora")
        tensors = tensors_of(backbone, "lora", k) | profile
        made.append(Adapter("lora", method.hyperparameters(), tensors, backbone.card(), card, head))
    return Engine(backbone, adapters=made)


def same(a: Answer, b: Answer) -> None:
    assert (a.output, a.adapter) == (b.output, b.adapter)
    assert log_p(a) == pytest.approx(log_p(b), abs=1e-3)


def log_p(answer: Answer) -> float:
    assert answer.probability is not None
    return math.log(answer.probability)


def test_an_answer_that_never_changes_its_weights_is_that_of_the_mixture() -> None:
    fixed = Centroid(every=NEVER, threshold=EVERY)
    for text, answer in zip(TEXTS, engine().answer([Request(t) for t in TEXTS], router=fixed), strict=True):
        assert answer.by is not None
        assert len([*read(answer.by).names()]) == 3
        [found] = engine()._answer([Request(text, adapter=fixed.expression(weights_of(text, fixed)))], 256, fixed)
        same(found, answer)


def test_each_adapter_gets_its_own_weight() -> None:
    """One that gives again what it gave at first, by the adapters' ids."""
    router = Centroid(temperature=0.5, threshold=EVERY)
    first = weights_of(TEXTS[0], router)

    class Again(Centroid):
        def follow(self, known: Known, ids: Sequence[str], embeddings: Tensor) -> Tensor:
            return torch.tensor([[first[id] for id in ids]])

    [still] = engine().answer([Request(TEXTS[0])], router=replace(router, every=NEVER))
    [again] = engine().answer([Request(TEXTS[0])], router=Again(temperature=0.5, threshold=EVERY, every=1))
    same(again, still)


def weights_of(text: str, router: Centroid) -> dict[str, float]:
    e = engine().embed([text], reads=router.reads)
    return dict(engine().route(e, [False], router)[0].weights)


def test_answers_follow_what_they_say() -> None:
    """Alone and together they are the same, and other than with weights that stay."""
    how = {"temperature": 0.5, "boost": 1.0, "threshold": EVERY}
    following = engine().answer([Request(t) for t in TEXTS], router=Centroid(every=1, **how))
    for text, answer in zip(TEXTS, following, strict=True):
        same(engine().answer([Request(text)], router=Centroid(every=1, **how))[0], answer)
    still = engine().answer([Request(t) for t in TEXTS], router=Centroid(every=NEVER, **how))
    assert [a.by for a in still] == [a.by for a in following]
    for a, b in zip(still, following, strict=True):
        assert abs(log_p(a) - log_p(b)) > 0.003


def test_a_rule_with_beams_is_refused() -> None:
    asked = Request(TEXTS[0], sampling=Sampling(max_tokens=4, beams=2))
    refused(lambda: engine().answer([asked], router=Centroid(threshold=EVERY)), "leave out beams")


def test_on_the_command_line(tmp_path: Path) -> None:
    base = pt.load()
    lib = pt.Library(tmp_path / "skills")
    for seed, (name, texts) in enumerate({"fruit": ["an apple", "a ripe plum"], "mood": ["so sad", "glad"]}.items()):
        head = HeadCard(kind="classification", targets=(name, "none"))
        first = heads.start(head, base.hidden_size, seed)
        tensors = {f"head/{n}": t for n, t in first.items()} | Profile.of(Engine(base).embed(texts)).tensors()
        card = Card(name=name, task=TaskCard(name=name, kind="classification"))
        lib.add(Adapter("head", method_of("head").hyperparameters(), tensors, base.card(), card, head))
    asked = ["predict", "-l", tmp_path / "skills", "--router", "centroid", "--set", "threshold=inf"]
    apple, sad = run(*asked, "--set", "every=1", "--json", stdin=b"a ripe apple\nso very sad").lines
    assert (apple["name"], sad["name"]) == ("fruit", "mood")
    assert {*read(apple["by"]).names()} == {"fruit", "mood"}
    assert run(*asked, "--set", "k=1", stdin=b"a text").status == 2
