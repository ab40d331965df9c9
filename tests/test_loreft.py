"""LoReFT by hand, and where in a text it acts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from writers import writer

from polytask.errors import UsageError
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import build
from polytask.methods.lifting import Active, Plan


def test_by_hand():
    """h = [1, 2, 3], R = [.6, .8, 0], W = [1, 0, 1], b = .5: W h + b − R h = 4.5 − 2.2, and 2.3 R = [1.38, 1.84, 0]."""
    m = build("loreft", {"r": 1})
    p = {"R": torch.tensor([[0.6, 0.8, 0.0]]), "W": torch.tensor([[1.0, 0.0, 1.0]]), "b": torch.tensor([0.5])}
    where = {"at": torch.tensor([0]), "left": torch.tensor([0])}
    h = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(h + m.delta(m.ready(p, {}) | where, h, h), torch.tensor([[2.38, 3.84, 3.0]]))


def test_rows_are_orthonormal_whatever_is_learned():
    m = build("loreft", {"r": 4})
    p = m.init(tiny.backbone("bert").sites["0"], torch.Generator().manual_seed(0), {})
    torch.testing.assert_close(m.ready(p, {})["R"], p["R"])
    R = m.ready(p | {"R": p["R"] + torch.randn(4, 32)}, {})["R"]
    torch.testing.assert_close(R @ R.T, torch.eye(4))


def test_the_count_is_the_papers():
    """r (2 d + 1) at each block."""
    tensors = build("loreft", {"r": 8}).start(tiny.backbone("bert"), 0)
    assert sum(t.numel() for t in tensors.values()) == 3 * 8 * (2 * 32 + 1)
    with pytest.raises(UsageError, match="at most 32"):
        build("loreft", {"r": 33}).start(tiny.backbone("bert"), 0)


def moved(backbone, m, batch) -> torch.Tensor:
    """Which tokens of the last block's output it changes, when it acts there alone."""
    active = Active.of(m, m.start(backbone, 0))
    with torch.no_grad():
        return (Plan(backbone, [active]).hidden(batch) != Plan(backbone, []).hidden(batch)).any(-1)


def test_it_acts_at_both_ends_of_each_text():
    backbone = tiny.backbone("llama")
    m = build("loreft", {"r": 2, "first": 2, "last": 1, "sites": ["-1"]})
    batch = backbone.collate([[5, 6, 7, 8, 9], [5, 6, 7]])
    assert moved(backbone, m, batch)[:, :5].tolist() == [
        [True, True, False, False, True],
        [True, True, True, False, False],
    ]
    packed = backbone.pack([[[5, 6, 7, 8], [9, 10, 11, 12, 13]]])
    assert moved(backbone, m, packed)[0, :9].tolist() == [True, True, False, True, True, True, False, False, True]


def test_what_is_written_is_not_moved():
    """Greedy writing with the cache is that of whole passes in which only the prompt is moved."""
    backbone = writer("llama")
    m = build("loreft", {"r": 4, "first": 1, "last": 1})
    plan = Plan(backbone, [Active.of(m, m.start(backbone, 0))])
    ids = [5, 6, 7, 8]
    [written] = generate(plan, [Prompt(ids, torch.ones(1), Sampling(max_tokens=5))])
    for token in written.tokens:
        batch = backbone.collate([ids])
        asked = torch.zeros_like(batch.mask)
        asked[0, :4] = True
        with torch.no_grad():
            z = plan.logits(replace(batch, asked=asked), torch.ones(1, 1), torch.tensor([[0, len(ids) - 1]]))
        assert int(z.argmax()) == token
        ids = [*ids, token]
