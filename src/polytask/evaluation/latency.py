"""How much longer a forward pass takes with an adapter than without: pairs of passes in turns, A B A B."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from polytask.adapters import Adapter
from polytask.backbones import Backbone
from polytask.errors import PolytaskError
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat
from polytask.tasks import Example

ROWS = 32  # examples of the pass
PAIRS = (7, 31)  # at least and at most
SECONDS = 2.0  # for which pairs are measured, when there are enough


class Latency(BaseModel):
    """`ratio`: the median over `pairs` of a pass's seconds with the adapter over those of the backbone alone; `low` and
    `high` are the quartiles. `rows`: the examples of a pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ratio: float
    low: float
    high: float
    pairs: int
    rows: int


@torch.no_grad()
def added(backbone: Backbone, adapter: Adapter, examples: Sequence[Example], limit: int = 256) -> Latency:
    """Measured on the first of the examples, which need outputs where the adapter answers in text: one pass to the
    head's logits, or to those of the answer's tokens. The head is in both.

    Raises PolytaskError where there is no example or no head.
    """
    if adapter.head is None or not examples:
        raise PolytaskError(f"adapter {adapter.name}: no head, or no example, to measure a pass with")
    method = build(adapter.method, adapter.hyperparameters)
    read = {n.removeprefix("head/"): t.to(backbone.device) for n, t in adapter.at("head").items()}
    units = passes.encode(backbone, adapter.head, examples[:ROWS], min(limit, backbone.max_length - method.slots))
    parts = Active.of(method, adapter.tensors).parts
    plans = (Plan(backbone, parts), Plan(backbone, []))
    seats = (Seat(adapter.head, read, torch.ones(len(parts))), Seat(adapter.head, read, torch.ones(0)))

    def once(plan: Plan, seat: Seat) -> Callable[[], list[Tensor]]:
        return lambda: [z.cpu() for _, _, z in passes.forward(plan, [seat], units, [0] * len(units))]

    changed, plain = (once(plan, seat) for plan, seat in zip(plans, seats, strict=True))
    for _ in range(2):  # what is worked out once, such as joined tensors, is not the pass's
        changed()
        plain()
    ratios: list[float] = []
    began = time.perf_counter()
    while len(ratios) < PAIRS[0] or (len(ratios) < PAIRS[1] and time.perf_counter() - began < SECONDS):
        ratios.append(_seconds(changed) / _seconds(plain))
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Latency(ratio=ratio, low=low, high=high, pairs=len(ratios), rows=len(units))


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
