"""Virtual tokens: PEFT keeps one table, `prompt_embeddings`, of what stands before each text.

| polytask                            | `prompt_embeddings`                                                         |
|-------------------------------------|-----------------------------------------------------------------------------|
| prompt `tokens/P` [n, d]            | PROMPT_TUNING: [n, d]                                                       |
| ptuning                             | PROMPT_TUNING: [n, d], what its network gives; PEFT keeps no more either    |
| prefix `3.attn.k/P`, `3.attn.v/P`   | PREFIX_TUNING: [n, 2 L width], each block's keys before its values, keys as |
|   [n, width] in each of L blocks    |   an attention keeps them: normed and turned to positions 0, 1, …           |

An encoder-decoder's prompt stands before what its encoder reads. PEFT stores a second one for the decoder there, and
never reads it. Its prefixes are in the decoder and polytask's in the encoder, so that they have nothing in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters.adapter import Adapter
from polytask.adapters.peft.layout import CONFIG, TENSORS, ModelLike, SiteLike, Written
from polytask.adapters.store import shown
from polytask.errors import PolytaskError, UsageError

TABLE = "prompt_embeddings"
METHODS = ("prompt", "ptuning", "prefix")
TYPES = {"PROMPT_TUNING": "prompt", "P_TUNING": "prompt", "PREFIX_TUNING": "prefix"}

# What PEFT's configs say that changes nothing about the finished table, or that is read below.
HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "inference_mode",
        "init_weights",
        "modules_to_save",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "peft_type",
        "peft_version",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "revision",
        "task_type",
        "token_dim",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    )
)


def written(adapter: Adapter, sites: Mapping[str, SiteLike], model: ModelLike | None) -> Written:
    """The table and the config of a prompt, a P-tuning or a prefix."""
    n = adapter.hyperparameters.get("n")
    table = (_prefix if adapter.method == "prefix" else _prompt)(adapter, n, sites, model)
    writes = "SEQ_2_SEQ_LM" if "enc.tokens" in sites else "CAUSAL_LM"
    text = adapter.head.text if adapter.head else adapter.card.task.kind == "generation"
    config = {
        "num_virtual_tokens": n,
        "num_transformer_submodules": 1,
        "num_layers": len(_blocks(sites)) or None,
        "task_type": writes if text else "FEATURE_EXTRACTION",  # without one PEFT leaves the virtual tokens out
    }
    return table._replace(config=config | table.config)


def _prompt(adapter: Adapter, n: object, sites: Mapping[str, SiteLike], model: ModelLike | None) -> Written:
    """The table [n, d], and what only this type's config says."""
    at, width = _tokens(sites)
    if adapter.sites != (at,):
        raise PolytaskError(f"{adapter.name}: PEFT has virtual tokens at {at}, not at {', '.join(adapter.sites)}")
    p = adapter.at(at)
    wanted = ("P",) if adapter.method == "prompt" else ("Z", "W1", "b1", "W2", "b2", "W3", "b3")
    if set(p) != set(wanted):
        raise PolytaskError(
            f"{adapter.name}: {at} has {', '.join(p)}, where {adapter.method} has {', '.join(wanted)}; it is damaged"
        )
    if adapter.method == "ptuning":
        h = F.relu(F.linear(p["Z"], p["W1"], p["b1"]))
        p = {"P": F.linear(F.relu(F.linear(h, p["W2"], p["b2"])), p["W3"], p["b3"])}
    if tuple(p["P"].shape) != (n, width):
        raise PolytaskError(f"{adapter.name}: its virtual tokens are {tuple(p['P'].shape)}, and not {(n, width)}")
    heads = model.heads if model else None
    config = {"peft_type": "PROMPT_TUNING", "token_dim": width, "num_attention_heads": heads}
    return Written({TABLE: p["P"].detach().cpu()}, config, adapter.method == "prompt")


