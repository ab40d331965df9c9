"""Keys as an attention keeps them for later tokens: normed where the model norms keys, and turned to their positions.

    K′_j = R(j) norm(K_j),   R(j) [a; b] = s [a cos jω − b sin jω; b cos jω + a sin jω]

Rotary positions: Su, Lu, Pan, Wen, Liu 2021, arXiv 2104.09864. K_j is what the key's map puts out at position j = 0, 1,
…; a and b are the halves of a head's first 2·|ω| features, ω the block's frequencies, and s the model's scaling, 1 but
with YaRN. A model without rotary positions and norms keeps K as it is.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polytask.errors import PolytaskError, UsageError

if TYPE_CHECKING:
    from polytask.backbones.backbone import Backbone


@torch.no_grad()
def kept(backbone: Backbone, name: str, K: Tensor) -> Tensor:
    """K′ [n, width] of K [n, width] at the site `3.attn.k`, in fp32 or more.

    Raises UsageError where the model takes no keys from before a text.
    """
    if "past_key_values" not in inspect.signature(backbone.base.forward).parameters:
        raise UsageError(
            f"{backbone.name}: {type(backbone.base).__name__} keeps no keys, so a prefix works in polytask alone"
        )
    K = _exact(backbone, K)
    norm = _norm(backbone, name)
    if norm is not None:  # Qwen 3 and Gemma 3 norm each head, OLMo 2 all of them at once
        K = norm(K.view(len(K), -1, norm.weight.numel())).flatten(1)
    return _turn(backbone, name, K, *_rotation(backbone, name, K)).cpu()


@torch.no_grad()
def put_out(backbone: Backbone, name: str, kept: Tensor) -> Tensor:
    """K [n, width] of K′. Raises PolytaskError where the model norms keys: K′ does not say how long K was."""
    if _norm(backbone, name) is not None:
        raise PolytaskError(
            f"{backbone.name} norms its keys, and polytask's prefix stands before the norm, where not all of PEFT's "
            "have a counterpart; train it anew"
        )
    kept = _exact(backbone, kept)
    cos, sin = _rotation(backbone, name, kept)
    s2 = cos.square() + sin.square()
    return _turn(backbone, name, kept, cos / s2, -sin / s2).cpu()


def _exact(backbone: Backbone, K: Tensor) -> Tensor:
    return K.detach().to(backbone.device, torch.promote_types(K.dtype, torch.float32))


def _norm(backbone: Backbone, name: str) -> Any:
    attention = backbone.model.get_submodule(backbone.sites[name].path.rpartition(".")[0])
    return getattr(attention, "k_norm", None)


def _rotation(backbone: Backbone, name: str, K: Tensor) -> tuple[Tensor, Tensor]:
    """s cos jω and s sin jω [n, 2·|ω|], twice side by side; [n, 0] where positions are not rotary."""
    modules = backbone.base.named_modules()
    rotary: Any = next((module for path, module in modules if path.rpartition(".")[2] == "rotary_emb"), None)
    if rotary is None:
        return K.new_zeros(len(K), 0), K.new_zeros(len(K), 0)
    kind = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:  # Gemma 3: the blocks that slide have their own ω
        config: Any = backbone.model.config
        kind["layer_type"] = config.get_text_config().layer_types[int(name.partition(".")[0])]
    cos, sin = rotary(K, torch.arange(len(K), device=K.device)[None], **kind)
    return cos[0], sin[0]


def _turn(backbone: Backbone, name: str, K: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    D = backbone.sites[f"{name.rpartition('.')[0]}.heads"].width // backbone.heads
    heads = K.view(len(K), -1, D)
    turning, rest = heads[..., : cos.shape[1]], heads[..., cos.shape[1] :]
    a, b = turning.chunk(2, -1)
    return torch.cat([turning * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None], rest], -1).flatten(1)
