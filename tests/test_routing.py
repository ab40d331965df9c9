"""Routers over inputs: who answers, with which weights; worked out by hand, and through the engine and command line."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import run, write_pairs, write_table
from made import one_line
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import Adapter, Card, HeadCard
from polytask.adapters.expression import Fuse, Mix, Name, fuse, read
from polytask.backbones import Backbone, heads
from polytask.composition.fused import fuse as fused_terms
from polytask.composition.routing.centroid import Centroid
from polytask.composition.routing.dlp import DLP, EPOCHS, HIDDEN, Classifier, learned, pieces
from polytask.composition.routing.lora_fusion import LoraFusion
from polytask.composition.routing.lora_retriever import LoraRetriever
from polytask.composition.routing.nearest_task import NearestTask, Profile
from polytask.composition.routing.router import Known, Router, build, routers
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Answer, Engine, Request
from polytask.library import Library
from polytask.methods import build as method_of
from polytask.methods import passes
from polytask.methods.lifting import Active
from polytask.tasks import TaskCard

TOKENS = tiny.words(*"abcdefgh")
EVERY = math.inf  # a threshold by which nothing is foreign


def known(*μ: list[float], m: float = 0.9, s: float = 0.1, alone: str = "", kin: list[int] | None = None) -> Known:
    """Adapters "0", "1", ... of these means; those named in `alone` do not mix."""
    N = len(μ)
    ids = tuple(map(str, range(N)))
    return Known(
        ids,
        tuple(f"n{i}" for i in range(N)),
        torch.tensor(μ),
        torch.full((N,), m),
        torch.full((N,), s),
        torch.zeros(N, dtype=torch.bool),
        torch.tensor([i in alone for i in ids]),
        torch.tensor(kin or [0] * N),
    )


def constant(*z: float, d: int = 2, of: Known | None = None) -> Classifier:
    """A classifier with these logits, whatever it reads, for tasks whose inputs lie as these adapters' do."""
    widths = [d, *[HIDDEN] * 3, len(z)]
    tensors = {f"W{n}": torch.zeros(widths[n], widths[n - 1]) for n in range(1, 5)}
    tensors |= {f"b{n}": torch.zeros(widths[n]) for n in range(1, 4)} | {"b4": torch.tensor(z).float()}
    ids = tuple(map(str, range(len(z))))
    of = of or known(*[[1.0] * d] * len(z))
    return Classifier(ids, tuple(f"n{i}" for i in ids), tensors, of.μ, of.m, of.s, 1.0)


def all_fit(those: Known, rows: int = 1) -> Tensor:
    return torch.ones(rows, len(those.ids), dtype=torch.bool)


PLANE = known([1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0])


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_the_retriever_takes_the_nearest_alike():
    """x along the first mean: cosines 1, 0.8, 0, −1. z of the nearest is (1 − 0.9) / 0.1 = 1."""
    c = torch.tensor([1.0, 0.8, 0.0, -1.0])
    x = torch.tensor([[3.0, 0.0]])
    for k, weights in ((1, {"0": 1.0}), (2, {"0": 0.5, "1": 0.5}), (9, dict.fromkeys("0123", 0.25))):
        [found] = LoraRetriever(k=k).choose(PLANE, x, all_fit(PLANE))
        assert found.weights == weights
        assert [*found.weights] == [*weights]
        assert found.sure == pytest.approx(float((c / 0.05).softmax(0)[: len(weights)].sum()))
    only = torch.tensor([[False, True, True, False]])
    assert LoraRetriever(k=3).choose(PLANE, x, only)[0].weights == {"1": 0.5, "2": 0.5}
    assert LoraRetriever().choose(PLANE, x, ~all_fit(PLANE))[0].weights == {}
    assert LoraRetriever(threshold=EVERY).choose(PLANE, x, ~all_fit(PLANE))[0].weights == {}


