"""Model Breadcrumbs: Davari & Belilovsky 2023, arXiv 2312.06795. See `claims.merging`.

The paper chooses hyperparameters on few tasks and keeps them while more are added. Here they are chosen on two, from
four tries for either rule, and six LoRAs are merged with them.
"""

from __future__ import annotations

from claims.claim import Rows, Verdict
from claims.merging import SCALES, SIX, alone, best, row

PAPER = "Davari & Belilovsky 2023"
CLAIM = "chosen on two tasks, Breadcrumbs merges six LoRAs at least a point better than task arithmetic does"


def measure(rows: Rows) -> Verdict:
    tries = [{"scale": λ} for λ in SCALES]
    found = {}
    for rule in ("breadcrumbs", "task-arithmetic"):
        found[rule] = row(rows, SIX, rule, best(rows, SIX[:2], rule, tries), "test")
    ours, its = found["breadcrumbs"], found["task-arithmetic"]
    more = ours["points"] - its["points"]
    return Verdict(
        f"{len(SIX)} tasks: Breadcrumbs {ours['points']:.1f} (λ = {ours['hyper']['scale']:g}), task arithmetic "
        f"{its['points']:.1f} (λ = {its['hyper']['scale']:g}; {more:+.1f} points), each one's own "
        f"{alone(rows, SIX)['points']:.1f}",
        more >= 1,
    )
