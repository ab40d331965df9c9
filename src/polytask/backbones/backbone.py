"""A frozen pretrained model with named sites."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from polytask.adapters import BackboneCard
from polytask.backbones import families, keys
from polytask.backbones.batch import Batch, padded
from polytask.backbones.quantised import QUANTISED, quantising, whole
from polytask.backbones.site import Site
from polytask.backbones.weights import Precision, fingerprint, pick_device, pick_dtype
from polytask.errors import PolytaskError, UsageError

Ids = Sequence[int]


class Backbone:
    """A frozen Hugging Face model and its tokenizer.

    `model` is the Hugging Face module, in evaluation mode, without gradients, never changed. `headless`: its
    language-model head, if any, was drawn at random. `precision` says what its maps are kept in, `dtype` what is
    computed in. `sites` maps every site's name to where it is. `hidden` gives the last hidden states that a head reads.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        *,
        precision: Precision = "auto",
        device: str | torch.device = "auto",
        headless: bool = False,
    ) -> None:
        self.name = name
        self.headless = headless
        self.tokenizer = tokenizer
        self.kind = families.kind(model)
        self.family = families.family(model)
        self.device = pick_device(device)
        self.fingerprint = fingerprint(model)
        self.dtype = pick_dtype(precision, self.device)
        self.precision = precision if precision in QUANTISED else str(self.dtype).removeprefix("torch.")
        self.model = model.eval().requires_grad_(False)
        with quantising(model, precision, self.device, self.dtype):
            self.model.to(self.device)
            for parameter in self.model.parameters():  # and not the buffers: rotary frequencies have to stay in fp32
                parameter.data = parameter.data.to(self.dtype)
        self.sites: dict[str, Site] = families.sites(model)
        self.parameters = sum(p.numel() for p in self.base.parameters())
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.hidden_size: int = config.hidden_size
        if tokenizer is not None and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def writes(self) -> bool:
        """Whether it has a language-model head with weights of its own or its embeddings', and a causal decoder."""
        model: Any = self.model
        return self.kind != "encoder" and not self.headless and model.get_output_embeddings() is not None

    @property
    def tied(self) -> bool:
        """Whether its language-model head is its token embeddings."""
        model: Any = self.model
        return self.writes and model.get_output_embeddings().weight is model.get_input_embeddings().weight

    @property
    def base(self) -> nn.Module:
        """The model without its language-model head."""
        return getattr(self.model, "base_model", self.model)

    @property
    def reader(self) -> nn.Module:
        """The module whose last hidden states a head reads: the encoder of an encoder-decoder, else the base model."""
        if self.kind == "encoder-decoder":
            model: Any = self.model
            encoder: nn.Module = model.get_encoder()
            return encoder
        return self.base

    @cached_property
    def reader_sites(self) -> dict[str, Site]:
        """The sites that the reader passes through, so that a method trained with a head acts where it is felt."""
        if self.kind != "encoder-decoder":
            return self.sites
        return {name: site for name, site in self.sites.items() if name.startswith("enc.")}

    def sites_for(self, *, writing: bool) -> dict[str, Site]:
        """The sites that matter to an answer in text, or to one by a head."""
        return self.sites if writing else self.reader_sites

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The reader's blocks, front to back."""
        paths = families.blocks(self.model)
        return [self.model.get_submodule(path) for path in paths.get("", paths.get("enc", []))]

    @cached_property
    def places(self) -> dict[str, tuple[str, str]]:
        """Where each module of `base` stands, by its path: its block, `3` or `enc.3`, and the part of it: `attn`,
        `cross`, `mlp`, `norm`, or nothing for what is none of these. What is outside blocks is not there."""
        at = {id(module): path for path, module in self.base.named_modules()}
        part_of = {
            at[id(self.model.get_submodule(site.path))]: name.split(".")[-2]
            for name, site in self.sites.items()
            if site.point == "output"
        }
        for mixture in families.experts(self.model).values():
            part_of |= {at[id(module)]: "mlp" for module in self.model.get_submodule(mixture.mlp).modules()}
        found = {}
        for tower, paths in families.blocks(self.model).items():
            for i, path in enumerate(paths):
                block = self.model.get_submodule(path)
                for inner, module in block.named_modules():
                    where = at[id(module)]
                    norm = "norm" if "norm" in type(module).__name__.lower() else ""
                    found[where] = (f"{tower}.{i}" if tower else str(i), part_of.get(where, norm) if inner else "")
        return found

    @property
    def heads(self) -> int:
        """Query heads of an attention."""
        config: Any = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return int(config.num_attention_heads)

    @property
    def resumable(self) -> bool:
        """Whether a pass can begin at a later block: T5's and DeBERTa's blocks hand each other more than states."""
        return self.family not in ("t5", "mt5", "umt5", "deberta-v2")

    @property
    def packable(self) -> bool:
        """Whether several sequences may share a row: decoders, which take positions and masks for each token."""
        return self.kind == "decoder"

    @cached_property
    def rowless(self) -> frozenset[str]:
        """Sites whose modules also run on something that all rows share: with share_att_key (DeBERTa-v3), q and k
        project the relative positions [1, 2·buckets, d] too."""
        config: Any = self.model.config
        if self.family != "deberta-v2" or not getattr(config, "share_att_key", False):
            return frozenset()
        return frozenset(name for name in self.sites if name.endswith((".attn.q", ".attn.k")))

    @cached_property
    def max_length(self) -> int:
        """The longest sequence that the model's positions and its tokenizer allow, in tokens."""
        config: Any = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
        if self.family in ("roberta", "xlm-roberta", "camembert"):
            positions -= config.pad_token_id + 1
        given = getattr(self.tokenizer, "model_max_length", positions)
        return int(min(positions, given if given < 10**9 else positions))

    def card(self) -> BackboneCard:
        return BackboneCard(
            name=self.name,
            fingerprint=self.fingerprint,
            family=self.family,
            hidden_size=self.hidden_size,
            parameters=self.parameters,
        )

    def tokenize(self, texts: Sequence[str], pairs: Sequence[str] | None = None, limit: int = 256) -> list[list[int]]:
        """Token ids of each text (with its pair, where given), cut to `limit` tokens."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=True,
            max_length=min(limit, self.max_length),
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        fallback = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else 0
        return [row or [fallback] for row in ids]

    def tokenize_words(
        self, rows: Sequence[Sequence[str]], limit: int = 256
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of pre-split words, and for each word the position of its first token.

        A word that the tokenizer drops or that lies beyond `limit` has position -1.
        """
        if not rows:
            return [], []
        encoded = self.tokenizer(
            [list(row) for row in rows],
            is_split_into_words=True,
            truncation=True,
            max_length=min(limit, self.max_length),
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        starts: list[list[int]] = []
        for i, row in enumerate(rows):
            first = [-1] * len(row)
            for position, word in enumerate(encoded.word_ids(i)):
                if word is not None and first[word] < 0:
                    first[word] = position
            starts.append(first)
        return encoded["input_ids"], starts

    def tokenize_masked(
        self, texts: Sequence[str], pairs: Sequence[str] | None, masks: int, limit: int = 256
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of each text (with its pair, where given) with `masks` mask tokens behind the first text, cut to
        `limit` tokens, and the positions of the masks."""
        if not texts:
            return [], []
        encoded = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=True,
            max_length=min(limit, self.max_length) - masks,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        front = self.tokenizer("a").sequence_ids(0).index(0)  # tokens that the tokenizer puts before a text
        rows, places = [], []
        for i, ids in enumerate(encoded["input_ids"]):
            own = [position for position, text in enumerate(encoded.sequence_ids(i)) if text == 0]
            at = own[-1] + 1 if own else front
            rows.append([*ids[:at], *[self.tokenizer.mask_token_id] * masks, *ids[at:]])
            places.append([*range(at, at + masks)])
        return rows, places

    def pack(self, rows: Sequence[Sequence[Ids]]) -> Batch:
        """Several sequences side by side in each row, padded on the right: see `Batch.document`."""
        joined = self.collate([[token for ids in row for token in ids] for row in rows])
        document = torch.zeros_like(joined.ids, device="cpu")
        for r, row in enumerate(rows):
            at = 0
            for number, ids in enumerate(row, 1):
                document[r, at : at + len(ids)] = number
                at += len(ids)
        return replace(joined, document=document.to(self.device))

    def collate(self, rows: Sequence[Ids]) -> Batch:
        """Pad token ids on the right into one batch on the model's device, to a length that `padded` allows."""
        longest = min(padded(max(1, *map(len, rows))), self.max_length)
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
            mask[i, : len(row)] = True
        return Batch(ids.to(self.device), mask.to(self.device))

    def widened(self, batch: Batch, n: Tensor) -> tuple[Batch, Tensor, Tensor]:
        """Room for n [R] virtual tokens before each sequence of every row. Gives the batch; for each old column its new
        one [R, T]; and what stands where [R, T']: virtual token j as j ≥ 0, token t of a sequence as −1 − t.

        Raises PolytaskError where a sequence becomes longer than the model allows.
        """
        number = batch.mask.long() if batch.document is None else batch.document
        last = number.amax(1, keepdim=True)
        where = torch.arange(number.shape[1], device=n.device) + n[:, None] * torch.where(number > 0, number, last)
        longest = int((batch.mask.sum(1) + n * last[:, 0]).max())
        width = padded(longest)
        if batch.document is None and longest <= self.max_length:
            width = min(width, self.max_length)
        row, column = batch.mask.nonzero(as_tuple=True)
        found = torch.zeros(len(n), width, dtype=torch.long, device=n.device)
        found[row, where[row, column]] = number[row, column]
        # What is left of a sequence and of no other belongs to it: the next number to the right.
        ahead = torch.arange(width, device=n.device).expand_as(found).masked_fill(found == 0, width)
        ahead = ahead.flip(1).cummin(1).values.flip(1)
        document = torch.nn.functional.pad(found, (0, 1)).gather(1, ahead)
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        # Virtual tokens are looked up as some other token: RoBERTa counts the positions of what is no padding.
        ids = torch.full_like(found, 1 if pad == 0 else 0).masked_fill(document == 0, pad)
        ids[row, where[row, column]] = batch.ids[row, column]
        wide = replace(batch, ids=ids, mask=document > 0, document=None if batch.document is None else document)
        if batch.asked is not None:
            wide = replace(wide, asked=wide.mask.index_put((row, where[row, column]), batch.asked[row, column]))
        places = wide.positions
        if int(places[wide.mask].max()) >= self.max_length:
            raise PolytaskError(
                f"{int(n.max())} virtual tokens and a text of {int(batch.positions[batch.mask].max()) + 1} are more "
                f"than the {self.max_length} that {self.name} reads; cut the text, or use fewer virtual tokens"
            )
        return wide, where.clamp(max=width - 1), torch.where(places < n[:, None], places, n[:, None] - places - 1)

    def hidden(self, batch: Batch, *, causal: bool | str = True) -> Tensor:
        """Last hidden states [R, T, d] of a batch, in the model's dtype; the decoder's [R, U, d] if there is `written`.

        `causal=False` drops a decoder's causal mask, so that every token sees the whole text (LS-unLLaMA: Li et al.
        2023, arXiv 2310.01208); a text such as "0011" drops it in some blocks: see `opened`. An encoder has none.
        Values at padded positions mean nothing.
        """
        mask: Any = batch.mask.long()
        options: dict[str, Any] = {}
        opening: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.kind == "decoder":
            options["use_cache"] = False
            if batch.document is not None:
                options["position_ids"] = batch.positions
            opened = self.opened(causal)
            if all(opened):
                mask = self._by_kind(self._open_mask(batch))
            elif any(opened):
                mask = self.apart(mask if batch.document is None else batch.document)
                opening = self._opening([i for i, open_ in enumerate(opened) if open_], mask, self._open_mask(batch))
            elif batch.document is not None:
                mask = self.apart(batch.document)
        with self._begin(batch), opening:
            out = self.reader(input_ids=batch.ids, attention_mask=mask, **options)
        if batch.written is not None:
            model: Any = self.model
            out = model.get_decoder()(
                input_ids=batch.written,
                encoder_hidden_states=out.last_hidden_state,
                encoder_attention_mask=mask,
                use_cache=False,
            )
        states: Tensor = out.last_hidden_state
        return states

    def opened(self, causal: bool | str) -> list[bool]:
        """Which blocks have no causal mask, front to back.

        A text of m digits stands for m groups of blocks, as equal as can be, the lowest first: 1 where the mask is
        dropped, 0 where it stays (layer-wise removal: Dukić & Šnajder 2024, arXiv 2401.14556, with m = 4).
        """
        n = len(self.blocks)
        if isinstance(causal, bool):
            return [not causal] * n
        return [causal[i * len(causal) // n] == "1" for i in range(n)]

    def upto(self, batch: Batch, block: int, *, causal: bool | str = True) -> Tensor:
        """What block number `block` reads [R, T, d]: the part of a pass that adapters above it share."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        handle = self.blocks[block].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_Reached):
                self.hidden(batch, causal=causal)
        finally:
            handle.remove()
        return found[0]

    def passing(self, batch: Batch, block: int) -> tuple[Tensor, Tensor]:
        """What block number `block` reads and the last hidden states, [R, T, d] each."""
        found: list[Tensor] = []

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        handle = self.blocks[block].register_forward_pre_hook(look, with_kwargs=True)
        try:
            last = self.hidden(batch)
        finally:
            handle.remove()
        return found[0], last

    @contextlib.contextmanager
    def _begin(self, batch: Batch) -> Iterator[None]:
        """Let the blocks before `batch.start` pass their input through, and give that block the cached states."""
        if batch.states is None:
            yield
            return
        states = batch.states

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        skipped = self.blocks[: batch.start]
        handle = self.blocks[batch.start].register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        for block in skipped:
            block.forward = _pass
        try:
            yield
        finally:
            handle.remove()
            for block in skipped:
                del block.forward

    @contextlib.contextmanager
    def _opening(self, blocks: Sequence[int], masks: Any, open_mask: Tensor) -> Iterator[None]:
        """Give these blocks the open mask in place of the one of `masks` that the model hands to them."""
        closed = list(masks.values()) if isinstance(masks, dict) else [masks]

        def given(value: Any) -> Any:
            return open_mask if any(value is mask for mask in closed) else value

        def swap(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return tuple(map(given, args)), {name: given(value) for name, value in kwargs.items()}

        handles = [self.blocks[i].register_forward_pre_hook(swap, with_kwargs=True) for i in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keys_kept(self, name: str, K: Tensor) -> Tensor:
        """What the attention of the site `3.attn.k` keeps of keys K [n, width] at positions 0 to n − 1: see `keys`."""
        return keys.kept(self, name, K)

    def keys_put_out(self, name: str, kept: Tensor) -> Tensor:
        """The K [n, width] of which it keeps this."""
        return keys.put_out(self, name, kept)

    def linear(self, site: Site) -> dict[str, Tensor]:
        """The weight W [width, reads] and bias b [width] (or a single 0) of the linear map whose output a site is.

        Of `tokens`, the table E [vocabulary, width] that is looked up. Raises UsageError at any other site.
        """
        module: Any = self.model.get_submodule(site.path)
        if isinstance(module, nn.Embedding):
            scale: Any = getattr(module, "embed_scale", None)  # Gemma, BART
            return {"E": module.weight.detach() if scale is None else module.weight.detach() * scale}
        if site.point != "output":
            raise UsageError(f"site {site.name} is not the output of a linear map, so it has no weight to read")
        W, b = module.weight, module.bias
        if not isinstance(module, nn.Linear):  # transformers' Conv1D keeps it the other way round
            W = W.T
        if site.part is not None:
            W, b = site.part.take(W.T).T, None if b is None else site.part.take(b)
        return {"W": W.detach(), "b": W.new_zeros(()) if b is None else b.detach()}

    def weights_read(self, *, writing: bool = False) -> list[tuple[str, str, nn.Parameter]]:
        """(module path in `base`, parameter name, parameter) of every weight that the hidden states depend on, the
        decoder's too where an encoder-decoder is `writing`.

        A weight that stands in several places (tied embeddings) is listed once, one that is read to no effect (BERT's
        pooler) not at all. Found by walking the graph of a pass over two tokens.
        """
        named = dict(self.base.named_parameters())
        for parameter in named.values():
            parameter.requires_grad_()
        try:
            with torch.enable_grad():
                ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
                written = ids if writing and self.kind == "encoder-decoder" else None
                out = self.hidden(Batch(ids, self._ones(1, 2), written=written))
        finally:
            for parameter in named.values():
                parameter.requires_grad_(False)
        reached: set[int] = set()
        seen: set[Any] = set()
        ahead: list[Any] = [out.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            ahead += [after for after, _ in node.next_functions]
        return [(*_split(name), parameter) for name, parameter in named.items() if id(parameter) in reached]

    @contextlib.contextmanager
    def weights_changed(self, differences: Mapping[tuple[str, str], Tensor]) -> Iterator[None]:
        """Run with θ + Δθ for the named (module path in `base`, parameter name), wherever θ stands; θ stays untouched.

        The sum is taken in fp32 and rounded to the model's dtype once; a quantised θ is what it stands for.
        """
        originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for (path, name), difference in differences.items():
                θ = self.base.get_submodule(path)._parameters[name]
                assert θ is not None
                changed = (whole(θ).float() + difference).to(θ.dtype)
                for module, where in self._places[id(θ)]:
                    originals.append((module, where, θ))
                    module._parameters[where] = changed  # type: ignore[assignment]
            yield
        finally:
            for module, where, θ in originals:
                module._parameters[where] = θ

    @cached_property
    def _places(self) -> dict[int, list[tuple[nn.Module, str]]]:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module, name))
        return places

    def _ones(self, R: int, T: int) -> Tensor:
        return torch.ones((R, T), dtype=torch.bool, device=self.device)

    def _open_mask(self, batch: Batch) -> Tensor:
        """An additive mask [R, 1, T, T] that hides padding, other sequences of the row, and nothing else."""
        if batch.document is None:
            return self.hiding(batch.mask[:, None, None, :].expand(-1, 1, batch.mask.shape[1], -1))
        return self.hiding(batch.document[:, None, :, None] == batch.document[:, None, None, :])

    def _by_kind(self, mask: Tensor) -> Any:
        """The same mask for every kind of layer, where there are several."""
        kinds, _ = self.windows
        return dict.fromkeys(kinds | {"full_attention"}, mask) if len(kinds) > 1 else mask

    def apart(self, document: Tensor) -> Any:
        """The additive mask of rows that several sequences share (see `Batch`), by kind of layer where there are
        several: [R, 1, T, T]."""
        T = document.shape[1]
        column = torch.arange(T, device=document.device)
        same = (document[:, None, :, None] == document[:, None, None, :]) & (column[:, None] >= column)
        kinds, window = self.windows
        near = same if window is None else same & (column[:, None] - column < window)
        if len(kinds) > 1:
            return {kind: self.hiding(near if kind == "sliding_attention" else same) for kind in kinds}
        return self.hiding(same if kinds == {"full_attention"} else near)

    def hiding(self, seen: Tensor) -> Tensor:
        """A bool mask as what is added to attention scores: 0 where seen, the least number elsewhere."""
        hidden = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return hidden.masked_fill_(~seen, torch.finfo(self.dtype).min)

    @cached_property
    def windows(self) -> tuple[set[str], int | None]:
        """The kinds of the model's attention layers, where its config names them, and how far those that slide see."""
        config: Any = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)


def _split(name: str) -> tuple[str, str]:
    """A parameter's name as its module's path and its name there."""
    path, _, last = name.rpartition(".")
    return path, last


class _Reached(Exception):
    """The pass has reached the block that was asked for."""


def _pass(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden_states