def test_who_does_not_mix_answers_alone_or_not_at_all():
    x = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    first, other = LoraRetriever(k=2, threshold=EVERY).choose(
        replace(PLANE, alone=torch.eye(4)[1].bool()), x, all_fit(PLANE, 2)
    )
    assert first.weights == {"0": 0.5, "2": 0.5}
    assert other.weights == {"2": 0.5, "0": 0.5}
    first, other = LoraRetriever(k=2, threshold=EVERY).choose(
        replace(PLANE, alone=torch.eye(4)[0].bool()), x, all_fit(PLANE, 2)
    )
    assert first.weights == {"0": 1.0}
    assert other.weights == {"2": 0.5, "1": 0.5}
    kin = replace(PLANE, kin=torch.tensor([7, 8, 7, 8]))
    assert LoraFusion(k=2, threshold=EVERY).choose(kin, x[:1], all_fit(kin))[0].weights == {"0": 0.5, "2": 0.5}


@pytest.mark.parametrize(
    "how", [NearestTask(), LoraRetriever(), Centroid(), LoraFusion(), DLP(classifier=constant(2, 1, 0, -1, of=PLANE))]
)
def test_a_far_input_goes_to_nobody(how: Router):
    """Its cosine with the nearest, of those that it may go to, is 0.6: z = −3 is beyond 2 deviations."""
    fits = torch.tensor([[True, False, False, True]])
    near, far = torch.tensor([[0.8, 0.6]]), torch.tensor([[0.6, 0.8]])
    assert how.choose(PLANE, near, fits)[0].weights
    [none] = how.choose(PLANE, far, fits)
    assert none.weights == {}
    assert 0.9 < none.sure <= 1  # of the nearest, of those two
    assert how.choose(known(), near, torch.ones(1, 0, dtype=torch.bool))[0].weights == {}


def test_dlp_takes_the_most_probable():
    """z = 2, 1, 0, −1: p = 0.6439, 0.2369, 0.0871, 0.0321. Among the first two, 0.7311 and 0.2689."""
    x = torch.tensor([[1.0, 0.0]])
    for P, weights, sure in (
        (0.6, [1.0], 0.6439),
        (0.7, [0.7311, 0.2689], 0.8808),
        (0.9, [0.6652, 0.2447, 0.0900], 0.9679),
    ):
        [found] = DLP(p=P, threshold=EVERY, classifier=constant(2, 1, 0, -1)).choose(PLANE, x, all_fit(PLANE))
        assert [*found.weights] == list("012"[: len(weights)])
        assert [*found.weights.values()] == pytest.approx(weights, abs=1e-4)
        assert found.sure == pytest.approx(sure, abs=1e-4)
    [two] = DLP(p=1.0, most=2, threshold=EVERY, classifier=constant(2, 1, 0, -1)).choose(PLANE, x, all_fit(PLANE))
    assert [*two.weights.values()] == pytest.approx([0.7311, 0.2689], abs=1e-4)
    fits = torch.tensor([[False, False, True, True]])
    [rest] = DLP(p=0.9, threshold=EVERY, classifier=constant(2, 1, 0, -1)).choose(PLANE, x, fits)
    assert rest.weights == pytest.approx({"2": 0.7311, "3": 0.2689}, abs=1e-4)
    [one] = DLP(p=1.0, threshold=EVERY, classifier=constant(2, 1, 0, -1)).choose(
        replace(PLANE, alone=torch.eye(4)[0].bool()), x, all_fit(PLANE)
    )
    assert one.weights == {"0": 1.0}


def lora(A: list[float], B: float) -> Active:
    tensors = {"0.attn.q/A": torch.tensor([A]), "0.attn.q/B": torch.tensor([[B]])}
    return Active.of(method_of("lora", {"r": 1, "alpha": 1}), tensors)


@pytest.mark.parametrize(("x", "fusion"), [([1.0, 1.0], 2.0), ([1.0, 0.0], 1.0)])
def test_fusion_has_cross_terms(x: list[float], fusion: float):
    """A₁ = [1, 0], B₁ = 1, A₂ = [0, 1], B₂ = 3: the means are [½, ½] and 2. The mixture of the two is (x₁ + 3 x₂) / 2,
    which is the same 2 for [1, 1] and ½ for [1, 0]."""
    [(weight, active)] = fused_terms([((1.0, lora([1.0, 0.0], 1.0)),), ((1.0, lora([0.0, 1.0], 3.0)),)])
    method, p = active.equation("0.attn.q", None)
    Δ = method.delta(method.ready(p, {}), torch.tensor([x]), torch.zeros(1, 1))
    assert (weight, Δ.item()) == (1.0, fusion)


