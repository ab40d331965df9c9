"""A batch of sequences, as passes of a backbone take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids of R sequences, padded on the right to T tokens.

    `ids` [R, T] int64, `mask` [R, T] bool (True where a token is real). `start` is the block at which to begin where
    `states` [R, T, d] already hold what that block reads. `written` [R, U] int64 is what an encoder-decoder's decoder
    has written so far; without it only the encoder runs. `document` [R, T] int64 numbers the sequences that share a
    row, from 1 (0 is padding): none sees another, and each counts its positions from 0. `asked` [R, T] bool says which
    tokens are a prompt's, where others are its answer's (None: all are). `beside` are texts that go with the rows, for
    methods that read them: the passes themselves do not. A row without one has no real token there.
    """

    ids: Tensor
    mask: Tensor
    start: int = 0
    states: Tensor | None = None
    written: Tensor | None = None
    document: Tensor | None = None
    asked: Tensor | None = None
    beside: Batch | None = None

    def rows(self, index: Tensor) -> Batch:
        """The batch of the rows at `index` [r] int64."""
        states, written, document, asked = (
            None if t is None else t[index] for t in (self.states, self.written, self.document, self.asked)
        )
        beside = None if self.beside is None else self.beside.rows(index)
        return Batch(self.ids[index], self.mask[index], self.start, states, written, document, asked, beside)

    @property
    def standing(self) -> tuple[Tensor, Tensor]:
        """Where each token stands in its prompt [R, T], from 0, and how many of the prompt come after it; 1 << 30 and
        −1 for an answer's tokens, −1 and −1 for padding."""
        number = self.mask.long() if self.document is None else self.document
        asked = self.mask if self.asked is None else self.asked & self.mask
        lengths = torch.zeros(len(number), int(number.max()) + 1, dtype=torch.long, device=number.device)
        lengths.scatter_add_(1, number, asked.long())
        at = torch.where(asked, self.positions, 1 << 30).masked_fill(~self.mask, -1)
        left = lengths.gather(1, number) - 1 - self.positions
        return at, left.masked_fill(~asked, -1)

    @property
    def positions(self) -> Tensor:
        """Each token's number in its sequence [R, T], from 0."""
        R, T = self.ids.shape
        column = torch.arange(T, device=self.ids.device).expand(R, T)
        if self.document is None:
            return column
        first = torch.nn.functional.pad(self.document[:, 1:] != self.document[:, :-1], (1, 0), value=True)
        return column - (column * first).cummax(1).values


def padded(length: int) -> int:
    """The next length that sequences are padded to.

    Matrix products are compiled for each new shape (oneDNN on the CPU) and the code is kept, which costs more time and
    memory than a few tokens of padding: steps of 2 up to 32 tokens, of 4 up to 64, of 8 up to 128, of 32 above.
    """
    step = 2 if length <= 32 else 4 if length <= 64 else 8 if length <= 128 else 32
    return -(-length // step) * step
