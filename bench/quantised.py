"""Frozen weights in 8 and 4 bits: what they save, and what time they cost, against bf16 on the same backbone.

Passes and steps of training LoRA (r = 8 on query and value) over 16 texts of 64 tokens; with the embedded decoder also
8 answers of 32 tokens. Weights are counted as they are kept: `maps` are the linear maps of the blocks, the rest of a
small model is mostly its embeddings.
"""

from __future__ import annotations

import random
from unittest.mock import patch

import torch
from torch import nn

from bench.measure import Row, Samples, Turn, Window, keep, options, turns
from polytask.backbones import Backbone, load
from polytask.backbones.quantised import QUANTISED
from polytask.inference import writing
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import build
from polytask.methods.lifting import Active, Plan

PLAIN = "bf16"
ROWS, TOKENS, ANSWERS, NEW = 16, 64, 8, 32


def bytes_of(weight: torch.Tensor) -> int:
    """What a weight takes, of torchao's tensors the parts that they are made of."""
    parts = getattr(weight, "__tensor_flatten__", None)
    return sum(bytes_of(getattr(weight, name)) for name in parts()[0]) if parts else weight.nbytes


def sizes(base: Backbone) -> tuple[int, int]:
    """Bytes of the blocks' linear maps, and of the rest."""
    maps = {id(m._parameters["weight"]) for block in base.blocks for m in block.modules() if isinstance(m, nn.Linear)}
    found = {id(p): bytes_of(p) for p in base.model.parameters()}
    return sum(n for i, n in found.items() if i in maps), sum(n for i, n in found.items() if i not in maps)


def ids(base: Backbone, rows: int, tokens: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(100, base.model.config.vocab_size) for _ in range(tokens)] for _ in range(rows)]


def reading(base: Backbone) -> Turn:
    batch = base.collate(ids(base, ROWS, TOKENS))

    def turn(window: Window) -> float:
        with window, torch.no_grad():
            base.hidden(batch)
        return ROWS

    return turn


def training(base: Backbone) -> Turn:
    batch = base.collate(ids(base, ROWS, TOKENS))
    method = build("lora")
    tensors = {name: t.requires_grad_() for name, t in method.start(base, 0).items()}
    plan = Plan(base, [Active.of(method, tensors)], training=True)

    def turn(window: Window) -> float:
        with window:
            plan.hidden(batch).float().square().mean().backward()  # type: ignore[no-untyped-call]
        return ROWS

    return turn


def writes(base: Backbone) -> Turn:
    plan = Plan(base, [])
    asked = [Prompt(row, torch.zeros(0), Sampling(max_tokens=NEW)) for row in ids(base, ANSWERS, TOKENS)]

    def turn(window: Window) -> float:
        with window, torch.no_grad():
            written = generate(plan, asked)
        return float(sum(len(one.tokens) for one in written))

    return turn


def main() -> None:
    o = options(__doc__ or "", rounds=7, limit=60.0)
    rows: list[Row] = []
    samples: dict[str, Samples] = {}
    weights: dict[str, dict[str, tuple[int, int]]] = {}
    for name in ("minilm", "polytask-base"):
        bases = {precision: load(name, precision=precision) for precision in (PLAIN, *QUANTISED)}  # type: ignore[arg-type]
        weights[name] = {precision: sizes(base) for precision, base in bases.items()}
        maps, rest = weights[name][PLAIN]
        for precision in QUANTISED:
            small, same = weights[name][precision]
            what = f"{name}, {precision}: bytes of the blocks' maps to those in {PLAIN}"
            ratio = small / maps
            rows.append(
                Row(
                    "quantised",
                    what,
                    ratio,
                    ratio,
                    ratio,
                    note=f"with all the rest {(small + same) / (maps + rest):.2f}",
                )
            )
        kinds = {"a pass": reading, "a step of LoRA": training} | ({"a token": writes} if bases[PLAIN].writes else {})
        for what, make in kinds.items():
            with patch.object(writing, "ends", lambda _: frozenset()):
                found = turns(
                    {p: make(base) for p, base in bases.items()}, rounds=o.rounds, limit=o.limit, clock=o.clock
                )
            samples[f"{name} {what}"] = found
            rows += [
                Row.of("quantised", f"{name}, {p}: time of {what} to {PLAIN}", found.ratio(p, PLAIN)) for p in QUANTISED
            ]
    keep("quantised", rows, samples, {"bytes": weights})


if __name__ == "__main__":
    main()