def test_what_cannot_be_fused_is_refused():
    one = ((1.0, lora([1.0, 0.0], 1.0)),)
    for other in (
        ((0.5, one[0][1]),),
        (*one, *one),
        ((1.0, replace(one[0][1], method=method_of("ia3"))),),
        ((1.0, replace(one[0][1], method=method_of("lora", {"r": 1, "alpha": 2}))),),
        ((1.0, Active(one[0][1].method, {"1.attn.q": one[0][1].at["0.attn.q"]})),),
    ):
        with pytest.raises(UsageError, match="fuse: ") as caught:
            fused_terms([one, other])
        one_line(caught.value)
    assert read("fuse(a, b, head=b)") == fuse("a", "b").read_by("b")
    assert str(fuse("a", "b")) == "fuse(a, b)"


def test_routers_by_name():
    assert {"nearest-task", "lora-retriever", "lora-fusion", "dlp-lora"} <= {*routers()}
    assert build("lora-retriever", {"k": "5", "threshold": "inf"}) == LoraRetriever(k=5, threshold=EVERY)
    for name, given, says in (
        ("oracle", {}, "no router 'oracle'; the routers are centroid, dlp-lora, "),
        ("lora-retriever", {"p": "1"}, "no hyperparameter 'p'; it has k, threshold"),
        ("lora-retriever", {"k": "0"}, "at least 1"),
        ("nearest-task", {"profiles": "1"}, "no hyperparameter 'profiles'; it has temperature, threshold"),
        ("dlp-lora", {"p": "1.5"}, "above 0 and up to 1"),
        ("dlp-lora", {"p": "half"}, "a float is needed"),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            build(name, given)
        one_line(caught.value)


# -- the classifier ----------------------------------------------------------------------------------------------------


def clouds(n: int = 40, d: int = 16) -> list[Tensor]:
    """Three tasks whose inputs lie around one mean, and differ in which pair of directions is long: a mean tells
    nothing of them."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, d, generator=draw) * (1 + 8 * (torch.arange(d) // 2 == t)) for t in range(3)]


TASKS = [("b", "second"), ("a", "first"), ("c", "third")]


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return Classifier.train(TASKS, clouds(400))


def test_a_classifier_learns_what_means_do_not_tell(trained: Classifier):
    assert trained.ids == ("a", "b", "c")
    assert trained.names == ("first", "second", "third")
    assert trained.right > 0.85
    new = clouds(600)
    found = [trained.logits(part[400:]).argmax(-1) for part in new]
    own = [trained.names.index(name) for _, name in TASKS]
    assert all((f == t).float().mean() > 0.8 for f, t in zip(found, own, strict=True))
    d, h, N = 16, HIDDEN, 3
    assert sum(t.numel() for t in trained.tensors.values()) == d * h + 2 * h * h + h * N + 3 * h + N
    assert EPOCHS > 1


def test_a_seed_gives_the_same_classifier_and_a_file_keeps_it(tmp_path: Path):
    first, second = (Classifier.train(TASKS, clouds(), block=2) for _ in range(2))
    path = tmp_path / "routers" / "dlp-lora.safetensors"
    first.save(path)
    kept = Classifier.load(path)
    assert (kept.ids, kept.names, kept.right, kept.block) == (first.ids, first.names, first.right, 2)
    for other in (second, kept):
        assert all(torch.equal(t, other.tensors[name]) for name, t in first.tensors.items())
        assert all(torch.equal(getattr(first, name), getattr(other, name)) for name in "μms")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_files_that_are_no_classifier(tmp_path: Path):
    path = tmp_path / "dlp-lora.safetensors"
    with pytest.raises(UsageError, match=r"not trained yet; train it with .*polytask library route TASK") as missing:
        Classifier.load(path)
    one_line(missing.value)
    constant(1, 2).save(path)
    whole = path.read_bytes()
    half, other = constant(1, 2), constant(1, 2, 3)
    replace(half, tensors={n: t for n, t in half.tensors.items() if n != "b2"}).save(tmp_path / "lacks")
    replace(half, tensors=other.tensors).save(tmp_path / "wide")
    replace(half, μ=torch.ones(3, 2)).save(tmp_path / "many")
    replace(half, s=torch.tensor([1.0, math.nan])).save(tmp_path / "none")
    others = [(tmp_path / name).read_bytes() for name in ("lacks", "wide", "many", "none")]
    for bad in (b"", whole[:100], whole[:-4], *others):
        path.write_bytes(bad)
        with pytest.raises(PolytaskError, match="damaged") as caught:
            Classifier.load(path)
        one_line(caught.value)


def test_a_classifier_of_an_earlier_version_is_to_be_trained_again(tmp_path: Path):
    path = tmp_path / "dlp-lora.safetensors"
    save_file({"W1": torch.zeros(2, 2)}, path, {"router": "dlp-lora", "version": "1", "ids": "[]", "names": "[]"})
    with pytest.raises(UsageError, match=r"by an earlier polytask, on other embeddings; train it with .*library route"):
        Classifier.load(path)


def test_pieces_are_some_neighbouring_words():
    texts = [" ".join(f"w{i}" for i in range(n)) for n in (0, 1, 2, 3, 8, 40)] * 50
    found = pieces(texts)
    assert found == pieces(texts)
    assert found != pieces(texts, seed=1)
    for text, piece in zip(texts, found, strict=True):
        n, words = len(text.split()), piece.split()
        assert f" {piece} " in f" {text} "
        assert min(n, 3) <= len(words) <= 12
    assert {len(piece.split()) for piece in found[5::6]} == {*range(3, 13)}


def test_pieces_are_learnt_too():
    """Of two tasks, inputs that differ in one direction and pieces in another: without pieces nothing is known of
    these. An input that is kept apart keeps its piece apart."""
    draw = torch.Generator().manual_seed(0)
    whole, parts = ([torch.randn(100, 8, generator=draw) for _ in range(2)] for _ in range(2))
    for t in range(2):
        whole[t][:, 0] += 9 * (-1) ** t
        parts[t][:, 1] += 9 * (-1) ** t
    new = torch.randn(200, 8, generator=draw)
    own = torch.arange(200) % 2
    new[:, 1] += 9.0 * (-1) ** own

    def right(*pieces: list[Tensor]) -> float:
        made = Classifier.train([("a", "a"), ("b", "b")], whole, *pieces)
        assert made.right == 1.0
        both = torch.tensor([1.0, 1.0]) / 2**0.5 if pieces else torch.tensor([1.0, 0.0])
        torch.testing.assert_close(made.μ[0, :2], both, atol=0.1, rtol=0)
        return float((made.logits(new).argmax(-1) == own).float().mean())

    assert right(parts) > 0.95
    assert right() < 0.8


def test_training_needs_several_tasks_with_inputs():
    with pytest.raises(UsageError, match="two of one backbone"):
        Classifier.train(TASKS[:1], clouds()[:1])
    with pytest.raises(UsageError, match="first has fewer than two"):
        Classifier.train(TASKS[:2], [clouds()[0], clouds()[1][:1]])


def test_a_classifier_refuses_other_adapters(trained: Classifier):
    x = torch.ones(1, 16)
    now = known([1.0] + [0.0] * 15, [0.0] * 15 + [1.0])
    with pytest.raises(UsageError, match=r"new: n0, n1; gone: first, second, third\); train it") as caught:
        DLP(classifier=trained).choose(now, x, all_fit(now))
    one_line(caught.value)
    three = replace(known(*[[1.0] * 16] * 3), ids=("a", "b", "d"), names=trained.names)
    with pytest.raises(UsageError, match="other versions"):
        DLP(classifier=trained).choose(three, x, all_fit(three))
    with pytest.raises(UsageError, match="not trained yet"):
        DLP().choose(three, x, all_fit(three))


# -- through the engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


def adapter_of(
    backbone: Backbone, name: str, words: str, method: str = "lora", seed: int = 0, **hyper: object
) -> Adapter:
    """An adapter with random tensors whose task has texts of these words."""
    head = HeadCard(kind="classification", targets=(name, "no"), pair="separate" if name == "pairs" else "none")
    m = method_of(method, hyper)
    draw = torch.Generator().manual_seed(seed)
    first = {f"head/{n}": 20 * t for n, t in heads.start(head, backbone.hidden_size, seed).items()}
    started = first | m.start(backbone, seed)
    tensors = {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in started.items()}
    texts = [" ".join(words[:i] + words[i:]) for i in range(1, 5)] + [" ".join(words[::-1])] + [*words]
    profile = Profile.of(Engine(backbone).embed(texts)).tensors()
    card = Card(name=name, task=TaskCard(name=name, kind="classification"))
    return Adapter(method, m.hyperparameters(), tensors | profile, backbone.card(), card, head)


@pytest.fixture(scope="module")
def engine(backbone: Backbone) -> Engine:
    made = [
        adapter_of(backbone, name, words, seed=seed)
        for seed, (name, words) in enumerate({"early": "abc", "late": "fgh", "middle": "cde"}.items())
    ]
    made.append(adapter_of(backbone, "pairs", "abc", seed=8))
    made.append(adapter_of(backbone, "scales", "dfh", "ia3", seed=9))
    return Engine(backbone, adapters=made)


def classifier(engine: Engine) -> Classifier:
    texts = {"early": "abc", "late": "fgh", "middle": "cde", "pairs": "abc", "scales": "dfh"}
    pairs = [*zip(engine.known.ids, engine.known.names, strict=True)]
    return learned(engine.backbone, pairs, [[*texts[name], texts[name]] for _, name in pairs])


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "deberta-v2"])
def test_a_gist_is_the_middle_and_the_end(family: str):
    """Means over a text's own tokens, of what block 1 of 3 reads and of the last states, which count 1.5 times."""
    backbone = tiny.backbone(family, tokenizer=TOKENS)
    texts = ["a b c", "f", "h g f e d c b a"]
    found = passes.gist(backbone, texts)
    for text, e in zip(texts, found, strict=True):
        [ids] = backbone.tokenize([text])
        states = backbone.reader(input_ids=torch.tensor([ids]), output_hidden_states=True)
        middle, end = (F.normalize(h[0].mean(0), dim=0) for h in (states.hidden_states[1], states.last_hidden_state))
        expected = torch.cat([middle, 1.5 * end]) / (1 + 1.5**2) ** 0.5
        torch.testing.assert_close(e, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:2], passes.gist(backbone, texts[1:2]), rtol=1e-4, atol=1e-5)
    assert passes.gist(backbone, []).shape == (0, 64)


