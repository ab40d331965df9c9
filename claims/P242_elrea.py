"""ELREA: Li, Gao, Zhang, Torkamani 2025, arXiv 2502.00089. See `claims.short`.

The paper clusters mixed instruction data by gradients, and beats one LoRA on all of it and experts of clusters at
random. Here the data of four tasks are one task, whose three labels mean another thing in each of the four: a label's
number, moved on by that of the task. Texts do not say which task they are of. Base and experts together take the steps
of one LoRA of twice the epochs, which is what they are compared with; all ways train at one rate.
"""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import polytask as pt
from claims import library, short
from claims.claim import Rows, Verdict
from polytask.composition.elrea import clusters
from polytask.recipes.elrea import elrea
from polytask.tasks import Example, Label

PAPER = "Li et al. 2025"
CLAIM = "experts of gradient clusters beat those of clusters at random and one LoRA of as many steps by 2 points"
TASKS = ("cr_polarity", "hate_offensive", "scicite", "csabstruct")
LABELS = ("A", "B", "C")
SIZES = {"train": 75, "validation": 25, "test": 75}  # of each task
SEEDS = (0, 1)
RATE, EPOCHS = 1e-3, 3
MORE = 2.0


@cache
def mixed() -> pt.Task:
    """All tasks as one; the label numbered i of task n is the label numbered i + n, of the three in turn."""
    splits: dict[str, list[tuple[Example, ...]]] = {name: [] for name in SIZES}
    for n, name in enumerate(TASKS):
        given = short.task(name)
        number = {label.name: i for i, label in enumerate(given.labels)}
        for split, size in SIZES.items():
            splits[split].append(
                tuple(
                    Example(f"{name}/{e.id}", e.input, LABELS[(number[str(e.output)] + n) % len(LABELS)])
                    for e in given.split(split)[:size]
                )
            )
    joined = {split: tuple(chain.from_iterable(zip(*parts, strict=True))) for split, parts in splits.items()}
    labels = tuple(map(Label, LABELS))
    return pt.Task("mixed", "classification", joined["train"], joined["validation"], joined["test"], labels=labels)


def at_random(δ: Tensor, count: int, seed: int) -> Tensor:
    return torch.randperm(len(δ), generator=torch.Generator().manual_seed(seed)) % count


def experts(way: str, seed: int) -> dict[str, Any]:
    settings = short.settings(RATE, seed, epochs=EPOCHS, patience=EPOCHS)
    partition = clusters if way == "gradients" else at_random
    hyper = {"clusters": len(TASKS)}
    made = elrea(short.base(), mixed(), hyperparameters=hyper, settings=settings, partition=partition)
    parts = {"sizes": list(made.sizes), "within": made.within, "between": made.between}
    return library.row_of(made.adapter) | parts | {"base": made.support[0].card.scores["test"].value}


def one(seed: int) -> dict[str, Any]:
    settings = short.settings(RATE, seed, epochs=2 * EPOCHS, patience=2 * EPOCHS)
    sites = {"sites": ["*.attn.[qkvo]", "*.mlp.*"]}
    return library.row_of(pt.adapt(short.base(), mixed(), "lora", hyperparameters=sites, settings=settings))


def measure(rows: Rows) -> Verdict:
    found = {
        way: [rows.get(lambda w=way, s=seed: experts(w, s), way=way, seed=seed) for seed in SEEDS]
        for way in ("gradients", "random")
    }
    longer = library.points([rows.get(lambda s=seed: one(s), way="one", seed=seed) for seed in SEEDS])
    ours, chance = (library.points(found[way]) for way in ("gradients", "random"))
    base = library.points(found["gradients"], "base")
    within, between = ([row[what] for row in found["gradients"]] for what in ("within", "between"))
    return Verdict(
        f"{len(TASKS)} tasks in one x {len(SEEDS)} seeds: experts of {len(TASKS)} gradient clusters {ours:.1f}, of "
        f"clusters at random {chance:.1f}, one LoRA of as many steps {longer:.1f}, the base alone {base:.1f}; cosines "
        f"of gradients within clusters {sum(within) / len(within):.2f}, between {sum(between) / len(between):.2f}",
        ours >= chance + MORE and ours >= longer + MORE,
    )
