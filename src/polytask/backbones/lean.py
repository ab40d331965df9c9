"""One token of each row through a Llama-shaped model, as one function of tensors.

    h ← x + o(attend(q, k, v)),   q, k, v = rotated projections of norm(x)
    x ← h + down(silu(gate(n)) ∘ up(n)),   n = norm(h)

It computes what the Hugging Face modules compute, without modules: in a step of a small model most time goes into
calling them, into copies of keys and into norms of six operations. Adapters act at the same sites in the same order
(`changes`), since no module runs that a hook could stand at. Llama (Touvron et al. 2023, arXiv 2302.13971) and what is
built like it: Mistral, Qwen 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.backbones.backbone import Backbone

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Change = Callable[[Tensor, Tensor], Tensor]  # (x, y) at a site → y with the adapters' differences


class Lean:
    """The weights of a model of this shape, as they are now; made anew where weights are changed."""

    def __init__(self, backbone: Backbone) -> None:
        model: Any = backbone.base
        config = model.config
        self.layers = list(model.layers)
        self.embedding, self.norm, self.rotary = model.embed_tokens.weight, model.norm.weight, model.rotary_emb
        self.eps: float = config.rms_norm_eps
        self.kinds: Sequence[str] = getattr(config, "layer_types", None) or ["full_attention"] * len(self.layers)
        self.head_width: int = self.layers[0].self_attn.head_dim

    @staticmethod
    def fits(backbone: Backbone) -> bool:
        """Whether the model is of this shape."""
        config: Any = backbone.model.config
        return backbone.family in FAMILIES and config.hidden_act == "silu" and backbone.base.training is False

    def step(
        self, tokens: Tensor, positions: Tensor, cache: Sequence[Any], mask: Any, changes: Mapping[str, Change]
    ) -> Tensor:
        """Last hidden states [S, 1, d] for tokens [S] at positions [S, 1]; `cache` has a layer for each block, whose
        `update` stores keys and values; `mask` is added to scores [S, 1, 1, columns], by kind of layer if a dict."""

        def at(site: str, x: Tensor, y: Tensor) -> Tensor:
            change = changes.get(site)
            return y if change is None else change(x, y)

        S, D = len(tokens), self.head_width
        x = F.embedding(tokens[:, None], self.embedding)
        x = at("embed", x, x)
        cos, sin = (t[:, :, None] for t in self.rotary(x, positions))  # [S, 1, 1, D]
        for i, block in enumerate(self.layers):
            attn, mlp = block.self_attn, block.mlp
            n = self._norm(x, block.input_layernorm.weight)
            q, k, v = (
                at(f"{i}.attn.{name}", n, F.linear(n, part.weight, part.bias))
                for name, part in (("q", attn.q_proj), ("k", attn.k_proj), ("v", attn.v_proj))
            )
            q, k, v = (t.view(S, 1, -1, D) for t in (q, k, v))
            if hasattr(attn, "q_norm"):  # Qwen 3
                q, k = self._norm(q, attn.q_norm.weight), self._norm(k, attn.k_norm.weight)
            H = q.shape[2]
            turned = _rotated(torch.cat([q, k], 2), cos, sin)
            keys, values = cache[i].update(turned[:, :, H:].transpose(1, 2), v.transpose(1, 2))
            # Heads that share keys stand as rows of one product: see `attention`.
            shared = turned[:, 0, :H].view(S, keys.shape[1], -1, D)
            seen = mask[self.kinds[i]] if isinstance(mask, dict) else mask
            h = F.scaled_dot_product_attention(shared, keys, values, attn_mask=seen, scale=attn.scaling)
            h = h.reshape(S, 1, H * D)
            h = at(f"{i}.attn.heads", h, h)
            y = at(f"{i}.attn.o", h, F.linear(h, attn.o_proj.weight, attn.o_proj.bias))
            x = x + at(f"{i}.attn", n, y)
            n = self._norm(x, block.post_attention_layernorm.weight)
            gate = at(f"{i}.mlp.gate", n, F.linear(n, mlp.gate_proj.weight, mlp.gate_proj.bias))
            up = at(f"{i}.mlp.up", n, F.linear(n, mlp.up_proj.weight, mlp.up_proj.bias))
            a = F.silu(gate) * up
            a = at(f"{i}.mlp.act", a, a)
            y = at(f"{i}.mlp.down", a, F.linear(a, mlp.down_proj.weight, mlp.down_proj.bias))
            x = x + at(f"{i}.mlp", n, y)
            x = at(f"{i}.sum", x, x)
            x = at(f"{i}", x, x)
        x = self._norm(x, self.norm)
        return at("head", x, x)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / √(mean x² + ε) · weight; the root in fp32. On a CPU a third of the time of `F.rms_norm` in bf16."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale: Tensor = (length.square() / x.shape[-1] + self.eps).rsqrt()
        return (x * scale).to(x.dtype) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): halves (a, b) ← (a cos − b sin, b cos + a sin)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