def test_last_states_alone_have_their_own_profile(engine: Engine, backbone: Backbone):
    """What `centroid` reads: the second half of a gist, with its own mean and cosines."""
    texts = ["a b", "b c d", "c", "a c e", "b e"]
    late = F.normalize(passes.embed(backbone, texts), dim=-1)
    own = Profile.of(passes.gist(backbone, texts))
    apart = Profile.of(torch.cat([torch.zeros_like(late), late], -1))
    assert own.late == pytest.approx((apart.typical, apart.spread), abs=1e-5)
    card = Card(name="one", task=TaskCard(name="one", kind="classification"))
    tensors = {"head/W": torch.zeros(2, 32), "head/b": torch.zeros(2)} | own.tensors()
    one = Adapter("head", {}, tensors, backbone.card(), card, HeadCard(kind="classification", targets=("x", "y")))
    those = Known.of([one], last=True)
    torch.testing.assert_close(those.μ[0], F.normalize(late.mean(0), dim=0), rtol=1e-4, atol=1e-5)
    assert (those.m.item(), those.s.item()) == pytest.approx(own.late)
    assert engine.embed(texts, reads=Centroid().reads).shape == (5, 32)


def test_a_profile_of_an_earlier_version_is_told(backbone: Backbone):
    one = adapter_of(backbone, "early", "abc")
    old = replace(one, tensors=one.tensors | {"task/mean": torch.ones(32), "task/spread": torch.tensor([0.9, 0.1])})
    here = Engine(backbone, adapters=[old])
    assert here.answer([Request("a b", adapter="early")])[0].output in ("early", "no")
    with pytest.raises(
        PolytaskError, match=r"early \(\w+\) keeps 32 numbers of its task, .* routed by 64: .*adapt it"
    ) as e:
        here.answer([Request("a b")])
    one_line(e.value)


