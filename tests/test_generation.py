"""Writing: rows that are written together get what each gets alone, and alone what Hugging Face's `generate` gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.convert_slow_tokenizer import bytes_to_unicode
from writers import LENGTH, clean, drawn, refused, tensors_of, tokenizer, writer

from polytask.adapters import Adapter, Card
from polytask.adapters.expression import mix
from polytask.backbones import Backbone
from polytask.backbones.text import Asked
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Ask, Engine
from polytask.inference.engine import WRITER
from polytask.inference.generation import generate, sample, stream
from polytask.inference.writing import Prompt, Sampling, Written, settled, vocabulary_size
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat
from polytask.tasks import TaskCard

METHODS = ("lora", "bottleneck", "ia3", "full")
BYTES = [tokenizer().convert_tokens_to_ids(letter) for _, letter in sorted(bytes_to_unicode().items())]


@cache
def backbone_of(family: str) -> Backbone:
    return writer(family)


@cache
def plan_of(family: str) -> Plan:
    backbone = backbone_of(family)
    return Plan(backbone, [Active.of(build(name), tensors_of(backbone, name, k)) for k, name in enumerate(METHODS)])


WEIGHTS = torch.tensor([[0.0] * 4, *torch.eye(4).tolist(), [0.5, 0.5, 0, 0], [0, 0, 0.7, 0.3]])


@cache
def engine() -> Engine:
    """With an adapter of each method, under its name."""
    backbone = backbone_of("llama")
    card = TaskCard(name="none", kind="generation")
    made = [
        Adapter(n, build(n).hyperparameters(), tensors_of(backbone, n, k), backbone.card(), Card(name=n, task=card))
        for k, n in enumerate(METHODS)
    ]
    return Engine(backbone, adapters=made)


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Whatever a test does, the shared backbones are bit-identical afterwards, and no hook is left."""
    yield
    assert torch.is_grad_enabled()
    for family in ("llama", "gpt2", "t5"):
        clean(backbone_of(family))


