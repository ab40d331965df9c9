"""Passes: what a head reads becomes units, and units are packed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from jobs import task_of

from polytask.adapters import HeadCard
from polytask.backbones import heads
from polytask.methods import passes
from polytask.tasks import Example


def test_passes_hold_every_unit_once_and_not_too_many_tokens():
    draw = random.Random(0)
    units = [passes.Unit(([1] * draw.randint(1, 90),) * draw.choice([1, 1, 2])) for _ in range(300)]
    found = passes.packs(units, 512)
    assert sorted(i for pack in found for i in pack) == list(range(300))
    for pack in found:
        longest = max(units[i].length for i in pack)
        assert len(pack) == 1 or longest * sum(len(units[i].ids) for i in pack) <= 512
    lengths = [units[i].length for pack in found for i in pack]
    assert lengths == sorted(lengths, reverse=True)
    assert passes.packs([]) == []
    assert passes.packs([passes.Unit(([1] * 9000,))], 512) == [[0]]


def test_units_are_what_the_head_reads(backbone):
    def ids(head: HeadCard, *rows: Example) -> Sequence[Any]:
        return [unit.ids for unit in passes.encode(backbone, head, rows)]

    plain = HeadCard(kind="classification")
    assert ids(plain, Example("0", "a b"), Example("1", ("a", "b"))) == [([1, 4, 5, 2],)] * 2
    pair = Example("0", "a", None, "b c")
    assert ids(plain.model_copy(update={"pair": "separate"}), pair) == [([1, 4, 2], [1, 5, 6, 2])]
    assert ids(plain.model_copy(update={"pair": "joint"}), pair) == [([1, 4, 2, 5, 6, 2],)]
    tags = passes.encode(backbone, HeadCard(kind="tagging", targets=("O",)), [Example("0", ("a", "\u200b", "b"))])
    assert (tags[0].ids, tags[0].starts) == (([1, 4, 5, 2],), [1, -1, 2])


def test_features_do_not_depend_on_the_budget(backbone, monkeypatch):
    for kind in ("classification", "similarity", "tagging"):
        task = task_of(kind, 20)
        head = heads.design(task)
        units = passes.encode(backbone, head, task.train)
        one = passes.features(backbone, head, units)
        monkeypatch.setattr(passes.packs, "__defaults__", (40,))
        for a, b in zip(one, passes.features(backbone, head, units), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()
