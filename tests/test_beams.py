"""Beam search: the answer that Hugging Face finds with `early_stopping="never"`, for rows of any adapters together."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from writers import refused, tokenizer, writer

from polytask.backbones import Backbone
from polytask.backbones.text import Asked
from polytask.inference.decoding.constraints import Constraint
from polytask.inference.engine import WRITER
from polytask.inference.generation import generate, stream
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat

PROMPTS = [[5, 9, 30], [7], [200, 11, 12, 13, 14, 80], [99, 98]]


@cache
def backbone_of(family: str) -> Backbone:
    """Logits far apart, so that answers differ and rounding decides nothing."""
    backbone = writer(family, seed=3, tie_word_embeddings=False)
    model: Any = backbone.model
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1 if family == "t5" else 12)  # T5's are its embeddings too
    return backbone


def theirs(backbone: Backbone, ids: list[int], ends: list[int], **options: Any) -> tuple[list[int], float]:
    """The tokens of transformers' best answer, with the one that ends it, and its score."""
    model: Any = backbone.model
    given = torch.tensor([ids])
    out = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        eos_token_id=ends,
        pad_token_id=0,
        forced_eos_token_id=None,  # which BART has
        do_sample=False,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    begun = 1 if backbone.kind == "encoder-decoder" else len(ids)
    tokens = out.sequences[0, begun:].tolist()
    upto = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:upto], float(out.sequences_scores[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_the_best_answer_is_that_of_hugging_face(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(family)
    plan = Plan(backbone, [])
    ends = sorted({tokenizer().eos_token_id, *range(40, 70), *range(150, 190)})  # so many that answers end
    monkeypatch.setattr("polytask.inference.writing.ends", lambda _: frozenset(ends))
    ended = set()
    for beams, α, ids in itertools.product((2, 3, 5), (0.0, 1.0, 2.0), PROMPTS):
        rule = Sampling(max_tokens=7, beams=beams, length_penalty=α)
        [found] = generate(plan, [Prompt(ids, None, rule)])
        right, score = theirs(backbone, ids, ends, num_beams=beams, length_penalty=α, max_new_tokens=7)
        assert list(found.tokens) == right
        assert found.logprob / len(right) ** α == pytest.approx(score, abs=1e-4)
        assert found.ended == ("end" if right[-1] in ends else "length")
        ended.add((found.ended, len(right)))
    assert len(ended) >= 2


def test_a_row_of_a_batch_gets_what_it_gets_alone_whoever_else_is_there() -> None:
    """Adapters, numbers of beams, rows without a search; more than there are places for."""
    backbone = backbone_of("llama")
    draw = torch.Generator().manual_seed(0)
    adapters = []
    for k, name in enumerate(("lora", "bottleneck")):
        start = build(name).start(backbone, k, writing=True)
        moved = {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in start.items()}
        adapters.append(Active.of(build(name), moved))
    plan = Plan(backbone, adapters)
    weights = [None, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])]
    prompts = [
        Prompt(ids, w, Sampling(max_tokens=3 + k, beams=1 + k % 4))
        for k, (ids, w) in enumerate(itertools.product(PROMPTS, weights))
    ]
    found = generate(plan, prompts, places=6)
    for prompt, one in zip(prompts, found, strict=True):
        [alone] = generate(plan, [prompt])
        assert one.tokens == alone.tokens
        assert one.logprob == pytest.approx(alone.logprob, abs=1e-3)
        asked = passes.answered(backbone, [Asked([*prompt.ids], [*one.tokens])])
        [log_p] = passes.logprobs(plan, [Seat(WRITER, {}, prompt.weights)], asked, [0])
        assert one.logprob == pytest.approx(float(log_p.sum()), abs=1e-3)
    assert len({one.tokens for one in found}) > len(prompts) / 2


def test_a_search_finds_the_most_probable_answer_of_all_where_it_is_wide_enough() -> None:
    """A choice of four answers: with as many beams as there are ways to go on, none is lost."""
    backbone = backbone_of("gpt2")
    plan, options = Plan(backbone, []), ("yes", "no", "the cat", "two dogs")
    for ids in PROMPTS:
        rule = {"max_tokens": 20, "length_penalty": 0.0, "constraint": Constraint.choice(options)}
        wide, narrow = generate(plan, [Prompt(ids, None, Sampling(beams=b, **rule)) for b in (64, 1)])
        assert wide.text in options
        assert narrow.text in options
        assert wide.logprob >= narrow.logprob - 1e-4
        asked = [Asked(ids, [*tokenizer().encode(o), tokenizer().eos_token_id]) for o in options]
        seat = Seat(WRITER, {}, None)
        log_p = passes.logprobs(plan, [seat], passes.answered(backbone, asked), [0] * len(options))
        # The same text in other tokens may be more probable still.
        assert wide.logprob >= max(float(p.sum()) for p in log_p) - 1e-3 or wide.tokens[-1] != asked[0].target[-1]


def test_stop_texts_end_a_way_and_pieces_come_when_the_answer_is_known() -> None:
    backbone = backbone_of("llama")
    plan, ids = Plan(backbone, []), PROMPTS[2]
    [free] = generate(plan, [Prompt(ids, None, Sampling(max_tokens=10, beams=3))])
    stop = free.text[2:4]
    assert stop.strip("\ufffd") == stop
    rule = Sampling(max_tokens=10, beams=3, stop=(stop,), length_penalty=0.0)
    [found] = generate(plan, [Prompt(ids, None, rule)])
    assert stop not in found.text
    pieces = list(stream(plan, [Prompt(ids, None, rule)]))
    assert "".join(piece.text for piece in pieces) == found.text
    assert [bool(piece.ended) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert tuple(piece.token for piece in pieces) == found.tokens


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"beams": 0}, "beams = 0"),
        ({"beams": 2, "temperature": 0.5}, "draws nothing"),
        ({"length_penalty": -1.0}, r"length_penalty = -1\.0"),
        ({"length_penalty": float("nan")}, "length_penalty = nan"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rule: dict[str, Any], says: str) -> None:
    refused(lambda: Sampling(**rule), says)


def test_every_family_searches() -> None:
    for family in tiny.LM:
        plan = Plan(writer(family), [])
        one, greedy = generate(
            plan, [Prompt([5, 6, 7], None, Sampling(max_tokens=5, beams=b, length_penalty=0.0)) for b in (4, 1)]
        )
        assert 0 < len(one.tokens) <= 6, family
        assert one.logprob >= greedy.logprob - 1e-3 or len(one.tokens) != len(greedy.tokens), family
