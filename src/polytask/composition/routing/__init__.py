"""Routers: weights over adapters from an input. One file each."""

from polytask.composition.routing import arrow as _arrow  # noqa: F401  # each enters its method
from polytask.composition.routing import meteora as _meteora  # noqa: F401
from polytask.composition.routing import phatgoose as _phatgoose  # noqa: F401
