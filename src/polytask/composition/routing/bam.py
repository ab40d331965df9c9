"""BAM: adapters of one backbone become a mixture of experts, feed-forward ones k at a time, attention ones all at once.

    attention     w = softmax(R_a x),                                Δ = Σ_n w_n Δ_n       R_a [N, reads]
    feed-forward  w = softmax over the k greatest of R_f x, else 0,  Δ = Σ_n w_n Δ_n       R_f [N, reads]
    elsewhere     Δ = (1/N) Σ_n Δ_n

Zhang, Gritsch, Gnaneshwar, Guo, Cairuz, Venkitesh, Foerster, Blunsom, Ruder, Üstün, Locatelli 2024, arXiv 2408.08274. N
copies of one model, each trained for itself, are the experts; where a copy was left as it was, its Δ is 0, and it is an
expert all the same. Routers are drawn, R ~ U(±1/√reads) like a linear map's; N · reads numbers a site, none elsewhere.

What differs from the paper:
- Copies are adapters on one frozen backbone, and they stay as they are: only routers are trained, in as many numbers as
  routers have. The paper trains the whole model after it is built. So there is no loss that balances the load either:
  no expert can starve that does not learn.
- A site sees only what it reads. So it has a router of its own where the paper has one for a block's attention and one
  for its feed-forward network: o and down are routed by the heads' and the activations' values.
- The paper runs each expert's attention by itself and weighs what comes out of O. Here Q, K, V and O are each mixed,
  and attention runs once. That is the same where experts agree, or where one of them has all the weight of all tokens,
  and for equal weights else to first order in Δ.
- The backbone's attention and feed-forward network stand one after the other, if it has them so; the paper's are
  computed side by side. k = 2, and softmax after the choice, are ours: the paper's are not known to us.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.backbones import Site
from polytask.methods.composed import Composed, Sources
from polytask.methods.method import Params, method


@method(
    "bam",
    place="weights",
    equation="Δ = Σ_n w_n Δ_n, w = softmax(R_a x) in attention, of the k greatest of R_f x in feed-forward networks",
    paper="Zhang et al. 2024, arXiv 2408.08274",
)
class BAM(Composed):
    """top_k: k."""

    elsewhere = True
    precise = True
    fixed = frozenset(("N",))

    top_k: int = 2

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        N, routers = len(self.over), {"attn": "R_a", "cross": "R_a", "mlp": "R_f"}
        router = next((routers[part] for part in site.name.split(".") if part in routers), None)
        if router is None:
            return {"N": torch.tensor(float(N))}
        bound = site.reads**-0.5
        return {router: torch.empty(N, site.reads).uniform_(-bound, bound, generator=generator)}

    def join(self, p: Params, x: Tensor, y: Tensor, sources: Sources) -> Tensor:
        here = [*sources]
        if "N" in p:
            return sources.weighted(torch.ones(len(here), device=y.device) / p["N"], y)
        if "R_a" in p:
            w = (x.float() @ p["R_a"].float().T).softmax(-1)
        else:
            z = x.float() @ p["R_f"].float().T
            top, which = z.topk(min(self.top_k, z.shape[-1]))
            w = torch.zeros_like(z).scatter(-1, which, top.softmax(-1))
        return sources.weighted(w if len(here) == w.shape[-1] else w[:, here], y)
