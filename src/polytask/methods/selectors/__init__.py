"""Which of a method's numbers are trained: one published way of choosing them per file."""

from polytask.methods.selectors.selector import Choice, Look, Selector, build, named, selectors

__all__ = ["Choice", "Look", "Selector", "build", "named", "selectors"]
