"""Writing: rows with different prompts, adapters, lengths and rules, decoded together from one resident backbone.

Rows are read (their prompts' keys and values computed) as places get free, and leave when they are done, so that a
long answer keeps no short one waiting (continuous batching: Yu et al. 2022, Orca, OSDI). Each row gets what it would
get alone: its adapters' weights, its rule for the next token, its own random numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polytask.backbones import Backbone, Batch
from polytask.backbones.attention import attending
from polytask.backbones.frame import Frame, read, unembed
from polytask.errors import UsageError
from polytask.methods import passes
from polytask.methods.lifting import Acting, Mix, Plan
from polytask.methods.passes import Unit

if TYPE_CHECKING:
    from polytask.inference.decoding.constraints import Constraint, Guide, Guides

PLACES = 32  # rows that are written at once


@dataclass(frozen=True)
class Sampling:
    """The rule for a row's next token.

    temperature: 0 takes the most probable token; otherwise logits are divided by it and a token is drawn. top_p: draw
    from the fewest tokens whose probabilities sum to at least this (nucleus sampling: Holtzman et al. 2019, arXiv
    1904.09751). seed: of the row's own random numbers. max_tokens: at most so many. stop: texts before which the answer
    ends. constraint: what the answer may be.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens = {self.max_tokens}: at least 1 is needed")
        if not self.temperature >= 0:
            raise UsageError(f"temperature = {self.temperature}: 0 or more is needed")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p}: more than 0 and at most 1 is needed")
        if any(not text for text in self.stop):
            raise UsageError("a stop text is empty: leave it out")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row to write: token ids, its weights [K] for the plan's adapters (None: the backbone alone), and its rule.

    `lead` is what stands between the prompt and the answer's first letter; it is written by the model and no part of
    the answer.
    """

    ids: Sequence[int]
    weights: Tensor | None = None
    sampling: Sampling = field(default_factory=Sampling)
    lead: str = ""


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


def generate(
    plan: Plan, prompts: Sequence[Prompt], *, guides: Guides | None = None, places: int = PLACES
) -> list[Written]:
    """The answer to each prompt, in order."""
    texts: list[list[str]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    sums = [0.0] * len(prompts)
    ends = [""] * len(prompts)
    for piece in stream(plan, prompts, guides=guides, places=places):
        texts[piece.row].append(piece.text)
        tokens[piece.row].append(piece.token)
        sums[piece.row] += piece.logprob
        ends[piece.row] = piece.ended or ends[piece.row]
    return [Written("".join(t), tuple(i), s, e) for t, i, s, e in zip(texts, tokens, sums, ends, strict=True)]


def stream(
    plan: Plan, prompts: Sequence[Prompt], *, guides: Guides | None = None, places: int = PLACES
) -> Iterator[Piece]:
    """The pieces of all answers, step by step; at most `places` rows are written at once.

    Raises UsageError for an empty prompt, one that leaves no room in the backbone's positions, or a backbone that
    cannot write.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt.ids):
            raise UsageError(f"prompt {i} has no tokens")
        if len(prompt.ids) > plan.backbone.max_length - (plan.backbone.kind == "decoder"):
            raise UsageError(
                f"prompt {i} has {len(prompt.ids)} tokens, and {plan.backbone.name} has {plan.backbone.max_length} "
                "positions for it and its answer; shorten it"
            )
    if not prompts:
        return
    none = torch.zeros(len(plan.adapters))
    weights = torch.stack([none if p.weights is None else p.weights.float().cpu() for p in prompts])
    for members in plan.together(weights):
        rows = members.tolist()
        yield from _Writer(plan, prompts, rows, weights, guides, places).run()


class _Row:
    """A row that is being written."""

    def __init__(self, number: int, prompt: Prompt, room: int, guide: Guide | None) -> None:
        self.number, self.sampling, self.lead = number, prompt.sampling, prompt.lead
        self.room = min(prompt.sampling.max_tokens, room)
        self.guide = guide
        self.tokens: list[int] = []
        self.said = 0  # letters of the text that have been given out
        self.over = False
        self.draw = torch.Generator().manual_seed(prompt.sampling.seed) if prompt.sampling.temperature else None


