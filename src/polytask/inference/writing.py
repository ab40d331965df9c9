"""What every way of writing shares: prompts and their rules, the pieces that come back, and the rows in between."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polytask.backbones import Backbone, Batch
from polytask.backbones.frame import Frame, read
from polytask.errors import UsageError
from polytask.methods import passes
from polytask.methods.lifting import Acting, Mix, Plan
from polytask.methods.passes import Unit

if TYPE_CHECKING:
    from polytask.inference.decoding.constraints import Constraint, Guide, Guides


@dataclass(frozen=True)
class Sampling:
    """The rule for a row's next token.

    temperature: 0 takes the most probable token; otherwise logits are divided by it and a token is drawn. top_p: draw
    from the fewest tokens whose probabilities sum to at least this (nucleus sampling: Holtzman et al. 2019, arXiv
    1904.09751). seed: of the row's own random numbers. max_tokens: at most so many. stop: texts before which the answer
    ends. constraint: what the answer may be. beams: more than 1 searches for the most probable answer, so many ways at
    once; length_penalty: the power of its length by which an answer's log-probability is divided (see `beams`).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens = {self.max_tokens}: at least 1 is needed")
        if not self.temperature >= 0:
            raise UsageError(f"temperature = {self.temperature}: 0 or more is needed")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p}: more than 0 and at most 1 is needed")
        if self.beams < 1:
            raise UsageError(f"beams = {self.beams}: at least 1 is needed")
        if self.beams > 1 and self.temperature:
            raise UsageError(f"temperature = {self.temperature} with beams = {self.beams}: a beam search draws nothing")
        if not 0 <= self.length_penalty < math.inf:
            raise UsageError(f"length_penalty = {self.length_penalty}: 0 or more is needed")
        if any(not text for text in self.stop):
            raise UsageError("a stop text is empty: leave it out")


@dataclass(frozen=True, eq=False)
class Steering:
    """Weights that follow what is written. `ids` are the tokens of the input, and `mean` [d] is the mean of the last
    hidden states that the backbone alone has for them. After each `every` tokens, the row's weights become
    `weigh(mean)` [K], where the mean [d] is that of the input and what has been written."""

    ids: Sequence[int]
    mean: Tensor
    weigh: Callable[[Tensor], Tensor]
    every: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row to write: token ids, its weights [K] for the plan's adapters (None: the backbone alone), and its rule.

    `lead` is what stands between the prompt and the answer's first letter; it is written by the model and no part of
    the answer. With `steering` the weights are those that it begins with.
    """

    ids: Sequence[int]
    weights: Tensor | None = None
    sampling: Sampling = field(default_factory=Sampling)
    lead: str = ""
    steering: Steering | None = None


@dataclass(frozen=True)
class Piece:
    """What a step added to a row: `text` may be empty where a letter is not whole yet. `ended` is set with the last
    piece: `end` (the model ended it), `stop` (a stop text), `length` (max_tokens, or no room)."""

    row: int
    text: str
    token: int
    logprob: float
    ended: str = ""


@dataclass(frozen=True)
class Written:
    """A whole answer. `logprob`: the sum of its tokens' log-probabilities in nats, before temperature and top_p."""

    text: str
    tokens: tuple[int, ...]
    logprob: float
    ended: str


class Row:
    """A row that is being written."""

    def __init__(self, number: int, prompt: Prompt, room: int, guide: Guide | None) -> None:
        self.number, self.sampling, self.lead = number, prompt.sampling, prompt.lead
        self.room = min(prompt.sampling.max_tokens, room)
        self.guide = guide
        self.tokens: list[int] = []
        self.said = 0  # letters of the text that have been given out
        self.over = False
        self.draw = torch.Generator().manual_seed(prompt.sampling.seed) if prompt.sampling.temperature else None

    def branch(self) -> Row:
        """Another row that has come as far."""
        other = copy.copy(self)
        other.tokens = list(self.tokens)
        other.guide = self.guide.branch() if self.guide is not None else None
        return other


