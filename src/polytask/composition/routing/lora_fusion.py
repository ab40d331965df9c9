"""LoraRetriever's fusion: the k nearest LoRAs answer as one, whose parameters are the means of theirs.

    A = Σ_{t ∈ K} A_t / k,   B = Σ_{t ∈ K} B_t / k,   Δ = s B A x        K the k greatest cos(e(x), μ_t)

Zhao, Gan, Wang, Zhou, Yang, Kuang, Wu 2024, arXiv 2402.09997; all else as in `lora_retriever`. B A has the cross terms
B_t A_u that the mean of differences has not, and its own terms are down to 1 / k². Parameters can be averaged of LoRAs
with the same r, α and sites: the nearest adapter answers with the nearest of its kind, and alone if it has none.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polytask.adapters.expression import Expression, Name, fuse
from polytask.composition.routing.lora_retriever import LoraRetriever
from polytask.composition.routing.router import Known, router

KIND = "router"
NAME = "lora-fusion"
PLACE = "input"
EQUATION = "Δ = s (Σ_K B_t / k) (Σ_K A_t / k) x, K the k greatest cos(e(x), μ_t)"
PAPER = "Zhao et al. 2024, arXiv 2402.09997"


@router(NAME)
class LoraFusion(LoraRetriever):
    """k, threshold: see LoraRetriever."""

    def expression(self, weights: Mapping[str, float]) -> Expression:
        first, *_ = weights
        return Name(first) if len(weights) == 1 else fuse(*map(Name, weights)).read_by(first)

    def joins(self, known: Known, best: Tensor) -> Tensor:
        return known.averages(best)
