"""The table that maps a Hugging Face model family to site names, and the functions that read it.

Names run front to back: `tokens`, the embedding of each token by itself; `embed`, what the first block reads; in
block 3 `3.attn.q|k|v|heads|o`, `3.attn`, `3.mlp.gate|up|act|down`, `3.mlp`, `3.sum` and `3`; `head`. An encoder-decoder
has two stacks, `enc.` and `dec.`; its decoder adds `dec.3.cross.*`, and `head` is the decoder's. `gate` is there only
where the MLP is gated: mlp.act = act(gate) * up. A mixture of experts has the site `3.mlp` and none within it, because
no map of it is run on all tokens.

To add a family, add a row to `FAMILIES`: its `config.model_type`, and the modules that its stacks name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from polytask.backbones.site import Part, Site
from polytask.errors import PolytaskError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["encoder", "decoder", "encoder-decoder"]


@dataclass(frozen=True, slots=True)
class Attention:
    """The projections of one attention, as paths in the block.

    One path for q, k and v is a fused projection, which puts them out in this order: once for all heads, or, `by_head`,
    once in each head.
    """

    q: str
    k: str
    v: str
    o: str
    by_head: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A feed-forward network that is a mixture of experts, as paths.

    `router` puts out (logits [tokens, n], weights [tokens, k], which [tokens, k]): the experts that each token is sent
    to, and with which weights. The first axis of every parameter of `maps` is the n experts.
    """

    mlp: str
    router: str
    maps: str


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks one after another. `block`, `embed` and `head` are paths in the base model, the others in the block."""

    block: str  # with {i} for the block's number
    attn: Attention
    up: str
    down: str
    gate: str = ""  # the half that goes through the activation; the same path as `up`: fused, gate first
    experts: Experts | None = None  # of the blocks that have it, in place of gate, up and down
    cross: Attention | None = None
    norm: str = ""  # the norm that ends a post-norm block
    embed: str = ""  # its output is what the first block reads; empty: no module puts out just that
    head: str = ""  # its output is what a head reads; empty: the last block

    def inner(self, mixture: Experts | None) -> Iterator[str]:
        """The paths that a block must have."""
        for attention in filter(None, (self.attn, self.cross)):
            yield from (attention.q, attention.k, attention.v, attention.o)
        mlp = (mixture.mlp, mixture.router, mixture.maps) if mixture else (self.gate, self.up, self.down)
        yield from filter(None, (*mlp, self.norm))


@dataclass(frozen=True, slots=True)
class Family:
    """One row: its stacks by prefix. Of variants (T5 v1.1 is gated, T5 is not), the first that fits is used."""

    kind: Kind
    variants: tuple[dict[str, Stack], ...]


BERT = Stack(
    block="encoder.layer.{i}",
    attn=Attention("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
    embed="embeddings",
)
DISTILBERT = Stack(
    block="transformer.layer.{i}",
    attn=Attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    up="ffn.lin1",
    down="ffn.lin2",
    norm="output_layer_norm",
    embed="embeddings",
)
# With share_att_key (DeBERTa-v3), query_proj and key_proj run twice in a pass: on the hidden states, then on the
# relative positions [1, 2 * buckets, hidden]. With conv_kernel_size (v2-xlarge), a convolution stands behind block 0.
DEBERTA_V2 = replace(
    BERT,
    attn=Attention(
        "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj", "attention.output.dense"
    ),
)
MODERNBERT = Stack(
    block="layers.{i}",
    attn=Attention("attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo"),
    gate="mlp.Wi",  # transformers calls this half `input` and the other `gate`, but activates this one
    up="mlp.Wi",
    down="mlp.Wo",
    embed="embeddings",
    head="final_norm",
)
GPT2 = Stack(
    block="h.{i}",
    attn=Attention("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
    up="mlp.c_fc",
    down="mlp.c_proj",
    embed="drop",  # tokens and positions are added outside a module; the dropout is the first to see the sum
    head="ln_f",
)
GPT_NEOX = Stack(
    block="layers.{i}",
    attn=Attention(
        "attention.query_key_value",
        "attention.query_key_value",
        "attention.query_key_value",
        "attention.dense",
        by_head=True,
    ),
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    embed="emb_dropout",
    head="final_layer_norm",
)
# Also Gemma, whose embed_tokens scales by itself. Gemma and OLMo 2 norm what `attn` and `mlp` put out before they add
# it. Qwen 3, Gemma 3 and OLMo 2 norm q and k behind these sites.
LLAMA = Stack(
    block="layers.{i}",
    attn=Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    embed="embed_tokens",
    head="norm",
)
PHI3 = replace(
    LLAMA,
    attn=Attention("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj"),
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
)
# OLMoE norms q and k behind these sites, as Qwen 3 does. In Qwen 3 some blocks may be without experts.
MIXTRAL = replace(LLAMA, experts=Experts("mlp", router="mlp.gate", maps="mlp.experts"))
# `embed` is left out: images are put between embed_tokens and the first block.
GEMMA3 = replace(LLAMA, block="language_model.layers.{i}", embed="", head="language_model.norm")

# `embed` is left out: the stack's dropout runs twice, and resize_token_embeddings makes both embed_tokens one module.
T5_ENCODER = Stack(
    block="encoder.block.{i}",
    attn=Attention(
        "layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.0.SelfAttention.o"
    ),
    up="layer.1.DenseReluDense.wi",
    down="layer.1.DenseReluDense.wo",
    head="encoder.final_layer_norm",
)
T5_DECODER = replace(
    T5_ENCODER,
    block="decoder.block.{i}",
    cross=Attention(
        "layer.1.EncDecAttention.q",
        "layer.1.EncDecAttention.k",
        "layer.1.EncDecAttention.v",
        "layer.1.EncDecAttention.o",
    ),
    up="layer.2.DenseReluDense.wi",
    down="layer.2.DenseReluDense.wo",
    head="decoder.final_layer_norm",
)
T5_GATED_ENCODER = replace(T5_ENCODER, gate="layer.1.DenseReluDense.wi_0", up="layer.1.DenseReluDense.wi_1")
T5_GATED_DECODER = replace(T5_DECODER, gate="layer.2.DenseReluDense.wi_0", up="layer.2.DenseReluDense.wi_1")

BART_ENCODER = Stack(
    block="encoder.layers.{i}",
    attn=Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    up="fc1",
    down="fc2",
    norm="final_layer_norm",
    embed="encoder.layernorm_embedding",
)
BART_DECODER = replace(
    BART_ENCODER,
    block="decoder.layers.{i}",
    cross=Attention("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj", "encoder_attn.out_proj"),
    embed="decoder.layernorm_embedding",
)
# mBART keeps BART's names but norms before each sublayer, so that its final_layer_norm does not end the block.
MBART_ENCODER = replace(BART_ENCODER, norm="", head="encoder.layer_norm")
MBART_DECODER = replace(BART_DECODER, norm="", head="decoder.layer_norm")

T5 = Family(
    "encoder-decoder",
    ({"enc": T5_ENCODER, "dec": T5_DECODER}, {"enc": T5_GATED_ENCODER, "dec": T5_GATED_DECODER}),
)

FAMILIES: dict[str, Family] = {
    "bert": Family("encoder", ({"": BERT},)),
    "roberta": Family("encoder", ({"": BERT},)),
    "xlm-roberta": Family("encoder", ({"": BERT},)),
    "camembert": Family("encoder", ({"": BERT},)),
    # The projection is there only where embeddings are narrower than the blocks.
    "electra": Family("encoder", ({"": replace(BERT, embed="embeddings_project")}, {"": BERT})),
    "distilbert": Family("encoder", ({"": DISTILBERT},)),
    "deberta-v2": Family("encoder", ({"": DEBERTA_V2},)),
    "modernbert": Family("encoder", ({"": MODERNBERT},)),
    "gpt2": Family("decoder", ({"": GPT2},)),
    "gpt_neox": Family("decoder", ({"": GPT_NEOX},)),
    "llama": Family("decoder", ({"": LLAMA},)),
    "mistral": Family("decoder", ({"": LLAMA},)),
    "qwen2": Family("decoder", ({"": LLAMA},)),
    "qwen3": Family("decoder", ({"": LLAMA},)),
    "gemma2": Family("decoder", ({"": LLAMA},)),
    "gemma3_text": Family("decoder", ({"": LLAMA},)),
    "gemma3": Family("decoder", ({"": GEMMA3},)),
    "phi3": Family("decoder", ({"": PHI3},)),
    "olmo2": Family("decoder", ({"": LLAMA},)),
    "mixtral": Family("decoder", ({"": MIXTRAL},)),
    "qwen3_moe": Family("decoder", ({"": MIXTRAL},)),
    "olmoe": Family("decoder", ({"": MIXTRAL},)),
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "bart": Family("encoder-decoder", ({"enc": BART_ENCODER, "dec": BART_DECODER},)),
    "mbart": Family("encoder-decoder", ({"enc": MBART_ENCODER, "dec": MBART_DECODER},)),
}


def family(model: PreTrainedModel) -> str:
    """The name of the model's row. Raises PolytaskError where the table has none."""
    name = str(model.config.model_type)
    if name not in FAMILIES:
        raise PolytaskError(
            f"no site names for models of type {name!r}: add a row to FAMILIES in {__file__} that names block, attn "
            f"(q, k, v, o), up, down and, where the model has them, gate, experts, cross, norm, embed, head; "
            f"in this model, these look like blocks: {_blocklike(model.base_model)}"
        )
    return name


