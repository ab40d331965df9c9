"""One published way of adapting per file, and the runtime that lifts each to batches of many adapters."""

from polytask.methods.method import Method, Params, build, methods

__all__ = ["Method", "Params", "build", "methods"]