class Writer:
    """Prompts that may share passes, on their way to answers."""

    def __init__(self, plan: Plan, prompts: Sequence[Prompt], weights: Tensor, guides: Guides | None) -> None:
        self.plan, self.backbone, self.prompts = plan, plan.backbone, prompts
        self.weights = weights.to(self.backbone.device)
        self.guides = guides
        self.ends = ends(self.backbone)
        self.decode = decoder(self.backbone.tokenizer)

    def batches(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], list[int], Batch]]:
        """Batches to read: the prompts in the order in which they will be read, and whose weights each row has."""
        ids = [list(self.prompts[i].ids) for i in chosen]
        if not self.backbone.packable:
            for pack in passes.packs([Unit((row,)) for row in ids]):
                members = [chosen[j] for j in pack]
                yield members, members, self.backbone.collate([ids[j] for j in pack])
            return
        for part in passes.filled([len(row) for row in ids], range(len(ids)), passes.TOKENS_A_PASS):
            owners = [tuple(self.weights[chosen[j]].tolist()) for j in part]
            rows = [[part[n] for n in row] for row in passes.binned([len(ids[j]) for j in part], owners)]
            members = [chosen[j] for row in rows for j in row]
            yield members, [chosen[row[0]] for row in rows], self.backbone.pack([[ids[j] for j in row] for row in rows])

    @torch.no_grad()
    def read(self, acting: Acting, frame: Frame, chosen: Sequence[int]) -> tuple[list[int], Tensor]:
        """Read prompts into new rows of the frame; their order there and their next-token states [n, d]."""
        order: list[int] = []
        states = []
        for members, owners, batch in self.batches(chosen):
            acting.mix = Mix(self.weights[owners])
            wide, _ = self.plan.widen(acting, batch, self.weights[owners])
            found = read(self.backbone, wide)
            acting.read()
            frame.join(found)
            states.append(found.hidden)
            order += members
        return order, torch.cat(states)

    def open(self, i: int) -> Row:
        """A prompt's row at its start."""
        prompt = self.prompts[i]
        used = self.plan.room(self.weights[i]) + len(prompt.ids) if self.backbone.kind == "decoder" else 1
        guide = None
        if prompt.sampling.constraint is not None:
            if self.guides is None:
                from polytask.inference.decoding.constraints import Guides

                self.guides = Guides(self.backbone.tokenizer, vocabulary_size(self.backbone))
            guide = self.guides.open(prompt.sampling.constraint, prompt.lead)
        return Row(i, prompt, self.backbone.max_length - used, guide)

    def piece(self, row: Row, token: int, logprob: float) -> Piece:
        """What a row's next token adds to it."""
        if row.guide is not None:
            row.guide.accept(token)
        ended = "end" if token in self.ends else ""
        if not ended:
            row.tokens.append(token)
            if row.guide is not None and row.guide.done:
                ended = "end"
            elif len(row.tokens) >= row.room:
                ended = "length"
        text = self.decode(row.tokens)
        text = "" if row.lead.startswith(text) else text.removeprefix(row.lead)
        cut = min((at for stop in row.sampling.stop if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            text, ended = text[:cut], "stop"
        upto = len(text) if ended else settled(text, row.sampling.stop)
        said = text[row.said : upto]
        row.said, row.over = max(row.said, upto), bool(ended)
        return Piece(row.number, said, token, logprob, ended)


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """From tokens to text, special ones left out; past the wrapper, which takes most of a fast tokenizer's time."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
    return lambda ids: str(fast.decode(ids, skip_special_tokens=True))


def settled(text: str, stop: Sequence[str]) -> int:
    """How many letters of a text that is being written will not change: not those of a half-written letter, nor of
    what may become a stop text."""
    text = text.rstrip("\ufffd")
    upto = len(text)
    for end in stop:
        for size in range(min(len(end) - 1, len(text)), 0, -1):
            if text.endswith(end[:size]):
                upto = min(upto, len(text) - size)
                break
    return upto


def ends(backbone: Backbone) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's end of sequence and those of the model's generation config."""
    found: set[int] = set()
    model: Any = backbone.model
    for owner in (backbone.tokenizer, getattr(model, "generation_config", None), model.config.get_text_config()):
        value = getattr(owner, "eos_token_id", None)
        found |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
    return frozenset(found)


def vocabulary_size(backbone: Backbone) -> int:
    """The width of the next-token logits."""
    model: Any = backbone.model
    return int(model.get_output_embeddings().weight.shape[0])
