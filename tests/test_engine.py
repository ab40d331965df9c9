"""The engine: many requests in one call are answered as each alone, and what does not fit is refused in one line."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import pytest
import tiny
import torch
from made import one_line
from torch import Tensor

from polytask.adapters import Adapter, Card, HeadCard
from polytask.adapters.expression import mix, read
from polytask.backbones import Backbone, heads, load
from polytask.composition.routing.nearest_task import NearestTask, Profile
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request, roster
from polytask.inference.requests import split_words
from polytask.methods import build, passes
from polytask.methods.lifting import Active
from polytask.tasks import TaskCard

TOKENS = tiny.words(*"abcdefgh")
TEXTS = ["a b c", "d", "e f g h a b c d e f", "h g", "b b b b", "c a"]
ABC = HeadCard(kind="classification", targets=("x", "y", "z"))


def adapter_of(
    backbone: Backbone, name: str, method: str, head: HeadCard = ABC, seed: int = 0, **hyper: object
) -> Adapter:
    """An adapter with random tensors of every kind."""
    m = build(method, hyper)
    draw = torch.Generator().manual_seed(seed)
    first = {f"head/{n}": 20 * t for n, t in heads.start(head, backbone.hidden_size, seed).items()}
    started = first | m.start(backbone, seed)
    scale = 0.02 if m.swaps else 0.3
    return Adapter(
        method=method,
        hyperparameters=m.hyperparameters(),
        tensors={n: t + scale * torch.randn(t.shape, generator=draw) for n, t in started.items()},
        backbone=backbone.card(),
        card=Card(name=name, task=TaskCard(name=name, kind=head.kind)),  # type: ignore[arg-type]
        head=head,
    )


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


@pytest.fixture(scope="module")
def adapters(backbone) -> list[Adapter]:
    many = HeadCard(kind="multilabel", targets=tuple("pqrst"), pool="first")
    tags = HeadCard(kind="tagging", targets=("O", "B-T", "I-T"))
    return [
        adapter_of(backbone, "lora", "lora", seed=1),
        adapter_of(backbone, "narrow", "lora", HeadCard(kind="classification", targets=("n", "m")), seed=2, r=2),
        adapter_of(backbone, "many", "bottleneck", many, seed=3),
        adapter_of(backbone, "tags", "ia3", tags, seed=4),
        adapter_of(backbone, "number", "pfeiffer", HeadCard(kind="regression", pool="last"), seed=5),
        adapter_of(backbone, "same", "full", HeadCard(kind="similarity", pair="separate"), seed=6),
        adapter_of(backbone, "joint", "lora", replace_pair(ABC, "joint"), seed=7),
        adapter_of(backbone, "plain", "head", HeadCard(kind="classification", targets=tuple("123456789")), seed=8),
        adapter_of(backbone, "asked", "full", HeadCard(kind="classification", targets=("u", "v"), pool="attention")),
    ]


def replace_pair(head: HeadCard, pair: str) -> HeadCard:
    return head.model_copy(update={"pair": pair})


def close(a, b) -> None:
    assert a.adapter == b.adapter
    assert a.name == b.name
    if isinstance(a.output, float):
        assert a.output == pytest.approx(b.output, abs=1e-5)
    else:
        assert a.output == b.output
    assert a.probability == pytest.approx(b.probability, abs=1e-5)


def requests_for(adapters: list[Adapter], texts: list[str]) -> list[Request]:
    pairs = {a.name for a in adapters if a.head is not None and a.head.pair != "none"}
    return [Request(t, "a h" if a.name in pairs else None, a.name) for t in texts for a in adapters]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_requests_of_all_adapters_in_one_call_are_answered_as_each_alone(backbone, adapters):
    engine = Engine(backbone, adapters=adapters)
    requests = requests_for(adapters, TEXTS)
    mixtures = [
        mix({"lora": 0.7, "narrow": 0.3}),
        mix({"many": 0.5, "plain": 1.0, "asked": 0.25}, head="plain"),
        mix({"lora": 0.5, adapters[0].id: 0.5, "tags": -1.0}, head="tags"),
    ]
    requests += [Request(t, adapter=m) for m in mixtures for t in TEXTS[:3]]
    together = engine.answer(requests)
    assert len(together) == len(requests)
    for request, answer in zip(requests, together, strict=True):
        close(answer, Engine(backbone, adapters=adapters).answer([request])[0])
    backwards = engine.answer(requests[::-1])[::-1]
    for a, b in zip(together, backwards, strict=True):
        close(a, b)
    assert engine.answer([]) == []


def test_an_answer_is_the_heads_reading_of_the_adapted_states(backbone, adapters):
    """Worked from the backbone's states outwards, with no code of the engine."""
    engine = Engine(backbone, adapters=adapters)
    plain = next(a for a in adapters if a.name == "plain")
    batch = backbone.collate([[1, 4, 5, 6, 2]])
    h = backbone.hidden(batch)[0, :5].mean(0)
    z = plain.tensors["head/W"] @ h + plain.tensors["head/b"]
    answer = engine.answer([Request("a b c", adapter="plain")])[0]
    assert answer.output == plain.head.targets[int(z.argmax())]
    assert answer.probability == pytest.approx(float(z.softmax(0).max()), abs=1e-6)
    words = engine.answer([Request(("a", "\u200b", "h"), adapter="tags")])[0]
    assert len(words.output) == 3
    assert words.output[1] == "O"  # a word that the tokenizer drops


