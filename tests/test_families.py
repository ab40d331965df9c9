"""Every site of every family sees what it says: checked against weights, hidden states and attention done by hand."""

import copy
from collections import Counter
from functools import cache

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    OPTConfig,
    OPTModel,
    PreTrainedModel,
    T5EncoderModel,
)
from transformers.activations import ACT2FN

from polytask.backbones import families
from polytask.backbones.site import Site
from polytask.errors import PolytaskError, UsageError

# Which rows of a fused weight are which, written down by hand from transformers' code: 4 heads of 8, 2 of them for k
# and v in Phi-3, 64 in the MLP.
THIRDS = {"attn.q": range(32), "attn.k": range(32, 64), "attn.v": range(64, 96)}
HALVES = {"mlp.gate": range(64), "mlp.up": range(64, 128)}
FUSED = {
    "gpt2": THIRDS,
    "modernbert": THIRDS | HALVES,
    "phi3": {"attn.q": range(32), "attn.k": range(32, 48), "attn.v": range(48, 64)} | HALVES,
    "gpt_neox": {
        f"attn.{letter}": [24 * head + 8 * third + j for head in range(4) for j in range(8)]
        for third, letter in enumerate("qkv")
    },
}
POST_NORM = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "deberta-v2", "bart"}
NORMED_SUBLAYERS = {"gemma2", "gemma3_text", "gemma3", "olmo2"}
PAIRED = {"t5", "mt5", "umt5", "bart", "mbart"}

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
model_of = cache(tiny.make)


class Seen:
    """One pass with a plain hook at every site: `y` and `x` as site.py defines them, of the module's first call."""

    def __init__(self, model: PreTrainedModel, tokens: int = 5, **inputs: Tensor) -> None:
        self.sites = families.sites(model)
        self.y: dict[str, Tensor] = {}
        self.x: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        handles = [model.get_submodule(s.path).register_forward_hook(self.hook(s)) for s in self.sites.values()]
        self.out = forward(model, tokens, **inputs)
        for handle in handles:
            handle.remove()

    def hook(self, site: Site):
        def look(module, args, out):
            self.calls[site.name] += 1
            if self.calls[site.name] == 1:
                out = out[0] if isinstance(out, tuple) else out
                read = args[0] if args else None
                self.y[site.name] = (
                    read if site.point in ("input", "sum") else site.part.take(out) if site.part else out
                )
                self.x[site.name] = out if site.point == "sum" else read

        return look


def forward(model: PreTrainedModel, tokens: int = 5, **inputs: Tensor):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (2, tokens), generator=draw)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 128, (2, tokens), generator=draw)
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True, **inputs)


def rows(family: str, name: str) -> slice | list[int]:
    place = name.split(".", 1)[-1]
    return list(FUSED[family][place]) if place in FUSED.get(family, {}) else slice(None)


def weight(module: nn.Module) -> Tensor:
    """[out, in], of a Linear or a Conv1D."""
    return module.weight.T if hasattr(module, "nf") else module.weight


