"""Virtual tokens, PiSSA and KaSA to and from the real PEFT, on tiny models."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from commands import run
from made import adapter, one_line
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from writers import writer

from polytask.adapters import Adapter, Card, HeadCard, TextCard, export_peft, import_peft
from polytask.backbones import Backbone, load
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine
from polytask.library import Library
from polytask.methods import build
from polytask.methods.lifting import Active, Plan
from polytask.tasks import TaskCard

NORMED = ("qwen3", "gemma3_text", "gemma3", "olmo2")  # keys are normed behind their map
ROWS = [[5, 6, 7, 8, 9], [9, 8, 7]]
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
REAL = IDS > 0


@cache
def backbone_of(family: str) -> Backbone:
    return tiny.backbone(family)


def made(backbone: Backbone, name: str, seed: int = 1, **hyper: Any) -> Adapter:
    """An adapter whose trained tensors have left where they start."""
    m = build(name, hyper)
    draw = torch.Generator().manual_seed(seed)
    start = m.start(backbone, 0)
    moved = {n: t + 0.2 * torch.randn(t.shape, generator=draw) if m.trains(n) else t for n, t in start.items()}
    return adapter(name, tensors=moved, method=name, hyperparameters=m.hyperparameters(), backbone=backbone.card())


def with_head(one: Adapter) -> Adapter:
    tensors = {**one.tensors, "head/W": torch.randn(2, one.backbone.hidden_size), "head/b": torch.zeros(2)}
    return replace(one, tensors=tensors, head=HeadCard(kind="classification", targets=("a", "b")))


def foreign(folder: Path) -> Path:
    """The folder as it would be if PEFT had written it."""
    for name in ("polytask_head.json", "polytask_head.safetensors"):
        (folder / name).unlink()
    return folder


def said(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def ours(backbone: Backbone, *adapters: Adapter) -> Tensor:
    """Last hidden states of the texts' own tokens."""
    active = [Active.of(build(one.method, one.hyperparameters), one.tensors) for one in adapters]
    with torch.no_grad():
        return Plan(backbone, active).hidden(backbone.collate(ROWS))[:, :5][REAL]