def mixed(n: int = 20, *, most: int = 26) -> list[Prompt]:
    """Rows of all weights, short and long, some greedy and some drawn: at a low temperature, where two tokens are
    rarely so near each other that rounding decides which comes first."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, most, (n,), generator=draw).tolist()
    return [
        Prompt(
            drawn(length, draw),
            WEIGHTS[i % len(WEIGHTS)],
            Sampling(max_tokens=3 + 5 * i % 14, temperature=0.3 * (i % 2), top_p=1.0 - 0.1 * (i % 3), seed=i),
        )
        for i, length in enumerate(lengths)
    ]


def same(a: Written, b: Written) -> None:
    assert (a.tokens, a.text, a.ended) == (b.tokens, b.text, b.ended)
    assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


# -- against Hugging Face ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "t5", "bart"])
def test_greedy_tokens_are_those_of_hugging_face(family: str) -> None:
    """Ends included: a token that came up is made one more end of sequence, and the answer stops there."""
    backbone = writer(family, **({"decoder_start_token_id": 9} if family in ("t5", "bart") else {}))
    draw = torch.Generator().manual_seed(3)
    model: Any = backbone.model
    ends = 0
    for length in (1, 7, 20):
        ids = drawn(length, draw)
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length, dtype=torch.long)}
        end = [tokenizer().eos_token_id]
        for _ in range(3):
            model.generation_config.eos_token_id = end
            out = model.generate(**given, do_sample=False, max_new_tokens=25, forced_eos_token_id=None, pad_token_id=1)
            right = out[0, 1 if backbone.kind == "encoder-decoder" else length :].tolist()
            [found] = generate(Plan(backbone, []), [Prompt(ids, None, Sampling(max_tokens=25))])
            assert list(found.tokens) == right
            ended = right[-1] in end
            assert found.ended == ("end" if ended else "length")
            assert found.text == tokenizer().decode(right[: len(right) - ended], skip_special_tokens=True)
            ends += ended
            end = [*end, next((t for i, t in enumerate(right) if i >= 2 and t not in right[:i]), right[0])]
    assert ends >= 6


# -- a batch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_rows_of_a_batch_are_written_as_each_alone(family: str) -> None:
    """More rows than places, no adapter, four kinds, and mixtures; and with the probabilities of a whole pass."""
    plan, prompts = plan_of(family), mixed()
    together = generate(plan, prompts, places=6)
    for prompt, found in zip(prompts, together, strict=True):
        same(found, generate(plan, [prompt])[0])
        asked = passes.answered(plan.backbone, [Asked([*prompt.ids], [*found.tokens])])
        [log_p] = passes.logprobs(plan, [Seat(WRITER, {}, prompt.weights)], asked, [0])
        assert found.logprob == pytest.approx(float(log_p.sum()), abs=1e-3)
        said = found.tokens[:-1] if found.ended == "end" else found.tokens
        assert found.text == tokenizer().decode(said, skip_special_tokens=True)
        assert (found.ended == "length") == (len(said) == prompt.sampling.max_tokens)
    assert len({found.tokens for found in together}) > len(prompts) / 2  # or rows taken for each other would pass
    for a, b in zip(generate(plan, prompts, places=32), together, strict=True):
        same(a, b)


@pytest.mark.parametrize("family", [*tiny.LM])
def test_adapters_act_at_every_site_as_in_a_whole_pass(family: str) -> None:
    """Step by step and without modules too: each token's probability is that of the pass over prompt and answer."""
    backbone = writer(family)
    sites = [name for name in backbone.sites if name != "head"]
    adapters = []
    for seed, name in enumerate(("lora", "bottleneck", "ia3")):
        method = build(name, {"sites": sites})
        start = method.start(backbone, seed, writing=True)
        draw = torch.Generator().manual_seed(seed)
        adapters.append(
            Active.of(method, {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in start.items()})
        )
    plan = Plan(backbone, adapters)
    rows = [(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0.4, 0.3, 0.3), (0, 0, 0)]
    draw = torch.Generator().manual_seed(2)
    prompts = [Prompt(drawn(2 + 3 * i, draw), torch.tensor(w), Sampling(max_tokens=8)) for i, w in enumerate(rows)]
    found = generate(plan, prompts)
    units = passes.answered(backbone, [Asked([*p.ids], [*w.tokens]) for p, w in zip(prompts, found, strict=True)])
    log_p = passes.logprobs(plan, [Seat(WRITER, {}, p.weights) for p in prompts], units, range(5))
    for one, right in zip(found, log_p, strict=True):
        assert one.logprob == pytest.approx(float(right.sum()), abs=1e-3)
    assert len({round(one.logprob, 4) for one in found}) == 5


