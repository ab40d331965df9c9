"""Reprogramming: the symbols of a foreign alphabet are read as mixtures of the backbone's own words.

    e_t = θ[x_t] E          x_t a symbol of V_t, θ [V_t, V_s], E [V_s, d] the backbone's table of embeddings

Melnyk, Chenthamarakshan, Chen, Das, Dhurandhar, Padhi, Das 2022, arXiv 2210.07144, whose alphabet is that of proteins
and whose backbone is BERT. θ ~ N(0, 0.02²), as BERT's own maps begin, without a softmax: V_t V_s numbers, from which
nothing of what the symbols meant as letters is kept. θ E is a table of V_t rows and is worked out once.

Each character of `alphabet` is a symbol. `adapt` has texts read with spaces around them, so that each is a token (see
`HeadCard.alphabet`), and what is no symbol is read as ever. The paper's second map turns the logits of all V_s words
into those of V_t symbols, Γ W_lm h with Γ [V_t, V_s]. That is a linear map of h, as a task's head is, which is learned
in its place: with a label for each symbol a task of tags is the paper's filling in. So there are no answers in text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polytask.backbones import Backbone, Site
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, method

NEAR = 1e-4  # squared distance of a token's embedding to a symbol's, over the symbol's square; rounding is far below


@method("reprogram", place="tokens", equation="e_t ← θ[x_t] E", paper="Melnyk et al. 2022, arXiv 2210.07144")
class Reprogram(Method):
    """alphabet: the symbols, one character each, such as ACDEFGHIKLMNPQRSTVWY for proteins."""

    elsewhere = True

    alphabet: str = ""
    sites: tuple[str, ...] = ("tokens",)

    def __post_init__(self) -> None:
        if twice := [c for i, c in enumerate(self.alphabet) if c in self.alphabet[:i] or c.isspace()]:
            raise UsageError(f"reprogram: {twice[0]!r} in the alphabet is a space, or there twice")

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        if not self.alphabet:
            raise UsageError("reprogram needs an alphabet, as in --set alphabet=ACDEFGHIKLMNPQRSTVWY")
        if writing:
            raise UsageError("reprogram changes what is read and not what is written: have the task answered by a head")
        return super().start(backbone, seed)

    def frozen(self, backbone: Backbone, site: Site) -> Params:
        """E, and the tokens that symbols come as: `token` [F] is the symbol `symbol` [F], most in two forms, as a
        tokenizer has one for the beginning of a text and one for behind a space. Without a tokenizer, symbol s is
        token s."""
        if site.name.rpartition(".")[2] != "tokens":
            raise UsageError(f"reprogram acts at the site 'tokens', on token embeddings, and not at {site.name!r}")
        forms = {s: s for s in range(len(self.alphabet))} if backbone.tokenizer is None else self.forms(backbone)
        token, symbol = (torch.tensor([*part], device=backbone.device) for part in (forms, forms.values()))
        return {"E": backbone.linear(site)["E"], "token": token, "symbol": symbol}

    def forms(self, backbone: Backbone) -> dict[int, int]:
        """The symbol of each token. Raises UsageError for one that the backbone has no token for."""
        found: dict[int, int] = {}
        tokenizer: Any = backbone.tokenizer
        twice = tokenizer([f"{c} {c}" for c in self.alphabet], add_special_tokens=False)["input_ids"]
        for s, (c, ids) in enumerate(zip(self.alphabet, twice, strict=True)):
            if len(ids) != 2 or tokenizer.unk_token_id in ids:
                raise UsageError(f"reprogram: {c!r} is no token of {backbone.name}; write another letter for it")
            for token in ids:
                if found.setdefault(token, s) != s:
                    raise UsageError(f"reprogram: {self.alphabet[found[token]]!r} and {c!r} are one to {backbone.name}")
        return found

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        return {"θ": torch.empty(len(self.alphabet), len(frozen["E"])).normal_(0, 0.02, generator=generator)}

    def ready(self, p: Params, frozen: Params) -> Params:
        θ, E = p["θ"], frozen["E"]
        return {"θE": (θ @ E.to(θ.dtype))[frozen["symbol"]], "E": E[frozen["token"]]}

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        """A site shows what was looked up, and not for which token: a symbol is known by its row of E."""
        E, e = p["E"].float(), y.float()
        size = E.square().sum(-1)
        apart, f = (e.square().sum(-1, keepdim=True) + size - 2 * e @ E.T).min(-1)  # |e − E_f|² [T], the least
        return torch.where((apart <= NEAR * size[f])[:, None], p["θE"][f] - y, torch.zeros_like(y))