def kind(model: PreTrainedModel) -> Kind:
    """What the model's attention is, which may differ from its family's: EmbeddingGemma is an encoder."""
    row = FAMILIES[family(model)]
    config = model.config.get_text_config()
    if row.kind == "encoder" and getattr(config, "is_decoder", False):
        return "decoder"
    if row.kind == "decoder" and getattr(config, "use_bidirectional_attention", False):
        return "encoder"
    return row.kind


def blocks(model: PreTrainedModel) -> dict[str, list[str]]:
    """The paths of the blocks, front to back: {"": [...]}, or {"enc": [...], "dec": [...]}."""
    root = _root(model)
    return {
        prefix: [root + path for path in _block_paths(model.base_model, stack)]
        for prefix, stack in _stacks(model).items()
    }


def experts(model: PreTrainedModel) -> dict[str, Experts]:
    """The mixtures of experts by the name of their block; paths are relative to `model`."""
    root = _root(model)
    found: dict[str, Experts] = {}
    for prefix, stack in _stacks(model).items():
        for i, path in enumerate(_block_paths(model.base_model, stack)):
            if mixture := _mixture(model.base_model, path, stack):
                parts = (f"{root}{path}.{part}" for part in (mixture.mlp, mixture.router, mixture.maps))
                found[f"{prefix}.{i}" if prefix else str(i)] = Experts(*parts)
    return found