def _prefix(adapter: Adapter, n: object, sites: Mapping[str, SiteLike], model: ModelLike | None) -> Written:
    """The table [n, 2 L width], and the same."""
    width = _width(adapter.name, sites)
    wanted = [f"{i}.attn.{x}" for i in _blocks(sites) for x in "kv"]
    if set(adapter.sites) != set(wanted):
        other = min(set(wanted) ^ set(adapter.sites))
        raise PolytaskError(
            f"{adapter.name}: PEFT has a prefix at the keys and values of every block and nowhere else; see {other}"
        )
    if model is None:
        raise UsageError(f"{adapter.name}: PEFT keeps keys as the model turns them; pass the backbone as model=")
    parts: list[Tensor] = []
    exact = True
    for name in wanted:
        P = adapter.at(name).get("P")
        if P is None or tuple(P.shape) != (n, width):
            raise PolytaskError(f"{adapter.name}: {name} has no P of the shape {(n, width)}; it is damaged")
        P = P.detach().cpu()
        parts.append(model.keys_kept(name, P) if name.endswith("k") else P)
        exact = exact and parts[-1].dtype == P.dtype and torch.equal(parts[-1], P)
    heads = width * model.heads // sites["0.attn.heads"].width
    config = {"peft_type": "PREFIX_TUNING", "token_dim": width, "num_attention_heads": heads}
    return Written({TABLE: torch.cat(parts, 1)}, config, exact)


def read(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sites: Mapping[str, SiteLike],
    model: ModelLike | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and hyperparameters of a folder of virtual tokens."""
    strange = next((name for name in tensors if name != TABLE), None)
    if strange is not None:
        raise PolytaskError(f"{folder}: tensor {shown(strange)} is no table of virtual tokens")
    if TABLE not in tensors:
        raise PolytaskError(f"{folder / TENSORS}: has no {TABLE}")
    table, n = tensors[TABLE], config.get("num_virtual_tokens")
    if not isinstance(n, int) or n < 1:
        raise PolytaskError(f"{folder / CONFIG}: num_virtual_tokens {n!r} is no number of virtual tokens")
    rows = n
    if TYPES[str(config["peft_type"]).upper()] == "prompt":
        at, width = _tokens(sites)
        if str(config.get("task_type")).endswith("SEQ_2_SEQ_LM"):
            rows *= 2 if config.get("num_transformer_submodules") == 2 else 1
        _check(folder, table, n, rows, width, f"the embeddings are {width} wide")
        return {f"{at}/P": table[:n].contiguous()}, {"n": n, "sites": ["tokens"]}
    width = _width(str(folder), sites)
    blocks = _blocks(sites)
    _check(folder, table, n, n, 2 * len(blocks) * width, f"{len(blocks)} blocks keep keys and values {width} wide")
    if model is None:
        raise UsageError(f"{folder}: PEFT keeps keys as the model turns them; pass the backbone as model=")
    learned = {}
    for i, part in zip(blocks, table.view(n, len(blocks), 2, width).unbind(1), strict=True):
        learned[f"{i}.attn.k/P"] = model.keys_put_out(f"{i}.attn.k", part[:, 0].contiguous())
        learned[f"{i}.attn.v/P"] = part[:, 1].contiguous()
    return learned, {"n": n, "sites": ["*.attn.k", "*.attn.v"]}


def note(config: Mapping[str, Any]) -> str:
    """What a reader should know of where a table came from."""
    if str(config["peft_type"]).upper() == "P_TUNING":
        return "a prompt out of PEFT's P_TUNING, which keeps what its network gives and not the network"
    if config.get("prefix_projection"):
        return "a prefix out of PEFT's PREFIX_TUNING, which keeps what its projection gives and not the projection"
    return ""


def _check(folder: Path, table: Tensor, n: int, rows: int, width: int, why: str) -> None:
    if tuple(table.shape) != (rows, width):
        raise PolytaskError(
            f"{folder}: {TABLE} has shape {tuple(table.shape)}, and not {(rows, width)}: {CONFIG} says {n} virtual "
            f"tokens, and {why}"
        )


def _tokens(sites: Mapping[str, SiteLike]) -> tuple[str, int]:
    """The site before which a prompt stands, and how wide it is."""
    at = next((name for name in ("enc.tokens", "tokens") if name in sites), None)
    if at is None:
        raise UsageError("these sites have no `tokens`, where a prompt stands; pass all sites of the backbone")
    return at, sites[at].width


def _blocks(sites: Mapping[str, SiteLike]) -> list[int]:
    """The blocks of a model with one stack."""
    return list(takewhile(lambda i: f"{i}.attn.k" in sites, count()))


def _width(who: str, sites: Mapping[str, SiteLike]) -> int:
    """How wide keys and values are."""
    if not _blocks(sites):
        raise UsageError(
            f"{who}: PEFT's prefixes are in an encoder-decoder's decoder and polytask's in its encoder, so none goes "
            "from one to the other"
        )
    return sites["0.attn.k"].width
