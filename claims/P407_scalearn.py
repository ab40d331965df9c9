"""ScaLearn: Frohmann et al. 2023, arXiv 2310.01217. See `claims.library`.

The paper adds up the adapters of several tasks, the target's own among them, with learned scales, and stays near
AdapterFusion even where a source has one number for all layers. Here: the eight adapters of `P226_adapter_fusion` and
64 examples; eight numbers against the attention of that claim, against their mean, and against the best single one of
them by validation score. Above the mean and a single adapter a head alone is trained.
"""

from __future__ import annotations

from typing import Any

import polytask as pt
from claims import library, short
from claims.claim import Rows, Verdict
from claims.P226_adapter_fusion import FEW, fusion, sources
from polytask.adapters import Adapter
from polytask.adapters.expression import Mix, Name
from polytask.composition.kept import keep

PAPER = "Frohmann et al. 2023"
CLAIM = (
    "eight scales, one for each source, beat the sources' mean and the best source, and are within a point of fusion"
)
RATES = (6e-3, 3e-2)
SHARED = {"shared": True}
WITHIN = 1.0


def scaled(rows: Rows, name: str, seed: int, rate: float) -> dict[str, Any]:
    task = library.target(name, FEW, seed)
    return library.run(task, "scalearn_uniform", SHARED, rate, seed, over=sources(rows, name, seed))


def under_head(rows: Rows, name: str, seed: int, below: Adapter, known: library.Known) -> dict[str, Any]:
    settings = short.settings(1e-3, seed, epochs=1)
    task = library.target(name, FEW, seed)
    made = pt.adapt(short.base(), task, "head", settings=settings, above=[below], library=known)
    return library.row_of(made)


def mean_of(rows: Rows, name: str, seed: int) -> dict[str, Any]:
    known = library.Known(sources(rows, name, seed))
    terms = tuple((1 / len(known.adapters), Name(id)) for id in known.adapters)
    return under_head(rows, name, seed, keep(Mix(terms), known.get, None, "mean"), known)


def best_of(rows: Rows, name: str, seed: int) -> dict[str, Any]:
    known = library.Known(sources(rows, name, seed))
    each = {one.name: under_head(rows, name, seed, one, known) for one in known.adapters.values()}
    best = max(each, key=lambda source: each[source]["validation"])
    return each[best] | {"source": best}


def measure(rows: Rows) -> Verdict:
    shared = Rows("P226")
    attention = fusion(shared)
    scales = library.every(rows, RATES, lambda n, s, r: scaled(shared, n, s, r), way="scales")
    keys = [{"task": name, "seed": seed} for name in library.TARGETS for seed in library.SEEDS]
    average = [rows.get(lambda k=k: mean_of(shared, k["task"], k["seed"]), way="mean", **k) for k in keys]
    single = [rows.get(lambda k=k: best_of(shared, k["task"], k["seed"]), way="best source", **k) for k in keys]
    ours, theirs, mean, best = map(library.points, (scales, attention, average, single))
    return Verdict(
        f"{len(library.TARGETS)} targets x {len(library.SEEDS)} seeds: {scales[0]['parameters']} scales {ours:.1f}, "
        f"fusion {theirs:.1f} with {attention[0]['parameters']:,} numbers, the mean {mean:.1f}, the best source "
        f"{best:.1f} ({ours - theirs:+.1f}, {ours - mean:+.1f} and {ours - best:+.1f} points)",
        ours > mean and ours > best and ours >= theirs - WITHIN,
    )
