"""From examples to logits: tokens, passes of similar length, and heads of several adapters over one pass.

An example becomes a `Unit`: one token sequence, or two for a pair whose texts are encoded apart. A `Seat` is who
answers: a head with its tensors, and the weights of a plan's adapters that its rows get. Units of different seats
share a pass; each seat's head reads its own rows. An answer in text is read like tags: each of its tokens is the class
that the position before it has to give.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, Batch, heads, text
from polytask.backbones.batch import padded
from polytask.backbones.frame import start_token
from polytask.methods.lifting import Plan, Terms, planned
from polytask.tasks import Example
from polytask.tasks.task import Output

TOKENS_TO_START = 64  # what a pass costs beside its tokens, in tokens; measured with MiniLM on a CPU
LATE = 1.5  # what the last states count in a gist, to those in the middle; on the tasks of development
TOKENS_A_PASS = 2048  # padded tokens: large enough for full matrix products, small enough for a laptop's memory


@dataclass(slots=True)
class Unit:
    """An example as token ids: a text's, or those of two texts of a pair (none of the second, where a method reads it
    beside the first and there is none). `starts` are the positions that are read one by one: of its words' first
    pieces, where it is tagged, of its mask tokens, or those that predict its answer's tokens, `target`. `written` is
    what a decoder beside the encoder reads. `states` are cached hidden states [T, d] of each sequence at the block
    where passes begin."""

    ids: tuple[list[int], ...]
    starts: list[int] | None = None
    target: list[int] | None = None
    written: list[int] | None = None
    states: tuple[Tensor, ...] | None = None

    @property
    def length(self) -> int:
        """The padded length of its longest sequence."""
        return padded(max(len(row) for row in (*self.ids, self.written or ())))

    @property
    def at(self) -> list[int]:
        """The positions that are read one by one, without words that have none."""
        return [at for at in self.starts or () if at >= 0]


@dataclass(frozen=True, eq=False)
class Seat:
    """A head, its tensors, and the weights [K] its rows give to the plan's adapters (None: the backbone alone)."""

    head: HeadCard
    params: Mapping[str, Tensor]
    weights: Tensor | None = None


def encode(backbone: Backbone, head: HeadCard, examples: Sequence[Example], limit: int = 256) -> list[Unit]:
    """Tokenise examples the way `head` reads them, at most `limit` tokens a sequence (a text card has its own)."""
    if head.text:
        return answered(backbone, text.encode(backbone, head, [text.taught(head, e) for e in examples]))
    if head.kind == "tagging":
        ids, starts = backbone.tokenize_words([e.input for e in examples], limit)
        return _beside(backbone, head, examples, [Unit((row,), at) for row, at in zip(ids, starts, strict=True)], limit)
    texts = [_spelt(head, e.input if isinstance(e.input, str) else " ".join(e.input)) for e in examples]
    seconds = [_spelt(head, e.pair or "") for e in examples]
    if head.masks:
        pairs = None if head.pair == "none" else seconds
        masked = zip(*backbone.tokenize_masked(texts, pairs, head.masks, limit), strict=True)
        return [Unit((row,), at) for row, at in masked]
    if head.pair in ("none", "beside"):
        units = [Unit((row,)) for row in backbone.tokenize(texts, limit=limit)]
        return _beside(backbone, head, examples, units, limit)
    if head.pair == "joint":
        return [Unit((row,)) for row in backbone.tokenize(texts, seconds, limit)]
    both = zip(backbone.tokenize(texts, limit=limit), backbone.tokenize(seconds, limit=limit), strict=True)
    return [Unit((u, v)) for u, v in both]


def _beside(
    backbone: Backbone, head: HeadCard, examples: Sequence[Example], units: list[Unit], limit: int
) -> list[Unit]:
    """The units with the second texts, where a method reads them."""
    if head.pair != "beside":
        return units
    seconds = backbone.tokenize([_spelt(head, e.pair or "") for e in examples], limit=limit)
    for unit, e, row in zip(units, examples, seconds, strict=True):
        unit.ids = (*unit.ids, [] if e.pair is None else row)
    return units


def _spelt(head: HeadCard, said: str) -> str:
    """A text with spaces around each character of the head's alphabet."""
    if head.alphabet is None:
        return said
    return " ".join(re.sub(f"[{re.escape(head.alphabet)}]", r" \g<0> ", said).split())


