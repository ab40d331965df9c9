"""Tiny random models of every family in the site table: 3 blocks of width 32 with 4 heads, built from a config alone.

Every weight is drawn, biases and norms too, so that no wrong module gives the right number by being zero or one.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from polytask.backbones import Backbone, Batch

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0}
GEMMA: dict[str, Any] = {**GROUPED, "query_pre_attn_scalar": 8}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PAIRED: dict[str, Any] = {**SIZES, "decoder_start_token_id": 0}
T5: dict[str, Any] = {**PAIRED, "d_kv": 8, "d_ff": 64, "num_decoder_layers": 3, "dropout_rate": 0.0}
BART: dict[str, Any] = {
    **PAIRED,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
}
# As DeBERTa-v3 has it, with buckets that fit a short text.
DEBERTA: dict[str, Any] = {
    **SIZES,
    **STILL,
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, **STILL},
    "roberta": {**SIZES, **STILL},
    "xlm-roberta": {**SIZES, **STILL},
    "camembert": {**SIZES, **STILL},
    "electra": {**SIZES, **STILL, "embedding_size": 16},
    "distilbert": {**SIZES, "hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0},
    "deberta-v2": DEBERTA,
    "modernbert": {**SIZES, "cls_token_id": 1, "sep_token_id": 2},
    "gpt2": {**SIZES, "n_inner": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": SIZES,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **GEMMA},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "bart": BART,
    "mbart": BART,
}
FAMILIES = list(CONFIGS)
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")  # of experts: there is no site within their `3.mlp`
LM: dict[str, Any] = {
    **dict.fromkeys(["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"], AutoModelForCausalLM),
    **dict.fromkeys(["gemma2", "gemma3_text", "phi3", "olmo2"], AutoModelForCausalLM),
    **dict.fromkeys(["mixtral", "qwen3_moe", "olmoe"], AutoModelForCausalLM),
    "gemma3": AutoModelForImageTextToText,
    **dict.fromkeys(["t5", "mt5", "umt5", "bart", "mbart"], AutoModelForSeq2SeqLM),
}


def make(family: str, seed: int = 0, *, auto: Any = AutoModel, **config: Any) -> PreTrainedModel:
    """A model in evaluation mode; `auto` is the head (AutoModel: none), `config` overrides the family's settings."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(AutoConfig.for_model(family, **{**CONFIGS[family], **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def make_lm(family: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """The same with its language-model head, for the families in `LM`."""
    return make(family, seed, auto=LM[family], **config)


def backbone(family: str, seed: int = 0, *, precision: str = "fp32", tokenizer: Any = None, **config: Any) -> Backbone:
    """A tiny model as a Backbone on the CPU, without a tokenizer where none is given."""
    model = make(family, seed, attn_implementation="eager", **config)
    return Backbone(model, tokenizer, f"tiny-{family}", precision=precision, device="cpu")


def sites(family: str, *patterns: str) -> list[str]:
    """Those of the patterns that the family has places for, `*.attn.o` where it has none."""
    if family not in MIXTURES:
        return list(patterns)
    return [p for p in patterns if ".mlp." not in p] or ["*.attn.o"]


def batch(rows: int, tokens: int = 9, seed: int = 0) -> Batch:
    """Random tokens; rows are padded on the right to several lengths, the first is whole."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, tokens), generator=draw)
    lengths = torch.randint(2, tokens + 1, (rows,), generator=draw)
    lengths[0] = tokens
    mask = torch.arange(tokens) < lengths[:, None]
    return Batch(ids.masked_fill(~mask, 0), mask)


def words(*names: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are these: `[CLS] a b [SEP]`, an unknown word is `[UNK]`, and "\u200b" is dropped."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*special, *names))}, unk_token="[UNK]"))
    made.normalizer = normalizers.Replace("\u200b", "")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
