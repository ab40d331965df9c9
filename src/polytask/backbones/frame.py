"""Language models as they write: next-token logits, and the keys and values of rows that come and go.

A `Frame` holds S rows flush right: every row's next token goes to the same column `end`, whatever the row's length, so
that a step stores all rows by one slice, and rows can join and leave between steps. What lies left of a row's first
token is hidden from it.

    row 0   ·  ·  ·  x₀ x₁ x₂ | end
    row 1   x₀ x₁ x₂ x₃ x₄ x₅ | end
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from polytask.backbones.backbone import Backbone
from polytask.backbones.batch import Batch
from polytask.backbones.lean import Change, Lean
from polytask.errors import UsageError

ROOM = 64  # columns that a full frame grows by, at least

KeysValues = list[tuple[Tensor, Tensor]]  # of each block: [rows, heads, columns, width of a head]


def unembed(backbone: Backbone, hidden: Tensor) -> Tensor:
    """Next-token logits [..., vocabulary], fp32, from last hidden states [..., d].

    Raises UsageError for a backbone without a language-model head.
    """
    model: Any = backbone.model
    if not backbone.writes:
        raise UsageError(f"{backbone.name} has no language-model head, so it cannot write; name a decoder")
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    if config.tie_word_embeddings if backbone.family == "umt5" else getattr(config, "scale_decoder_outputs", False):
        hidden = hidden * model.model_dim**-0.5  # T5 with tied embeddings
    logits: Tensor = head(hidden).float()
    if hasattr(model, "final_logits_bias"):  # BART
        logits = logits + model.final_logits_bias[0].float()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass
class Read:
    """n prompts that have been read: what a frame needs to go on writing. `hidden` [n, d] predicts each next token;
    prompt i's keys and values stand in row `rows[i]` of the cache, from column `starts[i]` on."""

    hidden: Tensor
    rows: Tensor
    starts: Tensor
    lengths: Tensor
    cache: KeysValues
    cross: KeysValues
    cross_mask: Tensor | None = None


