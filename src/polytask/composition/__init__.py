"""What adapters do together: expressions over them, merging rules, and routers that choose among them per input."""

from polytask.adapters.expression import Expression, bare, ensemble, mix, parallel, pipeline, read, split, stack
from polytask.composition import elrea as _elrea  # noqa: F401  # enters its method
from polytask.composition import kept as _kept  # noqa: F401  # and these
from polytask.composition import learned as _learned  # noqa: F401
from polytask.composition import routing as _routing  # noqa: F401

__all__ = ["Expression", "bare", "ensemble", "mix", "parallel", "pipeline", "read", "split", "stack"]