def test_a_mixture_is_the_weighted_sum(backbone):
    one = adapter_of(backbone, "one", "lora", seed=1)
    two = adapter_of(backbone, "two", "lora", seed=2)
    # B ← w B in each adapter, and both at once, as one adapter of rank 16.
    joined: dict[str, Tensor] = {}
    for name, t in one.tensors.items():
        joined[name] = t
        if name.endswith("/A"):
            joined[name] = torch.cat([t, two.tensors[name]])
        elif name.endswith("/B"):
            joined[name] = torch.cat([0.6 * t, -0.4 * two.tensors[name]], dim=1)
    m = build("lora", {"r": 16, "alpha": 32})
    merged = replace(one, tensors=joined, hyperparameters=m.hyperparameters(), card=Card(name="m", task=one.card.task))
    engine = Engine(backbone, adapters=[one, two, merged])
    for text in TEXTS:
        a, b = engine.answer([Request(text, adapter=read("0.6*one + -0.4*two")), Request(text, adapter="m")])
        assert a.output == b.output
        assert a.probability == pytest.approx(b.probability, abs=1e-5)
        assert (a.name, b.name) == ("one", "m")


def test_mixtures_that_cannot_be_read():
    for text in ("x*one", "0.5*", "one + ", ""):
        with pytest.raises(UsageError) as caught:
            read(text)
        one_line(caught.value)
    with pytest.raises(UsageError, match="not one of its adapters"):
        mix({"a": 1.0}, head="b")
    with pytest.raises(UsageError, match="at least one"):
        mix({})
    assert str(read("0.7*a + b")) == "0.7 * a + b"


def test_adapters_come_from_a_source_when_they_are_asked_for(backbone, adapters):
    asked: list[str] = []

    class Shelf:
        def get(self, ref: str) -> Adapter:
            asked.append(ref)
            return next(a for a in adapters if ref in (a.name, a.id))

    engine = Engine(backbone, source=Shelf())
    first = engine.answer([Request("a", adapter="lora"), Request("b", adapter="lora"), Request("a", adapter="plain")])
    assert asked == ["lora", "plain"]
    assert engine.answer([Request("a", adapter=adapters[0].id)])[0] == first[0]
    assert asked == ["lora", "plain"]
    engine.drop(adapters[0].id)
    assert engine.answer([Request("a", adapter="lora")])[0] == first[0]
    assert asked == ["lora", "plain", "lora"]


def test_more_mixtures_than_plans_are_kept(backbone, adapters):
    engine = Engine(backbone, adapters=adapters)
    expected = {a.name: engine.answer(requests_for([a], ["a b"]))[0] for a in adapters}
    for i in range(1 << 5):
        some = [a for j, a in enumerate(adapters) if i >> j & 1]
        for a, answer in zip(some, engine.answer(requests_for(some, ["a b"])), strict=True):
            close(answer, expected[a.name])


def test_compositions_that_nobody_asks_for_any_more_are_let_go(backbone, monkeypatch):
    monkeypatch.setattr(roster, "READERS_KEPT", 3)
    monkeypatch.setattr(roster, "PLANS_KEPT", 2)
    engine = Engine(backbone, adapters=[adapter_of(backbone, name, "lora", seed=i) for i, name in enumerate("abcdef")])
    for pair in combinations("abcdef", 2):
        engine.answer([Request("a b", adapter=f"fuse({','.join(pair)})")])
    gc.collect()
    made = [one for one in gc.get_objects() if type(one) is Active and one.method.name == "fuse"]
    assert 3 <= len(made) <= 5