def wrong(backbone: Backbone, head: HeadCard, examples: Sequence[Example]) -> list[list[Unit]]:
    """Each example's wrong answers in text: its other options, or the other labels."""
    others = [[o for o in dict.fromkeys(text.options(head, e)) if o != e.output] for e in examples]
    prompts = [text.ask(head, replace(e, output=o)) for e, own in zip(examples, others, strict=True) for o in own]
    units = iter(answered(backbone, text.encode(backbone, head, prompts)))
    return [[next(units) for _ in own] for own in others]


def answered(backbone: Backbone, asked: Sequence[text.Asked]) -> list[Unit]:
    """Prompts with answers, as units whose read positions predict the answers' tokens."""
    units = []
    for one in asked:
        target = one.target or []
        if backbone.kind == "encoder-decoder":
            written = [start_token(backbone), *target[:-1]]
            units.append(Unit((one.ids,), list(range(len(target))), target, written))
        else:
            first = len(one.ids) - 1
            units.append(Unit(([*one.ids, *target[:-1]],), list(range(first, first + len(target))), target))
    return units


def packs(units: Sequence[Unit], budget: int = TOKENS_A_PASS) -> list[list[int]]:
    """Indexes of units, longest first, cut into passes of at most `budget` padded tokens (or one unit).

    The cuts are those of least cost, where a pass of n rows padded to T tokens costs nT + TOKENS_TO_START. They fall
    where the budget is full, or on every fourth row where a length ends, so that passes come in few shapes.
    """
    order = sorted(range(len(units)), key=lambda i: -units[i].length)
    sides = max((len(unit.ids) for unit in units), default=1)
    lengths = [units[i].length * sides for i in order]
    N = len(order)
    ends = [i for i in range(1, N) if lengths[i] != lengths[i - 1]] + [N]
    cost: dict[int, tuple[int, int]] = {0: (0, 0)}  # of the first i units: tokens, and where their last pass begins
    for i in range(N):
        if i not in cost:
            continue
        fit = max(1, budget // lengths[i])
        for end in (*ends[bisect.bisect_right(ends, i) :], i + fit):
            j = min(N, i + fit, i - (i - end) // 4 * 4)
            total = cost[i][0] + (j - i) * lengths[i] + TOKENS_TO_START
            if j not in cost or total < cost[j][0]:
                cost[j] = (total, i)
            if j == min(N, i + fit):
                break
    passes: list[list[int]] = []
    while N:
        begin = cost[N][1]
        passes.insert(0, order[begin:N])
        N = begin
    return passes


def schedule(
    seats: Sequence[Seat],
    units: Sequence[Unit],
    which: Sequence[int],
    budget: int = TOKENS_A_PASS,
    *,
    packable: bool = False,
    bound: Mapping[int, Hashable] | None = None,
) -> Iterator[list[int]]:
    """Passes of units whose seats agree on the causal mask and on writing, as indexes of units; see `packs`.

    Answers in text that may share rows are cut by the budget alone, whatever their lengths. Units that are `bound` to
    the same thing come in one pass, in order, even where they are more than the budget.
    """
    bound = bound or {}
    ways = [(seats[s].head.causal, seats[s].head.text is not None, i in bound) for i, s in enumerate(which)]
    for way in sorted(set(ways), key=str):
        chosen = [i for i, own in enumerate(ways) if own == way]
        if way[2]:
            groups: dict[Hashable, list[int]] = {}
            for i in chosen:
                groups.setdefault(bound[i], []).append(i)
            whole = [*groups.values()]
            for taken in filled([sum(units[i].length for i in own) for own in whole], range(len(whole)), budget):
                yield [i for g in taken for i in whole[g]]
            continue
        if way[1] and packable:
            yield from filled([units[i].length for i in chosen], chosen, budget)
            continue
        for pack in packs([units[i] for i in chosen], budget):
            yield [chosen[j] for j in pack]


def filled(lengths: Sequence[int], items: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Items in order, cut where their lengths go over the budget."""
    taken: list[int] = []
    used = 0
    for length, item in zip(lengths, items, strict=True):
        if taken and used + length > budget:
            yield taken
            taken, used = [], 0
        taken.append(item)
        used += length
    if taken:
        yield taken


def binned(lengths: Sequence[int], owners: Sequence[Hashable]) -> list[list[int]]:
    """Rows that hold sequences of one owner side by side, none longer than the longest sequence: the longest first,
    each into the first row with room (first-fit decreasing; Prepacking: Zhao et al. 2024, arXiv 2404.09529)."""
    capacity = max(lengths, default=0)
    rows: list[list[int]] = []
    room: dict[Hashable, list[tuple[int, int]]] = {}  # by owner: (room, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        own = room.setdefault(owners[i], [])
        at = next((n for n, (left, _) in enumerate(own) if left >= lengths[i]), None)
        if at is None:
            at = len(own)
            own.append((capacity, len(rows)))
            rows.append([])
        left, row = own[at]
        own[at] = (left - lengths[i], row)
        rows[row].append(i)
    return rows


def forward(
    plan: Plan, seats: Sequence[Seat], units: Sequence[Unit], which: Sequence[int], start: int = 0
) -> Iterator[tuple[int, list[int], Tensor]]:
    """One pass. Unit i is answered by seat `which[i]`; yields (seat, its units in order, logits) for each seat.

    Logits are [units, C], or [positions, C] for a head that reads words or an answer: those of its units, one after
    another (see `words`). `start` is the block at which cached states enter.
    """
    backbone = plan.backbone
    mine: dict[int, list[int]] = {}
    for i, seat in enumerate(which):
        mine.setdefault(seat, []).append(i)
    if seats[which[0]].head.text:
        yield from _answers(plan, seats, units, mine, which, start)
        return
    rows: list[list[int]] = []
    states: list[Tensor] = []
    beside: list[Unit | None] = []
    weights: list[Tensor] = []
    spans: dict[int, tuple[int, int]] = {}
    K = len(plan.adapters)
    for s, members in mine.items():
        begin = len(rows)
        second = seats[s].head.pair == "beside"
        for side in range(1 if second else len(units[members[0]].ids)):
            rows += [units[i].ids[side] for i in members]
            states += [kept[side] for i in members if (kept := units[i].states)]
            beside += [units[i] if second else None for i in members]
        spans[s] = (begin, len(rows))
        given = seats[s].weights
        weights.append((torch.zeros(K) if given is None else given).expand(len(rows) - begin, K))
    batch = backbone.collate(rows)
    if states:
        batch = replace(batch, start=start, states=_stacked(states, batch))
    if any(unit and unit.ids[1] for unit in beside):
        seconds = backbone.collate([unit.ids[1] if unit else [] for unit in beside])
        if states:
            theirs = [unit.states[1] if unit and unit.states else states[0][:0] for unit in beside]
            seconds = replace(seconds, start=start, states=_stacked(theirs, seconds))
        batch = replace(batch, beside=seconds)
    causal = seats[which[0]].head.causal
    hidden = plan.hidden(batch, torch.cat(weights).to(backbone.device), causal=causal)
    for s, members in mine.items():
        begin, end = spans[s]
        head, params = seats[s].head, seats[s].params
        φ = heads.features(head, hidden[begin:end], batch.mask[begin:end], params.get("q"))
        if head.kind == "tagging":
            rows_of, at = words([units[i] for i in members])
            φ = φ[rows_of.to(φ.device), at.to(φ.device)]
        elif head.masks:
            at = torch.tensor([units[i].at for i in members], device=φ.device)
            φ = φ[torch.arange(len(at), device=φ.device)[:, None], at]
        yield s, members, heads.read(head, dict(params), φ, batch.mask[begin:end])


def _answers(
    plan: Plan,
    seats: Sequence[Seat],
    units: Sequence[Unit],
    mine: Mapping[int, Sequence[int]],
    which: Sequence[int],
    start: int,
) -> Iterator[tuple[int, list[int], Tensor]]:
    """A pass of answers in text, several in a row where the backbone allows it."""
    backbone = plan.backbone
    if backbone.packable:
        rows = binned([len(unit.ids[0]) for unit in units], which)
        batch = backbone.pack([[units[i].ids[0] for i in row] for row in rows])
    else:
        rows = [[i] for i in range(len(units))]
        batch = backbone.collate([unit.ids[0] for unit in units])
        batch = replace(batch, written=backbone.collate([unit.written or [] for unit in units]).ids)
    if units[0].states:
        joined = [torch.cat([state for i in row for state in units[i].states or ()]) for row in rows]
        batch = replace(batch, start=start, states=_stacked(joined, batch))
    if plan.positional and backbone.kind == "decoder":
        asked = torch.zeros_like(batch.mask, device="cpu")
        for r, row in enumerate(rows):
            ends = itertools.accumulate((len(units[i].ids[0]) for i in row), initial=0)
            for i, begin in zip(row, ends, strict=False):
                asked[r, begin : begin + units[i].at[0] + 1] = True
        batch = replace(batch, asked=asked.to(backbone.device))
    none = torch.zeros(len(plan.adapters))
    weights = torch.stack([none if (w := seats[which[row[0]]].weights) is None else w for row in rows])
    begins: dict[int, tuple[int, int]] = {}
    for r, row in enumerate(rows):
        ends = itertools.accumulate((len(units[i].ids[0]) for i in row), initial=0)
        begins |= {i: (r, begin) for i, begin in zip(row, ends, strict=False)}
    at = [(r, begin + k) for members in mine.values() for i in members for r, begin in [begins[i]] for k in units[i].at]
    places = torch.tensor(at, dtype=torch.long).reshape(-1, 2)
    z = plan.logits(batch, weights.to(backbone.device), places.to(backbone.device))
    sizes = [sum(len(units[i].at) for i in members) for members in mine.values()]
    for (s, members), part in zip(mine.items(), torch.split(z, sizes), strict=True):
        yield s, [*members], part


def _stacked(states: Sequence[Tensor], batch: Batch) -> Tensor:
    """Cached states [T, d] of each row, padded to the batch's width: [R, T, d]."""
    stacked = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(batch.ids.device)
    return F.pad(stacked, (0, 0, 0, batch.ids.shape[1] - stacked.shape[1]))


def words(units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
    """(row, position) of every word with a position, row by row."""
    pairs = [(row, at) for row, unit in enumerate(units) for at in unit.at]
    index = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return index[:, 0], index[:, 1]


@torch.no_grad()
def features(
    backbone: Backbone,
    head: HeadCard,
    units: Sequence[Unit],
    q: Tensor | None = None,
    *,
    terms: Terms = (),
    start: int = 0,
) -> list[Tensor]:
    """What a head reads of the backbone alone, or with adapters: φ [width] of each unit, [words, d] of each tagged
    one, [masks, d] of one with mask tokens, [T, d] of one whose tokens labels attend to. `start` is the block at which
    cached states enter."""
    p: dict[str, Tensor] = {}
    if q is not None:  # read by the pooling, so that there has to be a W that leaves φ as it is
        d = heads.width(head, backbone.hidden_size)
        p = {"W": torch.eye(d, device=backbone.device), "b": torch.zeros(d, device=backbone.device), "q": q}
    order, weights = planned([terms])
    plan, seat = Plan(backbone, order), Seat(head, p, weights[0])
    found: list[Tensor] = [torch.empty(0)] * len(units)
    for pack in packs(units):
        for _, members, φ in forward(plan, [seat], [units[i] for i in pack], [0] * len(pack), start):
            parts = torch.split(φ, [len(units[pack[j]].at) for j in members]) if head.reads == "words" else φ.unbind()
            for j, part in zip(members, parts, strict=True):
                found[pack[j]] = part[: len(units[pack[j]].ids[0])] if head.pool == "labels" else part
    return found


def embed(backbone: Backbone, texts: Sequence[str], limit: int = 256, block: int | None = None) -> Tensor:
    """Mean-pooled last hidden states [N, d] of the backbone alone, fp32, on the CPU; or what block number `block`
    reads, which is the pass up to there."""
    if block is not None:
        return _pooled(backbone, texts, limit, 1, lambda batch: (backbone.upto(batch, block),))
    plain = HeadCard(kind="classification")
    units = encode(backbone, plain, [Example("", text) for text in texts], limit)
    return torch.stack(features(backbone, plain, units)).cpu() if units else torch.empty(0, backbone.hidden_size)


def gist(backbone: Backbone, texts: Sequence[str], limit: int = 256) -> Tensor:
    """e [N, 2d] of texts, of unit length, fp32, on the CPU: what tells their tasks apart.

        e = [ĥ_½; LATE · ĥ] / ‖·‖         ĥ_½ and ĥ: mean states half of the way up and at the end, of unit length

    States in the middle tell tasks better, those at the end short texts. Of test inputs of twelve tasks MiniLM's middle
    alone puts 79 % nearest to their own task's mean, its end 78 %, both 84 %; of these inputs' first five words 44 %,
    64 % and 62 % (bench/gist.py).
    """
    d, half = backbone.hidden_size, len(backbone.blocks) // 2
    both = _pooled(backbone, texts, limit, 2, lambda batch: backbone.passing(batch, half))
    middle, end = F.normalize(both[:, :d], dim=-1), F.normalize(both[:, d:], dim=-1)
    return F.normalize(torch.cat([middle, LATE * end], -1), dim=-1)


@torch.no_grad()
def _pooled(
    backbone: Backbone, texts: Sequence[str], limit: int, n: int, states: Callable[[Batch], tuple[Tensor, ...]]
) -> Tensor:
    """The means [N, n d] over each text's tokens of n states [R, T, d], side by side."""
    plain = HeadCard(kind="classification")
    units = encode(backbone, plain, [Example("", text) for text in texts], limit)
    found = torch.empty(len(units), n * backbone.hidden_size)
    for pack in packs(units):
        batch = backbone.collate([units[i].ids[0] for i in pack])
        found[pack] = torch.cat([heads.features(plain, h, batch.mask).float().cpu() for h in states(batch)], -1)
    return found


@torch.no_grad()
def logprobs(
    plan: Plan, seats: Sequence[Seat], units: Sequence[Unit], which: Sequence[int], budget: int = TOKENS_A_PASS
) -> list[Tensor]:
    """log p of each token of each unit's answer [tokens], fp32, on the CPU, in the units' order."""
    found: list[Tensor] = [torch.empty(0)] * len(units)
    for pack in schedule(seats, units, which, budget, packable=plan.backbone.packable):
        for _, members, z in forward(plan, seats, [units[i] for i in pack], [which[i] for i in pack]):
            targets = [units[pack[j]].target or [] for j in members]
            wanted = torch.tensor([token for target in targets for token in target], device=z.device)
            log_p = z.log_softmax(-1).gather(1, wanted[:, None])[:, 0].cpu()
            for j, part in zip(members, torch.split(log_p, [len(target) for target in targets]), strict=True):
                found[pack[j]] = part
    return found


@torch.no_grad()
def logits(
    plan: Plan, seats: Sequence[Seat], units: Sequence[Unit], which: Sequence[int], budget: int = TOKENS_A_PASS
) -> list[Tensor]:
    """What each unit's head makes of it: logits [C], or [words, C] where it is tagged; fp32, on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(units)
    for pack in schedule(seats, units, which, budget, packable=plan.backbone.packable):
        for s, members, z in forward(plan, seats, [units[i] for i in pack], [which[i] for i in pack]):
            words = [len(units[pack[j]].at) for j in members]
            parts = torch.split(z, words) if seats[s].head.reads == "words" else z.unbind()
            for j, part in zip(members, parts, strict=True):
                found[pack[j]] = part.float().cpu()
    return found


def decoded(head: HeadCard, unit: Unit, z: Tensor) -> tuple[Output, float | None]:
    """A unit's answer with its probability, from its `logits`."""
    if head.reads == "sequence":
        [output], [sure] = heads.decode(head, z[None])
        return output, sure
    tags, each = heads.decode(head, z)
    said = iter(tags)
    whole = tuple(str(next(said)) if at >= 0 else head.targets[0] for at in unit.starts or ())
    return whole, min((p for p in each if p is not None), default=None)


@torch.no_grad()
def answer(
    plan: Plan, seats: Sequence[Seat], units: Sequence[Unit], which: Sequence[int], budget: int = TOKENS_A_PASS
) -> list[tuple[Output, float | None]]:
    """What each unit's seat answers by its head, with its probability, in the units' order.

    A tagged row's probability is that of its least sure word; a word that was cut off gets the first target, `O`.
    """
    answers: list[tuple[Output, float | None]] = [("", None)] * len(units)
    for pack in schedule(seats, units, which, budget, packable=plan.backbone.packable):
        for s, members, z in forward(plan, seats, [units[i] for i in pack], [which[i] for i in pack]):
            head = seats[s].head
            outputs, sure = heads.decode(head, z.cpu())
            if head.reads == "sequence":
                for j, found in zip(members, zip(outputs, sure, strict=True), strict=True):
                    answers[pack[j]] = found
                continue
            next_word = iter(zip(outputs, sure, strict=True))
            for j in members:
                starts = units[pack[j]].starts or ()
                tags = [next(next_word) if at >= 0 else (head.targets[0], 0.0) for at in starts]
                least = min((p for _, p in tags if p is not None), default=None)
                answers[pack[j]] = (tuple(str(tag) for tag, _ in tags), least)
    return answers
