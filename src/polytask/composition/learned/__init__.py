"""Compositions with numbers of their own, learned on a task over adapters that stay as they are."""

from polytask.composition.learned import atlas as _atlas  # noqa: F401  # each enters its method
from polytask.composition.learned import fusion as _fusion  # noqa: F401
from polytask.composition.learned import kadapters as _kadapters  # noqa: F401
from polytask.composition.learned import scalearn as _scalearn  # noqa: F401
