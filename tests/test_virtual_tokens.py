"""Virtual tokens: what PEFT computes on the same numbers, in every way of reading and writing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from writers import writer

from polytask.backbones import Backbone
from polytask.errors import PolytaskError
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import Params, build
from polytask.methods.lifting import Active, Plan


def active(backbone: Backbone, name: str, seed: int = 0, **hyper: Any) -> Active:
    """A method with tensors that are nowhere zero."""
    m = build(name, hyper)
    draw = torch.Generator().manual_seed(seed)
    return Active.of(m, {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, 0).items()})


def states(backbone: Backbone, adapters: list[Active], ids: list[list[int]], weights: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return Plan(backbone, adapters).hidden(backbone.collate(ids), weights)


def peft_of(backbone: Backbone, config: Any) -> Any:
    """The real PEFT around a copy of the model; one set of virtual tokens also where there is a decoder."""
    config.num_transformer_submodules = 1
    return get_peft_model(copy.deepcopy(backbone.model), config).eval()


# ------------------- as PEFT has it


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "gpt_neox", "llama", "qwen3"])
def test_a_prompt_is_pefts(family: str) -> None:
    backbone = tiny.backbone(family)
    one = active(backbone, "prompt", n=4)
    model = peft_of(backbone, PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4))
    model.prompt_encoder["default"].embedding.weight.data = one.at["tokens"]["P"]
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 4:]
    torch.testing.assert_close(states(backbone, [one], ids.tolist())[:, :5], theirs, rtol=1e-5, atol=1e-5)


def test_a_ptuning_network_is_pefts() -> None:
    backbone = tiny.backbone("llama")
    one = active(backbone, "ptuning", n=4, hidden=24)
    config = PromptEncoderConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4, encoder_hidden_size=24)
    model = peft_of(backbone, config)
    p = one.at["tokens"]
    encoder = model.prompt_encoder["default"]
    encoder.embedding.weight.data = p["Z"]
    for i, k in enumerate((0, 2, 4), 1):
        encoder.mlp_head[k].weight.data, encoder.mlp_head[k].bias.data = p[f"W{i}"], p[f"b{i}"]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        theirs = model(input_ids=ids).last_hidden_state[:, 4:]
    torch.testing.assert_close(states(backbone, [one], ids.tolist())[:, :5], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_a_prefix_is_pefts_with_keys_turned_to_their_positions(family: str) -> None:
    backbone = writer(family)
    n = 3
    one = active(backbone, "prefix", n=n)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n)
    model = peft_of(backbone, config)
    table = []
    for i in range(len(backbone.blocks)):
        K, V = one.at[f"{i}.attn.k"]["P"], one.at[f"{i}.attn.v"]["P"]
        table += [turned(backbone, K), V]
    model.prompt_encoder["default"].embedding.weight.data = torch.cat(table, 1)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    plan = Plan(backbone, [one])
    at = torch.tensor([[0, t] for t in range(5)])
    with torch.no_grad():
        ours = plan.logits(backbone.collate(ids.tolist()), torch.ones(1, 1), at)
    torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-4)


def turned(backbone: Backbone, K: Tensor) -> Tensor:
    """Keys [n, heads · D] as they are after the rotation to positions 0, 1, ..."""
    rotary = getattr(backbone.base, "rotary_emb", None)
    if rotary is None:
        return K
    cos, sin = rotary(K, torch.arange(len(K))[None])  # [1, n, D]
    heads = K.view(len(K), -1, cos.shape[-1]).transpose(0, 1)
    a, b = heads.chunk(2, -1)
    return (heads * cos + torch.cat([-b, a], -1) * sin).transpose(0, 1).flatten(1)


# ------------------- by hand


def test_a_prefix_is_in_the_softmax_with_the_text() -> None:
    """q = [1, 0], K = I, V = [1 2; 3 4], P_K = [.5 .5], P_V = [−1 0]: weights .3199 .4555 .2246, so [.8095 1.8095]."""
    q, K, V = torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    m = build("prefix", {"n": 1})
    x = torch.tensor([0, -1, -2])  # the virtual token, and the text

    def after(P: list[float], y: Tensor) -> Tensor:
        y = torch.cat([torch.full((1, 2), 9.0), y])  # whatever the model makes of the filler is replaced
        return y + m.delta({"P": torch.tensor([P])}, x, y)

    keys, values = after([0.5, 0.5], K), after([-1.0, 0.0], V)
    found = (q @ keys.T / 2**0.5).softmax(-1) @ values
    torch.testing.assert_close(found, torch.tensor([[0.8095, 1.8095]]), rtol=0, atol=5e-5)


def test_ept_fuses_its_prompt_with_what_it_adds_to_the_text() -> None:
    """P = I₂ and A B = [.5 −.5; 1 −1; 0 0] give P_f = [1.6155 −.6155; .3845 .6155]; with U = 0 all spaces are one."""
    m = build("ept", {"s": 2, "n": 3, "rank": 1, "spaces": 2})
    p: Params = {
        "P": torch.eye(2),
        "A": torch.tensor([[0.5], [1.0], [0.0]]),
        "B": torch.tensor([[1.0, -1.0]]),
        "U": torch.zeros(2, 2, 1),
        "V": torch.ones(2, 1, 2),
        "W_g": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    }
    ready = m.ready(p, {})
    torch.testing.assert_close(ready["P"], torch.tensor([[1.6155, -0.6155], [0.3845, 0.6155]]), rtol=0, atol=5e-5)
    x = torch.tensor([0, 1, -1, -2, -5])
    y = torch.full((5, 2), 7.0)
    expected = torch.cat([ready["P"], torch.tensor([[7.5, 6.5], [8.0, 6.0], [7.0, 7.0]])])
    torch.testing.assert_close(y + m.delta(ready, x, y), expected)
    # A space that is not the identity counts by its gate: g = softmax(W_g · mean of P_f), mean = [1, 0].
    p["U"] = torch.tensor([[[1.0], [0.0]], [[0.0], [0.0]]])
    moved = m.ready(p, {})["P"]
    g = torch.tensor([1.0, 0.0]).softmax(0)[0]
    torch.testing.assert_close(moved[0], ready["P"][0] + g * ready["P"][0, 0] * torch.ones(2))


def test_an_aligner_is_a_second_attention_over_one_token() -> None:
    """q = [1, 0], gate .5 and the value [−1, 0] of the token: half of it is added before W_o, whatever q is."""
    backbone = tiny.backbone("llama")
    one = active(backbone, "aligner")
    t, H = one.at["0.attn.o"]["t"], backbone.heads
    block = backbone.blocks[0].self_attn
    seen: list[Tensor] = []
    handle = block.o_proj.register_forward_hook(lambda _m, args, out: seen.extend((args[0], out)))
    at_first = Active(one.method, {"0.attn.o": one.at["0.attn.o"]})
    states(backbone, [at_first], [[5, 6, 7]])
    handle.remove()
    heads, plain = seen[0], block.o_proj(seen[0])
    K, V = block.k_proj(t).view(-1, heads.shape[-1] // H), block.v_proj(t).view(-1, heads.shape[-1] // H)
    V = V.repeat_interleave(H // len(V), 0)
    assert (K[:, None] @ K[:, :, None]).softmax(-1).eq(1).all()  # over a single key
    g = one.at["0.attn.o"]["g"]
    by_hand = block.o_proj(heads + (g[:, None] * V).flatten())
    with torch.no_grad():
        Δ = build("aligner").ready(one.at["0.attn.o"], one.method.frozen(backbone, backbone.sites["0.attn.o"]))["Δ"]
    torch.testing.assert_close(plain + Δ, by_hand, rtol=1e-5, atol=1e-5)
    own = list(build("aligner").start(backbone, 0))
    assert own.count("shared/t") == 1
    assert len(own) == 1 + len(backbone.blocks)


# ------------------- where texts share rows


@pytest.mark.parametrize("name", ["prompt", "prefix", "ept", "ptuning"])
def test_rows_with_other_numbers_of_virtual_tokens_get_what_they_get_alone(name: str) -> None:
    for family in ("bert", "llama", "t5"):
        backbone = tiny.backbone(family)
        size = "s" if name == "ept" else "n"
        few, many = (active(backbone, name, seed, **{size: n}) for seed, n in ((1, 2), (2, 5)))
        ids = [[5, 6, 7, 8], [9, 8, 7], [4, 5, 6, 7, 8, 9], [5, 5]]
        weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
        mixed = states(backbone, [few, many], ids, weights)
        for r, one in enumerate(([few], [many], [], [few])):
            alone = states(backbone, one, [ids[r]])
            n = len(ids[r])
            torch.testing.assert_close(mixed[r, :n], alone[0, :n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix", "ept"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_packed_texts_have_virtual_tokens_of_their_own(family: str, name: str) -> None:
    backbone = writer(family)
    plan = Plan(backbone, [active(backbone, name)])
    texts = [[5, 6, 7], [8, 9], [4, 5, 6, 7]]
    w = torch.ones(1, 1)
    with torch.no_grad():
        packed = plan.logits(backbone.pack([texts]), w, torch.tensor([[0, 2], [0, 4], [0, 8]]))
        for i, ids in enumerate(texts):
            alone = plan.logits(backbone.collate([ids]), w, torch.tensor([[0, len(ids) - 1]]))
            torch.testing.assert_close(packed[i], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5", "bart"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_writing_goes_on_from_virtual_tokens(family: str, name: str) -> None:
    """Greedy writing in a batch gives what the whole sequence gives, read anew for each token."""
    backbone = writer(family)
    one, other = active(backbone, name, 1), active(backbone, "lora", 2)
    plan = Plan(backbone, [one, other])
    rows = [([5, 6, 7], [1.0, 0.0]), ([8, 9, 4, 5, 6], [0.0, 1.0]), ([7, 7], [1.0, 0.0])]
    rule = Sampling(max_tokens=6)
    found = generate(plan, [Prompt(ids, torch.tensor(w), rule) for ids, w in rows])
    for (ids, w), written in zip(rows, found, strict=True):
        assert list(written.tokens) == forced(plan, backbone, ids, torch.tensor([w]), len(written.tokens))


def forced(plan: Plan, backbone: Backbone, ids: list[int], w: Tensor, steps: int) -> list[int]:
    from dataclasses import replace

    from polytask.backbones.frame import start_token

    written: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            if backbone.kind == "encoder-decoder":
                begun = torch.tensor([[start_token(backbone), *written]])
                batch = replace(backbone.collate([ids]), written=begun)
                at = [[0, len(written)]]
            else:
                batch, at = backbone.collate([[*ids, *written]]), [[0, len(ids) + len(written) - 1]]
            written.append(int(plan.logits(batch, w, torch.tensor(at)).argmax()))
    return written


def test_too_many_virtual_tokens_for_a_model_are_one_line() -> None:
    backbone = tiny.backbone("bert")
    long = [5] * (backbone.max_length - 3)
    with pytest.raises(PolytaskError, match="10 virtual tokens and a text of"):
        states(backbone, [active(backbone, "prefix")], [long])


def test_parameters_are_what_the_papers_count() -> None:
    backbone = tiny.backbone("llama")
    d, L = backbone.hidden_size, len(backbone.blocks)
    kv = backbone.sites["0.attn.k"].width

    def count(name: str, **hyper: Any) -> int:
        return sum(t.numel() for t in build(name, hyper).start(backbone, 0).values())

    assert count("prompt", n=7) == 7 * d
    assert count("prefix", n=7) == 2 * L * 7 * kv
    assert count("aligner") == d + L * backbone.heads
    assert count("ept", s=5, n=9, rank=2, spaces=3) == 5 * d + 2 * (9 + d) + 3 * 2 * 2 * d + 3 * d


def test_a_prompt_begins_as_tokens_of_the_vocabulary() -> None:
    for family in ("bert", "gemma2"):
        backbone = tiny.backbone(family)
        P = build("prompt", {"n": 3}).start(backbone, 0)["tokens/P"]
        table: Any = backbone.model.get_input_embeddings()
        with torch.no_grad():
            known = table(torch.arange(table.num_embeddings))
        assert all(any(torch.allclose(row, other) for other in known) for row in P)