def test_an_adapter_changes_what_is_written_and_a_weight_of_zero_does_not() -> None:
    plan, ids = plan_of("llama"), [9, 8, 7, 6]
    found = generate(plan, [Prompt(ids, w, Sampling(max_tokens=12)) for w in (None, *WEIGHTS)])
    same(found[0], found[1])
    same(found[0], generate(Plan(plan.backbone, []), [Prompt(ids, None, Sampling(max_tokens=12))])[0])
    assert len({round(one.logprob, 2) for one in found}) == len(WEIGHTS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_a_row_that_fills_the_models_positions_ends_beside_rows_that_go_on(family: str) -> None:
    plan = Plan(writer(family), [])
    draw = torch.Generator().manual_seed(0)
    sizes = [(LENGTH - 4, 200), (3, 60), (LENGTH - 1, 9), (5, 200), (2, 40)]
    prompts = [Prompt(drawn(n, draw), None, Sampling(max_tokens=m)) for n, m in sizes]
    found = generate(plan, prompts)
    for prompt, one in zip(prompts, found, strict=True):
        same(one, generate(plan, [prompt])[0])
        used = len(prompt.ids) if family in ("llama", "gpt2") else 1
        room = min(prompt.sampling.max_tokens, LENGTH - used)
        assert one.ended == "end" or (one.ended, len(one.tokens)) == ("length", room)
    assert sum(one.ended == "length" for one in found) >= 3
    # And beside some that began later: it ends alone, and stays in its place until more have ended.
    later = [prompts[3], *(Prompt(drawn(3, draw), None, Sampling(max_tokens=60)) for _ in range(40))]
    for prompt, one in list(zip(later, generate(plan, later), strict=True))[::20]:
        same(one, generate(plan, [prompt])[0])


def test_a_chain_of_waiting_rows_goes_through_two_places() -> None:
    """Short answers do not wait for the long one beside them."""
    plan = plan_of("llama")
    prompts = [Prompt([5] * 20, None, Sampling(max_tokens=40))]
    prompts += [Prompt([6 + i, 7], WEIGHTS[i % 4], Sampling(max_tokens=2 + i % 3)) for i in range(9)]
    order: list[int] = []
    for piece in stream(plan, [p for p in prompts if p.weights is None or not p.weights[3]], places=2):
        if piece.ended:
            order.append(piece.row)
    assert order[-1] == 0
    assert sorted(order) == list(range(len(order)))


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_seeds_reproduce_and_differ() -> None:
    plan = plan_of("llama")

    def drawn_by(seeds: Sequence[int], **rule: Any) -> list[tuple[int, ...]]:
        rules = [Sampling(max_tokens=15, seed=seed, **rule) for seed in seeds]
        return [found.tokens for found in generate(plan, [Prompt([5, 6, 7], WEIGHTS[1], rule) for rule in rules])]

    first = drawn_by([0, 1, 2, 0], temperature=1.0)
    assert first[0] == first[3]
    assert len(set(first)) == 3
    assert drawn_by([2, 1], temperature=1.0) == [first[2], first[1]]
    [greedy] = drawn_by([0])
    assert drawn_by([0, 1], temperature=1e-4) == [greedy] * 2
    assert drawn_by([0, 1], temperature=1.0, top_p=1e-6) == [greedy] * 2


def nucleus(logits: list[float], top_p: float, u: float) -> int | None:
    """By the book, in double precision; None where rounding could decide."""
    z = np.array(logits, dtype=np.float64)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    order = np.argsort(-p, kind="stable")
    kept: list[int] = []
    total = 0.0
    for i in order:
        if abs(total - top_p) < 1e-5:
            return None
        if total >= top_p:
            break
        kept.append(int(i))
        total += p[i]
    at = u * total
    upto = 0.0
    for i in sorted(kept):
        upto += p[i]
        if abs(upto - at) < 1e-5:
            return None
        if upto > at:
            return i
    return None


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(-40, 40), min_size=7, max_size=7),
            st.floats(0.01, 1.0),
            st.floats(0.0, 1.0, exclude_max=True, width=32),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_token_is_drawn_from_the_nucleus(rows: list[tuple[list[int], float, float]]) -> None:
    logits = [[z / 8 for z in row] for row, _, _ in rows]
    right = [nucleus(z, top_p, u) for z, (_, top_p, u) in zip(logits, rows, strict=True)]
    assume(any(i is not None for i in right))
    top_p, u = (torch.tensor([row[k] for row in rows]) for k in (1, 2))
    found = sample(torch.tensor(logits), top_p, u).tolist()
    for a, b in zip(found, right, strict=True):
        assert b is None or a == b