class _Writer:
    """Rows that may share passes, from their prompts to their ends."""

    def __init__(
        self,
        plan: Plan,
        prompts: Sequence[Prompt],
        members: Sequence[int],
        weights: Tensor,
        guides: Guides | None,
        places: int,
    ) -> None:
        self.plan, self.backbone, self.prompts = plan, plan.backbone, prompts
        # Neighbours in length are read together, and the longest first, so that the last to be written are short.
        self.waiting = deque(sorted(members, key=lambda i: -len(prompts[i].ids)))
        self.weights = weights.to(self.backbone.device)
        self.guides, self.places = guides, places
        self.frame: Frame
        self.rows: list[_Row] = []  # in the frame's order; one that has ended stays until its place is needed
        self.ends = ends(self.backbone)
        self.decode = decoder(self.backbone.tokenizer)

    def run(self) -> Iterator[Piece]:
        first = self.weights[list(self.waiting)[:1]]
        with attending(self.backbone.model), self.plan.acting(first) as acting:
            self.frame = Frame(self.backbone)  # here, where changed weights are in their places
            hidden = torch.empty(0)
            while self.waiting or self.rows:
                if self.waiting and 4 * len(self.rows) <= 3 * self.places:
                    hidden = self._admit(acting, hidden)
                tokens, logprobs = self._choose(hidden)
                for place, row in enumerate(self.rows):
                    if not row.over:
                        yield self._piece(row, tokens[place], logprobs[place])
                # Taking rows out copies the rest, so it is done for several at once, and before one that is over
                # comes to the end of the model's positions.
                over = sum(row.over for row in self.rows)
                full = self.frame.end >= self.backbone.max_length - 1
                if over == len(self.rows) or over >= max(1, self.places // 8) or (over and full):
                    tokens = self._leave(tokens)
                    acting.mix = self._mix()
                if self.rows:
                    written = torch.tensor(tokens, device=self.backbone.device)
                    hidden = self.frame.step(written, acting.changes)

    def _leave(self, tokens: list[int]) -> list[int]:
        """Take out the rows that are over; the tokens of those that stay."""
        left = [place for place, row in enumerate(self.rows) if not row.over]
        self.rows = [self.rows[place] for place in left]
        self.frame.keep(torch.tensor(left, dtype=torch.long, device=self.backbone.device))
        return [tokens[place] for place in left]

    @torch.no_grad()
    def _admit(self, acting: Acting, hidden: Tensor) -> Tensor:
        """Read as many waiting prompts as there are places; next-token states of all rows."""
        count = min(len(self.waiting), self.places - len(self.rows))
        chosen = [self.waiting.popleft() for _ in range(count)]
        states = [hidden] if self.rows else []
        for members, owners, batch in self._batches(chosen):
            acting.mix = Mix(self.weights[owners])
            found = read(self.backbone, batch)
            self.frame.join(found)
            states.append(found.hidden)
            self.rows += [self._open(i) for i in members]
        acting.mix = self._mix()
        return torch.cat(states)

    def _batches(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], list[int], Batch]]:
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

    def _mix(self) -> Mix:
        return Mix(self.weights[[row.number for row in self.rows]])

    def _open(self, i: int) -> _Row:
        prompt = self.prompts[i]
        used = len(prompt.ids) if self.backbone.kind == "decoder" else 1
        guide = None
        if prompt.sampling.constraint is not None:
            if self.guides is None:
                from polytask.inference.decoding.constraints import Guides

                self.guides = Guides(self.backbone.tokenizer, vocabulary_size(self.backbone))
            guide = self.guides.open(prompt.sampling.constraint, prompt.lead)
        return _Row(i, prompt, self.backbone.max_length - used, guide)

    @torch.no_grad()
    def _choose(self, hidden: Tensor) -> tuple[list[int], list[float]]:
        """Each row's next token from last hidden states [S, d], and its log-probability."""
        logits = unembed(self.backbone, hidden)
        total = logits.logsumexp(-1)
        allowed = logits
        if any(row.guide for row in self.rows):
            allowed = logits.clone()
            for place, row in enumerate(self.rows):
                if row.guide is not None and not row.over:
                    allowed[place, ~row.guide.allowed().to(logits.device)] = -torch.inf
        tokens = allowed.argmax(-1)
        drawn = [place for place, row in enumerate(self.rows) if row.draw is not None]
        if drawn:
            u = torch.tensor([torch.rand((), generator=self.rows[place].draw) for place in drawn])
            rules = [self.rows[place].sampling for place in drawn]
            heat = torch.tensor([r.temperature for r in rules], device=logits.device)
            top_p = torch.tensor([r.top_p for r in rules], device=logits.device)
            tokens[drawn] = sample(allowed[drawn] / heat[:, None], top_p, u.to(logits.device))
        found = logits.gather(1, tokens[:, None])[:, 0] - total
        return tokens.tolist(), found.tolist()

    def _piece(self, row: _Row, token: int, logprob: float) -> Piece:
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


def sample(logits: Tensor, top_p: Tensor, u: Tensor) -> Tensor:
    """A token of each row [S] from logits [S, V], by uniform numbers u [S] in [0, 1).

    The nucleus is the fewest most probable tokens whose probabilities sum to top_p or more. The first token of it in
    the vocabulary's order at which their sum exceeds u of the whole is drawn, so that tokens of nearly equal
    probability do not change places when other rows are there.
    """
    p = logits.softmax(-1)
    if bool((top_p < 1).any()):
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        inside = ranked.cumsum(-1) - ranked < top_p[:, None]
        inside[:, 0] = True
        p = p * torch.zeros_like(inside).scatter(1, order, inside)
    total = p.cumsum(-1)
    return torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0].clamp(max=p.shape[1] - 1)


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
