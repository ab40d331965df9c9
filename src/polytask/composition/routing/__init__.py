"""Routers: weights over adapters from an input. One file each."""

from polytask.composition.routing import bam as _bam  # noqa: F401  # each enters its method
from polytask.composition.routing import meteora as _meteora  # noqa: F401
from polytask.composition.routing import task_moe as _task_moe  # noqa: F401
from polytask.composition.routing.arrow import arrow
from polytask.composition.routing.phatgoose import phatgoose

ROUTERS = {"arrow": arrow, "phatgoose": phatgoose}
"""What makes the adapters that `adapters.expression.ROUTERS` names."""
