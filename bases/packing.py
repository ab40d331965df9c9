"""From documents to rows: which document stands where, pass after pass, the same for the same seed.

Long texts are cut into pieces of one row, at another place in each pass; short documents are put together into rows by
best fit, so that none is cut (Ding et al. 2024, arXiv 2404.10830). Within a row each document starts at position 0 and
attends to itself only; `Batch.document` says which is which.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TEXT, PROMPT, ANSWER = 0, 1, 2  # what a predicted token is part of
WINDOW = 2048  # pieces among which a row is put together


@dataclass(frozen=True)
class Cache:
    """The stream that `bases.data build` wrote; tokens stay on the disk."""

    tokens: np.ndarray  # [N] uint16
    documents: np.ndarray  # [D] of data.DOCUMENT
    starts: np.ndarray  # [D] where each begins
    names: tuple[str, ...]  # of the sources

    @classmethod
    def open(cls, folder: Path) -> Cache:
        """Read a cache folder."""
        documents = np.load(folder / "documents.npy")
        names = tuple(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sources"])
        return cls.of(np.load(folder / "tokens.npy", mmap_mode="r"), documents, names)

    @classmethod
    def of(cls, tokens: np.ndarray, documents: np.ndarray, names: tuple[str, ...]) -> Cache:
        """A cache in memory."""
        starts = np.cumsum(documents["length"], dtype=np.int64) - documents["length"]
        return cls(tokens, documents, starts, names)


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents; each tensor is [rows, length]. `part` is about `target`; -1 where there is nothing."""

    tokens: Tensor
    position: Tensor
    document: Tensor
    target: Tensor
    part: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


@dataclass(frozen=True)
class Plan:
    """The rows of one pass: row r holds the pieces `first[r]` to `first[r + 1]`."""

    start: np.ndarray  # [pieces] in the stream
    length: np.ndarray  # [pieces]
    answer: np.ndarray  # [pieces] where in the piece the answer begins; -1 for text
    first: np.ndarray  # [rows + 1]

    def __len__(self) -> int:
        return len(self.first) - 1


def pieces(cache: Cache, chosen: np.ndarray, length: int, phase: np.random.Generator | None = None) -> np.ndarray:
    """[pieces, 3] of start, length and answer: the `chosen` documents, cut to rows.

    Text is cut everywhere, its first piece at a random length if a generator is given; of a longer example the end
    stays, which has the answer.
    """
    start = cache.starts[chosen]
    size, answer = (cache.documents[name][chosen].astype(np.int64) for name in ("length", "answer"))
    task = answer > 0
    cut = np.where(task & (size > length), size - length, 0)
    found = [np.stack([start + cut, size - cut, np.maximum(answer - cut, 0)], 1)[task]]
    for begin, n in zip(start[~task], size[~task], strict=True):
        head = 0 if phase is None or n <= length else int(phase.integers(length))
        edges = np.unique(np.concatenate([[0, n], np.arange(head or length, n, length)]))
        found.append(np.stack([begin + edges[:-1], np.diff(edges), np.full(len(edges) - 1, -1)], 1))
    return np.concatenate(found)


def plan(cache: Cache, mix: Mapping[str, float], length: int, seed: int, number: int) -> Plan:
    """Pass `number` over the stream: the source with the largest share once, others as often as it takes."""
    random = np.random.default_rng([seed, number])
    group_of = np.array([list(mix).index(name.split("/")[0]) for name in cache.names])[cache.documents["source"]]
    open_ = cache.documents["held"] == 0
    sizes = {g: int(cache.documents["length"][open_ & (group_of == g)].sum()) for g in np.unique(group_of)}
    shares = list(mix.values())
    largest = max(sizes, key=lambda g: shares[g])
    chosen = []
    for g, size in sizes.items():
        times = shares[g] / shares[largest] * sizes[largest] / max(size, 1)
        ids = np.flatnonzero(open_ & (group_of == g))
        # 2.3 times: all of them twice, and 30 % of them, others in each pass.
        some = random.permutation(ids)[: round(times % 1 * len(ids))]
        chosen += [np.repeat(ids, int(times)), some]
    found = pieces(cache, np.concatenate(chosen), length, random)
    return _fit(found[random.permutation(len(found))], length, random)


def rows_of(cache: Cache, chosen: np.ndarray, length: int) -> Plan:
    """The `chosen` documents, each cut and packed the same way, in no random order: to measure on."""
    return _fit(pieces(cache, chosen, length), length, None)


def _fit(found: np.ndarray, length: int, random: np.random.Generator | None) -> Plan:
    """Pieces to rows: within a window the longest first, each into the fullest row that still takes it."""
    order, counts = [], []
    for begin in range(0, len(found), WINDOW):
        window = found[begin : begin + WINDOW, 1]
        rows: list[list[int]] = []
        space: list[tuple[int, int]] = []  # (tokens left, row), ascending
        for piece in np.argsort(-window, kind="stable").tolist():
            size = int(window[piece])
            at = bisect.bisect_left(space, (size, -1))
            if at < len(space):
                left, row = space.pop(at)
            else:
                left, row = length, len(rows)
                rows.append([])
            rows[row].append(begin + piece)
            if left > size:
                bisect.insort(space, (left - size, row))
        order += rows
    if random is not None:
        order = [order[n] for n in random.permutation(len(order))]
    counts = [len(row) for row in order]
    flat = found[np.concatenate(order)] if order else found
    return Plan(flat[:, 0], flat[:, 1], flat[:, 2], np.concatenate([[0], np.cumsum(counts)]))


def collate(cache: Cache, p: Plan, rows: range, length: int, pad: int) -> Batch:
    """The batch of some rows of a plan."""
    shape = (len(rows), length)
    tokens, position = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    document, part = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    for row, r in enumerate(rows):
        at = 0
        for n in range(p.first[r], p.first[r + 1]):
            start, size, answer = int(p.start[n]), int(p.length[n]), int(p.answer[n])
            here = slice(at, at + size)
            tokens[row, here] = cache.tokens[start : start + size]
            position[row, here] = np.arange(size)
            document[row, here] = n
            # Token t predicts token t + 1; the last of a document predicts nothing.
            part[row, at : at + size - 1] = TEXT if answer < 0 else PROMPT
            if answer >= 0:
                part[row, max(at, at + answer - 1) : at + size - 1] = ANSWER
            at += size
    target = np.full(shape, pad, np.int64)
    target[:, :-1] = tokens[:, 1:]
    return Batch(*(torch.from_numpy(a) for a in (tokens, position, document, target, part)))


class Stream:
    """Batches without an end; `at` = (pass, row) is all the state there is."""

    def __init__(
        self,
        cache: Cache,
        mix: Mapping[str, float],
        *,
        length: int,
        rows: int,
        seed: int,
        pad: int,
        at: tuple[int, int],
    ) -> None:
        self.cache, self.mix, self.length, self.rows, self.seed, self.pad = cache, mix, length, rows, seed, pad
        self.at = at

    def __iter__(self) -> Iterator[tuple[Batch, tuple[int, int]]]:
        """(batch, where the next one begins); a pass ends with a whole batch, and its last few rows are left out."""
        number, row = self.at
        while True:
            p = plan(self.cache, self.mix, self.length, self.seed, number)
            if len(p) < self.rows:
                raise ValueError(f"a pass has {len(p)} rows, fewer than a batch of {self.rows}")
            while row + self.rows <= len(p):
                batch = collate(self.cache, p, range(row, row + self.rows), self.length, self.pad)
                row += self.rows
                yield batch, (number, row)
            number, row = number + 1, 0
