"""For all tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads of small models wait for each other more than they compute, and tests share few cores."""
    torch.set_num_threads(1)
