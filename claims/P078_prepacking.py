"""Prompts of mixed length are read faster packed than padded: Zhao et al. 2024, Prepacking, arXiv 2404.09529.

The paper packs the prompts of a batch into rows as long as the longest of them, with block-diagonal masks and positions
that start again, and compares the time to read them with that of the batch padded by Hugging Face. Here: the embedded
decoder, batches of 32 prompts drawn from five real tasks whose lengths are skewed, in the processor's own precision for
the times (turns, medians of ratios) and in fp32 for the next-token logits.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import polytask as pt
from bench.measure import Window, turns
from claims.claim import Rows, Verdict, data
from polytask.backbones import text
from polytask.backbones.frame import read, unembed
from polytask.methods import passes
from polytask.recipes.reading import Reading

PAPER = "Zhao et al. 2024"
CLAIM = "prompts packed into shared rows are read faster than padded ones, with the same result"
TASKS = ("tldr_command", "csabstruct", "gsm8k", "scan_simple", "sgd_state")
BATCHES, ROWS, ROUNDS = 4, 32, 7
FASTER, APART = 1.5, 1e-4


def prompts(base: pt.Backbone) -> list[list[list[int]]]:
    """Batches of prompts, each of all tasks."""
    folder = data()
    assert folder is not None
    draw = random.Random(0)
    found = []
    for name in TASKS:
        task = pt.Task.read(folder / name)
        head = Reading(in_text="yes").design(base, task)
        examples = draw.sample(task.train, BATCHES * ROWS // len(TASKS) + 1)
        asked = [text.ask(head, replace(e, output=None)) for e in examples]
        found += [list(one.ids) for one in text.encode(base, head, asked)]
    draw.shuffle(found)
    return [found[i * ROWS : (i + 1) * ROWS] for i in range(BATCHES)]


def packed(base: pt.Backbone, rows: list[list[int]]) -> tuple[list[int], Tensor]:
    """The order in which prompts were read, and their next-token states."""
    bins = passes.binned([len(ids) for ids in rows], [0] * len(rows))
    found = read(base, base.pack([[rows[i] for i in row] for row in bins]))
    return [i for row in bins for i in row], found.hidden


def padded(base: pt.Backbone, rows: list[list[int]]) -> Tensor:
    """Next-token states of the batch as a Hugging Face model reads it before it writes: padded on the left."""
    longest = max(map(len, rows))
    pad = base.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    out = base.base(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True)
    states: Tensor = out.last_hidden_state[:, -1]
    return states


@torch.no_grad()
def run() -> dict[str, Any]:
    exact, base = pt.load("polytask-base", precision="fp32"), pt.load("polytask-base")
    batches = prompts(base)
    apart = 0.0
    for rows in batches:
        order, states = packed(exact, rows)
        right = unembed(exact, padded(exact, [rows[i] for i in order]))
        apart = max(apart, float((unembed(exact, states) - right).abs().max()))

    def ours(window: Window) -> float:
        with window:
            for rows in batches:
                packed(base, rows)
        return len(batches)

    def theirs(window: Window) -> float:
        with window:
            for rows in batches:
                padded(base, rows)
        return len(batches)

    ratio = turns({"packed": ours, "padded": theirs}, rounds=ROUNDS, limit=300.0).ratio("padded", "packed")
    lengths = sorted(len(ids) for rows in batches for ids in rows)
    return {
        "faster": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "apart": apart,
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "threads": torch.get_num_threads(),
    }


def measure(rows: Rows) -> Verdict:
    found = rows.get(run, batches=BATCHES)
    return Verdict(
        f"{BATCHES} batches of {ROWS} prompts of {found['shortest']} to {found['longest']} tokens (median "
        f"{found['median']}): packed {found['faster']:.2f}x as fast as padded ({found['low']:.2f} – "
        f"{found['high']:.2f}); logits at most {found['apart']:.1e} apart",
        found["faster"] >= FASTER and found["apart"] <= APART,
    )