TEXTS = ["a b c", "f g h", "c d e", "a b", "h f", "d", "a b\tc a", "e c d", "b", "d f h"]


def how(name: str, engine: Engine) -> Router:
    return {
        "nearest-task": NearestTask(threshold=EVERY),
        "lora-retriever": LoraRetriever(threshold=EVERY),
        "centroid": Centroid(threshold=EVERY),
        "lora-fusion": LoraFusion(threshold=EVERY),
        "dlp-lora": DLP(p=0.95, threshold=EVERY, classifier=classifier(engine)),
    }[name]


@pytest.mark.parametrize("name", ["nearest-task", "lora-retriever", "centroid", "lora-fusion", "dlp-lora"])
def test_a_batch_is_answered_as_each_alone(engine: Engine, name: str):
    router = how(name, engine)
    together = engine.answer([Request(text) for text in TEXTS], router=router)
    several = 0
    for text, answer in zip(TEXTS, together, strict=True):
        same(engine.answer([Request(text)], router=router)[0], answer)
        assert answer.routed is not None
        assert 0 < answer.routed <= 1
        assert ("\t" in text) == (answer.name == "pairs")
        if answer.by is None:
            same(engine.answer([Request(text, adapter=answer.name)])[0], answer)
            continue
        several += 1
        asked = read(answer.by)
        assert isinstance(asked, Fuse if name == "lora-fusion" else Mix)
        assert {*asked.names()} <= {"early", "late", "middle", *(() if name == "lora-fusion" else ("scales",))}
        assert next(asked.names()) == answer.name
        same(engine.answer([Request(text, adapter=answer.by)])[0], answer, 1e-3)
    assert (several > 5) == (name != "nearest-task")