def in_peft(model: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns about what it does not find
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def states(model: Any) -> Tensor:
    """The same of PEFT's model, whose virtual tokens stand first."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=REAL.long()).last_hidden_state
    return found[:, -5:][REAL]


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def read(folder: Path, backbone: Backbone, **options: Any) -> Adapter:
    card = Card(name="theirs", task=TaskCard(name="theirs", kind="classification"))
    given = {"model": backbone, "backbone": backbone.card(), "card": card} | options
    return import_peft(folder, backbone.sites, **given)


# ------------------- out to PEFT, and back


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "deberta-v2", "gpt2", "llama", "gemma2", "t5"])
@pytest.mark.parametrize("name", ["prompt", "ptuning"])
def test_a_prompt_computes_the_same_in_peft_and_comes_back(tmp_path: Path, name: str, family: str) -> None:
    backbone = backbone_of(family)
    one = with_head(made(backbone, name, n=4))
    expected = ours(backbone, one)
    assert (expected - ours(backbone)).abs().max() > 1e-2
    folder = export_peft(one, tmp_path / "out", backbone.sites, model=backbone)
    assert said(folder)["peft_type"] == "PROMPT_TUNING"
    same(states(in_peft(backbone.reader, folder)), expected)

    back = import_peft(folder, backbone.sites)
    assert (back.id, back.card, back.head) == (one.id, one.card, one.head)
    theirs = read(foreign(folder), backbone)
    assert (theirs.method, theirs.hyperparameters["n"]) == ("prompt", 4)
    same(ours(backbone, theirs), expected)
    Engine(backbone).add(theirs)


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "gpt2", "gpt_neox", "llama", "mistral", "gemma2", "phi3", *NORMED]
)
def test_a_prefix_computes_the_same_in_peft_and_comes_back(tmp_path: Path, family: str) -> None:
    backbone = backbone_of(family)
    one = with_head(made(backbone, "prefix", n=3))
    expected = ours(backbone, one)
    assert (expected - ours(backbone)).abs().max() > 1e-2
    folder = export_peft(one, tmp_path / "out", backbone.sites, model=backbone)
    same(states(in_peft(backbone.model, folder)), expected)

    back = import_peft(folder, backbone.sites, model=backbone)
    assert (back.id, back.card) == (one.id, one.card)
    beside = load_file(folder / "polytask_head.safetensors")
    assert ("0.attn.k/P" in beside) == (family not in ("bert", "roberta", "gpt2"))  # whose keys stay as they are
    if family in NORMED:
        with pytest.raises(PolytaskError, match="norms its keys") as error:
            read(foreign(folder), backbone)
        one_line(error.value)
        return
    theirs = read(foreign(folder), backbone)
    for name, tensor in made(backbone, "prefix", n=3).tensors.items():
        torch.testing.assert_close(theirs.tensors[name], tensor, rtol=1e-6, atol=1e-6)
    same(ours(backbone, theirs), expected)
    Engine(backbone).add(theirs)


KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"rope_parameters": YARN}),
        ("gemma3_text", {"layer_types": KINDS}),
        ("phi3", {"partial_rotary_factor": 0.5}),
    ],
)
def test_keys_turn_as_their_block_turns_them(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    """With YaRN, which also scales; with other frequencies in blocks that slide; in half of a head only."""
    backbone = tiny.backbone(family, **config)
    one = made(backbone, "prefix", n=5)
    folder = export_peft(one, tmp_path, backbone.sites, model=backbone)
    same(states(in_peft(backbone.model, folder)), ours(backbone, one))
    K = one.tensors["1.attn.k/P"]
    assert not torch.allclose(backbone.keys_kept("1.attn.k", K), backbone_of(family).keys_kept("1.attn.k", K))
    if family not in NORMED:
        torch.testing.assert_close(read(foreign(folder), backbone).tensors["1.attn.k/P"], K, rtol=1e-6, atol=1e-6)


def test_a_key_is_turned_by_its_position(tmp_path: Path) -> None:
    """Position 0 turns by nothing; at position 1 the first pair of a head turns by 1 radian, cos 1 = .5403."""
    backbone = backbone_of("llama")
    one = made(backbone, "prefix", n=2)
    K = torch.zeros(2, backbone.sites["0.attn.k"].width)
    K[:, 0] = 1.0  # the first half's first feature; its partner is feature 4 of 8
    one = replace(one, tensors={**one.tensors, "0.attn.k/P": K})
    table = load_file(export_peft(one, tmp_path, backbone.sites, model=backbone) / "adapter_model.safetensors")
    first = table["prompt_embeddings"][:, :8]
    torch.testing.assert_close(first[0], torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(first[1], torch.tensor([0.5403, 0, 0, 0, 0.8415, 0, 0, 0]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["prompt", "ptuning", "prefix"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_writer_writes_the_same_in_peft(tmp_path: Path, family: str, name: str) -> None:
    backbone = writer(family)
    text = HeadCard(kind="generation", text=TextCard(template="plain"))
    one = replace(made(backbone, name, n=3), head=text)
    folder = export_peft(one, tmp_path, backbone.sites, model=backbone)
    assert said(folder)["task_type"] == "CAUSAL_LM"
    model = in_peft(backbone.model, folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -4:]
        at = torch.tensor([[0, t] for t in range(4)])
        plan = Plan(backbone, [Active.of(build(one.method, one.hyperparameters), one.tensors)])
        same(plan.logits(backbone.collate(ids.tolist()), torch.ones(1, 1), at), theirs)


def test_an_encoder_decoder_writes_the_same_in_peft(tmp_path: Path) -> None:
    backbone = writer("t5")
    one = replace(made(backbone, "prompt", n=3), head=HeadCard(kind="generation", text=TextCard(template="plain")))
    folder = export_peft(one, tmp_path, backbone.sites, model=backbone)
    assert said(folder)["task_type"] == "SEQ_2_SEQ_LM"
    same_answers(backbone, one, in_peft(backbone.model, folder))


def same_answers(backbone: Backbone, one: Adapter, model: Any) -> None:
    ids, begun = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 9, 4]])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=begun).logits[0]
        at = torch.tensor([[0, t] for t in range(3)])
        plan = Plan(backbone, [Active.of(build(one.method, one.hyperparameters), one.tensors)])
        batch = replace(backbone.collate(ids.tolist()), written=begun)
        same(plan.logits(batch, torch.ones(1, 1), at), theirs)
        assert (theirs - Plan(backbone, []).logits(batch, torch.ones(1, 0), at)).abs().max() > 1e-2


# ------------------- in from PEFT

N = {"num_virtual_tokens": 4}
TABLES = {
    "prompt": peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", **N),
    "P-tuning": peft.PromptEncoderConfig(task_type="FEATURE_EXTRACTION", encoder_hidden_size=24, **N),
    "P-tuning's LSTM": peft.PromptEncoderConfig(
        task_type="FEATURE_EXTRACTION", encoder_hidden_size=24, encoder_reparameterization_type="LSTM", **N
    ),
    "prefix": peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", **N),
    "prefix with a projection": peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", prefix_projection=True, encoder_hidden_size=24, **N
    ),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", TABLES)
def test_virtual_tokens_by_peft_are_read(tmp_path: Path, kind: str, family: str) -> None:
    backbone = backbone_of(family)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), copy.deepcopy(TABLES[kind])).eval()
    expected = states(model)
    model.save_pretrained(tmp_path)
    one = read(tmp_path, backbone)
    assert one.method == ("prefix" if kind.startswith("prefix") else "prompt")
    assert len(one.card.notes) == (kind not in ("prompt", "prefix"))
    same(ours(backbone, one), expected)
    assert (expected - ours(backbone)).abs().max() > 1e-2
    Engine(backbone).add(one)
    again = export_peft(one, tmp_path / "again", backbone.sites, model=backbone)
    same(states(in_peft(backbone.model, again)), expected)


def test_an_encoder_decoders_prompt_is_the_half_that_peft_reads(tmp_path: Path) -> None:
    backbone = writer("t5")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape[0] == 6
    one = read(tmp_path, backbone)
    assert one.at("enc.tokens")["P"].shape[0] == 3
    same_answers(backbone, one, model)


def test_a_classifier_by_peft(tmp_path: Path) -> None:
    """PEFT names `score` and `classifier`, and twice, whatever the model has."""
    model = tiny.make("llama", auto=AutoModelForSequenceClassification)
    backbone = backbone_of("llama")
    card = HeadCard(kind="classification", targets=("a", "b"), pool="last")
    for config in (
        peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]),
    ):
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        folder = tmp_path / str(config.peft_type)
        wrapped.save_pretrained(folder)
        assert set(said(folder)["modules_to_save"]) == {"classifier", "score"}
        with pytest.raises(PolytaskError, match=r"it trained score too \(modules_to_save\)"):
            read(folder, backbone)
        one = read(folder, backbone, head_module="score", head=card)
        trained = dict(wrapped.named_parameters())
        [W] = [t for name, t in trained.items() if name.endswith("score.modules_to_save.default.weight")]
        assert torch.equal(one.tensors["head/W"], W)


# ------------------- LoRAs in the place of a part of the weight

PLACES = {
    "bert": ["*.attn.[qv]", "*.mlp.up"],
    "llama": ["*.attn.[qv]", "*.mlp.down"],
    "gpt2": ["*.attn.[qkv]", "*.mlp.up"],
    "gpt_neox": ["*.attn.[qv]"],
}


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize(("name", "hyper"), [("pissa", {}), ("pissa", {"rslora": True}), ("kasa", {})])
def test_what_stands_in_the_weights_place_goes_out_as_a_lora(
    tmp_path: Path, family: str, name: str, hyper: dict[str, Any]
) -> None:
    backbone = backbone_of(family)
    one = with_head(made(backbone, name, r=3, alpha=5, sites=PLACES[family], **hyper))
    expected = ours(backbone, one)
    folder = export_peft(one, tmp_path / "out", backbone.sites)
    config = said(folder)
    assert (config["peft_type"], config["init_lora_weights"], config.get("kasa_config")) == ("LORA", True, None)
    model = in_peft(backbone.model, folder)
    same(states(model), expected)
    assert (expected - ours(backbone)).abs().max() > 1e-2

    back = import_peft(folder, backbone.sites)
    assert (back.id, back.method, back.card) == (one.id, name, one.card)
    theirs = read(foreign(folder), backbone)
    assert theirs.method == "lora"
    same(ours(backbone, theirs), expected)


VARIANTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by the root of its rank": {"init_lora_weights": "pissa", "use_rslora": True},
    "kasa": {"kasa_config": peft.KasaConfig(beta=0.3, gamma=0.2)},
    "kasa by the root of its rank": {"kasa_config": peft.KasaConfig(beta=0.3, gamma=0.2), "use_rslora": True},
}
TARGETS = {
    "bert": ["query", "intermediate.dense"],
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "phi3": ["qkv_proj", "down_proj"],
}


@pytest.mark.parametrize(
    ("kind", "family"),
    [(k, f) for k in VARIANTS for f in TARGETS if (k[:4], f) != ("kasa", "gpt2")],  # PEFT has no KaSA in a Conv1D
)
def test_what_stands_in_the_weights_place_is_read(tmp_path: Path, kind: str, family: str) -> None:
    backbone = backbone_of(family)
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[family], **VARIANTS[kind], **fan)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    expected = states(model)
    model.save_pretrained(tmp_path)
    one = read(tmp_path, backbone)
    assert one.method == kind.partition(" ")[0]
    if one.method == "kasa":
        assert (one.hyperparameters["beta"], one.hyperparameters["gamma"]) == (0.3, 0.2)
    same(ours(backbone, one), expected)
    same(states(in_peft(backbone.model, tmp_path)), expected)
    Engine(backbone).add(one)
    with pytest.raises(UsageError, match="pass the backbone as model="):
        read(tmp_path, backbone, model=None)


# ------------------- what was changed, and what is refused


def test_a_folder_that_was_changed_is_read_as_peft_has_it(tmp_path: Path) -> None:
    backbone = backbone_of("bert")
    for name in ("ptuning", "pissa"):
        folder = export_peft(made(backbone, name), tmp_path / name, backbone.sites, model=backbone)
        path = folder / "adapter_model.safetensors"
        save_file({n: 2 * t for n, t in load_file(path).items()}, path)
        back = import_peft(folder, backbone.sites)
        assert back.method == ("prompt" if name == "ptuning" else "lora")
        assert set(back.tensors) == set(made(backbone, back.method, sites=back.hyperparameters["sites"]).tensors)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(PolytaskError) as caught:
        read(folder, options.pop("of", backbone_of("llama")), **options)
    return one_line(caught.value)


def test_damaged_and_strange_folders(tmp_path: Path) -> None:
    backbone = backbone_of("llama")
    prompt = foreign(export_peft(made(backbone, "prompt", n=4), tmp_path / "p", backbone.sites, model=backbone))
    path, config = prompt / "adapter_model.safetensors", said(prompt)
    good = load_file(path)["prompt_embeddings"]

    def says(**changed: Any) -> None:
        (prompt / "adapter_config.json").write_text(json.dumps(config | changed))

    save_file({"embedding": good}, path)
    assert "tensor embedding is no table of virtual tokens" in refusal(prompt)
    save_file({}, path)
    assert "has no prompt_embeddings" in refusal(prompt)
    save_file({"prompt_embeddings": good[:3].contiguous()}, path)
    assert "has shape (3, 32), and not (4, 32): adapter_config.json says 4 virtual tokens" in refusal(prompt)
    save_file({"prompt_embeddings": good[:, :16].contiguous()}, path)
    assert "the embeddings are 32 wide" in refusal(prompt)
    save_file({"prompt_embeddings": good}, path)
    for n in (None, "four", 0):
        says(num_virtual_tokens=n)
        assert f"num_virtual_tokens {n!r} is no number" in refusal(prompt)
    says(peft_type="MULTITASK_PROMPT_TUNING")
    assert "polytask imports LORA, IA3, PROMPT_TUNING, P_TUNING, PREFIX_TUNING" in refusal(prompt)
    says(some_future_variant=True)
    assert "some_future_variant is set; polytask's prompt cannot represent it" in refusal(prompt)
    says()
    path.unlink()
    torch.save({"prompt_embeddings": good}, prompt / "adapter_model.bin")
    assert "pickle and is never read" in refusal(prompt)

    prefix = foreign(export_peft(made(backbone, "prefix", n=4), tmp_path / "k", backbone.sites, model=backbone))
    assert "3 blocks keep keys and values 32 wide" in refusal(prefix, of=backbone_of("gpt2"))
    assert "pass the backbone as model=" in refusal(prefix, model=None)
    assert "in an encoder-decoder's decoder and polytask's in its encoder" in refusal(prefix, of=backbone_of("t5"))

    beside = export_peft(made(backbone, "kasa"), tmp_path / "b", backbone.sites)
    told = beside / "polytask_head.json"
    told.write_text(json.dumps({n: v for n, v in json.loads(told.read_text()).items() if n != "method"}))
    assert "polytask_head.json: is damaged: 'method'" in refusal(beside)

    kasa = foreign(export_peft(made(backbone, "kasa"), tmp_path / "w", backbone.sites))
    config = said(kasa) | {"kasa_config": {"beta": 0.1}}
    (kasa / "adapter_config.json").write_text(json.dumps(config))
    assert "has no lora_diag" in refusal(kasa)
    (kasa / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "is dora and kasa at once" in refusal(kasa)


def test_what_peft_has_no_place_for(tmp_path: Path) -> None:
    def refused(one: Adapter, backbone: Backbone, says: str, **options: Any) -> None:
        with pytest.raises(PolytaskError, match=says) as error:
            export_peft(one, tmp_path / "out", backbone.sites, **{"model": backbone} | options)
        one_line(error.value)
        assert not (tmp_path / "out").exists()

    llama, t5, modern = backbone_of("llama"), backbone_of("t5"), backbone_of("modernbert")
    refused(made(t5, "prefix"), t5, "in an encoder-decoder's decoder")
    refused(made(modern, "prefix"), modern, "ModernBertModel keeps no keys")
    refused(made(llama, "prefix"), llama, "pass the backbone as model=", model=None)
    refused(made(llama, "prefix", sites=["[1-2].attn.k", "[1-2].attn.v"]), llama, "every block .* see 0.attn.k")
    refused(made(llama, "prompt", sites=["embed"]), llama, "at tokens, not at embed")
    refused(with_head(made(llama, "prompt")), llama, "leave head_module out", head_module="score")
    refused(made(llama, "ept"), llama, "only for lora, dora, pissa, kasa, ia3, prompt, ptuning, prefix")
    one = made(llama, "prompt", n=3)
    refused(replace(one, hyperparameters={**one.hyperparameters, "n": 4}), llama, r"\(3, 32\), and not \(4, 32\)")
    half = {name: t for name, t in made(llama, "pissa").tensors.items() if not name.endswith("/B0")}
    refused(replace(made(llama, "pissa"), tensors=half), llama, "has A, B, A0, where pissa has A, B, A0, B0")


# ------------------- as a user does it


@pytest.mark.parametrize("name", ["prompt", "prefix", "ptuning", "pissa"])
def test_the_command_line_takes_them_out_and_in(tmp_path: Path, name: str) -> None:
    backbone = load("minilm")
    one = with_head(made(backbone, name))
    Library(tmp_path / "own").add(one)
    done = run("library", "export", name, tmp_path / "out", "--format", "peft", "-l", tmp_path / "own")
    assert done.status == 0, done.err
    again = ("library", "import", tmp_path / "out", "--base", "minilm", "-l", tmp_path / "again", "--json")
    assert run(*again).json["adapter"] == one.id
    foreign(tmp_path / "out")
    theirs = run(*again, "--name", "theirs", "--kind", "classification")
    method = {"ptuning": "prompt", "pissa": "lora"}.get(name, name)
    assert Library(tmp_path / "again").get(theirs.json["adapter"]).method == method
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    assert "is missing" in run(*again, "--name", "theirs", "--kind", "classification").error
