"""K-Adapter: its layers beside transformers' own, its chain from the states that Hugging Face gives, what it sees, and
answers written with a cache beside those of whole passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import TOKENS, job_of, task_of
from test_opamp import as_in_whole_passes, prompts_of
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer
from writers import clean, refused, tensors_of, writer

from polytask.adapters import Adapter
from polytask.backbones import Backbone, Batch, Site
from polytask.errors import UsageError
from polytask.inference import Engine, Request
from polytask.inference.generation import generate
from polytask.methods import build
from polytask.methods.kadapter import KAdapter
from polytask.methods.lifting import Active, Plan
from polytask.recipes.adapt import adapt
from polytask.training import train

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
DECODERS = [family for family in tiny.LM if family not in ("t5", "mt5", "umt5", "bart", "mbart")]


@cache
def backbone_of(family: str) -> Backbone:
    return tiny.backbone(family, tokenizer=TOKENS if family == "bert" else None)


@cache
def writer_of(family: str) -> Backbone:
    return writer(family)


used: list[Backbone] = []


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Whatever a test does, its backbones are bit by bit what they were, and no hook is left."""
    yield
    for backbone in used:
        clean(backbone)
    used.clear()


def base(family: str, *, writes: bool = False) -> Backbone:
    used.append(writer_of(family) if writes else backbone_of(family))
    return used[-1]


def shaken(backbone: Backbone, m: KAdapter | None = None, seed: int = 0) -> Active:
    m = m or KAdapter()
    draw = torch.Generator().manual_seed(seed)
    return Active.of(m, {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, seed).items()})


def states(backbone: Backbone, adapters: list[Active], batch: Batch, **more: Any) -> Tensor:
    with torch.no_grad():
        return Plan(backbone, adapters).hidden(batch, **more)


def theirs(backbone: Backbone, batch: Batch) -> tuple[Tensor, ...]:
    """The states from the embeddings to the last block's, as Hugging Face gives them, from a copy: it leaves hooks."""
    given = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    more = {"use_cache": False} if backbone.kind == "decoder" else {}
    with torch.no_grad():
        found: tuple[Tensor, ...] = copy.deepcopy(backbone.reader)(
            **given, **more, output_hidden_states=True
        ).hidden_states
    return found


# -- the equation ------------------------------------------------------------------------------------------------------


