"""A batch of 32 rows whose rows use 1, 8, 32 (and 64 rows, 64) different LoRA adapters, against the batch without any.

MiniLM, LoRA r = 8 on query and value, random token ids, no padding, weights in the backbone's own precision. Each
ratio is to the same side's own pass without adapters: polytask's `Plan.hidden` to the backbone, PEFT's
`adapter_names` to the plain model. `cold` builds the plan of adapters that were never together before.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from bench.measure import Row, Samples, Turn, Window, keep, options, turns
from polytask.backbones import Backbone, Batch, load
from polytask.backbones.loading import embedded_folder
from polytask.methods import build
from polytask.methods.lifting import Active, Plan

TARGETS = {1: 1.15, 8: 1.20, 32: 1.25}
SECONDS = 0.3  # a turn repeats its pass for about this long, so that others' use of the processor can be seen


def active(base: Backbone, method: str, seed: int) -> Active:
    """An adapter with random tensors, none of them zero."""
    chosen = build(method)
    made = chosen.start(base, seed)
    generator = torch.Generator().manual_seed(seed)
    return Active.of(chosen, {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in made.items()})


def peft_model(base: Backbone, adapters: int) -> PeftModel:
    """The same backbone with that many LoRA adapters in PEFT, sdpa as transformers loads it."""
    model = AutoModel.from_pretrained(embedded_folder()).eval()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    found = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, adapters):
        found.add_adapter(f"a{i}", config)
    return found.eval().to(base.dtype)


def repeated(turn: Turn) -> Turn:
    """Do a short turn as often as fits in `SECONDS`."""
    times = 0

    def many(window: Window) -> float:
        nonlocal times
        if not times:
            turn(Window())
            once = Window()
            with once:
                turn(Window())
            times = max(3, round(SECONDS / once.seconds))
        with window:
            for _ in range(times):
                turn(Window())
        return float(times)

    return many


def batch(R: int, T: int) -> Batch:
    ids = torch.randint(1000, 30000, (R, T), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones(R, T, dtype=torch.bool))


def polytask_side(base: Backbone, R: int, T: int) -> dict[str, Turn]:
    """Passes by number of adapters, `cold` plans, and other methods."""
    given = batch(R, T)

    def warm(method: str, K: int) -> Turn:
        plan = Plan(base, [active(base, method, seed) for seed in range(K)])
        weights = torch.eye(K)[torch.arange(R) % K]

        def turn(_: Window) -> float:
            plan.hidden(given, weights)
            return 1.0

        return turn

    def cold(_: Window) -> float:
        Plan(base, adapters).hidden(given, weights)
        return 1.0

    def alone(_: Window) -> float:
        base.hidden(given)
        return 1.0

    adapters = [active(base, "lora", seed) for seed in range(min(R, 32))]
    weights = torch.eye(len(adapters))[torch.arange(R) % len(adapters)]
    sides: dict[str, Turn] = {"alone": alone}
    if R == 32:
        sides |= {f"lora {K}": warm("lora", K) for K in TARGETS}
        sides |= {"lora 32 cold": cold, "bottleneck 8": warm("bottleneck", 8), "ia3 8": warm("ia3", 8)}
    else:
        sides[f"lora {R}"] = warm("lora", R)
    return sides


def peft_side(base: Backbone, R: int, T: int, counts: list[int]) -> dict[str, Turn]:
    given = batch(R, T)
    inputs = {"input_ids": given.ids, "attention_mask": given.mask.long()}
    plain = AutoModel.from_pretrained(embedded_folder()).eval().to(base.dtype)
    model = peft_model(base, max(counts))

    def alone(_: Window) -> float:
        plain(**inputs)
        return 1.0

    def mixed(K: int) -> Turn:
        names = [f"a{i % K}" for i in range(R)]

        def turn(_: Window) -> float:
            model(**inputs, adapter_names=names)
            return 1.0

        return turn

    return {"peft alone": alone} | {f"peft {K}": mixed(K) for K in counts}


@torch.no_grad()
def main() -> None:
    o = options(__doc__ or "", rounds=15, limit=120.0, peft=1)
    base = load("minilm")
    rows: list[Row] = []
    kept: dict[str, Samples] = {}
    for R, T in ((32, 8), (32, 48), (64, 8)):
        counts = [1, 8, 32] if R == 32 else [64]
        sides = polytask_side(base, R, T)
        if o.peft:
            sides |= peft_side(base, R, T, counts)
        variants = {name: repeated(turn) for name, turn in sides.items()}
        kept[f"{R}x{T}"] = found = turns(variants, rounds=o.rounds, limit=o.limit, clock=o.clock)
        for name in sides:
            if "alone" in name:
                continue
            to = "peft alone" if name.startswith("peft") else "alone"
            K = int(name.split()[1])
            target = TARGETS.get(K) if R == 32 and name.startswith("lora") and "cold" not in name else None
            ms = 1e3 * found.cost(name).median
            note = f"{ms:.3g} ms, alone {1e3 * found.cost(to).median:.3g} ms"
            what = f"{R} rows x {T} tokens: {name}"
            rows.append(Row.of("infer", what, found.ratio(name, to), target=target, better="less", note=note))
        if o.peft:
            found_ratio = found.ratio("alone", "peft alone")
            rows.append(Row.of("infer", f"{R} rows x {T} tokens: alone to PEFT's alone", found_ratio))
    keep("infer", rows, kept, {"dtype": str(base.dtype)})


if __name__ == "__main__":
    main()
