"""Adapters made by hand, for the tests of what keeps them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polytask.adapters import Adapter, BackboneCard, Card, HeadCard, Lineage, ScoreCard
from polytask.tasks import TaskCard

BACKBONE = BackboneCard(name="tiny", fingerprint="f" * 64, family="bert", hidden_size=16, parameters=1000)


def lora_tensors(seed: int = 0, layers: int = 6, width: int = 384, r: int = 8) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = {"A": (r, width), "B": (width, r)}
    return {
        f"{layer}.attn.{part}/{name}": torch.randn(*shape, generator=made)
        for layer in range(layers)
        for part in "qv"
        for name, shape in shapes.items()
    }


def adapter(
    name: str = "tickets",
    *,
    seed: int = 0,
    tensors: dict[str, Tensor] | None = None,
    method: str = "lora",
    hyperparameters: dict[str, Any] | None = None,
    head: HeadCard | None = None,
    backbone: BackboneCard = BACKBONE,
    task: dict[str, Any] | None = None,
    **card: Any,
) -> Adapter:
    """A small adapter; another seed gives another id."""
    said = {"name": name, "kind": "classification", "instruction": "Route the ticket.", **(task or {})}
    return Adapter(
        method=method,
        hyperparameters=hyperparameters or {"r": 2, "alpha": 4.0, "sites": ["*.attn.q", "*.attn.v"], "dropout": 0.1},
        tensors=tensors if tensors is not None else lora_tensors(seed, layers=1, width=4, r=2),
        backbone=backbone,
        card=Card(name=name, task=TaskCard(**said), **card),
        head=head,
    )


def rich(name: str = "tickets", seed: int = 0) -> Adapter:
    """One with a head, a task embedding, scores, lineage and notes."""
    tensors = lora_tensors(seed, layers=1, width=4, r=2)
    made = torch.Generator().manual_seed(seed)
    tensors |= {
        name: torch.randn(*n, generator=made)
        for name, n in {"head/W": (3, 4), "head/b": (3,), "task/mean": (4,)}.items()
    }
    return adapter(
        name,
        tensors=tensors,
        head=HeadCard(kind="classification", targets=("a", "b", "c")),
        scores={"test": ScoreCard(metric="accuracy", value=0.9, low=0.85, high=0.95, n=100)},
        lineage=Lineage(parents=("0" * 16,), data={"train": "a" * 64}, made_by="test"),
        notes=("first try",),
        trained_parameters=47,
    )


def killed(work: Callable[[], object]) -> None:
    """Run it in a forked child, where it must end in its own kill -9 (see `die`)."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def one_line(error: BaseException) -> str:
    """The message, which must be one line."""
    message = str(error)
    assert message
    assert "\n" not in message
    return message
