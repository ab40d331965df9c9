"""Bitune: a prompt is read twice, forwards and in both directions, and answers attend to a mixture of the two.

    K = (τ K_→ + |w_K| K_↔) / (τ + |w_K|),   V = (τ V_→ + |w_V| V_↔) / (τ + |w_V|)          in each block
    K_→, V_→ [n−1, d_kv]: keys and values of x₁ … x_{n−1}, with the causal mask and one LoRA
    K_↔, V_↔ [n−1, d_kv]: the same without a mask, with another LoRA

The prompt's last token x_n and the answer are read with the causal mask and the first LoRA, behind the mixed keys and
values. Kopiczko, Blankevoort, Asano 2024, arXiv 2405.14862. τ = 0.01, w_K = w_V = 0.01 in each block at first, so that
the two count alike and training does not start at the backbone; r = 8 and α = 1 on all linear maps, B = 0. Keys are
mixed as the attention keeps them, turned to their positions. The second LoRA is left out where nothing reads what it
does: in the last block beyond keys and values. Numbers: those of the LoRAs, and two for each block.

Reading costs two passes over the prompt, writing no more than one LoRA. With a head, the states of x₁ … x_{n−1} are
those of the causal pass, and only the last token's come from behind the mixture: pool that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from polytask.backbones import Backbone, Batch, Site
from polytask.errors import UsageError
from polytask.methods.lifting import Active, Plan
from polytask.methods.lora import LoRA
from polytask.methods.method import Method, Params, method


@method(
    "bitune",
    place="weights",
    equation="K ← (τ K_→ + |w| K_↔) / (τ + |w|), V alike",
    paper="Kopiczko et al. 2024, arXiv 2405.14862",
)
class Bitune(Method):
    """r: rank of both LoRAs. alpha: their scale's numerator. tau: what w is weighed against."""

    opaque = True
    elsewhere = True
    positional = True

    r: int = 8
    alpha: float = 1.0
    tau: float = 0.01
    sites: tuple[str, ...] = ("*.attn.[qkvo]", "*.mlp.[gud]*")

    @property
    def lora(self) -> LoRA:
        return LoRA.of({"r": self.r, "alpha": self.alpha})

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        if backbone.kind != "decoder":
            raise UsageError(f"bitune opens a decoder's causal mask, and {backbone.name} is an {backbone.kind}")
        last = len(backbone.blocks) - 1
        read = (f"{last}.attn.k/", f"{last}.attn.v/")
        own = {
            name: t
            for name, t in super().start(backbone, seed, writing=writing).items()
            if not (name.startswith(f"{last}.") and name.endswith("↔")) or name.startswith(read)
        }
        return own | {f"{i}/w_{c}": torch.full((1,), 0.01) for i in range(last + 1) for c in "KV"}

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        made = [(way, self.lora.init(site, generator, frozen)) for way in "→↔"]
        return {f"{name}{way}": t for way, p in made for name, t in p.items()}

    def only(self, tensors: Mapping[str, Tensor]) -> Self:
        return super().only({name: t for name, t in tensors.items() if not name.endswith(("/w_K", "/w_V"))})

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        reading = _Reading(self, backbone, at)
        base: Any = backbone.base
        vars(backbone)["hidden"], base.forward = reading.hidden, reading.forward
        try:
            yield
        finally:
            del vars(backbone)["hidden"], base.forward


