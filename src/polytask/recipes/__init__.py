"""Named, reproducible ways to get an adapter."""

from polytask.recipes.adapt import adapt, adapt_many

__all__ = ["adapt", "adapt_many"]