def heads_of(model: PreTrainedModel, y: Tensor) -> Tensor:
    """[B, T, h * 8] → [B, 4, T, 8], with grouped k and v repeated."""
    split = y.unflatten(-1, (-1, 8)).transpose(1, 2)
    return split.repeat_interleave(4 // split.shape[1], dim=1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_family
def test_linear_sites_are_their_rows_of_the_weight(family):
    model = model_of(family)
    seen = Seen(model)
    linear = [site for site in seen.sites.values() if site.point == "output"]
    inner = set() if family in tiny.MIXTURES else {"up", "down"}
    assert {"q", "k", "v", "o"} | inner <= {site.name.split(".")[-1] for site in linear}
    for site in linear:
        module, x = model.get_submodule(site.path), seen.x[site.name]
        index = rows(family, site.name)
        bias = None if module.bias is None else module.bias[index]
        close(seen.y[site.name], F.linear(x, weight(module)[index], bias))
        assert (site.reads, site.width) == (x.shape[-1], seen.y[site.name].shape[-1])


@every_family
def test_a_site_is_seen_once_in_a_pass_with_its_width(family):
    seen = Seen(model_of(family))
    # DeBERTa-v3 also projects its relative positions with them.
    twice = {name for name in seen.sites if family == "deberta-v2" and name.endswith((".attn.q", ".attn.k"))}
    assert {name: seen.calls[name] for name in seen.sites} == {name: 1 + (name in twice) for name in seen.sites}
    assert {name: y.shape[-1] for name, y in seen.y.items()} == {name: s.width for name, s in seen.sites.items()}


@every_family
def test_one_token_attends_to_its_own_value(family):
    model = model_of(family)
    seen = Seen(model, tokens=1)
    for name in seen.sites:
        if name.endswith(".heads"):
            v = seen.y[name.replace(".heads", ".v")]
            close(heads_of(model, seen.y[name]), heads_of(model, v))


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "deberta-v2"])
def test_heads_are_attention_of_q_k_and_v(family):
    model = tiny.make(family, **({"attn_logit_softcapping": None} if family == "gemma2" else {}))
    for name, module in model.named_modules():
        if name.endswith("relative_attention_bias"):
            nn.init.zeros_(module.weight)
    # Where all tokens stand at position 0, rotary embeddings do nothing.
    rotary = any("rotary" in name for name, _ in model.named_modules())
    inputs = {"position_ids": torch.zeros(1, 5, dtype=torch.long)} if rotary else {}
    # Without a mask, transformers may take the repeated position for texts packed into one row.
    seen = Seen(model, attention_mask=torch.ones(2, 5, dtype=torch.long), **inputs)
    for name, site in seen.sites.items():
        if not name.endswith(".heads"):
            continue
        q, k, v = (seen.y[name.replace(".heads", f".{letter}")] for letter in "qkv")
        attention = model.get_submodule(site.path.rpartition(".")[0])
        if hasattr(attention, "q_norm"):
            per_head = attention.q_norm.weight.numel() == 8
            q, k = (
                norm(y.unflatten(-1, (-1, 8))).flatten(-2) if per_head else norm(y)
                for norm, y in ((attention.q_norm, q), (attention.k_norm, k))
            )
        q, k, v = (heads_of(model, y) for y in (q, k, v))
        scores = q @ k.mT * (1.0 if "t5" in family else 8**-0.5)
        if families.kind(model) == "decoder" or (name.startswith("dec.") and ".attn." in name):
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        close(seen.y[name], (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


@every_family
def test_changing_a_linear_site_is_changing_its_rows(family):
    model = model_of(family)
    before = forward(model).last_hidden_state
    draw = torch.Generator().manual_seed(2)
    for site in families.sites(model).values():
        if site.point != "output" or ".1." not in f".{site.name}":
            continue
        Δ = torch.randn(site.width, site.reads, generator=draw)

        def act(module, args, out, site=site, Δ=Δ):
            change = F.linear(args[0], Δ)
            return site.part.put(out, site.part.take(out) + change) if site.part else out + change

        handle = model.get_submodule(site.path).register_forward_hook(act)
        acted = forward(model).last_hidden_state
        handle.remove()
        changed = copy.deepcopy(model)
        with torch.no_grad():
            weight(changed.get_submodule(site.path))[rows(family, site.name)] += Δ
        torch.testing.assert_close(acted, forward(changed).last_hidden_state, rtol=1e-3, atol=1e-4)
        assert (acted - before).abs().max() > 1e-2, site.name


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in tiny.MIXTURES])
def test_act_is_what_the_gate_lets_through(family):
    model = model_of(family)
    y = Seen(model).y
    config = model.config.get_text_config()
    settings = ("dense_act_fn", "hidden_activation", "hidden_act", "activation_function", "activation")
    φ = ACT2FN[next(getattr(config, setting) for setting in settings if hasattr(config, setting))]
    for name in [name for name in y if name.endswith(".mlp")]:
        gate, up = y.get(f"{name}.gate"), y[f"{name}.up"]
        close(y[f"{name}.act"], φ(up) if gate is None else φ(gate) * up)
        close(y[f"{name}.down"], y[name])


