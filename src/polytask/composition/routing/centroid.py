"""Token-level centroid routing: adapters count by how near the text so far lies to the inputs of their tasks.

    c_e = cos(h, μ_e)              μ_e the mean of the normalised embeddings of task e's training inputs
    s_e = c_e + (b − 1) |c_e|      for the greatest c_e, which is b c_e where that is positive; else c_e
    w   = softmax(s / T)           Δ = Σ_e w_e Δ_e, with the same w at all sites
    nobody  if  (c_e − m_e) / s_e < −threshold for the nearest e: see `nearest_task`

Belofsky 2023, arXiv 2311.10847. h [d] embeds the whole text so far: at first the input, then with what has been written
of the answer, anew after every k tokens (`every`). The paper does best with k = 2. Nothing is trained. b = 4 and T = 1
as in the authors' code, which multiplies the greatest cosine and takes a plain softmax. The head or template of the
adapter that is nearest to the input answers; a head's answer, and one that is chosen by likelihood, has one w.

h is the mean of the frozen backbone's last states, which is half of what profiles are made of, where the authors have a
second encoder of sentences. In a decoder it goes on with each token, at the cost of a step of the backbone without
adapters. The authors read all of the text again for each token, by its new weights; here the keys and values of earlier
tokens stay as those were read, so that new weights cost nothing. Each adapter's whole change is weighed, and not the
factors of LoRAs (`linear` in PEFT). At most `most` adapters answer together, the nearest ones to the input; the paper
has four and takes all.

An encoder-decoder's written tokens have no states beside those of its input, and what changes whole weights is in its
place for a whole answer: there w is that of the input. One that changes the model itself, or is a kept expression,
answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.composition.routing.router import TEMPERATURE, Known, Mixing, Reads, Routed, decided, nobody, router
from polytask.errors import UsageError

KIND = "router"
NAME = "centroid"
PLACE = "token"
EQUATION = "Δ = Σ_e w_e Δ_e, w = softmax(cos(h, μ_e) / T) of the text so far, the greatest times b"
PAPER = "Belofsky 2023, arXiv 2311.10847"


@router(NAME)
class Centroid(Mixing):
    """boost: b. temperature: T. every: k, written tokens with the same weights. most: adapters that answer together, at
    most. threshold: deviations of the nearest task below which an input is foreign."""

    boost: float = 4.0
    temperature: float = 1.0
    every: int = 2
    most: int = 4
    threshold: float = 2.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"{NAME}.temperature = {self.temperature:g}: a number above 0 is needed")

    @property
    def reads(self) -> Reads:
        return "last"  # which there are of a text that is being written

    def choose(self, known: Known, embeddings: Tensor, fits: Tensor) -> list[Routed]:
        if not known.ids:
            return nobody(len(embeddings))
        c = known.cosines(embeddings, fits)
        best = c.argmax(-1)
        top, which = c.masked_fill(~known.mixes(best), -torch.inf).topk(min(self.most, len(known.ids)))
        sure = (c / TEMPERATURE).softmax(-1).gather(1, best[:, None])[:, 0]
        return decided(known, which, self.weights(top), sure, known.near(c, best, self.threshold))

    def follow(self, known: Known, ids: Sequence[str], embeddings: Tensor) -> Tensor:
        """w [R, N] of the adapters `ids`, for texts so far with these embeddings [R, d]."""
        μ = known.μ[[known.ids.index(id) for id in ids]]
        return self.weights(F.normalize(embeddings.float(), dim=-1) @ μ.T)

    def weights(self, c: Tensor) -> Tensor:
        """w [R, N] from cosines [R, N]."""
        greatest = torch.zeros_like(c).scatter(1, c.argmax(-1, keepdim=True), self.boost - 1)
        return ((c + greatest * c.abs().nan_to_num(posinf=0.0)) / self.temperature).softmax(-1)
