"""DLP-LoRA: Zhang & Li 2024, arXiv 2410.01497. See `claims.routed`.

The paper trains a small classifier on the inputs of 26 tasks, fuses the most probable LoRAs for each sentence, and
takes under twice the time of one LoRA. Here eight LoRAs on the embedded encoder with a head each; the classifier reads
the backbone's states half of the way up, and that half pass is in the time. The rule without rejection of foreign
inputs, as in the paper. The time is of the processor, on the same inputs: routed and mixed, against each input's own
LoRA, named, in turns; the median of the ratios.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import median

from claims import library, routed, short
from claims.claim import Rows, Verdict
from polytask.composition.routing.dlp import DLP, learned

PAPER = "Zhang & Li 2024"
CLAIM = "a classifier picks LoRAs that keep 95 % of what each task's own gets right, in under twice the time"
SHARE, TIMES = 0.95, 2.0


@cache
def dlp() -> DLP:
    known = [(library.skill(name, "lora").id, name) for name in library.SKILLS]
    texts = [[e.text for e in short.task(name).train[: library.EXAMPLES]] for name in library.SKILLS]
    return DLP(threshold=math.inf, classifier=learned(short.base(), known, texts, short.LIMIT))


def measure(rows: Rows) -> Verdict:
    own = rows.get(lambda: routed.named(routed.own), way="own")
    mean = rows.get(lambda: routed.named(routed.uniform), way="mean of all")
    found = rows.get(lambda: routed.routed(dlp()), way="classifier, half a pass")
    times = rows.get(lambda: {"ratios": routed.times(dlp())}, way="times, half a pass")["ratios"]
    return Verdict(
        f"{len(library.SKILLS)} tasks, inputs mixed: own LoRA {own['right']:.1%}, picked {found['right']:.1%}, mean of "
        f"all LoRAs read by the own head {mean['right']:.1%}; the own's head reads {found['own']:.1%}; "
        f"{median(times):.2f} times the time",
        found["right"] >= SHARE * own["right"] and found["right"] > mean["right"] and median(times) < TIMES,
    )
