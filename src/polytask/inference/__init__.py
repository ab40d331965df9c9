"""Answers from one resident backbone."""

from polytask.inference.engine import Engine
from polytask.inference.requests import Answer, Ask, Request
from polytask.inference.writing import Sampling, Written

__all__ = ["Answer", "Ask", "Engine", "Request", "Sampling", "Written"]
