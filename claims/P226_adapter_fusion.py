"""AdapterFusion: Pfeiffer et al. 2020, arXiv 2005.00247. See `claims.library`.

The paper trains one adapter for each of 16 tasks and then attention over all of them for each task, and gains most
where a task has few examples. Here: a target's own adapter, of 64 examples, and those of seven other tasks; attention
over these eight, against the own one alone. Both are trained for as long, and are tuned alike. Every adapter is then
compared with itself before, number for number.
"""

from __future__ import annotations

from typing import Any

from claims import library
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter

PAPER = "Pfeiffer et al. 2020"
CLAIM = "of 64 examples, attention over eight frozen adapters beats the target's own alone by 2 points"
FEW = 64
RATES = {"own": (1e-3, 3e-3), "fusion": (5e-4, 2e-3)}
MORE = 2.0


def own_rate(rows: Rows) -> float:
    return library.best_rate(rows, RATES["own"], alone, way="own", examples=FEW)


def alone(name: str, seed: int, rate: float) -> dict[str, Any]:
    return library.row_of(library.own(name, FEW, seed, "pfeiffer", rate))


def sources(rows: Rows, name: str, seed: int) -> list[Adapter]:
    """Those of the seven other tasks, and the target's own."""
    return [*library.others(name, "pfeiffer"), library.own(name, FEW, seed, "pfeiffer", own_rate(rows))]


def fused(rows: Rows, name: str, seed: int, rate: float) -> dict[str, Any]:
    over = sources(rows, name, seed)
    before = [{n: t.clone() for n, t in one.tensors.items()} for one in over]
    found = library.run(library.target(name, FEW, seed), "fusion", {}, rate, seed, over=over)
    same = all(t.equal(kept[n]) for one, kept in zip(over, before, strict=True) for n, t in one.tensors.items())
    return found | {"unchanged": same}


def fusion(rows: Rows) -> list[dict[str, Any]]:
    return library.every(rows, RATES["fusion"], lambda n, s, r: fused(rows, n, s, r), way="fusion", examples=FEW)


def measure(rows: Rows) -> Verdict:
    both = fusion(rows)
    single = library.every(rows, RATES["own"], alone, way="own", examples=FEW)
    two, one = library.points(both), library.points(single)
    unchanged = all(row["unchanged"] for row in both)
    return Verdict(
        f"{len(library.TARGETS)} targets x {len(library.SEEDS)} seeds: fusion {two:.1f} with "
        f"{both[0]['parameters']:,} numbers, own adapter {one:.1f} with {single[0]['parameters']:,}, the head alone "
        f"{library.points(single, 'head'):.1f} ({two - one:+.1f} points against the own one); the adapters are "
        f"{'unchanged' if unchanged else 'CHANGED'}",
        two - one >= MORE and unchanged,
    )