def sites(model: PreTrainedModel) -> dict[str, Site]:
    """The model's sites by name, front to back; paths are relative to `model`, which may have a head or not.

    Raises PolytaskError where the family has no row, or where its row names a module that the model has not.
    """
    root = _root(model)
    found: list[Site] = []
    for prefix, stack in _stacks(model).items():
        tower = f"{prefix}." if prefix else ""
        paths = [root + path for path in _block_paths(model.base_model, stack)]
        hidden = _sizes(model, f"{paths[0]}.{stack.attn.o}")[1]
        path, width = _table(model, prefix)
        found.append(Site(f"{tower}tokens", path, "stream", width, width))
        if stack.embed:
            found.append(Site(f"{tower}embed", root + stack.embed, "stream", hidden, hidden))
        else:
            found.append(Site(f"{tower}embed", paths[0], "input", hidden, hidden))
        for i, path in enumerate(paths):
            name = f"{tower}{i}"
            found += _attention_sites(model, f"{name}.attn", path, stack.attn)
            if stack.cross:
                found += _attention_sites(model, f"{name}.cross", path, stack.cross)
            if mixture := _mixture(model, path, stack):
                mlp = f"{path}.{mixture.mlp}"
                found.append(Site(f"{name}.mlp", mlp, "across", hidden, hidden, source=mlp))
            else:
                found += _mlp_sites(model, f"{name}.mlp", path, stack)
            if stack.norm:
                found.append(Site(f"{name}.sum", f"{path}.{stack.norm}", "sum", hidden, hidden))
            else:
                found.append(Site(f"{name}.sum", path, "stream", hidden, hidden))
            found.append(Site(name, path, "stream", hidden, hidden))
        head = "enc.head" if prefix == "enc" else "head"
        found.append(Site(head, root + stack.head if stack.head else paths[-1], "stream", hidden, hidden))
    return {site.name: site for site in found}


