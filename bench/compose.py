"""What compositions cost in one pass of 32 x 48 tokens, against the backbone without adapters.

MiniLM, random token ids, no padding, weights in the backbone's own precision. LoRA r = 8 on query and value: one, eight
summed by the plan's weights, Arrow over eight and over 64 (three for each token). Bottlenecks at the end of each block:
eight fused by attention, and two stacked. Beside them Arrow of Hugging Face PEFT over eight, to PEFT's plain model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig
from transformers import AutoModel

from bench.infer import active, batch, repeated
from bench.measure import Row, Turn, Window, keep, options, turns
from polytask.backbones import Backbone, load
from polytask.backbones.loading import embedded_folder
from polytask.composition import compose
from polytask.methods import build
from polytask.methods.lifting import Active, Plan, Terms, planned

R, T = 32, 48
TARGETS = {  # variant: (against what, at most)
    "sum of 8": ("alone", 1.1),
    "arrow over 8": ("alone", 1.2),
    "arrow over 64": ("one lora", 1.5),
    "fusion of 8": ("alone", 1.4),
    "stack of 2": ("alone", None),
    "one lora": ("alone", None),
    "peft arrow over 8": ("peft alone", None),
}


def over(base: Backbone, method: str, sources: list[Active]) -> Active:
    """A composed method with its own tensors random."""
    ids = [str(n) for n in range(len(sources))]
    chosen = build(method, {"over": ids, "sites": [*compose.sites(sources)]})
    generator = torch.Generator().manual_seed(0)
    made = chosen.start(base, 0)
    drawn = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in made.items()}
    return Active.of(chosen, drawn, sources)


def polytask_side(base: Backbone) -> dict[str, Turn]:
    loras = [active(base, "lora", seed) for seed in range(64)]
    bottlenecks = [active(base, "pfeiffer", seed) for seed in range(8)]
    asked: dict[str, Terms] = {
        "alone": (),
        "one lora": ((1.0, loras[0]),),
        "sum of 8": tuple((1 / 8, one) for one in loras[:8]),
        "arrow over 8": ((1.0, over(base, "arrow", loras[:8])),),
        "arrow over 64": ((1.0, over(base, "arrow", loras)),),
        "fusion of 8": ((1.0, over(base, "fusion", bottlenecks)),),
        "stack of 2": compose.stack([((1.0, one),) for one in bottlenecks[:2]]),
    }
    given = batch(R, T)

    def passed(terms: Terms) -> Turn:
        order, weights = planned([terms] * R)
        plan = Plan(base, order)

        def turn(_: Window) -> float:
            plan.hidden(given, weights)
            return 1.0

        return turn

    return {name: passed(terms) for name, terms in asked.items()}


def peft_arrow(base: Backbone, adapters: int) -> PeftModel:
    """The same backbone with PEFT's router over that many LoRAs, as its `create_arrow_model` makes it from files."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(AutoModel.from_pretrained(embedded_folder()).eval(), config, adapter_name="task_0")
    for i in range(1, adapters):
        model.add_adapter(f"task_{i}", config)
    arrow = ArrowConfig(top_k=3)
    arrow.task_adapter_names = [f"task_{i}" for i in range(adapters)]
    router = replace(config, init_lora_weights=True)
    router.arrow_config = arrow
    model.add_adapter("arrow_router", router)
    model.set_adapter("arrow_router")
    return model.eval().to(base.dtype)


def peft_side(base: Backbone) -> dict[str, Turn]:
    given = batch(R, T)
    inputs = {"input_ids": given.ids, "attention_mask": given.mask.long()}
    models = {
        "peft alone": AutoModel.from_pretrained(embedded_folder()).eval().to(base.dtype),
        "peft arrow over 8": peft_arrow(base, 8),
    }

    def passed(model: torch.nn.Module) -> Turn:
        def turn(_: Window) -> float:
            model(**inputs)
            return 1.0

        return turn

    return {name: passed(model) for name, model in models.items()}


@torch.no_grad()
def main() -> None:
    o = options(__doc__ or "", rounds=15, limit=120.0)
    base = load("minilm")
    sides = polytask_side(base) | peft_side(base)
    variants = {name: repeated(turn) for name, turn in sides.items()}
    found = turns(variants, rounds=o.rounds, limit=o.limit, clock=o.clock)
    rows = [
        Row.of("compose", f"{name} to {to}", found.ratio(name, to), target=target, better="less")
        for name, (to, target) in TARGETS.items()
    ]
    mean = found.cost("alone").median
    keep("compose", rows, {f"{R}x{T}": found}, {"milliseconds alone": 1e3 * mean})


if __name__ == "__main__":
    main()
