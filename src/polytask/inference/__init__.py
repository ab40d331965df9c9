"""Answers from one resident backbone."""

from polytask.inference.engine import Answer, Engine, Request

__all__ = ["Answer", "Engine", "Request"]
