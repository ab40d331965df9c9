"""What weights are: their fingerprint, and where and in which numbers they are computed with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from polytask.backbones.quantised import QUANTISED
from polytask.errors import UsageError

# No hidden state depends on these, and not every checkpoint of a model has them: where one lacks them, transformers
# draws them at random.
UNREAD = ("pooler.", "lm_head.")

Precision = Literal["auto", "fp32", "bf16", "int8", "nf4"]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and values of the base model's weights, as they were stored; `UNREAD` left out."""
    sha = hashlib.sha256()
    state: Mapping[str, Tensor] = getattr(model, "base_model", model).state_dict()
    for name in sorted(state):
        if name.startswith(UNREAD):
            continue
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device, Apple's GPU, or the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where it is computed and not emulated: CUDA from Ampere on, x86 with AVX512-BF16 or AMX."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if precision not in ("auto", *QUANTISED):
        raise UsageError(f"precision {precision!r}: one of auto, fp32, bf16, {', '.join(QUANTISED)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32
