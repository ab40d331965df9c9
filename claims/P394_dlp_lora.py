"""DLP-LoRA: Zhang & Li 2024, arXiv 2410.01497. See `claims.routed`.

The paper trains a small classifier on the inputs of 26 tasks, fuses the most probable LoRAs for each sentence, and
takes under twice the time of one LoRA. Here eight LoRAs on the embedded encoder with a head each; the classifier reads
the backbone's own embeddings, whose pass is in the time. The rule without rejection of foreign inputs, as in the paper.
The time is of the processor, on the same inputs: routed and mixed, against each input's own LoRA, named.
"""

from __future__ import annotations

import math
from typing import Any

from claims import library, routed, short
from claims.claim import Rows, Verdict
from polytask.composition.routing.dlp import DLP, Classifier

PAPER = "Zhang & Li 2024"
CLAIM = "a classifier picks LoRAs that keep 95 % of what each task's own gets right, in under twice the time"
SHARE, TIMES = 0.95, 2.0


def picked() -> dict[str, Any]:
    engine = routed.engine()
    known = [(library.skill(name, "lora").id, name) for name in library.SKILLS]
    texts = [[e.text for e in short.task(name).train[: library.EXAMPLES]] for name in library.SKILLS]
    classifier = Classifier.train(known, [engine.embed(each, short.LIMIT) for each in texts])
    return routed.routed(DLP(threshold=math.inf, classifier=classifier)) | {"classified": classifier.right}


def measure(rows: Rows) -> Verdict:
    own = rows.get(lambda: routed.named(routed.own), way="own")
    mean = rows.get(lambda: routed.named(routed.uniform), way="mean of all")
    found = rows.get(picked, way="classifier")
    times = found["seconds"] / own["seconds"]
    return Verdict(
        f"{len(library.SKILLS)} tasks, inputs mixed: own LoRA {own['right']:.1%}, picked {found['right']:.1%}, mean of "
        f"all LoRAs read by the own head {mean['right']:.1%}; the own's head reads {found['own']:.1%}; {times:.2f} "
        "times the time",
        found["right"] >= SHARE * own["right"] and found["right"] > mean["right"] and times < TIMES,
    )