def test_threads_get_their_own_answers(backbone, adapters):
    engine = Engine(backbone, adapters=adapters)
    requests = requests_for(adapters, TEXTS[:4])
    expected = engine.answer(requests)
    barrier = threading.Barrier(6)

    def ask(i: int) -> None:
        barrier.wait()
        for _ in range(3):
            mine = list(range(i, len(requests), 6))
            for j, answer in zip(mine, engine.answer([requests[j] for j in mine]), strict=True):
                close(answer, expected[j])

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(ask, i) for i in range(6)]:
            done.result()
    assert torch.is_grad_enabled()


def test_long_and_empty_inputs(backbone, adapters):
    engine = Engine(backbone, adapters=adapters)
    for request in requests_for(adapters, ["", "a " * 500, "\u200b"]):
        answer = engine.answer([request])[0]
        assert answer.output is not None
    assert len(engine.answer([Request("a " * 500, adapter="tags")])[0].output) == 500


# -- what does not fit -------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Adapter], Adapter]:
    def edit(adapter: Adapter) -> Adapter:
        tensors = dict(adapter.tensors)
        change(tensors)
        return replace(adapter, tensors=tensors)

    return edit


def hyper(**values: object) -> Callable[[Adapter], Adapter]:
    return lambda a: replace(a, hyperparameters={**a.hyperparameters, **values})


def head(**values: object) -> Callable[[Adapter], Adapter]:
    return lambda a: replace(a, head=a.head.model_copy(update=values))


