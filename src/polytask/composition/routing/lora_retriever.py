"""LoraRetriever: the k adapters whose tasks lie nearest to an input answer it together.

    c_t = cos(e(x), μ_t)          μ_t the mean of the normalised embeddings of task t's training inputs
    K = the k greatest of c       Δ = Σ_{t ∈ K} Δ_t / k            the mixture: what they do at each site, alike
    nobody  if  (c_t − m_t) / s_t < −threshold for the nearest t

Zhao, Gan, Wang, Zhou, Yang, Kuang, Wu 2024, arXiv 2402.09997. k = 3 as in the paper; k = 1 is its selection, and
`lora_fusion` its fusion of parameters. Nothing is trained: an adapter that is added is found at once. What is read at
last is read by the head of the nearest task; the paper's models write and have no heads.

e(x) is the gist of x in the frozen backbone (`passes.gist`), and not from a second encoder that follows instructions:
so there is no instruction before the text, since these backbones have learned none, and no training of the retriever on
pairs of a task's inputs, which the paper has as an option. μ is the adapter's own profile, of up to 512 inputs, where
the paper takes some dozen. The paper has no rule for foreign inputs; `threshold` = inf is without.
An adapter that changes the model itself, or is a kept expression, answers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.composition.routing.router import TEMPERATURE, Known, Mixing, Routed, decided, nobody, router

KIND = "router"
NAME = "lora-retriever"
PLACE = "input"
EQUATION = "Δ = Σ_{t ∈ K} Δ_t / k, K the k greatest cos(e(x), μ_t)"
PAPER = "Zhao et al. 2024, arXiv 2402.09997"


@router(NAME)
class LoraRetriever(Mixing):
    """k: adapters that answer together. threshold: deviations of the nearest task below which an input is foreign."""

    k: int = 3
    threshold: float = 2.0

    def choose(self, known: Known, embeddings: Tensor, fits: Tensor) -> list[Routed]:
        if not known.ids:
            return nobody(len(embeddings))
        c = known.cosines(embeddings, fits)
        best = c.argmax(-1)
        with_best = c.masked_fill(~self.joins(known, best), -torch.inf)
        top, which = with_best.topk(min(self.k, len(known.ids)))
        taken = (top > -torch.inf).float()
        p = (c / TEMPERATURE).softmax(-1).gather(1, which)
        weights = taken / taken.sum(-1, keepdim=True)
        return decided(known, which, weights, (p * taken).sum(-1), known.near(c, best, self.threshold))

    def joins(self, known: Known, best: Tensor) -> Tensor:
        """[R, N] bool: who can answer together with the nearest."""
        return known.mixes(best)
