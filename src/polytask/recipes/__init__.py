"""Named, reproducible ways to get an adapter."""

from polytask.recipes.adapt import adapt, adapt_many
from polytask.recipes.reading import Reading

__all__ = ["Reading", "adapt", "adapt_many"]
