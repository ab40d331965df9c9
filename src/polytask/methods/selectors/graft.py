"""Skill grafting: the few weights of a fine-tuned model that carry what it learnt.

    θ(γ) = θ₀ + γ ∘ (θ₁ − θ₀),   γ = γ₀ + (1 − 2γ₀) ∘ σ(S − c),   min_S L(θ(γ)),   then γ is rounded

Panigrahi, Saunshi, Zhao, Arora 2023, arXiv 2302.06600. θ₁ comes from training everything; γ₀ = 1 at the largest
|θ₁ − θ₀|; S ~ U(0, 1), c = 10, so that γ starts near γ₀; plain gradient descent on the training data, a step per pass
over it. The rounded γ with the best validation score is kept, among them γ₀ itself. Nothing is trained again, and the
head stays as training left it. The authors' step is 10⁷ ∂L/∂S; here it is `rate` ∂L/∂S / max|∂L/∂S|, so that the
largest change has a known size whatever the loss's scale.
"""

from __future__ import annotations

import torch

from polytask.methods.method import Params
from polytask.methods.selectors.lottery import largest
from polytask.methods.selectors.selector import Choice, Look, Selector, selector


@selector("graft", equation="θ₀ + γ ∘ (θ₁ − θ₀), γ few ones", paper="Panigrahi et al. 2023, arXiv 2302.06600")
class Graft(Selector):
    """share: of the weights that γ₀ takes. steps: on S. rate: the largest change of S in a step. c: the sigmoid's
    shift. batch: rows of a pass."""

    share: float = 1e-4
    steps: int = 10
    rate: float = 10.0
    c: float = 10.0
    batch: int = 32

    def choose(self, look: Look) -> Choice:
        θ0 = look.tensors
        θ1 = look.trained(look.method, θ0)
        own = [n for n in θ0 if not n.startswith("head/")]
        δ = {n: θ1[n] - θ0[n] for n in own}
        γ0 = largest({n: t.abs() for n, t in δ.items()}, round(self.share * sum(t.numel() for t in δ.values())))
        draw = torch.Generator().manual_seed(look.seed)
        S = {n: torch.rand(t.shape, generator=draw).to(t.device) for n, t in δ.items()}

        def grafted(γ: Params) -> Params:
            return {n: θ0[n] + γ[n] * δ[n] if n in γ else t for n, t in θ1.items()}

        best, best_score = grafted(γ0), look.score(look.method, grafted(γ0))
        for _ in range(self.steps):
            σ = {n: torch.sigmoid(S[n] - self.c) for n in own}
            γ = {n: γ0[n] + (1 - 2 * γ0[n]) * σ[n] for n in own}
            total = {n: torch.zeros_like(t) for n, t in δ.items()}
            for g in look.gradients(look.method, grafted(γ), self.batch, 0):
                for n in own:
                    total[n] += g[n]
            slope = {n: total[n] * δ[n] * (1 - 2 * γ0[n]) * σ[n] * (1 - σ[n]) for n in own}
            steepest = max(float(t.abs().max()) for t in slope.values())
            if not steepest:
                break
            for n in own:
                S[n] -= self.rate / steepest * slope[n]
            rounded = {n: (γ0[n] + (1 - 2 * γ0[n]) * torch.sigmoid(S[n] - self.c)).round() for n in own}
            score = look.score(look.method, grafted(rounded))
            if score > best_score:
                best, best_score = grafted(rounded), score
        tensors = {n: t for n, t in best.items() if n.startswith("head/") or bool(t.any())}
        return Choice(look.method.only(tensors), tensors, done=True)