def test_draws_by_hand() -> None:
    """p = 0.2, 0.5, 0.3: of the nucleus of 0.6 are the last two, with 5/8 and 3/8."""
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, 3)
    u = torch.tensor([0.0, 0.62, 0.63, 0.999, 0.19, 0.21])
    assert sample(logits, torch.tensor([0.6, 0.6, 0.6, 0.6, 1.0, 1.0]), u).tolist() == [1, 1, 2, 2, 0, 1]
    barred = torch.tensor([[-torch.inf, 1.0, -torch.inf]]).expand(3, 3)
    assert sample(barred, torch.tensor([1.0, 0.1, 1.0]), torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [1, 1, 1]


def test_frequencies_are_the_probabilities() -> None:
    draw = torch.Generator().manual_seed(0)
    n = 40_000
    logits = torch.randn(12, generator=draw)
    p = logits.softmax(-1)
    for top_p in (1.0, 0.7):
        found = sample(logits.expand(n, 12), torch.full((n,), top_p), torch.rand(n, generator=draw))
        ranked = p.sort(descending=True)
        kept = ranked.indices[ranked.values.cumsum(0) - ranked.values < top_p]
        right = torch.zeros(12).index_put((kept,), p[kept] / p[kept].sum())
        frequency = torch.bincount(found, minlength=12) / n
        assert (frequency - right).abs().max() < 5 * (0.25 / n) ** 0.5
        assert (frequency[right == 0] == 0).all()


def test_frequencies_of_answers_are_the_models_at_their_temperature() -> None:
    """Rows differ in their seeds alone; their first random numbers are spread as they should be."""
    backbone = backbone_of("gpt2")
    n, T = 600, 0.15
    rules = [Sampling(max_tokens=1, temperature=T, seed=seed) for seed in range(n)]
    found = generate(Plan(backbone, []), [Prompt([5, 6], None, rule) for rule in rules], places=200)
    logits = backbone.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    p = (logits / T).softmax(-1)
    frequency = torch.bincount(torch.tensor([one.tokens[0] for one in found]), minlength=len(p)) / n
    top = p.topk(5).indices
    assert 0.3 < p[top].sum() < 0.9
    sd = (p[top] * (1 - p[top]) / n) ** 0.5
    assert ((frequency[top] - p[top]).abs() < 4 * sd).all()
    right = logits.log_softmax(-1)
    for one in found[:5]:  # before temperature
        assert one.logprob == pytest.approx(float(right[one.tokens[0]]), abs=1e-4)


# -- texts: a model that writes what it is told ----------------------------------------------------------------------


@cache
def scripted() -> Backbone:
    """GPT-2 whose every weight is zero but for positions, one-hot vectors of the token that comes next."""
    V = len(tokenizer())
    width = V + V % 2
    config = GPT2Config(vocab_size=V, n_positions=512, n_embd=width, n_layer=1, n_head=2, n_inner=2)
    config.tie_word_embeddings, config.eos_token_id = False, tokenizer().eos_token_id
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_()
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                p.fill_(1.0)
        model.lm_head.weight[:, :V] = torch.eye(V)
    return Backbone(model, tokenizer(), "scripted", precision="fp32", device="cpu")


def say(*scripts: Sequence[int]) -> list[Prompt]:
    """Prompts to which `scripted` writes these tokens, one script after the other along its positions."""
    model: Any = scripted().model
    along = [token for script in scripts for token in script]
    assert len(along) <= 512
    model.transformer.wpe.weight.data.zero_()[torch.arange(len(along)), torch.tensor(along)] = 1.0
    starts = np.cumsum([0, *map(len, scripts)])[:-1]
    return [Prompt([5] * (int(at) + 1)) for at in starts]


def told(prompt: Prompt, **rule: Any) -> Prompt:
    return Prompt(prompt.ids, None, Sampling(**rule), prompt.lead)


END = tokenizer().eos_token_id
JAPANESE = "日本語のcafé 👩‍🔬 naïve"


def test_a_letter_is_given_out_when_it_is_whole() -> None:
    by_byte = [BYTES[value] for value in JAPANESE.encode()]
    plan = Plan(scripted(), [])
    prompts = say([*by_byte, END], [*tokenizer().encode(JAPANESE), END])
    pieces: dict[int, list[str]] = {0: [], 1: []}
    for piece in stream(plan, prompts):
        assert "\ufffd" not in piece.text
        pieces[piece.row].append(piece.text)
    assert "".join(pieces[1]) == JAPANESE
    assert pieces[0][: len(by_byte)] == [
        letter if last else "" for letter in JAPANESE for last in [False] * (len(letter.encode()) - 1) + [True]
    ]


def test_a_stop_text_ends_the_answer_before_it_and_is_never_given_out() -> None:
    plan = Plan(scripted(), [])
    text = "the cat\n\nInput: no"
    ways = [[BYTES[value] for value in text.encode()], tokenizer().encode(text)]
    for way in ways:
        for stops, right in [
            (("\n\n",), "the cat"),
            (("\nInput", "no"), "the cat\n"),
            (("x", "at\n\nI"), "the c"),
            (("the",), ""),
            (("dog", "no way"), text),
        ]:
            [prompt] = say([*way, END])
            given = list(stream(plan, [told(prompt, stop=stops)]))
            said = "".join(p.text for p in given)
            assert said == right
            assert given[-1].ended == ("end" if right == text else "stop")
            assert not any(p.ended for p in given[:-1])
            assert generate(plan, [told(prompt, stop=stops)])[0].text == right


def written_by(tokens: Sequence[int], stops: Sequence[str]) -> str:
    """Token by token: up to the stop text that is there first."""
    for n in range(1, len(tokens) + 1):
        text = tokenizer().decode(tokens[:n], skip_special_tokens=True)
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)]
    return tokenizer().decode(tokens, skip_special_tokens=True)


