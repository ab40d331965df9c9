"""Nearest-task routing: an input goes to the adapter whose training inputs lie nearest to it.

    c_t = cos(e(x), μ_t)          μ_t the mean of the normalised embeddings of task t's training inputs
    z_t = (c_t − m_t) / s_t       m_t, s_t mean and deviation of c_t over task t's own inputs
    p(t | x) ∝ exp(c_t / τ)       over the tasks and nothing else
    none of these  if  z_t < −threshold for the nearest t

The centroid router of many mixture papers at the granularity of tasks (e.g. Jang et al. 2023, arXiv 2302.03202;
Zhao et al. 2024, arXiv 2402.09997), with a rejection by each task's own spread, so that a narrow task does not draw in
what merely resembles it. e(x) is the gist of x in the frozen backbone (`passes.gist`): the mean states half of the way
up beside the last ones. No adapter runs to route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.composition.routing.router import TEMPERATURE, Known, Mixing, Routed, decided, nobody, router

KIND = "router"
NAME = "nearest-task"
PLACE = "input"
EQUATION = "p(t|x) ∝ exp(cos(e(x), μ_t)/τ); none if (cos − m_t)/s_t < −threshold"
PAPER = "task centroids: Jang et al. 2023, arXiv 2302.03202"


@dataclass(frozen=True)
class Profile:
    """What routing knows of a task: μ [2d] of unit length, and m and s of its own inputs' cosines to μ; and m and s of
    the second halves of these, which are of last states, `late`."""

    mean: Tensor
    typical: float
    spread: float
    late: tuple[float, float]

    @classmethod
    def of(cls, embeddings: Tensor) -> Profile:
        """From the gists [N, 2d] of a task's training inputs. Each cosine leaves its own input out of the mean."""
        e = F.normalize(embeddings.float(), dim=-1)
        late = _cosines(F.normalize(e[:, e.shape[1] // 2 :], dim=-1))
        return cls(F.normalize(e.sum(0), dim=0), *_cosines(e), late)

    def tensors(self) -> dict[str, Tensor]:
        return {"task/mean": self.mean, "task/spread": torch.tensor([self.typical, self.spread, *self.late])}


def _cosines(e: Tensor) -> tuple[float, float]:
    """Mean and deviation of the cosines of each e [N, d] to the mean of the others."""
    others = F.normalize(e.sum(0) - e, dim=-1) if len(e) > 1 else e
    c = (e * others).sum(-1)
    return float(c.mean()), max(float(c.std()) if len(e) > 2 else 0.1, 0.02)


@dataclass(frozen=True)
class Choice:
    """Which task an input goes to (None: none of these), how probable that is, and how unusual it is for the task."""

    index: int | None
    probability: float
    z: float


@router(NAME)
class NearestTask(Mixing):
    """`temperature` τ of the softmax over cosines; `threshold` in deviations below which an input is foreign."""

    profiles: Sequence[Profile] = ()
    temperature: float = TEMPERATURE
    threshold: float = 2.0

    def route(self, embeddings: Tensor, fits: Tensor | None = None) -> list[Choice]:
        """A choice among `profiles` for each row of embeddings [R, d]. `fits` [R, tasks] bool says which tasks a row
        may go to at all (a pair of texts only to a task over pairs); None: to any."""
        if not self.profiles:
            return [Choice(None, 0.0, 0.0)] * len(embeddings)
        N = len(self.profiles)
        every = torch.ones(len(embeddings), N, dtype=torch.bool) if fits is None else fits
        nothing = torch.zeros(N, dtype=torch.long)
        known = Known(
            tuple(map(str, range(N))),
            ("",) * N,
            torch.stack([p.mean for p in self.profiles]),
            torch.tensor([p.typical for p in self.profiles]),
            torch.tensor([p.spread for p in self.profiles]),
            nothing.bool(),
            nothing.bool(),
            nothing,
        )
        best, p, c = self._nearest(known, embeddings, every)
        z = known.deviations(c, best)
        return [
            Choice(i if zi >= -self.threshold else None, pi, zi)
            for i, pi, zi in zip(best.tolist(), p.nan_to_num(0.0).tolist(), z.tolist(), strict=True)
        ]

    def choose(self, known: Known, embeddings: Tensor, fits: Tensor) -> list[Routed]:
        if not known.ids:
            return nobody(len(embeddings))
        best, p, c = self._nearest(known, embeddings, fits)
        return decided(known, best[:, None], torch.ones(len(best), 1), p, known.near(c, best, self.threshold))

    def _nearest(self, known: Known, embeddings: Tensor, fits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest task of each row [R], its probability, and all cosines [R, N]."""
        c = known.cosines(embeddings, fits)
        best = c.argmax(-1)
        p = (c / self.temperature).softmax(-1).gather(1, best[:, None])[:, 0]
        return best, p, c
