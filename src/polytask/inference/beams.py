"""Beam search: the b most probable ways to go on are kept at every step, and the best whole answer is given.

    score(y) = Σₜ log p(yₜ | x, y₁..ₜ₋₁) / |y|^α

Of the 2b best next tokens of all b ways together, those that end an answer and are among the b best are whole answers;
the b best of the others go on. A search is over when no way can still get a better score than the best whole answer
has: log p ≤ 0, so a way's sum so far over the longest length bounds it. α = 0 prefers short answers, 1 the best mean.
Lowerre 1976 (HARPY); the form with |y|^α is that of Hugging Face transformers with `early_stopping="never"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polytask.backbones.attention import attending
from polytask.backbones.frame import Frame
from polytask.inference.writing import Piece, Row, Writer
from polytask.methods.lifting import Acting, Mix


@dataclass
class _Way:
    """An answer that is being written, and the place in the frame of the one that it goes on from."""

    row: Row
    place: int
    total: float = 0.0
    pieces: tuple[Piece, ...] = ()


@dataclass
class _Search:
    """The ways of one prompt."""

    ways: list[_Way]
    best: _Way | None = None
    score: float = field(default=-math.inf)


class Beams(Writer):
    """Prompts whose rules ask for beams."""

    def run(self, members: Sequence[int], places: int) -> Iterator[Piece]:
        """The pieces of each prompt's best answer, when it is known; at most `places` ways are written at once."""
        with attending(self.backbone.model), self.plan.acting(self.weights[list(members[:1])]) as acting:
            for group in self._groups(members, places):
                yield from self._search(acting, group)

    def _groups(self, members: Sequence[int], places: int) -> Iterator[list[int]]:
        """Prompts that are searched together, neighbours in length."""
        group: list[int] = []
        used = 0
        for i in sorted(members, key=lambda i: -len(self.prompts[i].ids)):
            beams = self.prompts[i].sampling.beams
            if group and used + beams > places:
                yield group
                group, used = [], 0
            group.append(i)
            used += beams
        yield group

    def _search(self, acting: Acting, group: Sequence[int]) -> Iterator[Piece]:
        frame = Frame(self.backbone)
        order, hidden = self.read(acting, frame, group)
        acting.mix = Mix(self.weights[order])
        searches = [_Search([_Way(self.open(i), place)]) for place, i in enumerate(order)]
        while searches:
            self._extend_all(acting, searches, hidden)
            for search in searches:
                if not search.ways and search.best:
                    yield from search.best.pieces
            searches = [search for search in searches if search.ways]
            if not searches:
                return
            ways = [way for search in searches for way in search.ways]
            frame.keep(torch.tensor([way.place for way in ways], device=hidden.device))
            acting.mix = Mix(self.weights[[way.row.number for way in ways]])
            tokens = torch.tensor([way.pieces[-1].token for way in ways], device=hidden.device)
            hidden = frame.step(tokens, acting.changes)
            for place, way in enumerate(ways):
                way.place = place

    @torch.no_grad()
    def _extend_all(self, acting: Acting, searches: Sequence[_Search], hidden: Tensor) -> None:
        logits = self.plan.unembed(acting, hidden)
        for search in searches:
            self._extend(search, logits)

    def _extend(self, search: _Search, logits: Tensor) -> None:
        """One more token for each way; none are left when the search is over."""
        rule = search.ways[0].row.sampling
        b, α = rule.beams, rule.length_penalty
        log_p = logits[[way.place for way in search.ways]].log_softmax(-1)  # [ways, vocabulary]
        totals = log_p + log_p.new_tensor([way.total for way in search.ways])[:, None]
        for k, way in enumerate(search.ways):
            if way.row.guide is not None:
                totals[k, ~way.row.guide.allowed().to(totals.device)] = -torch.inf
        found = totals.flatten().topk(min(2 * b, totals.numel()))
        before, search.ways = search.ways, []
        for rank, (total, at) in enumerate(zip(found.values.tolist(), found.indices.tolist(), strict=True)):
            if total == -math.inf or len(search.ways) == b:
                break
            k, token = divmod(at, log_p.shape[1])
            row = before[k].row.branch()
            piece = self.piece(row, token, float(log_p[k, token]))
            way = _Way(row, before[k].place, total, (*before[k].pieces, piece))
            if not row.over:
                search.ways.append(way)
            elif rank < b and (score := total / len(way.pieces) ** α) > search.score:
                search.best, search.score = way, score
        if search.ways and search.ways[0].total / search.ways[0].row.room ** α <= search.score:
            search.ways = []
