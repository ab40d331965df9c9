"""Label heads on a decoder, and without its causal mask for tags: Li et al. 2023, LS-LLaMA, arXiv 2310.01208.

The paper projects a decoder's last hidden states to the labels and trains that with LoRA, where others have it write
the label's words; for tags it also drops the causal mask (LS-unLLaMA). Here: the embedded decoder, LoRA of rank 12 on
query and value as in the paper, equal epochs. Four tasks of sentences: the head on the last token against the label
written as text. Two tasks of tags: every token sees the whole sentence against causal. Rates were picked on validation
splits, those for sentences on cr_polarity's and those for tags on btc_ner's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Any

import polytask as pt
from claims.claim import Rows, Verdict, data

PAPER = "Li et al. 2023"
CLAIM = "label heads beat writing the label; without the causal mask, tags gain 5 points"
SENTENCES = ("cr_polarity", "scicite", "hate_offensive", "csabstruct")
TAGS = ("btc_ner", "snips_slots")
LORA = {"r": 12, "alpha": 32, "sites": ["*.attn.q", "*.attn.v"]}
WAYS = {
    "head": pt.Reading(pool="last"),
    "written": pt.Reading(in_text="yes", decide="write"),
    "causal": pt.Reading(),
    "open": pt.Reading(causal=False),
}
RATES = {"head": (2e-3, 6e-3), "written": (2e-3, 6e-3), "causal": (2e-3, 6e-3), "open": (2e-3, 6e-3)}
PICKED_ON = {"head": "cr_polarity", "written": "cr_polarity", "causal": "btc_ner", "open": "btc_ner"}
SEEDS = (0, 1)
EPOCHS, EXAMPLES = 6, 600  # of each training split, from its beginning


@cache
def base() -> pt.Backbone:
    return pt.load("polytask-base")


def run(name: str, way: str, rate: float, seed: int) -> dict[str, Any]:
    folder = data()
    assert folder is not None
    task = pt.Task.read(folder / name)
    task = replace(task, train=task.train[:EXAMPLES], validation=task.validation[:200], test=task.test[:600])
    adapter = pt.adapt(
        base(),
        task,
        "lora",
        hyperparameters=LORA,
        settings=pt.Settings(lr=rate, seed=seed, epochs=EPOCHS, batch=16),
        reading=WAYS[way],
    )
    scores = adapter.card.scores
    return {
        "metric": scores["test"].metric,
        "test": scores["test"].value,
        "validation": scores["validation"].value,
        "seconds": adapter.card.seconds,
    }


def measure(rows: Rows) -> Verdict:
    def score(name: str, way: str, rate: float, seed: int) -> dict[str, Any]:
        return rows.get(lambda: run(name, way, rate, seed), task=name, way=way, rate=rate, seed=seed)

    def mean_of(names: tuple[str, ...], way: str) -> float:
        rate = max(RATES[way], key=lambda rate: score(PICKED_ON[way], way, rate, SEEDS[0])["validation"])
        return 100 * mean(score(name, way, rate, seed)["test"] for name in names for seed in SEEDS)

    head, written = mean_of(SENTENCES, "head"), mean_of(SENTENCES, "written")
    open_, causal = mean_of(TAGS, "open"), mean_of(TAGS, "causal")
    return Verdict(
        f"{len(SENTENCES)} tasks of sentences x {len(SEEDS)} seeds: head {head:.1f}, written {written:.1f} "
        f"({head - written:+.1f} points); {len(TAGS)} tasks of tags: open {open_:.1f}, causal {causal:.1f} "
        f"({open_ - causal:+.1f} points)",
        head > written and open_ - causal >= 5,
    )