@every_family
def test_the_chain_by_hand(family: str) -> None:
    """A norm that multiplies by nothing has T put out its shift β, whatever it reads. So a₁ = H₀ + β₁ W_u1ᵀ + b_u1,
    a₂ = H₁ + a₁ + β₂ W_u2ᵀ + b_u2, a₃ likewise from H₂, and heads read [H₃; a₃] Wᵀ + b."""
    backbone, batch = base(family), tiny.batch(3)
    active = shaken(backbone)
    tower = "enc." if backbone.kind == "encoder-decoder" else ""
    assert [*active.at] == [f"{tower}embed", f"{tower}0", f"{tower}1"]
    H = theirs(backbone, batch)
    a = torch.zeros(())
    for k, p in enumerate(active.at.values()):
        p["T1.gain_mlp"].zero_()
        a = H[k] + a + p["T1.shift_mlp"] @ p["W_u"].T + p["b_u"]
    right = torch.cat([H[-1], a], -1) @ p["W"].T + p["b"]
    found = states(backbone, [active], batch)
    torch.testing.assert_close(found[batch.mask], right[batch.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_its_layers_are_transformers_own(family: str) -> None:
    """With BERT's layers on the same tensors, under a mask that hides padding, and what is later in a Llama."""
    backbone, batch = base(family), tiny.batch(4)
    active = shaken(backbone, KAdapter(width=0.5, heads=4, inner=2, sites=("embed", "1")))
    w, T = 16, batch.ids.shape[1]
    config = BertConfig(
        hidden_size=w,
        num_attention_heads=4,
        intermediate_size=4 * w,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    seen = batch.mask[:, None, None, :].expand(-1, 1, T, T)
    if family == "llama":
        seen = seen & torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    H, a = theirs(backbone, batch), torch.zeros(())
    for k, p in zip((0, 2), active.at.values(), strict=True):
        x = H[k] + a
        z = x @ p["W_d"].T + p["b_d"]
        for n in range(2):
            layer = BertLayer(config).eval()
            own: dict[str, Tensor] = {name.removeprefix(f"T{n}."): t for name, t in p.items()}
            for letter, W, b in zip(
                ("query", "key", "value"), own["W_qkv"].chunk(3), own["b_qkv"].chunk(3), strict=True
            ):
                linear = getattr(layer.attention.self, letter)
                linear.weight.data, linear.bias.data = W, b
            for linear, name in (
                (layer.attention.output.dense, "o"),
                (layer.intermediate.dense, "1"),
                (layer.output.dense, "2"),
            ):
                linear.weight.data, linear.bias.data = own[f"W_{name}"], own[f"b_{name}"]
            for norm, name in ((layer.attention.output.LayerNorm, "attn"), (layer.output.LayerNorm, "mlp")):
                norm.weight.data, norm.bias.data = own[f"gain_{name}"], own[f"shift_{name}"]
            with torch.no_grad():
                out = layer(z, mask)
            z = out[0] if isinstance(out, tuple) else out
        a = x + z @ p["W_u"].T + p["b_u"]
    right = torch.cat([H[-1], a], -1) @ p["W"].T + p["b"]
    found = states(backbone, [active], batch)
    torch.testing.assert_close(found[batch.mask], right[batch.mask], rtol=1e-4, atol=1e-4)


def test_the_count_is_that_of_the_equation() -> None:
    """K (2 w d + w + d + N (12 w² + 13 w)) numbers in the adapter, which are 47,251,200 for RoBERTa-large, and 2 d² + d
    in what joins it with the backbone's states."""
    count = {n: t.numel() for n, t in build("kadapter").start(base("bert"), 0).items()}
    assert count.pop("shared/W") + count.pop("shared/b") == 2 * 32**2 + 32
    assert sum(count.values()) == 3 * (2 * 24 * 32 + 24 + 32 + 2 * (12 * 24**2 + 13 * 24))
    large = build("kadapter").init(Site("embed", "", "stream", 1024, 1024), torch.Generator(), {})
    assert 3 * sum(t.numel() for t in large.values()) == 47_251_200


def test_the_states_are_the_papers() -> None:
    """0, 11 and 23 of 24 blocks' and the embeddings', and what there is in small models."""
    read = {
        L: [*Active.of(m := build("kadapter"), m.start(tiny.backbone("roberta", num_hidden_layers=L), 0)).at]
        for L in (1, 2, 3, 6, 24)
    }
    assert read[24] == ["embed", "10", "22"]
    assert (read[1], read[2], read[3], read[6]) == (["embed"], ["embed", "0"], ["embed", "0", "1"], ["embed", "1", "4"])


# -- what it sees ------------------------------------------------------------------------------------------------------


def test_nothing_is_written_back() -> None:
    backbone, batch = base("llama"), tiny.batch(3)

    def outputs(adapters: list[Active]) -> list[Tensor]:
        found: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out))
            for block in backbone.blocks
        ]
        states(backbone, adapters, batch)
        for handle in handles:
            handle.remove()
        return found

    for a, b in zip(outputs([shaken(backbone)]), outputs([]), strict=True):
        assert torch.equal(a, b)


