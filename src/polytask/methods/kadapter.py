"""K-Adapter: a small model beside the backbone, which reads some of its states and is never read by it.

    in_k = H_k + a_(k−1),   a₀ = 0                         H_1 … H_K the backbone's states at K places
    a_k = in_k + T(in_k W_dᵀ + b_d) W_uᵀ + b_u             T transformer layers of the adapter's own
    H ← [H_L; a_K] Wᵀ + b                                  what heads read in place of the last states H_L

Wang, Tang, Duan, Wei, Huang, Ji, Cao, Jiang, Zhou 2020, arXiv 2002.01808. H_k [tokens, d], W_d [w, d], W_u [d, w],
W [d, 2d]. T is `inner` layers as BERT's: softmax(q kᵀ / √(w / heads)) v, a feed-forward network of width 4w with gelu,
and a norm behind each residual sum. Its own weights and biases ~ U(−1/√in, 1/√in), W_d and W_u ~ N(0, 0.0002²), their
biases 0, as in the authors' code. W = [I 0] and b = 0 where the code draws W at random: training starts at the
backbone.

For RoBERTa-large (L = 24, d = 1024) the authors take w = 768 and 12 heads, and its states 0, 11 and 23 of those from
the embeddings, 0, to the last block's, L. Here w = 0.75 d, a multiple of the heads, and the states are 0, ⌊(L − 1) / 2⌋
and L − 1, which is the same there. The paper trains an adapter on facts or syntax first, then a task on [H_L; a]
together with the backbone; here a task trains it, and the backbone stays frozen. An extra skip between adapters, which
the authors' scripts switch off, is left out.

The adapter's attention sees what the backbone's sees: no padding, which in the authors' code it does, and in a decoder
nothing later; where blocks differ, what those see that see most. While a decoder writes, T's keys and values are kept
in its cache, behind those of its blocks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.backbones import Backbone, Site
from polytask.backbones.families import match
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method


@method(
    "kadapter",
    place="activations",
    equation="H ← [H_L; a_K] Wᵀ + b, a_k = in_k + T(in_k W_dᵀ) W_uᵀ, in_k = H_k + a_(k−1)",
    paper="Wang et al. 2020, arXiv 2002.01808",
)
class KAdapter(Method):
    """width: w over d. heads: of the adapter's attention. inner: layers of each T. dropout: in T. sites: the states to
    read, `embed` or outputs of blocks; if not given, the paper's three."""

    opaque = True

    width: float = 0.75
    heads: int = 12
    inner: int = 2
    dropout: float = 0.1
    sites: tuple[str, ...] = ()

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        if writing and backbone.kind == "encoder-decoder":
            raise UsageError(
                f"kadapter changes what heads read, and {backbone.name} writes by a decoder that would read it too; "
                "take another method for an answer in text"
            )
        tower = "enc." if backbone.kind == "encoder-decoder" else ""
        L, d = len(backbone.blocks), backbone.hidden_size
        states = [f"{tower}embed", *(f"{tower}{i}" for i in range(L))]
        read = match(backbone.reader_sites, self.sites or dict.fromkeys(states[i] for i in (0, (L - 1) // 2, L - 1)))
        if wrong := [name for name in read if name not in states]:
            raise UsageError(f"kadapter reads the embeddings' and the blocks' outputs, and {wrong[0]} is neither")
        own = Method.start(replace(self, sites=tuple(read)), backbone, seed)  # type: ignore[type-var]
        return {"shared/W": torch.eye(d, 2 * d), "shared/b": torch.zeros(d)} | own

    def only(self, tensors: Mapping[str, Tensor]) -> Self:
        if "shared/W" not in tensors:
            raise UsageError(
                "kadapter's parts stand beside the blocks and read each other, so that no blocks can be chosen among "
                "them; take a selector of single numbers, such as snip"
            )
        return super().only(tensors)

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        d = site.width
        w = self.heads * int(self.width * d / self.heads)
        if w < 1:
            raise UsageError(
                f"kadapter: width = {self.width} of {d} features leaves none for each of {self.heads} heads; "
                "give fewer heads or more width"
            )

        def drawn(*shape: int, reads: int) -> Tensor:
            return torch.empty(shape).uniform_(-1 / math.sqrt(reads), 1 / math.sqrt(reads), generator=generator)

        p: Params = {
            "W_d": torch.empty(w, d).normal_(0, 0.0002, generator=generator),
            "b_d": torch.zeros(w),
            "W_u": torch.empty(d, w).normal_(0, 0.0002, generator=generator),
            "b_u": torch.zeros(d),
        }
        for n in range(self.inner):
            for name, width, reads in (("qkv", 3 * w, w), ("o", w, w), ("1", 4 * w, w), ("2", w, 4 * w)):
                p[f"T{n}.W_{name}"] = drawn(width, reads, reads=reads)
                p[f"T{n}.b_{name}"] = drawn(width, reads=reads)
            for norm in ("attn", "mlp"):
                p[f"T{n}.gain_{norm}"], p[f"T{n}.shift_{norm}"] = torch.ones(w), torch.zeros(w)
        return p

    def T(
        self, p: Params, n: int, z: Tensor, mask: Tensor, cache: Any = None, layer: int = 0, *, training: bool = False
    ) -> Tensor:
        """Layer n of a T on z [R, T, w]; `mask` [R, 1, T or 1, K] is added to scores. With a cache, K are all tokens so
        far, whose keys and values are in its layer of that number."""
        name, drop = f"T{n}.", self.dropout if training else 0.0

        def linear(map: str, x: Tensor) -> Tensor:
            return F.linear(x, p[f"{name}W_{map}"], p[f"{name}b_{map}"])

        def norm(which: str, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], p[f"{name}gain_{which}"], p[f"{name}shift_{which}"])

        parts = linear("qkv", z).chunk(3, -1)
        q, k, v = (t.reshape(*z.shape[:2], self.heads, -1).transpose(1, 2) for t in parts)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop).transpose(1, 2).flatten(2)
        z = norm("attn", z + F.dropout(linear("o", h), drop))
        return norm("mlp", z + F.dropout(linear("2", F.gelu(linear("1", z))), drop))

    def states(self, parts: Mapping[str, Params], H: Mapping[str, Tensor], seen: Seen, *, training: bool) -> Tensor:
        """[H_L; a_K] Wᵀ + b, from the parts' tensors by site and the states H that they read."""
        layer = seen.layer
        a: Tensor | None = None
        for name, p in parts.items():
            x = H[name] if a is None else H[name] + a
            z = F.linear(x, p["W_d"], p["b_d"])
            for n in range(self.inner):
                z = self.T(p, n, z, seen.mask, seen.cache, layer, training=training)
                layer += 1
            a = x + F.linear(z, p["W_u"], p["b_u"])
        assert a is not None
        return F.linear(torch.cat([seen.last, a], -1), p["W"], p["b"])

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        parts = on(backbone, at)

        def read(H: Mapping[str, Tensor], seen: Seen) -> Tensor:
            return self.states(parts, H, seen, training=training)

        with standing(backbone, parts, read):
            yield


@dataclass(frozen=True)
class Seen:
    """What stands beside a pass: its last states, what is added to scores, and its cache, in whose layers from `layer`
    on keys and values may be kept."""

    last: Tensor
    mask: Tensor
    cache: Any
    layer: int


def on(backbone: Backbone, at: Mapping[str, Params]) -> dict[str, Params]:
    """Tensors where and as the backbone computes, in the order of its sites."""
    return {
        name: {n: t.to(backbone.device, backbone.dtype) for n, t in at[name].items()}
        for name in backbone.sites
        if name in at
    }


@contextlib.contextmanager
def standing(
    backbone: Backbone, names: Iterable[str], read: Callable[[Mapping[str, Tensor], Seen], Tensor]
) -> Iterator[None]:
    """Have heads read `read` of the states at these sites in place of the last ones, in the passes within."""

    def after(_module: nn.Module, _args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        seen = Seen(
            out.last_hidden_state,
            _seen(backbone, kwargs["attention_mask"]),
            kwargs.get("past_key_values"),
            len(backbone.blocks),
        )
        out.last_hidden_state = read(H, seen)
        H.clear()
        return out

    with reading(backbone, names) as H:
        handle = backbone.reader.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextlib.contextmanager
def reading(backbone: Backbone, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What stands at these sites in the pass that runs, by name. An encoder-decoder refuses to write meanwhile: its
    decoder would read what is made of it."""
    H: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        site = backbone.sites[name]
        module = backbone.model.get_submodule(site.path)

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            H[name] = args[0]

        def after(_module: nn.Module, _args: Any, out: Any) -> None:
            H[name] = out[0] if isinstance(out, tuple) else out

        return (
            module.register_forward_pre_hook(before) if site.point == "input" else module.register_forward_hook(after)
        )

    handles = [hook(name) for name in names]
    if backbone.kind == "encoder-decoder":
        model: Any = backbone.model
        handles.append(model.get_decoder().register_forward_pre_hook(_refuse))
    try:
        yield H
    finally:
        for handle in handles:
            handle.remove()


def _seen(backbone: Backbone, mask: Any) -> Tensor:
    """What is added to scores [R, 1, T or 1, K] so that tokens see what they see in the backbone, from the mask that it
    was given."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        causal = backbone.kind == "decoder"
        mask = backbone.apart(mask) if causal else backbone.hiding(mask[:, None, None, :].bool())
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    found: Tensor = mask
    return found


def _refuse(_module: nn.Module, _args: Any) -> None:
    raise UsageError(
        "this changes what heads read, and cannot act where an encoder-decoder writes; ask for its head's answer"
    )
