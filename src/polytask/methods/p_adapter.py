"""P-Adapter: a small recurrent network rewrites the text's embeddings before the first block reads them.

    E′_t = W [h→_t; h←_t] + b,   h = BiLSTM₂(E)          E, E′ [T, d], h→ and h← [T, d/2], W [d, d], b [d]

Newman, Choubey, Rajani 2021, arXiv 2110.07280: the network learns, over many wordings of a question, to make one
question of them. BiLSTM₂ has two layers and runs over a sequence's own tokens, without padding and without its
neighbours in a row; E are token embeddings without positions, which the model adds as ever. 12 d² + 16 d numbers, and
d² + d of the map. All are drawn from U(±1/√reads), as torch's layers begin, so training starts far from the backbone:
nothing of E is kept but what passes the network. The paper's variants that copy the embeddings of the mask or of the
subject back are left out.

A prompt is rewritten before its answer is there: on decoders the answer's tokens are no part of what the network reads
and keep their embeddings. In an encoder-decoder it stands before the encoder.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from polytask.backbones import Backbone, Batch, Site
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method


@method(
    "p_adapter",
    place="tokens",
    equation="E ← W BiLSTM(E) + b",
    paper="Newman et al. 2021, arXiv 2110.07280",
)
class PAdapter(Method):
    """No hyperparameters: all sizes are those of the embeddings."""

    opaque = True
    elsewhere = True
    positional = True

    sites: tuple[str, ...] = ("tokens",)

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        return super().start(backbone, seed)  # an encoder-decoder's decoder is left alone

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        wanted(self, site)
        d = site.width
        p = {n: drawn(t.shape, d // 2, generator) for n, t in bilstm(d).named_parameters()}
        return p | {"W": drawn((d, d), d, generator), "b": drawn((d,), d, generator)}

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        [(where, p)] = at.items()
        with rewriting(backbone, where, lambda E: [read @ p["W"].T + p["b"] for read in states(p, E)]):
            yield


def wanted(m: Method, site: Site) -> None:
    """Raise UsageError at a site that is not the table of token embeddings."""
    if site.name.rpartition(".")[2] != "tokens":
        raise UsageError(f"{m.name} acts at the site 'tokens', on token embeddings, and not at {site.name!r}")


def drawn(shape: Any, reads: int, generator: torch.Generator) -> Tensor:
    """U(±1/√reads)."""
    bound = 1 / math.sqrt(reads)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def bilstm(d: int) -> nn.LSTM:
    """The network without its numbers: two layers, d features in and d out, half of them from each direction."""
    return nn.LSTM(d, d // 2, num_layers=2, bidirectional=True, device="meta")


def states(p: Params, E: list[Tensor]) -> list[Tensor]:
    """h [T, d] of each sequence [T, d], with the network's own numbers among `p`, in their precision."""
    net = bilstm(E[0].shape[1])
    own = {n: p[n] for n, _ in net.named_parameters()}
    dtype = own["weight_ih_l0"].dtype
    packed = pack_sequence([e.to(dtype) for e in E], enforce_sorted=False)
    h, _ = torch.func.functional_call(net, own, (packed,))
    return nn.utils.rnn.unpack_sequence(h)


@contextlib.contextmanager
def rewriting(
    backbone: Backbone, where: str, rewrite: Callable[[list[Tensor]], list[Tensor]], room: int = 0
) -> Iterator[None]:
    """With `rewrite` of the sequences' embeddings, a list of [T, d], in their places wherever the reader looks up
    tokens. The first `room` of each are virtual tokens: no more than these is padding."""
    masks: list[Any] = []
    asked: list[Tensor | None] = []
    plain = backbone.hidden

    def hidden(batch: Batch, *, causal: bool | str = True) -> Tensor:
        asked[:] = [batch.asked]
        return plain(batch, causal=causal)

    def begin(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():  # a prompt, and not a token that is written
            masks[:] = [kwargs["attention_mask"]]

    def look_up(_module: nn.Module, _args: Any, E: Tensor) -> Tensor | None:
        if not masks:  # T5's decoder, whose table is its encoder's
            return None
        spans = sequences(masks.pop())
        if asked and (prompt := asked.pop()) is not None:
            spans = [(r, i, i + int(prompt[r, i:j].sum())) for r, i, j in spans]
        spans = [(r, i, j) for r, i, j in spans if j - i > room]
        new = rewrite([E[r, i:j] for r, i, j in spans])
        row = torch.cat([torch.full((j - i,), r) for r, i, j in spans]).to(E.device)
        column = torch.cat([torch.arange(i, j) for _, i, j in spans]).to(E.device)
        return E.index_put((row, column), torch.cat(new).to(E.dtype))

    handles = [
        backbone.reader.register_forward_pre_hook(begin, with_kwargs=True),
        backbone.model.get_submodule(backbone.sites[where].path).register_forward_hook(look_up),
    ]
    vars(backbone)["hidden"] = hidden
    try:
        yield
    finally:
        del vars(backbone)["hidden"]
        for handle in handles:
            handle.remove()


def sequences(mask: Any) -> list[tuple[int, int, int]]:
    """(row, first column, column behind the last) of each sequence, from what the backbone hands to the model: a mask
    [R, T] of what is real, or one that is added to scores, [R, 1, T, T], by kind of layer where there are several. A
    token sees itself where it is real, and the one before it where that is of its sequence."""
    seen = next(iter(mask.values())) if isinstance(mask, dict) else mask
    if seen.ndim == 2:
        real = seen > 0
        first = torch.zeros_like(real)
    else:
        real = seen[:, 0].diagonal(dim1=1, dim2=2) == 0
        first = nn.functional.pad(seen[:, 0].diagonal(-1, dim1=1, dim2=2) != 0, (1, 0))
    before = nn.functional.pad(real[:, :-1], (1, 0))
    after = nn.functional.pad(real[:, 1:] & ~first[:, 1:], (0, 1))
    begins = (real & (first | ~before)).nonzero().tolist()
    ends = (real & ~after).nonzero().tolist()
    return [(r, i, j + 1) for (r, i), (_, j) in zip(begins, ends, strict=True)]
