"""Tiny models that write, with the embedded decoder's kind of tokenizer, and what every test of them checks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bases import tokenizer as step1
from polytask.backbones import Backbone
from polytask.backbones.weights import fingerprint
from polytask.errors import UsageError
from polytask.methods import build

TEXTS = [
    "the cat sat on the mat and saw two dogs run home at noon, a café in 日本",
    "Input: yes\nOutput: no",
    '{"a": 1}',
]
LENGTH = 96  # positions of the tiny models


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded decoder's kind: byte-level, with a chat template and an end token."""
    with tempfile.TemporaryDirectory() as folder:
        return step1.save(step1.train(TEXTS * 20, 420), Path(folder))


def writer(family: str, seed: int = 0, **config: Any) -> Backbone:
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer()), "max_position_embeddings": LENGTH}
    sizes |= {"eos_token_id": tokenizer().eos_token_id, "pad_token_id": tokenizer().pad_token_id}
    if family == "gemma3":
        sizes = {"text_config": {**tiny.CONFIGS[family]["text_config"], **sizes}}
    model = tiny.make_lm(family, seed, **{"attn_implementation": "eager", **sizes, **config})
    return Backbone(model, tokenizer(), f"tiny-{family}", precision="fp32", device="cpu")


def tensors_of(backbone: Backbone, name: str, seed: int) -> dict[str, Tensor]:
    """A method's tensors, all of them moved away from where they start."""
    draw = torch.Generator().manual_seed(seed)
    scale = 0.02 if name == "full" else 0.2
    start = build(name).start(backbone, seed, writing=True)
    return {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in start.items()}


def drawn(n: int, draw: torch.Generator) -> list[int]:
    """Tokens of a prompt."""
    return torch.randint(4, len(tokenizer()), (n,), generator=draw).tolist()


def clean(backbone: Backbone) -> None:
    assert fingerprint(backbone.model) == backbone.fingerprint
    for module in backbone.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())


def refused(call: Callable[[], object], says: str, error: type[Exception] = UsageError) -> None:
    with pytest.raises(error, match=says) as found:
        call()
    assert "\n" not in str(found.value)
