"""Writing: rows with different prompts, adapters, lengths and rules, decoded together from one resident backbone.

Rows are read (their prompts' keys and values computed) as places get free, and leave when they are done, so that a
long answer keeps no short one waiting (continuous batching: Yu et al. 2022, Orca, OSDI). Each row gets what it would
get alone: its adapters' weights, its rule for the next token, its own random numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polytask.backbones.attention import attending
from polytask.backbones.frame import Frame, read
from polytask.errors import UsageError
from polytask.inference.beams import Beams
from polytask.inference.writing import Piece, Prompt, Row, Steering, Writer, Written
from polytask.methods.lifting import Acting, Mix, Plan

if TYPE_CHECKING:
    from polytask.inference.decoding.constraints import Guides

PLACES = 32  # rows that are written at once


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
    ways = [_way(plan, prompt, row) for prompt, row in zip(prompts, weights, strict=True)]
    for members in plan.together(weights):
        for way in (_Continuous, _Steered, Beams):
            if rows := [i for i in members.tolist() if ways[i] is way]:
                yield from way(plan, prompts, weights, guides).run(rows, places)


def _way(plan: Plan, prompt: Prompt, weights: Tensor) -> type[Beams | _Continuous]:
    """How a row with these weights [K] is written."""
    still = plan.backbone.kind != "decoder" or bool(weights[plan.apart].any())
    if prompt.steering is not None and not still:
        if prompt.sampling.beams > 1:
            raise UsageError(
                f"beams = {prompt.sampling.beams}: weights that follow an answer follow one way to write it; leave out "
                "beams, or name who is to answer"
            )
        return _Steered
    return Beams if prompt.sampling.beams > 1 else _Continuous


class _Continuous(Writer):
    """Rows that join and leave between steps."""

    def run(self, members: Sequence[int], places: int) -> Iterator[Piece]:
        # Neighbours in length are read together, and the longest first, so that the last to be written are short.
        self.waiting = deque(sorted(members, key=lambda i: -len(self.prompts[i].ids)))
        self.places = places
        self.rows: list[Row] = []  # in the frame's order; one that has ended stays until its place is needed
        first = self.weights[list(self.waiting)[:1]]
        with attending(self.backbone.model), self.plan.acting(first) as acting:
            self.frame = Frame(self.backbone)  # here, where changed weights are in their places
            hidden = torch.empty(0)
            while self.waiting or self.rows:
                if self.waiting and 4 * len(self.rows) <= 3 * self.places:
                    hidden = self._admit(acting, hidden)
                tokens, logprobs = self._choose(acting, hidden)
                for place, row in enumerate(self.rows):
                    if not row.over:
                        yield self.piece(row, tokens[place], logprobs[place])
                # Taking rows out copies the rest, so it is done for several at once, and before one that is over
                # comes to the end of the model's positions.
                over = sum(row.over for row in self.rows)
                full = self.frame.end >= self.backbone.max_length - 1
                if over == len(self.rows) or over >= max(1, self.places // 8) or (over and full):
                    tokens = self._leave(tokens)
                    acting.mix = self._mix()
                if self.rows:
                    hidden = self._step(acting, torch.tensor(tokens, device=self.backbone.device))

    def _step(self, acting: Acting, written: Tensor) -> Tensor:
        """Next-token states of all rows after each one's token [S]."""
        return self.frame.step(written, acting.changes)

    def _leave(self, tokens: list[int]) -> list[int]:
        """Take out the rows that are over; the tokens of those that stay."""
        left = [place for place, row in enumerate(self.rows) if not row.over]
        self.rows = [self.rows[place] for place in left]
        self.frame.keep(torch.tensor(left, dtype=torch.long, device=self.backbone.device))
        return [tokens[place] for place in left]

    def _admit(self, acting: Acting, hidden: Tensor) -> Tensor:
        """Read as many waiting prompts as there are places; next-token states of all rows."""
        count = min(len(self.waiting), self.places - len(self.rows))
        order, states = self.read(acting, self.frame, [self.waiting.popleft() for _ in range(count)])
        states = torch.cat([hidden, states]) if self.rows else states
        self.rows += [self.open(i) for i in order]
        acting.mix = self._mix()
        return states

    def _mix(self) -> Mix:
        return Mix(self.weights[[row.number for row in self.rows]])

    @torch.no_grad()
    def _choose(self, acting: Acting, hidden: Tensor) -> tuple[list[int], list[float]]:
        """Each row's next token from last hidden states [S, d], and its log-probability."""
        logits = self.plan.unembed(acting, hidden)
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


class _Steered(_Continuous):
    """Rows whose weights follow what they write. A second frame has each row's input and answer as the backbone alone
    reads them; `total` [S, d] are the sums of their `count` [S] states."""

    def _admit(self, acting: Acting, hidden: Tensor) -> Tensor:
        if not self.rows:
            self.weights = self.weights.clone()
            self.alone = Frame(self.backbone)
            self.total = torch.zeros(0, self.backbone.hidden_size, device=self.backbone.device)
            self.count = self.total[:, 0]
        before = len(self.rows)
        states = super()._admit(acting, hidden)
        new = self.rows[before:]
        # No longer than the prompt, so that there are positions as long as the row has some.
        ids = [self._steering(row).ids[: len(self.prompts[row.number].ids)] for row in new]
        acting.mix = Mix(self.weights.new_zeros(len(new), self.weights.shape[1]))
        with torch.no_grad():
            self.alone.join(read(self.backbone, self.backbone.collate(ids)))
        acting.mix = self._mix()
        count = self.count.new_tensor([len(row) for row in ids])
        mean = torch.stack([self._steering(row).mean for row in new]).to(self.total)
        self.count, self.total = torch.cat([self.count, count]), torch.cat([self.total, count[:, None] * mean])
        return states

    def _leave(self, tokens: list[int]) -> list[int]:
        left = [place for place, row in enumerate(self.rows) if not row.over]
        index = torch.tensor(left, dtype=torch.long, device=self.backbone.device)
        self.alone.keep(index)
        self.total, self.count = self.total[index], self.count[index]
        return super()._leave(tokens)

    def _step(self, acting: Acting, written: Tensor) -> Tensor:
        mix, acting.mix = acting.mix, Mix(self.weights.new_zeros(len(self.rows), self.weights.shape[1]))
        self.total = self.total + self.alone.step(written, {})
        self.count = self.count + 1
        changed = False
        for row, h in zip(self.rows, self.total / self.count[:, None], strict=True):
            steering = self._steering(row)
            if not row.over and len(row.tokens) % steering.every == 0:
                self.weights[row.number] = steering.weigh(h.cpu()).to(self.weights)
                changed = True
        acting.mix = self._mix() if changed else mix
        return super()._step(acting, written)

    def _steering(self, row: Row) -> Steering:
        steering = self.prompts[row.number].steering
        assert steering is not None
        return steering


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