letters = st.text(
    st.sampled_from(["a", "b", "é", "日", "本", "👩", " "]) | st.characters(exclude_categories=["Cs"]), max_size=9
)


@settings(max_examples=35, deadline=None)
@given(
    texts=st.lists(
        st.tuples(letters, st.booleans(), st.lists(letters.filter(bool), max_size=2), st.integers(0, 9)),
        min_size=1,
        max_size=4,
    )
)
@example([("ab日", True, ["b日"], 9), ("ab日本", True, ["日本", "本"], 1)])
def test_pieces_are_the_text_and_no_piece_is_taken_back(texts: list[tuple[str, bool, list[str], int]]) -> None:
    scripts, rules = [], []
    for text, by_byte, stops, at in texts:
        ways = [BYTES[value] for value in text.encode()] if by_byte else tokenizer().encode(text)
        scripts.append([*ways, END])
        rules.append((*stops, *filter(None, [text[at // 3 : at]])))
    prompts = [told(p, stop=stops) for p, stops in zip(say(*scripts), rules, strict=True)]
    pieces: list[list[str]] = [[] for _ in prompts]
    for piece in stream(Plan(scripted(), []), prompts):
        pieces[piece.row].append(piece.text)
    for (text, _, _, _), script, stops, said in zip(texts, scripts, rules, pieces, strict=True):
        right = written_by(script[:-1], stops)
        assert "".join(said) == right
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in said)
    assert ["".join(said) for said in pieces] == [w.text for w in generate(Plan(scripted(), []), prompts, places=2)]


@settings(max_examples=200, deadline=None)
@given(
    whole=st.text("ab日é", max_size=8),
    stops=st.lists(st.text("ab日é", min_size=1, max_size=4), max_size=3),
    size=st.integers(0, 24),
)
@example("ab日", ["b日"], 3)
def test_what_is_settled_is_never_taken_back(whole: str, stops: list[str], size: int) -> None:
    data = whole.encode()
    text = data[:size].decode(errors="replace")
    assume(not any(stop in text for stop in stops))
    upto = settled(text, stops)
    final = whole
    for n in range(len(whole) + 1):  # letter by letter
        places = [whole[:n].find(stop) for stop in stops if stop in whole[:n]]
        if places:
            final = whole[: min(places)]
            break
    assert final.startswith(text[:upto])
    # And nothing is held back that could be given.
    sure = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(len(stop)) if sure.endswith(stop[:n])), default=0)
    assert upto == len(sure) - held


def test_settled_by_hand() -> None:
    assert settled("the cat", []) == 7
    assert settled("the cat\n", ["\n\n"]) == 7
    assert settled("caf\ufffd", []) == 3
    assert settled("Inp", ["Input:", "np"]) == 0
    assert settled("a stop", ["stopped", "top"]) == 2
    assert settled("", ["x"]) == 0


def test_what_stands_before_the_answer_is_no_part_of_it() -> None:
    """`lead`: also where the model leaves it out, or writes it in other tokens."""
    plan = Plan(scripted(), [])
    encode = tokenizer().encode
    scripts = [
        encode(" cat"),
        [*encode(" "), *encode("cat")],
        encode("cat"),
        encode("  cat"),
        encode("\n\ncat"),
        encode(" "),
    ]
    prompts = [Prompt(p.ids, None, p.sampling, " ") for p in say(*[[*s, END] for s in scripts])]
    found = generate(plan, prompts)
    assert [one.text for one in found] == ["cat", "cat", "cat", " cat", "\n\ncat", ""]
    [prompt] = say([*encode("\n\ncat\n\n"), END])
    [one] = generate(plan, [Prompt(prompt.ids, None, Sampling(stop=("\n\n",)), "\n\n")])
    assert (one.text, one.ended) == ("cat", "stop")
    [prompt] = say([*map(BYTES.__getitem__, b"\n\ncat\n"), END])
    pieces = [piece.text for piece in stream(plan, [Prompt(prompt.ids, None, Sampling(), "\n\n")])]
    assert pieces == ["", "", "c", "a", "t", "\n", ""]


def test_special_tokens_are_not_text() -> None:
    user = tokenizer().convert_tokens_to_ids("<|user|>")
    [prompt] = say([*tokenizer().encode("the"), user, *tokenizer().encode(" cat"), END])
    [found] = generate(Plan(scripted(), []), [prompt])
    assert (found.text, found.ended, user in found.tokens) == ("the cat", "end", True)


def test_a_limit_counts_tokens_and_not_the_end() -> None:
    the, cat = tokenizer().encode("the cat")
    [prompt] = say([the, cat, END])
    for most, right in [(1, ("the", (the,), "length")), (2, ("the cat", (the, cat), "length"))]:
        [found] = generate(Plan(scripted(), []), [told(prompt, max_tokens=most)])
        assert (found.text, found.tokens, found.ended) == right
    [found] = generate(Plan(scripted(), []), [told(prompt, max_tokens=3)])
    assert (found.text, found.tokens, found.ended) == ("the cat", (the, cat, END), "end")
    # One-hot vectors of width d after layer norm: the logit is √d⁻ for the token and the others' is about 0.
    V = len(tokenizer())
    d = scripted().hidden_size
    one = torch.zeros(d).index_fill(0, torch.tensor([0]), 1.0)
    z = torch.nn.functional.layer_norm(one, (d,))[:V]
    assert found.logprob == pytest.approx(3 * float(z.log_softmax(-1)[0]), abs=1e-4)


# -- constraints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_constrained_rows_are_valid_and_the_others_as_they_were(family: str) -> None:
    pytest.importorskip("llguidance")
    pytest.importorskip("jsonschema")
    from polytask.inference.decoding.constraints import Constraint, Guides

    schema = {
        "type": "object",
        "properties": {"team": {"enum": ["café", "日本"]}, "n": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["team", "n"],
        "additionalProperties": False,
    }
    kinds = [
        Constraint.choice(["yes", "no way", "日本"]),
        Constraint.regex("[0-9]{4}-[01][0-9]"),
        Constraint.json(schema),
    ]
    plan, draw = plan_of(family), torch.Generator().manual_seed(5)
    prompts = []
    for i in range(12):
        constraint = kinds[i % 6] if i % 6 < 3 else None
        rule = Sampling(max_tokens=70, temperature=1.5 * (i > 5), seed=i, constraint=constraint)
        rule = rule if constraint else Sampling(max_tokens=10, temperature=rule.temperature, seed=i)
        prompts.append(Prompt(drawn(1 + i, draw), WEIGHTS[i % 7], rule, " " if i % 4 == 1 else ""))
    found = generate(plan, prompts, places=5)
    for prompt, one in zip(prompts, found, strict=True):
        same(one, generate(plan, [prompt])[0])
        if prompt.sampling.constraint is not None:
            prompt.sampling.constraint.check(one.text)
            assert one.ended == "end"
            assert tokenizer().decode(one.tokens, skip_special_tokens=True) == prompt.lead + one.text
            asked = passes.answered(plan.backbone, [Asked([*prompt.ids], [*one.tokens])])
            [log_p] = passes.logprobs(plan, [Seat(WRITER, {}, prompt.weights)], asked, [0])
            assert one.logprob == pytest.approx(float(log_p.sum()), abs=1e-3)  # the model's own, unconstrained
    free = [p if p.sampling.constraint is None else Prompt(p.ids, p.weights, Sampling(max_tokens=3)) for p in prompts]
    for p, a, b in zip(prompts, found, generate(plan, free, places=5), strict=True):
        if p.sampling.constraint is None:
            same(a, b)
    kept = Guides(tokenizer(), vocabulary_size(plan.backbone))
    for a, b in zip(generate(plan, prompts[:3], guides=kept), found[:3], strict=True):
        same(a, b)


def test_a_greedy_choice_is_the_likeliest_way_token_by_token() -> None:
    pytest.importorskip("llguidance")
    from polytask.inference.decoding.constraints import Constraint

    plan = plan_of("llama")
    yes, no = (tokenizer().encode(word)[0] for word in ("yes", "no"))
    rule = Sampling(constraint=Constraint.choice(["yes", "no"]))
    for seed in range(6):
        ids = drawn(5, torch.Generator().manual_seed(seed))
        logits = plan.backbone.model(input_ids=torch.tensor([ids])).logits[0, -1]
        begins = [
            t
            for t in range(len(tokenizer()))
            if (s := tokenizer().decode([t])) and ("yes".startswith(s) or "no".startswith(s))
        ]
        best = max(begins, key=lambda t: float(logits[t]))
        [found] = generate(plan, [Prompt(ids, None, rule)])
        assert found.tokens[0] == best
        assert found.text == ("yes" if tokenizer().decode([best])[0] == "y" else "no")
    assert yes in begins
    assert no in begins


# -- the engine --------------------------------------------------------------------------------------------------------


def asks(**rule: Any) -> list[Ask]:
    rules = Sampling(**{"max_tokens": 9, **rule})
    who = [None, "lora", "full", mix({"lora": 0.5, "bottleneck": 0.5}), "ia3", mix({"ia3": 0.7, "full": 0.3})]
    return [Ask(f"the cat saw {n}", who[n % 6], rules) for n in range(12)]


def test_the_engine_writes_as_the_plan_of_its_adapters() -> None:
    found = engine().generate(asks())
    plan, encode = plan_of("llama"), tokenizer().encode
    weights = [WEIGHTS[0], WEIGHTS[1], WEIGHTS[4], WEIGHTS[5], WEIGHTS[3], WEIGHTS[6]]
    for n, one in enumerate(found):
        same(one, generate(plan, [Prompt(encode(f"the cat saw {n}"), weights[n % 6], Sampling(max_tokens=9))])[0])
    texts = [""] * 12
    for piece in engine().stream(asks()):
        texts[piece.row] += piece.text
    assert texts == [one.text for one in found]
    assert engine().generate([]) == []


def test_turns_are_put_as_the_chat_template_says(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "system", "content": "Meow."}, {"role": "user", "content": "the cat"}]
    text = "<|user|>\nMeow.\n\nthe cat\n<|assistant|>\n"
    rule = Sampling(max_tokens=9)
    a, b = engine().generate([Ask(turns, "lora", rule), Ask(text, "lora", rule)])
    same(a, b)
    monkeypatch.setattr(tokenizer(), "chat_template", None)
    with pytest.raises(UsageError, match="no chat template") as error:
        engine().generate([Ask(turns)])
    assert "\n" not in str(error.value)


def test_a_stream_that_is_left_leaves_nothing_behind() -> None:
    right = [one.text for one in engine().generate(asks())]
    for taken in (1, 20, 60):
        pieces = engine().stream(asks())
        for _ in range(taken):
            next(pieces)
        pieces.close()
        clean(engine().backbone)
    assert [one.text for one in engine().generate(asks())] == right


def test_between_the_pieces_of_a_stream_others_get_what_they_would_get_alone() -> None:
    """Or are told, in one line, that they have to wait."""
    ask = Ask("the cat", None, Sampling(max_tokens=5))
    [alone] = engine().generate([ask])
    for who in ("lora", "full"):
        pieces = engine().stream([Ask("the cat", who, Sampling(max_tokens=5))])
        next(pieces)
        said = ""
        try:
            [found] = engine().generate([ask])
        except PolytaskError as error:
            found, said = alone, str(error)
        pieces.close()
        same(found, alone)
        assert "\n" not in said


def test_pieces_may_be_taken_by_one_thread_and_another() -> None:
    """As a server's pool does; and then others are answered."""
    own = Engine(engine().backbone, adapters=engine().adapters)
    ask = Ask("the cat", "lora", Sampling(max_tokens=3))
    [right] = engine().generate([ask])
    pieces, said, done = own.stream([ask]), [], []
    take, taken = (threading.Semaphore(0), threading.Semaphore(0)), threading.Semaphore(0)

    def work(me: int) -> None:
        while not done:
            take[me].acquire()
            try:
                said.append(next(pieces).text)
            except (StopIteration, RuntimeError) as error:
                done.append(error)
            taken.release()

    threads = [threading.Thread(target=work, args=(me,), daemon=True) for me in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(4):
        take[turn % 2].release()
        assert taken.acquire(timeout=30)
    assert "".join(said) == right.text
    assert isinstance(done[0], StopIteration)
    last = threading.Thread(target=lambda: done.append(own.generate([ask])), daemon=True)
    last.start()
    last.join(timeout=30)
    same(done[1][0], right)


def test_a_stream_does_not_switch_gradients_off_for_who_takes_its_pieces() -> None:
    for pieces in (stream(plan_of("llama"), mixed(3)), engine().stream(asks())):
        next(pieces)
        on = torch.is_grad_enabled()
        pieces.close()
        assert on


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"max_tokens": -3}, "max_tokens = -3"),
        ({"temperature": -0.1}, r"temperature = -0\.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.01}, r"top_p = 1\.01"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"stop": ("a", "")}, "stop text is empty"),
    ],
)
def test_rules_that_make_no_sense(rule: dict[str, Any], says: str) -> None:
    refused(lambda: Sampling(**rule), says)


