"""What measurements say: comparisons of methods, and the pages that show them."""

from polytask.evaluation.comparison import Comparison, Failure, Row, Trial

__all__ = ["Comparison", "Failure", "Row", "Trial"]
