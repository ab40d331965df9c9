"""Half fine-tuning: half of every block's matrices are trained, the others stay.

    θ ← θ + M Δθ,   M = 1 for a drawn half of the matrices of each kind in each block, else 0

Hui, Zhang, Wang, Xu, Sun, Wu 2024, arXiv 2404.18466. The kinds are a block's attention, its feed-forward network and
its norms; of an odd number the larger or the smaller half is drawn. What stands outside blocks (embeddings) is trained.
A matrix and its bias, and an adapter's tensors at a site, are drawn together. What stays costs no memory for gradients
or moments. Use another seed for the next task: the paper draws anew in each round.
"""

from __future__ import annotations

import random

from polytask.methods.selectors.selector import Choice, Look, Selector, block_of, selector


@selector("half", equation="θ ← θ + M Δθ, M = 1 on half of each block", paper="Hui et al. 2024, arXiv 2404.18466")
class Half(Selector):
    """share: of the matrices of each kind that is trained."""

    share: float = 0.5

    def choose(self, look: Look) -> Choice:
        draw = random.Random(look.seed)
        kinds: dict[tuple[str, str], list[str]] = {}
        kept = set()
        for place in dict.fromkeys(name.rpartition("/")[0] for name in look.tensors):
            block = block_of(look.backbone, place)
            if not block:
                kept.add(place)
                continue
            kind = look.backbone.places[place[1:]][1] if place.startswith(":") else place.removeprefix(block)[:5]
            kinds.setdefault((block, kind), []).append(place)
        for places in kinds.values():
            n = self.share * len(places)
            kept.update(draw.sample(places, int(n) + (draw.random() < n % 1)))
        tensors = {name: t for name, t in look.tensors.items() if name.rpartition("/")[0] in kept}
        return Choice(look.method.only(tensors), tensors)
