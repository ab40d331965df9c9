"""The embedded decoder of polytask: weights, tokenizer and card, no code."""

from pathlib import Path


def folder() -> Path:
    """Where the model is; `transformers.AutoModelForCausalLM.from_pretrained` takes it."""
    return Path(__file__).parent / "model"
