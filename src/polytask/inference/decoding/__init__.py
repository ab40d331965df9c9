"""Ways of decoding: what comes between the logits and the next token."""

from polytask.inference.decoding.constraints import Constraint, Guide, Guides

__all__ = ["Constraint", "Guide", "Guides"]
