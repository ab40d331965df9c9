"""Layer-wise attention shortcuts: from the states that Hugging Face gives, and while a text is written."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_opamp import as_in_whole_passes, prompts_of
from writers import refused, writer

from polytask.errors import UsageError
from polytask.inference.generation import generate
from polytask.methods import build
from polytask.methods.lifting import Active, Plan


def shaken(backbone, **hyper):
    m = build("shortcuts", {"m": 8, **hyper})
    draw = torch.Generator().manual_seed(0)
    return m, {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, 0).items()}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "modernbert", "t5", "deberta-v2"])
def test_each_token_attends_to_its_own_depths(family):
    backbone, batch = tiny.backbone(family), tiny.batch(3)
    m, p = shaken(backbone)
    tower = "enc." if family == "t5" else ""
    seen = {}
    handles = [
        block.register_forward_hook(
            lambda _, __, out, depth=depth: seen.__setitem__(depth, out[0] if isinstance(out, tuple) else out)
        )
        for depth, block in enumerate(backbone.blocks)
    ]
    H = backbone.hidden(batch)
    for handle in handles:
        handle.remove()
    n = torch.nn.LayerNorm(32, elementwise_affine=False)
    expected = torch.zeros_like(H)
    for r in range(3):
        for t in range(batch.ids.shape[1]):
            q = p["shared/W_q"] @ n(H[r, t])
            states = [n(seen[depth][r, t]) for depth in range(3)]
            scores = [float(q @ (p[f"{tower}{depth}/W_k"] @ h)) / 8**0.5 for depth, h in enumerate(states)]
            a = torch.tensor(scores).softmax(0)
            taken = sum(a[depth] * (p[f"{tower}{depth}/W_v"] @ h) for depth, h in enumerate(states))
            expected[r, t] = H[r, t] + p["shared/W_o"] @ taken
    with torch.no_grad():
        got = Plan(backbone, [Active.of(m, p)]).hidden(batch)
    torch.testing.assert_close(got[batch.mask], expected[batch.mask], rtol=1e-4, atol=1e-4)


def test_the_count_is_the_equations():
    """W_q and W_o once, W_k and W_v of each block: 2 m d (1 + L)."""
    tensors = build("shortcuts", {"m": 8}).start(tiny.backbone("bert"), 0)
    assert sum(t.numel() for t in tensors.values()) == 2 * 8 * 32 * (1 + 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_writing_with_the_cache_is_that_of_whole_passes(family):
    backbone = writer(family)
    m, p = shaken(backbone)
    plan = Plan(backbone, [Active.of(m, p)])
    as_in_whole_passes(plan, prompts_of(3, torch.ones(3, 1)), places=2)


def test_what_it_cannot_do_is_said_in_a_line():
    backbone = writer("t5")
    with pytest.raises(UsageError, match="another method for an answer in text"):
        build("shortcuts").start(backbone, 0, writing=True)
    m, p = shaken(backbone)
    plan = Plan(backbone, [Active.of(m, p)])
    refused(lambda: generate(plan, prompts_of(1, torch.ones(1, 1))), "cannot act where an encoder-decoder writes")
    with pytest.raises(UsageError, match="attend to what blocks put out"):
        build("shortcuts", {"sites": ["*.mlp"]}).start(tiny.backbone("bert"), 0)
