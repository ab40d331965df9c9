"""For all tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from polytask.backbones import Backbone


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads of small models wait for each other more than they compute, and tests share few cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A tiny encoder that knows the words of `jobs.task_of`."""
    import tiny
    from jobs import TOKENS

    return tiny.backbone("bert", tokenizer=TOKENS)
