"""Head only: a linear map on the frozen backbone's features, the baseline that every other method must beat.

    logits = W · pool(h) + b

The last-layer baseline of Houlsby et al. 2019 (arXiv 1902.00751) and others. No site of the backbone is changed, so
features are computed once and the (convex) fit costs next to nothing.
"""

from __future__ import annotations

from polytask.errors import UsageError
from polytask.methods.method import Method, method


@method("head", place="logits", equation="W·pool(h) + b", paper="linear probes: Alain & Bengio 2016, arXiv 1610.01644")
class Head(Method):
    """No hyperparameters: the head that every adapter carries does the work."""

    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sites:
            raise UsageError(f"head.sites = {','.join(self.sites)}: head changes no site of the backbone; leave it out")