Q = "1.attn.q"
WRONG: dict[str, tuple[Callable[[Adapter], Adapter], str]] = {
    "a missing tensor": (edited(lambda t: t.pop(f"{Q}/A")), f"{Q}/A"),
    "an extra tensor": (edited(lambda t: t.update({f"{Q}/C": torch.zeros(1)})), f"{Q}/C"),
    "a tensor at another site": (edited(lambda t: t.update({"1.mlp.up/A": t[f"{Q}/A"]})), "1.mlp.up/A"),
    "a tensor of no site": (edited(lambda t: t.update({"weight": torch.zeros(1)})), "weight"),
    "a wrong shape": (edited(lambda t: t.update({f"{Q}/A": torch.zeros(8, 31)})), r"\[8, 31\]"),
    "numbers that are none": (edited(lambda t: t[f"{Q}/A"].copy_(torch.nan)), f"{Q}/A"),
    "another rank": (hyper(r=4), "hyperparameters"),
    "other sites": (hyper(sites=["*.attn.k"]), r"\.attn\.[kqv]/"),
    "sites that are not there": (hyper(sites=["9.attn.k"]), "no site matches"),
    "an unknown hyperparameter": (hyper(rank=4), "'rank'"),
    "a hyperparameter of another type": (hyper(r="eight"), "'eight'"),
    "one label more": (head(targets=("x", "y", "z", "w")), r"head/W is \[3, 32\], its head makes \[4, 32\]"),
    "one label less": (head(targets=("x", "y")), r"head/W is \[3, 32\], its head makes \[2, 32\]"),
    "a head for pairs": (head(pair="separate"), "head/W"),
    "a head that asks": (head(pool="attention"), "head/q"),
    "a number's head": (head(kind="regression", targets=()), "head/W"),
    "no head's weight": (edited(lambda t: t.pop("head/W")), "head/W"),
    "no head's offset": (edited(lambda t: t.pop("head/b")), "head/b"),
    "another tensor of the head": (edited(lambda t: t.update({"head/c": torch.zeros(1)})), "head/c"),
    "an unknown method": (lambda a: replace(a, method="nosuch"), "no method 'nosuch'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_that_does_not_fit_is_refused(backbone, case):
    edit, says = WRONG[case]
    engine = Engine(backbone)
    with pytest.raises(PolytaskError, match=says) as caught:
        engine.add(edit(adapter_of(backbone, "wrong", "lora", seed=9)))
    one_line(caught.value)
    assert engine.adapters == []
    with pytest.raises(UsageError):
        engine.answer([Request("a", adapter="wrong")])


def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(backbone):
    other = tiny.backbone("bert", seed=1, tokenizer=TOKENS)
    for method in ("lora", "full", "head"):
        adapter = adapter_of(other, "foreign", method)
        with pytest.raises(PolytaskError, match="trained on") as caught:
            Engine(backbone, adapters=[adapter])
        assert other.fingerprint[:12] in one_line(caught.value)
        assert Engine(other, adapters=[adapter]).answer([Request("a", adapter="foreign")])[0].output


def test_requests_that_cannot_be_answered(backbone, adapters):
    engine = Engine(backbone, adapters=adapters)
    headless = replace(
        adapters[0], head=None, tensors={n: t for n, t in adapters[0].tensors.items() if "head" not in n}
    )
    engine.add(replace(headless, card=Card(name="headless", task=headless.card.task)))
    for request, says in (
        (Request("a", adapter="nobody"), "nobody"),
        (Request("a", adapter=mix({"lora": 1.0, "nobody": 1.0})), "nobody"),
        (Request("one text", adapter="same"), "two texts"),
        (Request("a", "b", adapter="lora"), "one text"),
        (Request("a", adapter="headless"), "no head"),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            engine.answer([Request("a", adapter="lora"), request])
        one_line(caught.value)
    assert engine.answer([Request("a", adapter=mix({"lora": 1, "headless": 1}, head="lora"))])[0].output
    assert engine.answer([Request("a\tb", adapter="same")]) == engine.answer([Request("a", "b", adapter="same")])


def test_words_of_a_line():
    assert split_words("Don't stop, well-known café!") == ("Don't", "stop", ",", "well-known", "café", "!")
    assert split_words("  ") == ("",)


# -- routing -----------------------------------------------------------------------------------------------------------

BANK = """my card was charged twice | why was my card declined at the shop | the transfer has not arrived yet
i lost my card, please block it | how do i change my pin | there is a payment i do not recognise
the cash machine kept my card | my account balance is wrong | i was charged a fee for a cash withdrawal
can i get a refund for this payment | my top up by card failed | what is the exchange rate of your card"""
FILMS = """a moving and beautifully acted drama | the plot makes no sense at all | one of the funniest films this year
the actors seem bored throughout | a masterpiece of quiet suspense | two hours of my life that i will not get back
the special effects are stunning | the script is lazy and the jokes fall flat | a charming film for the whole family
this sequel is worse than the first movie | the direction is superb | the ending of the movie was disappointing"""
TRAVEL = """book a flight from boston to denver | find me a hotel near the airport | what is the weather in paris
is there a train to london tonight | cancel my flight to new york | how long is the drive to the beach
rent a car in chicago for the weekend | which gate does the plane leave from | i need a room for two nights
show flights on monday morning | how much luggage may i take on board | are there direct flights to tokyo"""
PAIRS = """how do i learn to cook\thow can one learn cooking | what is the capital of peru\twhich city is peru's capital
how can i lose weight\twhat is the best diet | why is the sky blue\twhat makes the sky look blue
how do magnets work\twhat is magnetism | who wrote hamlet\twho is the author of hamlet"""


def lines(text: str) -> list[str]:
    return [part.strip() for line in text.split("\n") for part in line.split("|")]


@pytest.fixture(scope="module")
def routed() -> Engine:
    """MiniLM with four tasks; each answers with its own name."""
    minilm = load(precision="fp32", device="cpu")
    engine = Engine(minilm)
    for seed, (name, text) in enumerate({"bank": BANK, "films": FILMS, "travel": TRAVEL, "pairs": PAIRS}.items()):
        card = HeadCard(kind="classification", targets=(name, "no"), pair="separate" if name == "pairs" else "none")
        made = adapter_of(minilm, name, "head", card, seed)
        profile = Profile.of(passes.gist(minilm, [line.replace("\t", "\n") for line in lines(text)]))
        engine.add(replace(made, tensors={**made.tensors, **profile.tensors()}))
    return engine


NEAR = {
    "there is a strange charge on my card": "bank",
    "please refund the payment": "bank",
    "the movie was a boring mess": "films",
    "a wonderful film with a great cast": "films",
    "i want to fly to berlin tomorrow": "travel",
    "find a cheap hotel in rome": "travel",
}


def test_a_text_goes_to_the_task_it_resembles(routed):
    answers = routed.answer([Request(text) for text in NEAR])
    assert [a.name for a in answers] == list(NEAR.values())
    for answer in answers:
        assert 0.34 < answer.routed <= 1
        assert answer.output in (answer.name, "no")
    # Alone and together are the same, and so is asking the chosen adapter by name.
    for text, answer in zip(NEAR, answers, strict=True):
        alone = routed.answer([Request(text)])[0]
        close(alone, answer)
        assert alone.routed == pytest.approx(answer.routed, abs=1e-5)
        close(routed.answer([Request(text, adapter=answer.name)])[0], answer)


def test_a_far_text_goes_to_none(routed):
    far = [
        "integrate x squared over the unit interval",
        "SELECT id FROM users WHERE age > 3;",
        "ĉu vi parolas esperanton",
        "mitochondria produce adenosine triphosphate by oxidative phosphorylation",
    ]
    answers = routed.answer([Request(text) for text in far] + [Request("please refund the payment")])
    for answer in answers[:-1]:
        assert (answer.output, answer.adapter, answer.name) == (None, None, None)
        assert 0 <= answer.routed <= 1
    assert answers[-1].name == "bank"


def test_one_text_never_goes_to_a_task_over_pairs_nor_a_pair_to_another(routed):
    singles = [first for line in lines(PAIRS) for first in line.split("\t")]
    assert all(a.name != "pairs" for a in routed.answer([Request(text) for text in singles]))
    pairs = [Request(*line.split("\t")) for line in lines(PAIRS)]
    assert {a.name for a in routed.answer(pairs)} == {"pairs"}
    tabbed = [Request(line) for line in lines(PAIRS)]
    assert {a.name for a in routed.answer(tabbed)} == {"pairs"}
    mixed = [Request("my card was charged", "the film is dull"), Request("my card was charged twice")]
    names = [a.name for a in routed.answer(mixed)]
    assert names[0] in ("pairs", None)
    assert names[1] == "bank"


def test_an_engine_without_profiles_routes_to_none(backbone, adapters):
    answers = Engine(backbone, adapters=adapters).answer([Request("a b"), Request("c", adapter="lora")])
    assert answers[0].adapter is None
    assert answers[1].name == "lora"
    assert Engine(backbone).answer([Request("a")])[0].output is None


def test_router_by_hand():
    """Two tasks at right angles; τ = 0.05."""
    late = (0.5, 0.1)
    along = [Profile(torch.tensor([1.0, 0]), 0.9, 0.1, late), Profile(torch.tensor([0, 1.0]), 0.8, 0.1, late)]
    router = NearestTask(along, threshold=2.0)
    near, between, far = router.route(torch.tensor([[2.0, 0], [3.0, 4.0], [-1, -1.0]]))
    assert (near.index, near.probability) == (0, pytest.approx(1.0))
    assert near.z == pytest.approx(1.0)
    assert between.index == 1
    assert between.z == pytest.approx(0)
    assert between.probability == pytest.approx(float(torch.tensor([0.6, 0.8]).div(0.05).softmax(0)[1]))
    assert far.index is None
    only = router.route(torch.tensor([[2.0, 0]]), torch.tensor([[False, True]]))[0]
    assert only.index is None  # far from the only task that it may go to
    none = router.route(torch.tensor([[2.0, 0]]), torch.tensor([[False, False]]))[0]
    assert (none.index, none.probability) == (None, 0.0)
    total = sum(
        NearestTask([along[i], along[1 - i]]).route(torch.tensor([[1.0, 1.1]]))[0].probability for i in range(2)
    )
    assert total == pytest.approx(2 * between_probability())


def between_probability() -> float:
    c = torch.tensor([1.0, 1.1]) / (1 + 1.21) ** 0.5
    return float((c / 0.05).softmax(0).max())


def test_profile_by_hand():
    """Three unit vectors; each cosine is to the mean of the other two."""
    e = torch.tensor([[2.0, 0], [0, 3.0], [0, 1.0]])
    profile = Profile.of(e)
    torch.testing.assert_close(profile.mean, torch.tensor([1.0, 2.0]) / 5**0.5)
    cosines = torch.tensor([0.0, 0.5**0.5, 0.5**0.5])
    assert profile.typical == pytest.approx(float(cosines.mean()))
    assert profile.spread == pytest.approx(float(cosines.std()))
    alone = Profile.of(torch.tensor([[3.0, 4.0]]))
    assert (alone.typical, alone.spread) == (pytest.approx(1.0), 0.1)
    again = alone.tensors()
    assert torch.equal(again["task/mean"], torch.tensor([0.6, 0.8]))
