"""What adapters do together: weighted mixtures, and routers that choose among them per input."""

from polytask.composition.mix import Mixture, mix

__all__ = ["Mixture", "mix"]
