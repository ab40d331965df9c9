"""Decoding 32 rows with 8 different LoRA adapters, against PEFT's `generate` with its mixed batch.

The embedded decoder, LoRA r = 8 on query and value, prompts of 16 to 64 tokens, 64 new tokens for every row (nothing
ends early on either side), greedy. PEFT gets the same prompts padded on the left, and `adapter_names`. `alone` is each
side without adapters.
"""

from __future__ import annotations

import argparse
import random
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.infer import active
from bench.measure import Row, Turn, Window, keep, options, turns
from polytask.backbones import Backbone, load
from polytask.backbones.backbone import writer_folder
from polytask.inference import generation
from polytask.inference.generation import Prompt, Sampling, generate
from polytask.methods.lifting import Plan

ROWS, ADAPTERS, NEW = 32, 8, 64


def prompts(vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(300, vocabulary) for _ in range(draw.randint(16, 64))] for _ in range(ROWS)]


def ours(base: Backbone, rows: list[list[int]], K: int) -> Turn:
    plan = Plan(base, [active(base, "lora", seed) for seed in range(K)])
    rule = Sampling(max_tokens=NEW)
    weights = torch.eye(K)[torch.arange(ROWS) % K] if K else torch.zeros(ROWS, 0)
    asked = [Prompt(ids, w, rule) for ids, w in zip(rows, weights, strict=True)]

    def turn(window: Window) -> float:
        with window:
            written = generate(plan, asked)
        return float(sum(len(one.tokens) for one in written))

    return turn


def theirs(base: Backbone, rows: list[list[int]], K: int) -> Turn:
    model = AutoModelForCausalLM.from_pretrained(writer_folder()).eval().to(base.dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = base.tokenizer.pad_token_id
    names: dict[str, list[str]] = {}
    if K:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = get_peft_model(model, config, adapter_name="a0")
        for i in range(1, K):
            wrapped.add_adapter(f"a{i}", config)
        model = wrapped.eval().to(base.dtype)
        names = {"adapter_names": [f"a{i % K}" for i in range(ROWS)]}
    longest = max(map(len, rows))
    ids = torch.tensor([[base.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def turn(window: Window) -> float:
        with window:
            found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **names)
        return float(found[:, longest:].numel())

    return turn


@torch.no_grad()
def main() -> None:
    o: argparse.Namespace = options(__doc__ or "", rounds=7, limit=240.0)
    base = load("polytask-base")
    rows = prompts(len(base.tokenizer))
    variants = {
        "alone": ours(base, rows, 0),
        "lora 8": ours(base, rows, ADAPTERS),
        "peft alone": theirs(base, rows, 0),
        "peft 8": theirs(base, rows, ADAPTERS),
    }
    with patch.object(generation, "ends", lambda _: frozenset()):
        found = turns(variants, rounds=o.rounds, limit=o.limit, clock=o.clock)
    speed = {name: f"{1 / found.cost(name).median:.0f} tokens/s" for name in variants}
    table = [
        Row.of(
            "decode",
            "8 adapters: PEFT's time to polytask's",
            found.ratio("peft 8", "lora 8"),
            target=4.0,
            note=f"{speed['lora 8']}, PEFT {speed['peft 8']}",
        ),
        Row.of(
            "decode",
            "8 adapters to none",
            found.ratio("lora 8", "alone"),
            target=1.15,
            better="less",
            note=f"alone {speed['alone']}",
        ),
        Row.of("decode", "PEFT: 8 adapters to none", found.ratio("peft 8", "peft alone"), note=speed["peft alone"]),
        Row.of("decode", "no adapters: PEFT's time to polytask's", found.ratio("peft alone", "alone")),
    ]
    keep("decode", table, {"decode": found}, {"dtype": str(base.dtype), "base": base.name})


if __name__ == "__main__":
    main()
