"""aTLAS: Zhang et al. 2024, arXiv 2407.02880. See `claims.library`.

The paper gives each block of each task vector its own coefficient, learned from a few images, and compares with one
coefficient a task vector. Here: 16 examples of a target, the LoRAs of four other tasks; a coefficient for each LoRA and
site against one for each LoRA. Both start at the backbone, are trained for as long, and are tuned alike.
"""

from __future__ import annotations

from typing import Any

from claims import library
from claims.claim import Rows, Verdict
from polytask.adapters import Adapter

PAPER = "Zhang et al. 2024"
CLAIM = "of 16 examples, coefficients of blocks beat one coefficient for each of four adapters by 3 points"
FEW, SOURCES = 16, 4
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("atlas", {}),
    "whole": ("scalearn_uniform", {"shared": True, "c": 0.0}),
}
RATES = (3e-2, 1e-1)
MORE = 3.0


def sources(name: str) -> list[Adapter]:
    return [library.skill(one, "lora") for one in library.SKILLS if one != name][:SOURCES]


def composed(way: str, name: str, seed: int, rate: float) -> dict[str, Any]:
    method, hyper = WAYS[way]
    return library.run(library.target(name, FEW, seed), method, hyper, rate, seed, over=sources(name))


def measure(rows: Rows) -> Verdict:
    found = {way: library.every(rows, RATES, lambda n, s, r, way=way: composed(way, n, s, r), way=way) for way in WAYS}
    blocks, whole = library.points(found["blocks"]), library.points(found["whole"])
    return Verdict(
        f"{len(library.TARGETS)} targets x {len(library.SEEDS)} seeds: {found['blocks'][0]['parameters']} coefficients "
        f"{blocks:.1f}, {found['whole'][0]['parameters']} coefficients {whole:.1f}, the head alone "
        f"{library.points(found['whole'], 'head'):.1f} ({blocks - whole:+.1f} points)",
        blocks - whole >= MORE,
    )
