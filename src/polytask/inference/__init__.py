"""Answers from one resident backbone."""

from polytask.inference.engine import Answer, Ask, Engine, Request
from polytask.inference.writing import Sampling, Written

__all__ = ["Answer", "Ask", "Engine", "Request", "Sampling", "Written"]
