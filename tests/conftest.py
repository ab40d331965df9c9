"""For all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from polytask.backbones import Backbone


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Threads of small models wait for each other more than they compute, and tests share few cores."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A tiny encoder that knows the words of `jobs.task_of`."""
    import tiny
    from jobs import TOKENS

    return tiny.backbone("bert", tokenizer=TOKENS)
