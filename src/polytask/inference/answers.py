"""Answers in text: written, or the most probable of those that there are.

A choice by likelihood compares options y for an input x, with p(y | x) = Π_t p(y_t | x, y_<t) over the option's tokens:

    raw      log p(y | x)
    length   log p(y | x) / |y|                      per token (Brown et al. 2020, arXiv 2005.14165)
    pmi      log p(y | x) − log p(y | ∅)             without the input (Holtzman et al. 2021, arXiv 2104.08315)

Where a label has several terms, its score is the mean of theirs, each counting as its card says (`recipes.terms`).

How much of the probability falls on the options at all is the model's attentiveness, Σ_y p(y | x): low where it would
rather write something else. More of it does not mean more right answers (Wiegreffe, Finlayson, Tafjord, Clark,
Sabharwal 2023, arXiv 2305.14596), so it is shown and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from polytask.adapters import HeadCard, TermCard, TextCard
from polytask.backbones import text
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling, Steering
from polytask.methods import passes
from polytask.methods.lifting import Plan
from polytask.methods.passes import Seat, Unit
from polytask.tasks import Example
from polytask.tasks.task import Output

NORMALISATIONS: tuple[str, ...] = get_args(TextCard.model_fields["normalise"].annotation)


@dataclass(frozen=True)
class Said:
    """An answer: its probability (of the whole text; among the options where it was chosen), what was written, and the
    attentiveness of a choice."""

    output: Output
    probability: float
    written: str
    mass: float | None = None
    scores: Tensor | None = None
    """log p of the options, where one was chosen."""


def say(
    plan: Plan,
    seats: Sequence[Seat],
    examples: Sequence[Example],
    sampling: Mapping[int, Sampling] | None = None,
    steering: Mapping[int, Steering] | None = None,
) -> list[Said]:
    """The answer of `seats[i]` to `examples[i]`; `sampling` has other rules for some of those that write, `steering`
    weights that follow what they write."""
    found: dict[int, Said] = {}
    writing = [i for i, seat in enumerate(seats) if writes(seat.head)]
    prompts = []
    for i in writing:
        prompt = text.ask(seats[i].head, replace(examples[i], output=None))
        [asked] = text.encode(plan.backbone, seats[i].head, [prompt])
        rule = (sampling or {}).get(i) or rule_of(seats[i])
        prompts.append(Prompt(asked.ids, seats[i].weights, rule, asked.lead, (steering or {}).get(i)))
    for i, written in zip(writing, generate(plan, prompts), strict=True):
        output = text.answer(seats[i].head, written.text, examples[i])
        found[i] = Said(output, math.exp(written.logprob), written.text)
    choosing = [i for i in range(len(seats)) if i not in set(writing)]
    likelihoods = weigh(plan, [seats[i] for i in choosing], [examples[i] for i in choosing])
    for i, options in zip(choosing, likelihoods, strict=True):
        card = seats[i].head.text
        found[i] = options.best(card.normalise if card else "raw")
    return [found[i] for i in range(len(seats))]


def writes(head: HeadCard) -> bool:
    """Whether its answers are written."""
    return head.text is not None and head.text.decide == "write"


def rule_of(seat: Seat) -> Sampling:
    """How a seat's answers are written: greedily, as long as its card says."""
    card = seat.head.text
    assert card is not None
    return Sampling(max_tokens=card.max_tokens, stop=card.stop)


@dataclass(frozen=True)
class Options:
    """The options of one input: log p(y | x) and log p(y | ∅) [options], and how many tokens each has. Where several
    terms stand for an option, these are [terms], and `shares` [options, terms] says how much each counts."""

    names: tuple[str, ...]
    log_p: Tensor
    log_p_alone: Tensor
    tokens: Tensor
    shares: Tensor | None = None

    def scores(self, normalise: str) -> Tensor:
        """What the options are compared by [options]."""
        if normalise == "length":
            found = self.log_p / self.tokens
        else:
            found = self.log_p - self.log_p_alone if normalise == "pmi" else self.log_p
        return found if self.shares is None else self.shares @ found

    @property
    def mass(self) -> float:
        """Attentiveness: the probability of all options together."""
        return float(self.log_p.exp().sum())

    def best(self, normalise: str) -> Said:
        log_p = self.scores(normalise).log_softmax(-1)
        i = int(log_p.argmax())
        return Said(self.names[i], float(log_p[i].exp()), self.names[i], self.mass, log_p)


def weigh(plan: Plan, seats: Sequence[Seat], examples: Sequence[Example]) -> list[Options]:
    """The likelihoods of each example's options under its seat, with and without its input."""
    names = [text.options(seat.head, e) for seat, e in zip(seats, examples, strict=True)]
    terms = [seat.head.text.terms if seat.head.text else None for seat in seats]
    said = [
        own if given is None else tuple(t.term for label in given for t in label)
        for own, given in zip(names, terms, strict=True)
    ]
    rows = [
        (i, replace(asked, output=one))
        for i, example in enumerate(examples)
        for asked in (example, replace(example, input="", pair="" if example.pair is not None else None))
        for one in said[i]
    ]
    # Without the input, many rows are the same question.
    unique: dict[tuple[int, str, str], int] = {}
    where: list[int] = []
    units: list[Unit] = []
    which: list[int] = []
    numbers: dict[int, int] = {}
    for i, example in rows:
        prompt = text.ask(seats[i].head, example)
        seat = numbers.setdefault(id(seats[i]), i)
        key = (seat, prompt.text, prompt.target)
        if key not in unique:
            unique[key] = len(units)
            units += passes.answered(plan.backbone, text.encode(plan.backbone, seats[i].head, [prompt]))
            which.append(seat)
        where.append(unique[key])
    log_p = passes.logprobs(plan, seats, units, which)
    sums = iter(log_p[at].sum() for at in where)
    sizes = iter(len(log_p[at]) for at in where)
    found = []
    for own, texts, weighted in zip(names, said, terms, strict=True):
        given, alone = (torch.stack([next(sums) for _ in texts]) for _ in range(2))
        tokens = torch.tensor([next(sizes) for _ in range(2 * len(texts))][: len(texts)])
        found.append(Options(own, given, alone, tokens, None if weighted is None else _shares(weighted)))
    return found


def likeliest(names: Sequence[str], log_p: Tensor) -> tuple[Output, float | None]:
    """The most probable option."""
    p = log_p.softmax(-1)
    return names[int(p.argmax())], float(p.max())


def _shares(terms: Sequence[Sequence[TermCard]]) -> Tensor:
    """How much each term counts for each label [labels, terms]; rows sum to one."""
    count = len(terms)
    weights = torch.tensor([[t.weight * (own == c) for own in range(count) for t in terms[own]] for c in range(count)])
    return weights / weights.sum(1, keepdim=True)


def choose_normalisation(options: Sequence[Options], answers: Sequence[Output]) -> str:
    """The way of comparing options that gets most of these answers right; the simplest of several."""
    right = {
        way: sum(one.best(way).output == answer for one, answer in zip(options, answers, strict=True))
        for way in NORMALISATIONS
    }
    return max(NORMALISATIONS, key=lambda way: right[way])