def test_prompts_that_cannot_be_read() -> None:
    for family in ("llama", "gpt2", "t5"):
        plan = plan_of(family)
        assert generate(plan, []) == []
        refused(lambda plan=plan: generate(plan, [Prompt([5]), Prompt([])]), "prompt 1 has no tokens")
        long = [Prompt([5]), Prompt([5] * (LENGTH + 1))]
        refused(
            lambda plan=plan, long=long: generate(plan, long), f"prompt 1 has {LENGTH + 1} tokens.*{LENGTH} positions"
        )
    [found] = generate(plan_of("gpt2"), [Prompt([5] * (LENGTH - 1), WEIGHTS[1])])
    assert len(found.tokens) == 1
    refused(lambda: generate(plan_of("gpt2"), [Prompt([5] * LENGTH)]), "shorten it")
    refused(lambda: engine().generate([Ask("the cat " * LENGTH)]), "shorten it")
    refused(lambda: engine().generate([Ask("the cat", "nobody")]), "no adapter 'nobody'")


def test_backbones_that_cannot_write() -> None:
    encoder = tiny.backbone("bert", tokenizer=tokenizer(), vocab_size=len(tokenizer()))
    drawn = Backbone(writer("llama").model, tokenizer(), "drawn", precision="fp32", device="cpu", headless=True)
    for backbone in (encoder, drawn):
        refused(lambda b=backbone: generate(Plan(b, []), [Prompt([5, 6])]), "no language-model head")
        refused(lambda b=backbone: Engine(b).generate([Ask("the cat")]), "no language-model head")
        clean(backbone)
