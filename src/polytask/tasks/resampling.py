"""What a metric gives to the bootstrap: its value, and the same value under any weighting of the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Resample = Callable[[Floats], Floats]  # weights (resamples, n) -> metric (resamples,)
CELLS = 4_000_000  # weights that a block of resamples may hold: 32 MB
Measured = tuple[dict[str, float], dict[str, Resample]]


def draws(rng: np.random.Generator, n: int, resamples: int) -> Iterator[Floats]:
    """How often each of `n` examples is drawn, (resamples, n), in blocks that fit in memory."""
    block = max(1, CELLS // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def ratio(over: Any, under: Any) -> Resample:
    """The ratio of two sums over examples; 0 where there is nothing to divide by."""

    def resample(w: Floats) -> Floats:
        below = w @ np.asarray(under, np.float64)
        return np.divide(w @ np.asarray(over, np.float64), below, out=np.zeros(len(w)), where=below > 0)

    return resample
