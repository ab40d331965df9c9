"""What a metric gives to the bootstrap: its value, and the same value under any weighting of the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Resample = Callable[[Floats], Floats]  # weights (resamples, n) -> metric (resamples,)
Measured = tuple[dict[str, float], dict[str, Resample]]


def ratio(over: Any, under: Any) -> Resample:
    """The ratio of two sums over examples; 0 where there is nothing to divide by."""

    def resample(w: Floats) -> Floats:
        below = w @ np.asarray(under, np.float64)
        return np.divide(w @ np.asarray(over, np.float64), below, out=np.zeros(len(w)), where=below > 0)

    return resample
