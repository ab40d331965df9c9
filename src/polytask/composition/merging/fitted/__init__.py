"""Merging rules that are fitted to the tasks' data: what weighs each adapter's numbers is found there."""

from polytask.composition.merging.fitted.fitted import Fitted, fitted_rules

__all__ = ["Fitted", "fitted_rules"]
