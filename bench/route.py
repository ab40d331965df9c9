"""What routing over 1,000 adapters costs beside one pass of 32 x 48 tokens.

MiniLM without adapters, random token ids, weights in the backbone's own precision; 32 embeddings and 1,000 profiles of
random directions. A router's turn is all that is between the embeddings and the expressions that the rows are answered
by. What gives the embeddings is a pass of the backbone itself (half a pass by `dlp-lora`), and not in it. Each ratio is
a turn to the pass.
"""

from __future__ import annotations

import math

import torch

from bench.infer import batch, repeated
from bench.measure import Row, Turn, Window, keep, options, turns
from polytask.backbones import load
from polytask.composition.routing.dlp import DLP, HIDDEN, Classifier
from polytask.composition.routing.lora_fusion import LoraFusion
from polytask.composition.routing.lora_retriever import LoraRetriever
from polytask.composition.routing.nearest_task import NearestTask
from polytask.composition.routing.router import Known, Router
from polytask.methods.lifting import Plan

R, T, N = 32, 48, 1000
TARGET = 0.05


def profiles(d: int) -> Known:
    """N adapters, every tenth over pairs, all LoRAs of one shape."""
    μ = torch.nn.functional.normalize(torch.randn(N, d, generator=torch.Generator().manual_seed(0)), dim=-1)
    ids = tuple(f"{n:016x}" for n in range(N))
    none = torch.zeros(N, dtype=torch.long)
    return Known(ids, ids, μ, none.float(), none + 1.0, torch.arange(N) % 10 == 0, none.bool(), none)


def classifier(known: Known, d: int) -> Classifier:
    """One with random tensors."""
    generator = torch.Generator().manual_seed(0)
    widths = [d, HIDDEN, HIDDEN, HIDDEN, N]
    shapes = {f"W{n}": (widths[n], widths[n - 1]) for n in range(1, 5)}
    tensors = {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
    tensors |= {f"b{n}": torch.zeros(widths[n]) for n in range(1, 5)}
    return Classifier(known.ids, known.names, tensors, known.μ[:, :d], known.m, known.s, 1.0)


@torch.no_grad()
def main() -> None:
    o = options(__doc__ or "", rounds=15, limit=60.0)
    base = load("minilm")
    plan, given, alone = Plan(base, []), batch(R, T), torch.zeros(R, 0)
    d = base.hidden_size
    known = profiles(2 * d)
    e = torch.randn(R, 2 * d, generator=torch.Generator().manual_seed(1))
    pairs = [False] * R

    def passed(_: Window) -> float:
        plan.hidden(given, alone)
        return 1.0

    def routed(router: Router) -> Turn:
        def turn(_: Window) -> float:
            for one in router.choose(known, e if router.reads == "gist" else e[:, :d], known.fits(pairs)):
                router.expression(one.weights)
            return 1.0

        return turn

    routers: dict[str, Router] = {
        "nearest-task": NearestTask(threshold=math.inf),
        "lora-retriever": LoraRetriever(threshold=math.inf),
        "lora-fusion": LoraFusion(threshold=math.inf),
        "dlp-lora": DLP(threshold=math.inf, classifier=classifier(known, d)),
    }
    variants = {"pass": repeated(passed)} | {name: repeated(routed(router)) for name, router in routers.items()}
    found = turns(variants, rounds=o.rounds, limit=o.limit, clock=o.clock)
    rows = [
        Row.of("route", f"{name}, {N:,} adapters, to a pass", found.ratio(name, "pass"), target=TARGET, better="less")
        for name in routers
    ]
    costs = {name: 1e3 * found.cost(name).median for name in variants}
    keep("route", rows, {f"{R}x{T}": found}, {"milliseconds": costs})


if __name__ == "__main__":
    main()
