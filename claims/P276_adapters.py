"""Adapters reach full fine-tuning: Houlsby et al. 2019, arXiv 1902.00751.

The paper compares the mean GLUE score of adapters with that of full fine-tuning, each tuned. Here: eight tasks in
their own splits (of the training split the first 2,000 examples, so that the claim reruns in an hour), the embedded
MiniLM, two seeds; per task the better of LoRA and bottleneck adapters, chosen on the validation split, against full
fine-tuning; and each method against a linear head on frozen features. Every method has the same number of epochs. Rates
were picked on cr_polarity's validation split: of two for full fine-tuning and for the bottleneck, untuned for LoRA.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Any

import polytask as pt
from claims.claim import Rows, Verdict, data
from claims.tasks import EIGHT as TASKS

PAPER = "Houlsby et al. 2019"
CLAIM = "adapters with 3.6 % of the parameters come within 0.4 points of full fine-tuning"
LINEAR = ("*.attn.q", "*.attn.k", "*.attn.v", "*.attn.o", "*.mlp.up", "*.mlp.down")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "alpha": 32, "sites": LINEAR},
    "bottleneck": {"reduction": 8},
    "full": {},
}
RATES = {"lora": 1e-3, "bottleneck": 1e-3, "full": 1e-4}
SEEDS = (0, 1)
EPOCHS = 4
EXAMPLES = 2000  # of each training split, from its beginning
LIMIT = 96  # tokens a text is cut to; 1 % of the texts are longer


@cache
def base() -> pt.Backbone:
    return pt.load()


def run(name: str, method: str, seed: int) -> dict[str, Any]:
    folder = data()
    assert folder is not None
    task = pt.Task.read(folder / name)
    task = replace(task, train=task.train[:EXAMPLES])
    adapter = pt.adapt(
        base(),
        task,
        method,
        hyperparameters=METHODS[method],
        settings=pt.Settings(lr=RATES[method], seed=seed, epochs=EPOCHS, limit=LIMIT),
    )
    scores = adapter.card.scores
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "low": scores["test"].low,
        "high": scores["test"].high,
        "validation": scores["validation"].value,
        "head": scores["baseline"].value,
        "parameters": sum(t.numel() for n, t in adapter.tensors.items() if not n.startswith(("head/", "task/"))),
        "seconds": adapter.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    best, full, head = [], [], []
    worst_gain = 1.0
    share = 0.0
    for seed in SEEDS:
        for name in TASKS:
            found = {
                m: rows.get(lambda m=m, n=name, s=seed: run(n, m, s), task=name, method=m, seed=seed) for m in METHODS
            }
            small = max((found["lora"], found["bottleneck"]), key=lambda row: row["validation"])
            best.append(small["test"])
            full.append(found["full"]["test"])
            head.append(small["head"])
            worst_gain = min(worst_gain, *(row["test"] - row["head"] for row in found.values()))
            share = max(share, *(found[m]["parameters"] / base().parameters for m in ("lora", "bottleneck")))
    gap = 100 * (mean(full) - mean(best))
    return Verdict(
        f"{len(TASKS)} tasks x {len(SEEDS)} seeds: best of lora/bottleneck {100 * mean(best):.2f}, full "
        f"{100 * mean(full):.2f} (gap {gap:+.2f} points), frozen head {100 * mean(head):.2f}; at most "
        f"{100 * share:.2f} % trained; smallest gain over the head {100 * worst_gain:+.2f}",
        gap <= 0.4 and share <= 0.036,
    )