_NAME = re.compile(r"(?:(?P<tower>enc|dec)\.)?(?:(?P<block>\d+)(?:\.(?P<place>.+))?|(?P<end>.+))")
_PATTERN = re.compile(
    r"(?:(?P<tower>enc|dec)\.)?"
    r"(?:(?P<block>\*|-?\d+-?|\[\d+-\d+\])(?:\.(?P<place>.+))?|(?P<end>[^*].*))"
)


def match(sites: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that at least one pattern stands for, each once, in the order of `sites`.

    A pattern that is a name stands for that site alone. Any other reads `[tower.]blocks[.place]` or `[tower.]end`:

    - tower: `enc` or `dec`; left out, it is every stack.
    - blocks: `*` every block; `3` that one; `-1` the last; `[2-5]` both ends included; `4-` from 4 on; `-2-` the last
      two. A stack that has not all these blocks matches nothing.
    - place: what comes behind the number, matched word by word (fnmatch): `*.attn.*` is all that is within attention,
      and not `3.attn`; `*.attn.[qv]` is q and v; `3.*` is 3.attn, 3.mlp and 3.sum. Left out, it is the block's output:
      `*` alone is 3, and not 3.attn.
    - end: `tokens`, `embed` or `head`.

    Raises UsageError for a pattern that matches nothing.
    """
    names = list(sites)
    parsed = [found for name in names if (found := _NAME.fullmatch(name))]
    depth: dict[str | None, int] = {}
    for name in parsed:
        if name["block"]:
            depth[name["tower"]] = max(depth.get(name["tower"], 0), int(name["block"]) + 1)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        want = _PATTERN.fullmatch(pattern)
        if pattern in names:
            hits = {pattern}
        else:
            hits = {name[0] for name in parsed if want and _fits(name, want, depth.get(name["tower"], 0))}
        if not hits:
            raise UsageError(f"no site matches {pattern!r}; near it: {', '.join(_near(pattern, names))}")
        chosen |= hits
    return [name for name in names if name in chosen]


def _fits(name: re.Match[str], want: re.Match[str], depth: int) -> bool:
    if want["tower"] and want["tower"] != name["tower"]:
        return False
    if name["block"] is None or want["block"] is None:
        return bool(name["end"] and want["end"]) and fnmatchcase(name["end"], want["end"])
    words, wanted = (m["place"].split(".") if m["place"] else [] for m in (name, want))
    return (
        int(name["block"]) in _numbers(want["block"], depth)
        and len(words) == len(wanted)
        and all(map(fnmatchcase, words, wanted))
    )


def _numbers(blocks: str, depth: int) -> range:
    """`blocks` of a pattern as numbers; empty where one of its ends is not among 0..depth-1."""
    if blocks == "*":
        return range(depth)
    if blocks.startswith("["):
        first, last = map(int, blocks[1:-1].split("-"))
    else:
        first = int(blocks[:-1] if blocks.endswith("-") else blocks)
        first += depth if first < 0 else 0
        last = depth - 1 if blocks.endswith("-") else first
    return range(first, last + 1) if first >= 0 and last < depth else range(0)


def _near(pattern: str, names: list[str]) -> list[str]:
    """At most eight names like `pattern`, with `*` for their block's number where the pattern has no plain number."""
    starred = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    block = re.match(r"(?:enc\.|dec\.)?\d+(?!-)", pattern)
    if block:
        return get_close_matches(pattern, names, n=8, cutoff=0.4) or starred[:8]
    return get_close_matches(re.sub(r"\[\d+-\d+\]|-?\d+-?", "*", pattern), starred, n=8, cutoff=0.4) or starred[:8]


def _root(model: PreTrainedModel) -> str:
    """What comes before a base model's path in `model`: its `base_model_prefix` where it wraps one."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _block_paths(base: nn.Module, stack: Stack) -> list[str]:
    listed = _module(base, stack.block.removesuffix(".{i}"))
    return [stack.block.format(i=i) for i in range(len(listed))] if isinstance(listed, nn.ModuleList) else []


def _mixture(base: nn.Module, block: str, stack: Stack) -> Experts | None:
    """The block's mixture of experts, if it has one."""
    found = stack.experts
    return found if found and _module(base, f"{block}.{found.maps}") is not None else None


def _stacks(model: PreTrainedModel) -> dict[str, Stack]:
    """The stacks of the variant whose modules the model has."""
    name, base = family(model), model.base_model
    lacks = []
    for stacks in FAMILIES[name].variants:
        paths: list[str] = []
        for stack in stacks.values():
            paths += filter(None, (stack.embed, stack.head))
            inner = _block_paths(base, stack) or [stack.block]
            for block in inner:
                paths += [f"{block}.{path}" for path in stack.inner(_mixture(base, block, stack))]
        missing = [path for path in paths if _module(base, path) is None]
        if not missing:
            return stacks
        lacks.append(missing)
    missing = min(lacks, key=len)
    raise PolytaskError(
        f"the row {name!r} of FAMILIES in {__file__} names {missing[0]!r}, which {type(base).__name__} has not "
        f"({len(missing)} modules are missing): load the whole model, or mend the row; "
        f"in this model, these look like blocks: {_blocklike(base)}"
    )


def _sizes(model: nn.Module, path: str) -> tuple[int, int]:
    """What a linear map reads and puts out: torch's Linear or transformers' Conv1D."""
    module = model.get_submodule(path)
    for reads, width in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(module, width):
            return int(getattr(module, reads)), int(getattr(module, width))
    raise PolytaskError(
        f"{path} is a {type(module).__name__}, and a site needs a linear map there: mend the row's path"
    )


def _table(model: PreTrainedModel, prefix: str) -> tuple[str, int]:
    """The path of the module that looks up tokens, and the size of what it finds."""
    stack: Any = {"enc": model.get_encoder, "dec": model.get_decoder}[prefix]() if prefix else model
    table = stack.get_input_embeddings()
    paths: Iterator[str] = (path for path, module in model.named_modules(remove_duplicate=False) if module is table)
    return next(paths), int(table.embedding_dim)


def _attention_sites(model: PreTrainedModel, name: str, block: str, attn: Attention) -> Iterator[Site]:
    heads, hidden = _sizes(model, f"{block}.{attn.o}")
    for letter, path in (("q", attn.q), ("k", attn.k), ("v", attn.v)):
        reads, width = _sizes(model, f"{block}.{path}")
        part = None
        if attn.q == attn.k:
            # Grouped queries: k and v share what the queries leave over.
            kv = (width - heads) // 2
            ends = [0, heads, heads + kv, heads + 2 * kv]
            groups = model.config.num_attention_heads if attn.by_head else 1
            at = "qkv".index(letter)
            width = ends[at + 1] - ends[at]
            part = Part(ends[at] // groups, ends[at + 1] // groups, groups)
        yield Site(f"{name}.{letter}", f"{block}.{path}", "output", reads, width, part)
    o = f"{block}.{attn.o}"
    yield Site(f"{name}.heads", o, "input", heads, heads)
    yield Site(f"{name}.o", o, "output", heads, hidden)
    yield Site(name, o, "across", _sizes(model, f"{block}.{attn.q}")[0], hidden, source=f"{block}.{attn.q}")


def _mlp_sites(model: PreTrainedModel, name: str, block: str, stack: Stack) -> Iterator[Site]:
    down = f"{block}.{stack.down}"
    inner, hidden = _sizes(model, down)
    reads = _sizes(model, f"{block}.{stack.up}")[0]
    fused = stack.gate == stack.up
    if stack.gate:
        yield Site(f"{name}.gate", f"{block}.{stack.gate}", "output", reads, inner, Part(0, inner) if fused else None)
    part = Part(inner, 2 * inner) if fused else None
    yield Site(f"{name}.up", f"{block}.{stack.up}", "output", reads, inner, part)
    yield Site(f"{name}.act", down, "input", inner, inner)
    yield Site(f"{name}.down", down, "output", inner, hidden)
    yield Site(name, down, "across", reads, hidden, source=f"{block}.{stack.up}")


def _blocklike(base: nn.Module) -> str:
    """The outermost lists of equal modules, and the weights in the first of each."""
    found: dict[str, str] = {}
    for path, module in base.named_modules():
        kinds = {type(block).__name__ for block in module} if isinstance(module, nn.ModuleList) else set()
        if len(kinds) == 1 and not any(path.startswith(f"{outer}.") for outer in found):
            inner = [name for name, leaf in module.get_submodule("0").named_modules() if "weight" in leaf._parameters]
            found[path] = f"{path}.{{i}} ({len(module)} {kinds.pop()} with {', '.join(inner)})"
    return "; ".join(found.values()) or "none"