def same(one: Answer, other: Answer, tolerance: float = 1e-5) -> None:
    assert (one.output, one.adapter, one.name) == (other.output, other.adapter, other.name)
    assert one.probability == pytest.approx(other.probability, abs=tolerance)


def test_an_engine_has_a_router_of_its_own(backbone: Backbone, engine: Engine):
    own = Engine(backbone, adapters=engine.adapters, router=LoraRetriever(k=2, threshold=EVERY))
    [answer] = own.answer([Request("a b c")])
    [other] = own.answer([Request("a b c")], router=NearestTask(threshold=EVERY))
    assert answer.by is not None
    assert answer.by.startswith("0.5 * ")
    assert (other.by, other.name) == (None, answer.name)
    [named] = own.answer([Request("a b c", adapter="late")])
    assert (named.by, named.routed, named.name) == (None, None, "late")


def test_known_follows_what_is_loaded(backbone: Backbone, engine: Engine):
    own = Engine(backbone, adapters=engine.adapters)
    assert own.known is own.known
    ids = own.known.ids
    assert ids == tuple(sorted(ids))
    own.drop(own.find("late"))
    assert {*ids} - {*own.known.ids} == {engine.find("late")}
    assert own.known.pairs.tolist() == [name == "pairs" for name in own.known.names]
    kin = dict(zip(own.known.names, own.known.kin.tolist(), strict=True))
    assert kin["early"] == kin["middle"] == kin["pairs"] != kin["scales"]
    added = adapter_of(backbone, "wide", "gh", r=3)
    own.add(added)
    kin = dict(zip(own.known.names, own.known.kin.tolist(), strict=True))
    assert kin["wide"] not in (kin["early"], kin["scales"])
    kept = replace(
        added,
        method="expression",
        hyperparameters={"expression": "early", "over": ["early"]},
        card=added.card.model_copy(update={"name": "kept"}),
    )
    alone = Known.of([added, kept])
    assert dict(zip(alone.names, alone.alone.tolist(), strict=True)) == {"wide": False, "kept": True}
    bare = replace(added, tensors={n: t for n, t in added.tensors.items() if not n.startswith("task/")})
    assert Known.of([bare]).ids == ()


def test_a_name_is_a_name():
    assert LoraRetriever().expression({"a": 1.0}) == LoraFusion().expression({"a": 1.0}) == Name("a")
    assert str(LoraFusion().expression({"a": 0.5, "b": 0.5})) == "fuse(a, b, head=a)"
    assert str(LoraRetriever().expression({"a": 0.75, "b": 0.25})) == "0.75 * a + 0.25 * b"