def read(backbone: Backbone, batch: Batch) -> Read:
    """Read prompts, row by row or several in a row; an encoder-decoder also writes its start token."""
    model: Any = backbone.model
    if backbone.kind == "encoder-decoder":
        seen = batch.mask.long()
        states = model.get_encoder()(input_ids=batch.ids, attention_mask=seen).last_hidden_state
        both = EncoderDecoderCache(DynamicCache(), DynamicCache())
        R = len(batch.ids)
        start = torch.full((R, 1), start_token(backbone), device=batch.ids.device)
        out = model.get_decoder()(
            input_ids=start,
            encoder_hidden_states=states,
            encoder_attention_mask=seen,
            past_key_values=both,
            use_cache=True,
        )
        rows = torch.arange(R, device=batch.ids.device)
        own, cross = _tensors(both.self_attention_cache), _tensors(both.cross_attention_cache)
        return Read(
            out.last_hidden_state[:, -1], rows, torch.zeros_like(rows), torch.ones_like(rows), own, cross, batch.mask
        )
    cache = DynamicCache()
    positions = batch.positions
    out = backbone.base(
        input_ids=batch.ids,
        attention_mask=batch.mask.long() if batch.document is None else backbone.apart(batch.document),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    document = batch.mask.long() if batch.document is None else batch.document
    last = F.pad(document[:, 1:] != document[:, :-1], (0, 1), value=True) & (document > 0)
    rows, ends = last.nonzero(as_tuple=True)
    lengths = positions[rows, ends] + 1
    return Read(out.last_hidden_state[rows, ends], rows, ends + 1 - lengths, lengths, _tensors(cache), [])


def start_token(backbone: Backbone) -> int:
    """The token that an encoder-decoder's answers begin with."""
    config: Any = backbone.model.config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        if (token := getattr(config, name, None)) is not None:
            return int(token)
    raise UsageError(f"{backbone.name}: its config names no decoder_start_token_id")


def _tensors(cache: Any) -> KeysValues:
    return [(layer.keys, layer.values) for layer in cache.layers]


class Frame:
    """Keys and values of S rows, and the step that writes one token of each."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._lean = Lean(backbone) if Lean.fits(backbone) else None
        self.end = 0
        self.start = torch.empty(0, dtype=torch.long, device=backbone.device)  # [S], each row's first column
        self._layers: list[_Layer] = []
        self._cross: KeysValues = []
        self._cross_mask: Tensor | None = None
        self._hiding = torch.empty(0, 1, 1, 0)  # [S, 1, 1, columns], added to attention scores

    @property
    def rows(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row [S] so far."""
        return self.end - self.start

    def keep(self, index: Tensor) -> None:
        """Go on with the rows at `index` [n] int64, in that order; a row may be named twice."""
        self.start = self.start[index]
        for layer in self._layers:
            layer.room_k, layer.room_v = layer.room_k[index], layer.room_v[index]
        self._cross = [(k[index], v[index]) for k, v in self._cross]
        if self._cross_mask is not None:
            self._cross_mask = self._cross_mask[index]
        self._lay()

    def join(self, new: Read) -> None:
        """Add rows that have been read, behind those that are here."""
        self._lay(int(new.lengths.max()))
        end = self.end
        source = torch.arange(end, device=new.lengths.device) - (end - new.lengths)[:, None]  # column → token, [n, end]
        hidden = source < 0
        source = source.clamp(min=0) + new.starts[:, None]

        def flush(t: Tensor) -> Tensor:
            """[R, heads, T, D] → [n, heads, end, D]"""
            moved = t.transpose(1, 2)[new.rows[:, None], source].masked_fill(hidden[:, :, None, None], 0.0)
            return moved.transpose(1, 2)

        for number, (k, v) in enumerate(new.cache):
            if number == len(self._layers):
                self._layers.append(_Layer())
            self._layers[number].add(flush(k), flush(v), self._columns)
        self.start = torch.cat([self.start, end - new.lengths])
        if new.cross_mask is not None:
            self._join_cross(new.cross, new.cross_mask)
        self._lay()

    @torch.no_grad()
    def step(self, tokens: Tensor, changes: Mapping[str, Change] | None = None) -> Tensor:
        """Last hidden states [S, d] after each row's next token [S]. With the `changes` of the adapters that act
        (`Acting.changes`), a model of the right shape takes the lean way."""
        if self.end == self._columns:
            self._lay()
        positions = self.lengths[:, None]
        self.end += 1
        for layer in self._layers:
            layer.end = self.end
        mask = self._mask()
        if changes is not None and self._lean is not None:
            return self._lean.step(tokens, positions, self._layers, mask, changes)[:, -1]
        cache: Any = Cache(layers=list(self._layers))
        model: Any = self.backbone.model
        if self.backbone.kind != "encoder-decoder":
            out = self.backbone.base(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            states: Tensor = out.last_hidden_state
            return states[:, -1]
        assert self._cross_mask is not None
        cross: Any = Cache(layers=[_still(k, v) for k, v in self._cross])
        with _positions(model.get_decoder(), positions):
            out = model.get_decoder()(
                input_ids=tokens[:, None],
                attention_mask=mask,
                # Its keys and values are in the cache: only the shape is looked at.
                encoder_hidden_states=self._cross_mask[:, :, None].to(self.backbone.dtype),
                encoder_attention_mask=self._cross_mask.long(),
                past_key_values=EncoderDecoderCache(cache, cross),
                use_cache=True,
            )
        states = out.last_hidden_state
        return states[:, -1]

    @property
    def _columns(self) -> int:
        return self._hiding.shape[-1]

    def _lay(self, least: int = 0) -> None:
        """Move the rows to the left as far as there are columns that no row uses, or to where their next column is
        `least`; make room where there is none."""
        unused = int(self.start.min()) if self.rows else self.end
        end = max(least, self.end - unused)
        shift = end - self.end
        columns = self._columns if end < self._columns else end + max(ROOM, end // 2)
        for layer in self._layers:
            layer.move(self.end, shift, columns)
        self.start, self.end = self.start + shift, end
        hidden = torch.arange(columns, device=self.start.device) < self.start[:, None]
        self._hiding = torch.zeros((self.rows, 1, 1, columns), dtype=self.backbone.dtype, device=self.start.device)
        self._hiding.masked_fill_(hidden[:, None, None], torch.finfo(self.backbone.dtype).min)

    def _join_cross(self, cross: KeysValues, mask: Tensor) -> None:
        if self._cross_mask is None or not len(self._cross_mask):
            self._cross, self._cross_mask = cross, mask
            return
        width = max(mask.shape[1], self._cross_mask.shape[1])

        def both(old: Tensor, new: Tensor) -> Tensor:  # padded on the right along the axis of tokens
            return torch.cat([F.pad(t, (0, 0, 0, width - t.shape[2])) for t in (old, new)])

        self._cross = [
            (both(k, new_k), both(v, new_v)) for (k, v), (new_k, new_v) in zip(self._cross, cross, strict=True)
        ]
        self._cross_mask = torch.cat([F.pad(m, (0, width - m.shape[1])) for m in (self._cross_mask, mask)])

    def _mask(self) -> Any:
        """What each row's next token must not see, [S, 1, 1, end], by the kind of layer where there are several."""
        mask = self._hiding[..., : self.end]
        kinds, window = self.backbone.windows
        if not window or kinds == {"full_attention"}:
            return mask
        near = mask
        if self.end > window:
            near = mask.clone()
            near[..., : self.end - window] = torch.finfo(mask.dtype).min
        by_kind = {kind: near if kind == "sliding_attention" else mask for kind in kinds}
        return by_kind if len(kinds) > 1 else near


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One block's keys and values, with room to the right."""

    def __init__(self) -> None:
        super().__init__()
        self.room_k, self.room_v = torch.empty(0), torch.empty(0)
        self.end = 0
        self.is_initialized = True

    def add(self, k: Tensor, v: Tensor, columns: int) -> None:
        """Rows whose tokens are flush right; the rows that are here have been moved there already."""
        self.end = k.shape[2]
        k, v = (F.pad(t, (0, 0, 0, columns - t.shape[2])) for t in (k, v))
        self.room_k = torch.cat([self.room_k, k]) if self.room_k.numel() else k
        self.room_v = torch.cat([self.room_v, v]) if self.room_v.numel() else v

    def move(self, end: int, shift: int, columns: int) -> None:
        if not self.room_k.numel() or (not shift and columns == self.room_k.shape[2]):
            return
        self.room_k, self.room_v = (
            F.pad(t[:, :, max(0, -shift) : end], (0, 0, max(0, shift), columns - end - shift))
            for t in (self.room_k, self.room_v)
        )
        self.end = end + shift

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.room_k[:, :, self.end - 1] = key_states[:, :, 0]
        self.room_v[:, :, self.end - 1] = value_states[:, :, 0]
        return self.room_k[:, :, : self.end], self.room_v[:, :, : self.end]

    def get_seq_length(self) -> int:
        return self.end - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end - 1 + query_length, 0


def _still(keys: Tensor, values: Tensor) -> DynamicLayer:
    """An encoder's keys and values, which do not grow."""
    layer = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


@contextlib.contextmanager
def _positions(decoder: nn.Module, positions: Tensor) -> Iterator[None]:
    """Give BART's learned positions each row's own number [S, 1]: its decoder takes one for all rows."""
    learned = getattr(decoder, "embed_positions", None)
    if learned is None:
        yield
        return

    def own(module: Any, _args: Any, _out: Tensor) -> Tensor:
        return F.embedding(positions + module.offset, module.weight)

    handle = learned.register_forward_hook(own)
    try:
        yield
    finally:
        handle.remove()
