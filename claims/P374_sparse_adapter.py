"""SparseAdapter: He et al. 2022, arXiv 2210.04284. See `claims.small`.

Bottleneck adapters of width 24 pruned to a fifth before training, against whole ones; and Large-Sparse, five times as
wide and pruned to the same number as the whole ones.
"""

from __future__ import annotations

from claims.claim import Rows, Verdict
from claims.small import TASKS, way

PAPER = "He et al. 2022"
CLAIM = "adapters pruned by 80 % before training are as good, and wider ones pruned to the same number better"
RATES = (1e-3, 3e-3)


def measure(rows: Rows) -> Verdict:
    whole = way("bottleneck", RATES, {"reduction": 16})
    pruned = way("bottleneck@snip", RATES, {"reduction": 16, "select.sparsity": 0.8})
    wide = way("bottleneck@snip", RATES, {"reduction": 3, "select.sparsity": 0.8})
    return Verdict(
        f"{len(TASKS)} tasks: whole {whole.score:.1f} ({whole.parameters:,} numbers), pruned {pruned.score:.1f} "
        f"({pruned.parameters:,}), wide and pruned {wide.score:.1f} ({wide.parameters:,})",
        pruned.score >= whole.score - 1 and wide.score >= whole.score,
    )
