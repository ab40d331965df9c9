"""LoraRetriever: Zhao et al. 2024, arXiv 2402.09997. See `claims.routed`.

The paper retrieves the three nearest of 48 LoRAs for each input and mixes what they do, fuses their parameters or takes
the nearest one, for a model that writes; all three come near to each task's own LoRA, and the mixture does best on
tasks whose own is missing. Here eight LoRAs on the embedded encoder with a head each, nothing trained to retrieve. The
rule without rejection of foreign inputs, as in the paper.
"""

from __future__ import annotations

import math

from claims import library, routed
from claims.claim import Rows, Verdict
from polytask.composition.routing.lora_fusion import LoraFusion
from polytask.composition.routing.lora_retriever import LoraRetriever

PAPER = "Zhao et al. 2024"
CLAIM = "retrieved LoRAs keep 90 % of what each task's own gets right, and beat the mean of all"
K = 3
SHARE = 0.9


def measure(rows: Rows) -> Verdict:
    own = rows.get(lambda: routed.named(routed.own), way="own")
    mean = rows.get(lambda: routed.named(routed.uniform), way="mean of all")
    ways = {
        "the nearest": LoraRetriever(k=1, threshold=math.inf),
        f"mixture of {K}": LoraRetriever(k=K, threshold=math.inf),
        f"fusion of {K}": LoraFusion(k=K, threshold=math.inf),
    }
    found = {way: rows.get(lambda how=how: routed.routed(how), way=way) for way, how in ways.items()}
    best = max(found, key=lambda way: float(found[way]["right"]))
    said = ", ".join(f"{way} {row['right']:.1%}" for way, row in found.items())
    return Verdict(
        f"{len(library.SKILLS)} tasks, inputs mixed: own LoRA {own['right']:.1%}, {said}, mean of all LoRAs read by "
        f"the own head {mean['right']:.1%}; the nearest is the own for {found['the nearest']['own']:.1%}",
        found[best]["right"] >= SHARE * own["right"] and found[best]["right"] > mean["right"],
    )