@every_family
def test_streams_are_what_is_added_and_sum_is_what_the_last_norm_reads(family):
    seen = Seen(model_of(family))
    y, x = seen.y, seen.x
    for prefix, paths in families.blocks(model_of(family)).items():
        tower = f"{prefix}." if prefix else ""
        before = y[f"{tower}embed"]
        for i in range(len(paths)):
            block = f"{tower}{i}"
            if family in POST_NORM:
                norm = model_of(family).get_submodule(seen.sites[f"{block}.sum"].path)
                assert seen.sites[f"{block}.sum"].point == "sum"
                close(y[f"{block}.sum"], x[f"{block}.mlp.up"] + y[f"{block}.mlp"])
                close(F.layer_norm(y[f"{block}.sum"], (32,), norm.weight, norm.bias, norm.eps), y[block])
                close(x[f"{block}.sum"], y[block])
            else:
                close(y[f"{block}.sum"], y[block])
                if family not in NORMED_SUBLAYERS:
                    cross = y.get(f"{block}.cross", torch.zeros(()))
                    close(before + y[f"{block}.attn"] + cross + y[f"{block}.mlp"], y[block])
            close(y[f"{block}.attn"], y[f"{block}.attn.o"])
            before = y[block]


@every_family
def test_streams_are_the_hidden_states(family):
    seen = Seen(model_of(family))
    if family in PAIRED:
        stacks = {
            "enc.": (seen.out.encoder_hidden_states, seen.out.encoder_last_hidden_state, "enc.head"),
            "dec.": (seen.out.decoder_hidden_states, seen.out.last_hidden_state, "head"),
        }
    else:
        stacks = {"": (seen.out.hidden_states, seen.out.last_hidden_state, "head")}
    for tower, (states, last, head) in stacks.items():
        close(seen.y[f"{tower}embed"], states[0])
        for i in range(2):
            close(seen.y[f"{tower}{i}"], states[i + 1])
        close(seen.y[head], last)
        # transformers gives the last block's output only after the final norm, which is the head's module.
        end = seen.y[f"{tower}2"]
        assert torch.equal(end, last) or torch.equal(end, seen.x[head])


@pytest.mark.parametrize(
    ("family", "head"),
    [
        (family, head)
        for family in tiny.FAMILIES
        for head in ("language model", "classification")
        if (family, head) != ("olmoe", "classification")  # transformers has none
    ],
)
def test_a_wrapped_model_has_the_same_sites(family, head):
    base = model_of(family)
    auto = AutoModelForSequenceClassification if head == "classification" else tiny.LM.get(family, AutoModelForMaskedLM)
    wrapped = tiny.make(family, auto=auto)
    prefix = next((f"{path}." for path, module in wrapped.named_modules() if type(module) is type(base)), "")
    assert prefix or family in PAIRED
    plain, found = families.sites(base), families.sites(wrapped)
    assert list(found) == list(plain)
    for name, site in found.items():
        assert site.path == prefix + plain[name].path
        assert type(wrapped.get_submodule(site.path)) is type(base.get_submodule(plain[name].path))
        assert (site.reads, site.width, site.part) == (plain[name].reads, plain[name].width, plain[name].part)
    assert families.blocks(wrapped) == {
        tower: [prefix + path for path in paths] for tower, paths in families.blocks(base).items()
    }


def test_names_run_front_to_back():
    names = list(families.sites(model_of("llama")))
    assert names[:8] == ["tokens", "embed", "0.attn.q", "0.attn.k", "0.attn.v", "0.attn.heads", "0.attn.o", "0.attn"]
    assert names[8:15] == ["0.mlp.gate", "0.mlp.up", "0.mlp.act", "0.mlp.down", "0.mlp", "0.sum", "0"]
    names = list(families.sites(model_of("t5")))
    assert names[names.index("enc.2") :][:4] == ["enc.2", "enc.head", "dec.tokens", "dec.embed"]
    assert names[-2:] == ["dec.2", "head"]


@pytest.mark.parametrize(
    ("family", "config", "kind"),
    [
        ("bert", {}, "encoder"),
        ("bert", {"is_decoder": True}, "decoder"),
        ("distilbert", {}, "encoder"),
        ("gpt2", {}, "decoder"),
        ("gemma3", {}, "decoder"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "encoder"),
        ("bart", {}, "encoder-decoder"),
    ],
)
def test_kind(family, config, kind):
    assert families.kind(tiny.make(family, **config)) == kind


