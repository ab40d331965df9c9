"""Decoding 32 rows with 8 different LoRA adapters, against PEFT's `generate` with its mixed batch.

The embedded decoder, LoRA r = 8 on all linear maps (what `auto` trains for answers in text) and on query and value
only, prompts of 16 to 64 tokens, 64 new tokens for every row (nothing ends early on either side), greedy. PEFT gets the
same prompts padded on the left, and `adapter_names`. `alone` is each side without adapters.
"""

from __future__ import annotations

import argparse
import random
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.measure import Row, Turn, Window, keep, options, turns
from polytask.backbones import Backbone, load
from polytask.backbones.loading import writer_folder
from polytask.inference import writing
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import build
from polytask.methods.lifting import Active, Plan

ROWS, ADAPTERS, NEW = 32, 8, 64
SITES = {
    "all": ("*.attn.[qkvo]", "*.mlp.gate", "*.mlp.up", "*.mlp.down"),
    "q, v": ("*.attn.q", "*.attn.v"),
}
MODULES = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "q, v": ("q_proj", "v_proj"),
}


def prompts(vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(300, vocabulary) for _ in range(draw.randint(16, 64))] for _ in range(ROWS)]


def active(base: Backbone, sites: tuple[str, ...], seed: int) -> Active:
    """An adapter with random tensors, none of them zero."""
    method = build("lora", {"r": 8, "alpha": 16, "sites": sites})
    draw = torch.Generator().manual_seed(seed)
    return Active.of(
        method, {n: t + 0.02 * torch.randn(t.shape, generator=draw) for n, t in method.start(base, seed).items()}
    )


def ours(base: Backbone, rows: list[list[int]], K: int, sites: tuple[str, ...] = ()) -> Turn:
    plan = Plan(base, [active(base, sites, seed) for seed in range(K)])
    rule = Sampling(max_tokens=NEW)
    weights = torch.eye(K)[torch.arange(ROWS) % K] if K else torch.zeros(ROWS, 0)
    asked = [Prompt(ids, w, rule) for ids, w in zip(rows, weights, strict=True)]

    def turn(window: Window) -> float:
        with window:
            written = generate(plan, asked)
        return float(sum(len(one.tokens) for one in written))

    return turn


def theirs(base: Backbone, rows: list[list[int]], K: int, modules: tuple[str, ...] = ()) -> Turn:
    model = AutoModelForCausalLM.from_pretrained(writer_folder()).eval().to(base.dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = base.tokenizer.pad_token_id
    names: dict[str, list[str]] = {}
    if K:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=list(modules), init_lora_weights=False)
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
    variants = {"alone": ours(base, rows, 0), "peft alone": theirs(base, rows, 0)}
    for where in SITES:
        variants[f"lora {where}"] = ours(base, rows, ADAPTERS, SITES[where])
        variants[f"peft {where}"] = theirs(base, rows, ADAPTERS, MODULES[where])
    with patch.object(writing, "ends", lambda _: frozenset()):
        found = turns(variants, rounds=o.rounds, limit=o.limit, clock=o.clock)
    speed = {name: f"{1 / found.cost(name).median:.0f} tokens/s" for name in variants}
    table = []
    for where in SITES:
        mine, peft = f"lora {where}", f"peft {where}"
        note = f"{speed[mine]}, PEFT {speed[peft]}"
        ratio = found.ratio(peft, mine)
        table.append(
            Row.of("decode", f"8 adapters on {where}: PEFT's time to polytask's", ratio, target=4.0, note=note)
        )
        table.append(
            Row.of(
                "decode",
                f"8 adapters on {where} to none",
                found.ratio(mine, "alone"),
                target=1.15,
                better="less",
                note=f"alone {speed['alone']}",
            )
        )
        ratio = found.ratio(peft, "peft alone")
        table.append(Row.of("decode", f"PEFT: 8 adapters on {where} to none", ratio, note=speed["peft alone"]))
    table.append(Row.of("decode", "no adapters: PEFT's time to polytask's", found.ratio("peft alone", "alone")))
    keep("decode", table, {"decode": found}, {"dtype": str(base.dtype), "base": base.name})


if __name__ == "__main__":
    main()