class _Reading:
    """The passes of a backbone with an adapter's tensors."""

    def __init__(self, m: Bitune, backbone: Backbone, at: Mapping[str, Params]) -> None:
        self.tau, self.backbone, self.at = m.tau, backbone, at
        base: Any = backbone.base
        self.plain = base.forward
        self.plans = {}
        for way in "→↔":
            lora = {site: {n: p[n + way] for n in "AB"} for site, p in at.items() if "A" + way in p}
            self.plans[way] = Plan(backbone, [Active(m.lora, lora)])

    def hidden(self, batch: Batch, *, causal: bool | str = True) -> Tensor:
        """In place of `Backbone.hidden`."""
        if causal is not True:
            raise UsageError("bitune opens the causal mask where it has to be open; leave it as it is")
        return self.read(batch, DynamicCache())

    def forward(self, **given: Any) -> Any:
        """In place of the base model's own: its prompts are read, and what is written goes on from them."""
        ids, cache = given["input_ids"], given["past_key_values"]
        if cache.get_seq_length():
            with self.plans["→"].acting(torch.ones(len(ids), 1, device=ids.device)):
                return self.plain(**given)
        mask, number = given["attention_mask"], (given["position_ids"] == 0).cumsum(1)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            number = number * mask
        return BaseModelOutputWithPast(self.read(Batch(ids, number > 0, document=number), cache), cache)

    def read(self, batch: Batch, cache: DynamicCache) -> Tensor:
        """Last hidden states [R, T, d]; `cache` gets the keys and values that are attended to."""
        backbone = self.backbone
        number = batch.mask.long() if batch.document is None else batch.document
        _, left = batch.standing
        prompt = left > 0  # x₁ … x_{n−1}
        rest = batch.mask & ~prompt
        T = number.shape[1]
        same = number[:, None, :, None] == number[:, None, None, :]
        itself = torch.eye(T, dtype=torch.bool, device=number.device)
        open_mask = backbone.hiding((same & prompt[:, None, None, :]) | itself)
        _, both = self.run("↔", batch.ids, backbone._by_kind(open_mask), batch.positions)
        states, ahead = self.run("→", batch.ids, backbone.apart(number), batch.positions)
        mixed = DynamicCache()
        for i, (there, back) in enumerate(zip(ahead.layers, both.layers, strict=True)):
            p = self.at[str(i)]
            mixed.update(self.mix(p["w_K"], there.keys, back.keys), self.mix(p["w_V"], there.values, back.values), i)
        # What comes behind the prompts, side by side: of each row its columns, and which of them are its own.
        U = int(rest.sum(1).max())
        columns = rest.long().argsort(dim=1, descending=True, stable=True)[:, :U]
        own = rest.gather(1, columns)
        ids, positions = batch.ids.gather(1, columns), batch.positions.gather(1, columns)
        whose = number.gather(1, columns).masked_fill(~own, -1)
        far = positions[:, None, :, None] - torch.cat([batch.positions, positions], 1)[:, None, None, :]
        seen = whose[:, None, :, None] == torch.cat([number.masked_fill(~prompt, -2), whose], 1)[:, None, None, :]
        states_of_rest, _ = self.run("→", ids, self.near(seen & (far >= 0), far), positions, mixed)
        row, column = own.nonzero(as_tuple=True)
        where = columns[row, column]
        for i, layer in enumerate(mixed.layers):
            kept = (t[:, :, :T].transpose(1, 2) for t in (layer.keys, layer.values))
            new = (t[:, :, T:].transpose(1, 2)[row, column] for t in (layer.keys, layer.values))
            K, V = (k.index_put((row, where), n).transpose(1, 2) for k, n in zip(kept, new, strict=True))
            cache.update(K, V, i)
        return states.index_put((row, where), states_of_rest[row, column])

    def run(
        self, way: str, ids: Tensor, mask: Any, positions: Tensor, cache: DynamicCache | None = None
    ) -> tuple[Tensor, DynamicCache]:
        """A pass with one of the LoRAs: last hidden states, and the keys and values."""
        cache = DynamicCache() if cache is None else cache
        with self.plans[way].acting(torch.ones(len(ids), 1, device=ids.device)):
            out = self.plain(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        return out.last_hidden_state, cache

    def mix(self, w: Tensor, there: Tensor, back: Tensor) -> Tensor:
        τ, w = self.tau, w.float().abs()
        return ((τ * there.float() + w * back.float()) / (τ + w)).to(there.dtype)

    def near(self, seen: Tensor, far: Tensor) -> Any:
        """A mask by kind of layer where there are several; `far` is how far each key lies back."""
        kinds, window = self.backbone.windows
        masks = {kind: seen & (far < window) if window and kind == "sliding_attention" else seen for kind in kinds}
        if len(kinds) > 1:
            return {kind: self.backbone.hiding(mask) for kind, mask in masks.items()}
        if window is not None and kinds != {"full_attention"}:
            seen = seen & (far < window)
        return self.backbone.hiding(seen)