def test_variants_are_found_by_their_modules():
    assert "enc.0.mlp.gate" in families.sites(model_of("mt5"))
    assert "enc.0.mlp.gate" not in families.sites(model_of("t5"))
    assert families.sites(model_of("electra"))["embed"].path == "embeddings_project"
    assert families.sites(tiny.make("electra", embedding_size=32))["embed"].path == "embeddings"


PLACES = ["attn.q", "attn.v", "attn", "mlp.up", "mlp", "sum"]
PLAIN = ["embed", *(f"{i}{place and '.'}{place}" for i in range(12) for place in [*PLACES, ""]), "head"]
PAIR = [f"{tower}.{name}" for tower in ("enc", "dec") for name in PLAIN if name != "head"] + ["enc.head", "head"]


@pytest.mark.parametrize(
    ("names", "patterns", "expected"),
    [
        (PLAIN, ["*"], [str(i) for i in range(12)]),
        (PLAIN, ["*.attn.q"], [f"{i}.attn.q" for i in range(12)]),
        (PLAIN, ["3.attn.*"], ["3.attn.q", "3.attn.v"]),
        (PLAIN, ["3.*"], ["3.attn", "3.mlp", "3.sum"]),
        (PLAIN, ["[9-11].attn.[qv]"], [f"{i}.attn.{letter}" for i in (9, 10, 11) for letter in "qv"]),
        (PLAIN, ["-1.mlp"], ["11.mlp"]),
        (PLAIN, ["-1"], ["11"]),
        (PLAIN, ["10-.sum"], ["10.sum", "11.sum"]),
        (PLAIN, ["-2-"], ["10", "11"]),
        (PLAIN, ["1"], ["1"]),
        (PLAIN, ["head", "2", "embed", "2"], ["embed", "2", "head"]),
        (PLAIN, ["h*"], ["head"]),
        (PAIR, ["3.attn.q"], ["enc.3.attn.q", "dec.3.attn.q"]),
        (PAIR, ["dec.-1.attn.*"], ["dec.11.attn.q", "dec.11.attn.v"]),
        (PAIR, ["*"], [f"{tower}.{i}" for tower in ("enc", "dec") for i in range(12)]),
        (PAIR, ["embed"], ["enc.embed", "dec.embed"]),
        (PAIR, ["head"], ["head"]),
        (PAIR, ["enc.*.sum"], [f"enc.{i}.sum" for i in range(12)]),
    ],
)
def test_match(names, patterns, expected):
    assert families.match(names, patterns) == expected


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.attn.query", "*.attn.q"),
        ("12.attn.q", "11.attn.q"),
        ("-13", "*"),
        ("[9-12].mlp", "*.mlp"),
        ("[5-2]", "*"),
        ("*.*.*.*", "*.attn.q"),
        ("hed", "head"),
        ("attn.q", "*.attn.q"),
        ("enc.*.attn.q", "*.attn.q"),
        ("", "embed"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_near(pattern, near):
    with pytest.raises(UsageError) as error:
        families.match(PLAIN, ["*.attn.q", pattern])
    message = str(error.value)
    assert message.startswith(f"no site matches {pattern!r}; near it: ")
    candidates = message.partition("near it: ")[2].split(", ")
    assert near in candidates
    assert len(candidates) <= 8
    assert "\n" not in message


def test_an_unknown_family_says_how_to_add_it():
    model = OPTModel(OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=128))
    with pytest.raises(PolytaskError) as error:
        families.sites(model)
    message = str(error.value)
    for part in ("'opt'", "families.py", "up, down", "decoder.layers.{i} (2 OPTDecoderLayer with self_attn.k_proj"):
        assert part in message
    assert "\n" not in message


def test_a_row_whose_module_is_missing_names_it():
    model = tiny.make("llama")
    del model.layers[1].mlp.down_proj
    with pytest.raises(PolytaskError, match=r"the row 'llama' .* names 'layers\.1\.mlp\.down_proj', which LlamaModel"):
        families.sites(model)
    with pytest.raises(PolytaskError, match=r"the row 't5' .* names 'decoder\..*load the whole model"):
        families.sites(T5EncoderModel(model_of("t5").config))
