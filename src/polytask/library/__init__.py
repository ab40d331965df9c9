"""The adapters that were kept: content-addressed folders, an index to search them, and a way to forget them."""

from polytask.library.index import Entry
from polytask.library.library import Damage, Library, Relatives

__all__ = ["Damage", "Entry", "Library", "Relatives"]