# -- on the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_backbone() -> Iterator[None]:
    from functools import cache

    import polytask.backbones

    real = polytask.backbones.load
    polytask.backbones.load = cache(real)
    yield
    polytask.backbones.load = real


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_table(folder / "things.csv")
    write_pairs(folder / "pairs.jsonl")
    (folder / "moods.csv").write_text(
        "text,mood\n"
        + "".join(
            f"I am so {w} today,{m}\nwhat a {w} day,{m}\n"
            for w, m in (
                ("happy", "up"),
                ("glad", "up"),
                ("merry", "up"),
                ("jolly", "up"),
                ("sad", "down"),
                ("gloomy", "down"),
                ("angry", "down"),
                ("tired", "down"),
            )
        )
    )
    for source, more in (
        ("things.csv", ()),
        ("moods.csv", ()),
        ("pairs.jsonl", ("--pair", "second", "-i", "first", "-o", "same")),
    ):
        done = run("adapt", folder / source, "-l", folder / "skills", "--method", "head", *more)
        assert done.status == 0, done.err
    return folder


def test_predict_with_a_router(skills: Path):
    asked = ["predict", "-l", skills / "skills", "--router", "lora-retriever"]
    lines = (
        b"I bought a melon\nwhat a merry day\nI bought a saw\tthe saw is mine\nLe Congres a ratifie le traite a Geneve."
    )
    thing, mood, pair, far = run(*asked, "--set", "k=2", "--json", stdin=lines).lines
    assert (thing["name"], thing["by"]) == ("things", "0.5 * things + 0.5 * moods")
    assert (mood["name"], mood["by"]) == ("moods", "0.5 * moods + 0.5 * things")
    assert pair["name"] == "pairs"
    assert "by" not in pair
    assert (far["output"], far["adapter"]) == (None, None)
    shown = run(*asked, stdin=lines).out.splitlines()
    assert [line.split("\t")[2] for line in shown] == [
        "0.5 * things + 0.5 * moods",
        "0.5 * moods + 0.5 * things",
        "pairs",
        "-",
    ]
    for arguments, says in (
        (["--router", "oracle"], "no router 'oracle'"),
        (["--router", "lora-retriever", "--set", "p=1"], "no hyperparameter 'p'"),
        (["--router", "lora-retriever", "-a", "things"], "give one"),
        (["--router", "dlp-lora"], "not trained yet; train it with the tasks' data: polytask library route TASK"),
    ):
        done = run("predict", "-l", skills / "skills", *arguments, stdin=b"a text")
        assert done.status == 2
        assert says in done.error


def test_a_router_is_trained_asked_and_outdated(skills: Path, tmp_path: Path):
    library = Path(shutil.copytree(skills / "skills", tmp_path / "skills"))
    same_pairs = tmp_path / "pairs"
    same_pairs.mkdir()
    shutil.copy(skills / "pairs.jsonl", same_pairs / "train.jsonl")
    (same_pairs / "task.yaml").write_text("name: pairs\ncolumns: {input: first, pair: second, output: same}\n")
    short = run("library", "route", skills / "things.csv", same_pairs, "-l", library)
    assert short.status == 2
    assert "those of moods are not given" in short.error
    tasks = [skills / "things.csv", skills / "moods.csv", same_pairs]
    done = run("library", "route", *tasks, "-l", library, "--json")
    assert done.status == 0, done.err
    assert {*done.json["names"]} == {"things", "moods", "pairs"}
    assert 0 < done.json["right"] <= 1
    lines = b"I bought a melon\nwhat a merry day\nI bought a saw\tthe saw is mine"
    found = run("predict", "-l", library, "--router", "dlp-lora", "--json", stdin=lines).lines
    assert [row["name"] for row in found] == ["things", "moods", "pairs"]
    Library(library).remove("moods")
    old = run("predict", "-l", library, "--router", "dlp-lora", stdin=lines)
    assert old.status == 2
    assert "gone: moods); train it" in old.error
    other = run("library", "route", skills / "moods.csv", skills / "things.csv", same_pairs, "-l", library)
    assert "no adapter of this task" in other.error