@every_family
def test_padding_is_of_no_consequence(family: str) -> None:
    backbone, batch = base(family), tiny.batch(5)
    active = shaken(backbone)
    found = states(backbone, [active], batch)
    for i, n in enumerate(batch.mask.sum(1).tolist()):
        short = Batch(batch.ids[i : i + 1, :n], batch.mask[i : i + 1, :n])
        torch.testing.assert_close(found[i : i + 1, :n], states(backbone, [active], short), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_a_decoders_adapter_does_not_look_ahead_unless_the_decoder_does(family: str) -> None:
    backbone, batch = base(family), tiny.batch(2)
    active = shaken(backbone)
    other = replace(batch, ids=batch.ids.clone())
    other.ids[0, -1] = other.ids[0, -1] % 100 + 5
    assert bool((other.ids != batch.ids).any())
    one, two = (states(backbone, [active], each) for each in (batch, other))
    torch.testing.assert_close(one[0, :-1], two[0, :-1], rtol=1e-5, atol=1e-5)
    assert (one[0, -1] - two[0, -1]).abs().max() > 1e-2
    one, two = (states(backbone, [active], each, causal=False) for each in (batch, other))
    assert (one[0, 0] - two[0, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_texts_that_share_a_row_do_not_see_each_other(family: str) -> None:
    """With a window of 4 tokens where there is one, in rows of several texts as in rows of one."""
    more = {"sliding_window": 4} if family != "llama" else {}
    backbone = tiny.backbone(family, **more)
    texts = [[5, 9, 7, 11, 20, 6, 33], [3, 4, 8], [12, 13, 14, 15, 16, 17]]
    active = shaken(backbone)
    packed = backbone.pack([texts])
    found = states(backbone, [active], packed)[0]
    at = 0
    for text in texts:
        alone = states(backbone, [active], backbone.collate([text]))[0, : len(text)]
        torch.testing.assert_close(found[at : at + len(text)], alone, rtol=1e-4, atol=1e-4)
        at += len(text)


def test_dropout_is_for_training_alone() -> None:
    backbone, batch = base("bert"), tiny.batch(2)
    active = shaken(backbone, KAdapter(dropout=0.5))
    plain = Active(KAdapter(dropout=0.0), active.at)
    assert torch.equal(states(backbone, [active], batch), states(backbone, [plain], batch))
    trained = Plan(backbone, [active], training=True)
    assert not torch.equal(trained.hidden(batch), trained.hidden(batch))


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_what_is_written_with_a_cache_is_what_whole_passes_say(family: str) -> None:
    """Rows of two such adapters that read other states, of a LoRA and of none come and go."""
    backbone = base(family, writes=True)
    made = [
        shaken(backbone, None, 1),
        shaken(backbone, KAdapter(width=0.5, heads=2, inner=1, sites=("-1",)), 2),
        Active.of(build("lora"), tensors_of(backbone, "lora", 3)),
    ]
    with torch.no_grad():
        as_in_whole_passes(Plan(backbone, made), prompts_of(12, torch.cat([torch.eye(3), torch.zeros(1, 3)])), 3)


def test_a_window_of_the_decoders_is_one_of_the_adapters() -> None:
    backbone = writer("mistral", sliding_window=5)
    with torch.no_grad():
        as_in_whole_passes(Plan(backbone, [shaken(backbone)]), prompts_of(6, torch.ones(1, 1)), 3)


def test_a_search_finds_what_whole_passes_say() -> None:
    backbone = base("llama", writes=True)
    with torch.no_grad():
        as_in_whole_passes(Plan(backbone, [shaken(backbone)]), prompts_of(3, torch.ones(1, 1), beams=3), 6)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_does_not_write_with_it(family: str) -> None:
    backbone = base(family, writes=True)
    refused(lambda: build("kadapter").start(backbone, 0, writing=True), "take another method for an answer in text")
    plan = Plan(backbone, [shaken(backbone)])
    refused(lambda: generate(plan, prompts_of(1, torch.ones(1, 1))), "cannot act where an encoder-decoder writes")


# -- trained, kept, refused --------------------------------------------------------------------------------------------


def test_it_learns_beside_another_as_it_learns_alone() -> None:
    backbone = base("bert")
    task = task_of(n=48, metric="accuracy")
    own = {"dropout": 0.0, "inner": 1, "sites": ["embed", "1"]}
    jobs = [job_of(task, "kadapter", own, "first", lr=2e-3), job_of(task, "lora", {}, "first")]
    both, alone = train(backbone, jobs)[0], train(backbone, jobs[:1])[0]
    assert both.history[-1]["loss"] < 0.9 * both.history[0]["loss"]
    assert both.history[-1]["loss"] == pytest.approx(alone.history[-1]["loss"], rel=1e-3)


def test_an_adapter_is_kept_and_answers(tmp_path: Path) -> None:
    backbone, task = base("bert"), task_of(n=24, metric="accuracy")
    said = {"heads": "4", "inner": "1"}
    one = adapt(backbone, task, "kadapter", hyperparameters=said, settings=job_of(task, epochs=1).settings)
    one.save(tmp_path / "one")
    asked = [Request(text, adapter=one.id) for text in ("a b c", "h g e f")]
    first, again = (Engine(backbone, adapters=[each]).answer(asked) for each in (one, Adapter.load(tmp_path / "one")))
    assert [a.probability for a in first] == [a.probability for a in again]


@pytest.mark.parametrize(
    ("hyper", "says"),
    [
        ({"sites": ["*.attn.q"]}, "the embeddings' and the blocks' outputs, and 0.attn.q is neither"),
        ({"sites": ["head"]}, "and head is neither"),
        ({"sites": ["7"]}, "no site matches '7'"),
        ({"heads": 40}, "width = 0.75 of 32 features leaves none for each of 40 heads"),
        ({"width": 0}, "width = 0.0 of 32 features leaves none for each of 12 heads"),
        ({"inner": 0}, "at least 1 is needed"),
    ],
)
def test_what_does_not_fit_is_refused(hyper: dict[str, Any], says: str) -> None:
    refused(lambda: build("kadapter", hyper).start(base("bert"), 0), says)


def test_a_selector_of_blocks_is_refused_and_one_of_states_is_not() -> None:
    m, start = build("kadapter"), build("kadapter").start(base("bert"), 0)
    refused(lambda: m.only({n: t for n, t in start.items() if n.startswith("1/")}), "no blocks can be chosen")
    one = {n: t for n, t in start.items() if n.startswith(("1/", "shared/"))}
    assert m.only(one).start(base("bert"), 0).keys() == one.keys()


def test_it_is_not_mixed() -> None:
    backbone = base("bert")
    with pytest.raises(UsageError, match="an adapter by kadapter cannot be mixed"):
        states(backbone, [shaken(backbone)], tiny.batch(2), weights=torch.tensor([[0.5], [1.0]]))
