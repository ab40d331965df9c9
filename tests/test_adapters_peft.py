"""Against the real PEFT, on tiny models with random weights, in float64 so that equal means equal."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made import BACKBONE, adapter, one_line
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polytask.adapters import Adapter, Card, HeadCard, export_peft, import_peft
from polytask.adapters.peft.layout import features_of
from polytask.errors import PolytaskError, UsageError
from polytask.tasks import TaskCard

peft = pytest.importorskip("peft")

WIDTH, INNER, LAYERS = 16, 24, 2
CARD = Card(name="foreign", task=TaskCard(name="foreign", kind="classification"))


@dataclass(frozen=True)
class Part:
    start: int
    stop: int
    groups: int = 1


@dataclass(frozen=True)
class Place:
    path: str
    point: str
    reads: int
    width: int
    part: Part | None = None


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=INNER,
        max_position_embeddings=32,
    )
    return BertModel(config).double().eval()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=INNER,
    )
    return LlamaModel(config).double().eval()


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=INNER
    )
    return GPTNeoXModel(config).double().eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return (
        GPT2Model(GPT2Config(vocab_size=50, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_inner=INNER, n_positions=32))
        .double()
        .eval()
    )


def places(kind: str, prefix: str = "") -> dict[str, Place]:
    found: dict[str, Place] = {}
    for i in range(LAYERS):
        if kind == "bert":
            block = f"{prefix}encoder.layer.{i}."
            for letter, module in (("q", "query"), ("k", "key"), ("v", "value")):
                found[f"{i}.attn.{letter}"] = Place(f"{block}attention.self.{module}", "output", WIDTH, WIDTH)
            found[f"{i}.attn.o"] = Place(f"{block}attention.output.dense", "output", WIDTH, WIDTH)
            found[f"{i}.mlp.act"] = Place(f"{block}output.dense", "input", INNER, INNER)
            found[f"{i}.mlp.down"] = Place(f"{block}output.dense", "output", INNER, WIDTH)
            found[f"{i}"] = Place(f"{prefix}encoder.layer.{i}", "stream", WIDTH, WIDTH)
        elif kind == "llama":
            block = f"{prefix}layers.{i}."
            for letter, out in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2)):
                found[f"{i}.attn.{letter}"] = Place(f"{block}self_attn.{letter}_proj", "output", WIDTH, out)
            found[f"{i}.mlp.act"] = Place(f"{block}mlp.down_proj", "input", INNER, INNER)
            found[f"{i}.mlp.down"] = Place(f"{block}mlp.down_proj", "output", INNER, WIDTH)
        elif kind == "neox":  # q, k and v side by side in each of 4 heads of 4
            for n, letter in enumerate("qkv"):
                path = f"layers.{i}.attention.query_key_value"
                found[f"{i}.attn.{letter}"] = Place(path, "output", WIDTH, WIDTH, Part(4 * n, 4 * n + 4, 4))
            found[f"{i}.mlp.act"] = Place(f"layers.{i}.mlp.dense_4h_to_h", "input", INNER, INNER)
        elif kind == "gpt2":
            for n, letter in enumerate("qkv"):
                part = Part(WIDTH * n, WIDTH * (n + 1))
                found[f"{i}.attn.{letter}"] = Place(f"h.{i}.attn.c_attn", "output", WIDTH, WIDTH, part)
            found[f"{i}.mlp.act"] = Place(f"h.{i}.mlp.c_proj", "input", INNER, INNER)
    return found


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama, "neox": neox, "gpt2": gpt2}
IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(5))


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def by_hand(model: nn.Module, one: Adapter, table: Mapping[str, Place]) -> Tensor:
    """polytask's equations, on hooks: y + s B A x, and l ∘ y."""
    handles = []
    says = one.hyperparameters
    for name in one.sites:
        place, p = table[name], one.at(name)

        module: Any = model.get_submodule(place.path)
        W = module.weight if isinstance(module, nn.Linear) else module.weight.T
        b = torch.zeros(len(W), dtype=W.dtype) if module.bias is None else module.bias
        rows = features_of(place, table) if place.point == "output" else torch.arange(len(W))

        def change(y: Tensor, x: Tensor, p: dict[str, Tensor] = p, frozen: Any = (W[rows], b[rows])) -> Tensor:
            if "l" in p:
                return y * p["l"]
            s = says["alpha"] / (math.sqrt(says["r"]) if says.get("rslora") else says["r"])
            if "m" in p:
                W, b = frozen
                V = W + s * p["B"] @ p["A"]
                return x @ (p["m"] / V.norm(dim=1) * V.T) + b
            return y + s * (x @ p["A"].T) @ p["B"].T

        def after(
            _: nn.Module, inputs: Any, y: Tensor, place: Place = place, change: Callable[..., Tensor] = change
        ) -> Tensor:
            if place.part is None:
                return change(y, inputs[0])
            part, y = place.part, y.clone()
            grouped = y.view(*y.shape[:-1], part.groups, -1)
            own = grouped[..., part.start : part.stop]
            own.copy_(change(own.flatten(-2), inputs[0]).unflatten(-1, (part.groups, -1)))
            return y

        def before(_: nn.Module, inputs: Any, change: Callable[..., Tensor] = change) -> Any:
            return (change(inputs[0], inputs[0]), *inputs[1:])

        handles.append(
            module.register_forward_pre_hook(before) if place.point == "input" else module.register_forward_hook(after)
        )
    try:
        return out(model)
    finally:
        for handle in handles:
            handle.remove()


def by_peft(model: nn.Module, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns about missing keys
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        return out(peft.PeftModel.from_pretrained(model, folder).eval())


def lora(table: Mapping[str, Place], letters: str = "qv", r: int = 3, **says: Any) -> Adapter:
    made = torch.Generator().manual_seed(1)
    tensors = {}
    for name, place in table.items():
        if name.split(".attn.")[-1] in tuple(letters):
            tensors[f"{name}/A"] = torch.randn(r, place.reads, generator=made, dtype=torch.float64)
            tensors[f"{name}/B"] = torch.randn(place.width, r, generator=made, dtype=torch.float64) / 4
    sites = [f"*.attn.{letter}" for letter in letters]
    return adapter(tensors=tensors, hyperparameters={"r": r, "alpha": 5.0, "dropout": 0.1, "sites": sites} | says)


def ia3(table: Mapping[str, Place], letters: str = "kv") -> Adapter:
    made = torch.Generator().manual_seed(1)
    ends = (*tuple(f"attn.{letter}" for letter in letters), "mlp.act")
    tensors = {
        f"{name}/l": 1 + torch.randn(place.width, generator=made, dtype=torch.float64) / 3
        for name, place in table.items()
        if name.endswith(ends)
    }
    return adapter(tensors=tensors, method="ia3", hyperparameters={"sites": [f"*.{end}" for end in ends]})


def with_head(one: Adapter) -> Adapter:
    tensors = {
        **one.tensors,
        "head/W": torch.randn(3, WIDTH).double(),
        "head/b": torch.randn(3).double(),
        "task/mean": torch.ones(WIDTH),
    }
    return replace(one, tensors=tensors, head=HeadCard(kind="classification", targets=("a", "b", "c")))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("kind", "letters"), [(k, s) for k in MODELS for s in ("qv", "qkv")])
def test_a_lora_computes_the_same_in_peft_and_comes_back(tmp_path: Path, kind: str, letters: str, rslora: bool) -> None:
    table = places(kind)
    one = with_head(lora(table, letters, **({"rslora": True} if rslora else {})))
    expected = by_hand(MODELS[kind](), one, table)
    assert (expected - out(MODELS[kind]())).abs().max() > 1e-3
    folder = export_peft(one, tmp_path / "out", table)
    torch.testing.assert_close(by_peft(MODELS[kind](), folder), expected, rtol=0, atol=1e-9)

    back = import_peft(folder, table)
    assert (back.id, back.card, back.hyperparameters) == (one.id, one.card, one.hyperparameters)
    assert set(back.tensors) == set(one.tensors)

    for name in ("polytask_head.json", "polytask_head.safetensors"):
        (folder / name).unlink()
    foreign = import_peft(folder, table, backbone=BACKBONE, card=CARD)
    torch.testing.assert_close(by_hand(MODELS[kind](), foreign, table), expected, rtol=0, atol=1e-9)
    assert foreign.hyperparameters["sites"] == one.hyperparameters["sites"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_dora_computes_the_same_in_peft_and_comes_back(tmp_path: Path, kind: str, rslora: bool) -> None:
    table = places(kind)
    plain = lora(table, "qkv", **({"rslora": True} if rslora else {}))
    made = torch.Generator().manual_seed(2)
    m = {f"{site}/m": 1 + torch.rand(table[site].width, generator=made, dtype=torch.float64) for site in plain.sites}
    one = with_head(replace(plain, method="dora", tensors={**plain.tensors, **m}))
    expected = by_hand(MODELS[kind](), one, table)
    assert (expected - out(MODELS[kind]())).abs().max() > 1e-3
    folder = export_peft(one, tmp_path / "out", table)
    torch.testing.assert_close(by_peft(MODELS[kind](), folder), expected, rtol=0, atol=1e-9)
    back = import_peft(folder, table)
    assert (back.id, back.method, back.hyperparameters) == (one.id, "dora", one.hyperparameters)
    for name in ("polytask_head.json", "polytask_head.safetensors"):
        (folder / name).unlink()
    foreign = import_peft(folder, table, backbone=BACKBONE, card=CARD)
    torch.testing.assert_close(by_hand(MODELS[kind](), foreign, table), expected, rtol=0, atol=1e-9)


def test_a_dora_of_half_a_module_is_refused(tmp_path: Path) -> None:
    table = places("gpt2")
    plain = lora(table, "q")
    m = {f"{site}/m": torch.ones(table[site].width, dtype=torch.float64) for site in plain.sites}
    one = replace(plain, method="dora", tensors={**plain.tensors, **m})
    with pytest.raises(PolytaskError, match=r"for all of .*c_attn or for none"):
        export_peft(one, tmp_path / "out", table)
    assert not (tmp_path / "out").exists()


def test_a_damaged_dora_is_refused(tmp_path: Path) -> None:
    """A config that says DoRA beside tensors of a plain LoRA."""
    table = places("bert")
    folder = export_peft(lora(table), tmp_path / "out", table)
    (folder / "polytask_head.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "has no lora_magnitude_vector" in refusal(folder)


@pytest.mark.parametrize("kind", MODELS)
def test_ia3_computes_the_same_in_peft_and_comes_back(tmp_path: Path, kind: str) -> None:
    table = places(kind)
    one = with_head(ia3(table))
    expected = by_hand(MODELS[kind](), one, table)
    assert (expected - out(MODELS[kind]())).abs().max() > 1e-3
    folder = export_peft(one, tmp_path / "out", table)
    torch.testing.assert_close(by_peft(MODELS[kind](), folder), expected, rtol=0, atol=1e-9)
    back = import_peft(folder, table)
    assert (back.id, back.card) == (one.id, one.card)
    (folder / "polytask_head.json").unlink()
    foreign = import_peft(folder, table, backbone=BACKBONE, card=CARD)
    torch.testing.assert_close(by_hand(MODELS[kind](), foreign, table), expected, rtol=0, atol=1e-9)
    assert sorted(foreign.hyperparameters["sites"]) == sorted(one.hyperparameters["sites"])


def trained(model: nn.Module, config: Any) -> nn.Module:
    """A PEFT model as if it had been trained: every number of the adapter is random."""
    wrapped = peft.get_peft_model(model, config)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=made, dtype=torch.float64) / 3)
            elif "ia3_" in name:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=made, dtype=torch.float64) / 3)
    return wrapped.eval()


PATTERNS = {
    "bert": {
        "target_modules": ["query", "value", "attention.output.dense"],
        "rank_pattern": {"query": 6, r"encoder.layer.1.attention.self.value": 2},
        "alpha_pattern": {"layer.0.attention.self.query": 3, "value": 7},
    },
    "llama": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 5},
        "alpha_pattern": {"v_proj": 3},
    },
    "neox": {"target_modules": ["query_key_value"], "rank_pattern": {"layers.1.attention.query_key_value": 2}},
    "gpt2": {"target_modules": ["c_attn"], "alpha_pattern": {"h.0.attn.c_attn": 1}, "fan_in_fan_out": True},
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_patterns_of_a_foreign_lora(tmp_path: Path, kind: str, rslora: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, lora_dropout=0.2, **PATTERNS[kind])
    model = trained(MODELS[kind](), config)
    expected = out(model)
    model.save_pretrained(tmp_path)
    one = import_peft(tmp_path, places(kind), backbone=BACKBONE, card=CARD)
    torch.testing.assert_close(by_hand(MODELS[kind](), one, places(kind)), expected, rtol=0, atol=1e-9)
    assert one.hyperparameters["dropout"] == 0.2
    assert one.hyperparameters.get("rslora", False) == rslora
    again = export_peft(one, tmp_path / "again", places(kind))
    torch.testing.assert_close(by_peft(MODELS[kind](), again), expected, rtol=0, atol=1e-9)


def test_parts_with_one_shared_a_keep_its_rank(tmp_path: Path) -> None:
    model = trained(gpt2(), peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    model.save_pretrained(tmp_path)
    one = import_peft(tmp_path, places("gpt2"), backbone=BACKBONE, card=CARD)
    again = export_peft(one, tmp_path / "again", places("gpt2"))
    was, now = load_file(tmp_path / "adapter_model.safetensors"), load_file(again / "adapter_model.safetensors")
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)


def test_a_foreign_ia3_of_a_wrapping_model(tmp_path: Path) -> None:
    """Trained on LlamaForCausalLM, whose paths begin with `model.`; PEFT's own targets for Llama."""
    from transformers import LlamaForCausalLM

    base = llama()
    whole = LlamaForCausalLM(base.config).double()
    whole.model.load_state_dict(base.state_dict())
    model = trained(
        whole,
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    with torch.no_grad():
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    model.save_pretrained(tmp_path)
    one = import_peft(tmp_path, places("llama"), backbone=BACKBONE, card=CARD)
    torch.testing.assert_close(by_hand(llama(), one, places("llama")), expected, rtol=0, atol=1e-9)
    # and out again, for the wrapping model
    folder = export_peft(one, tmp_path / "again", places("llama"), prefix="model.")
    whole = LlamaForCausalLM(base.config).double()
    whole.model.load_state_dict(base.state_dict())
    wrapped = peft.PeftModel.from_pretrained(whole, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            wrapped(input_ids=IDS, output_hidden_states=True).hidden_states[-1], expected, rtol=0, atol=1e-9
        )
    assert import_peft(folder, places("llama")).id == one.id
    # a table of the wrapping model, and a file of the inner one
    inner = export_peft(one, tmp_path / "inner", places("llama"))
    assert import_peft(inner, places("llama", "model.")).id == one.id


def test_the_head_as_a_module(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    one = with_head(lora(places("bert")))
    folder = export_peft(one, tmp_path, places("bert"), prefix="bert.", head_module="classifier")
    base = bert()
    base.config.num_labels = 3
    model = peft.PeftModel.from_pretrained(BertForSequenceClassification(base.config).double(), folder)
    weight = dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"]
    assert torch.equal(weight, one.tensors["head/W"])
    assert import_peft(folder, places("bert")).id == one.id

    for name in ("polytask_head.json", "polytask_head.safetensors"):
        (folder / name).unlink()
    own = {"backbone": BACKBONE, "card": CARD}
    with pytest.raises(PolytaskError, match="it trained classifier too"):
        import_peft(folder, places("bert"), **own)
    with pytest.raises(UsageError, match="head=HeadCard"):
        import_peft(folder, places("bert"), head_module="classifier", **own)
    back = import_peft(folder, places("bert"), head_module="classifier", head=one.head, **own)
    assert torch.equal(back.tensors["head/b"], one.tensors["head/b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    table = places("gpt2")
    one = lora(table)
    one = replace(one, tensors={name: tensor.to(dtype) for name, tensor in one.tensors.items()})
    folder = export_peft(one, tmp_path, table)
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {dtype}
    assert import_peft(folder, table).id == one.id


def test_a_file_changed_in_peft_is_read_as_it_is_now(tmp_path: Path) -> None:
    table = places("bert")
    one = with_head(lora(table))
    folder = export_peft(one, tmp_path, table)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10}))
    back = import_peft(folder, table)
    assert (back.hyperparameters["alpha"], back.card, back.head) == (10, one.card, one.head)


def test_servers_find_one_rank_and_no_patterns(tmp_path: Path) -> None:
    """vLLM and S-LoRA read r and lora_alpha only."""
    config = json.loads(
        (export_peft(lora(places("gpt2")), tmp_path, places("gpt2")) / "adapter_config.json").read_text()
    )
    assert (config["r"], config["lora_alpha"]) == (6, 10)
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)


# ------------------------------------------------------------------------------------------------------ what is refused


def foreign(folder: Path, **config: Any) -> Path:
    model = trained(bert(), peft.LoraConfig(r=4, target_modules=["query"]))
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def refusal(folder: Path, **options: Any) -> str:
    options = {"backbone": BACKBONE, "card": CARD} | options
    with pytest.raises(PolytaskError) as caught:
        import_peft(folder, options.pop("sites", places("bert")), **options)
    return one_line(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"modules_to_save": ["pooler"]}, "trained pooler too"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"peft_type": "VERA"}, "peft_type VERA"),
        ({"some_future_variant": {"x": 1}}, "some_future_variant is set"),
        ({"r": 7}, "says rank 7"),
        ({"r": "four"}, "no rank and number"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"peft_type": None, "use_dora": None}, "peft_type None"),
    ],
)
def test_what_cannot_be_represented(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    assert said in refusal(foreign(tmp_path, **config))


def test_damaged_and_foreign_folders(tmp_path: Path) -> None:
    folder = foreign(tmp_path)
    path = folder / "adapter_model.safetensors"
    good, tensors = path.read_bytes(), load_file(path)
    key = "base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"

    path.write_bytes(good[:-3])
    assert "truncated" in refusal(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    assert "has no lora_B.weight" in refusal(folder)
    save_file(tensors | {"base_model.model.embed.lora_embedding_A": torch.zeros(2, 2)}, path)
    assert "lora_embedding_A" in refusal(folder)
    save_file(tensors | {key: torch.zeros(5, 4)}, path)
    assert "16 wide" in refusal(folder)
    save_file({}, path)
    assert "holds no LoRA" in refusal(folder)
    path.unlink()
    assert "is missing" in refusal(folder)
    torch.save(tensors, folder / "adapter_model.bin")
    assert "pickle and is never read" in refusal(folder)
    path.write_bytes((folder / "adapter_model.bin").read_bytes())
    assert "zip archive" in refusal(folder)
    path.write_bytes(good)
    assert "no site in this backbone" in refusal(folder, sites=places("llama"))
    assert "pass backbone=" in refusal(folder, backbone=None)
    (folder / "adapter_config.json").write_text("{")
    assert "is not JSON" in refusal(folder)
    (folder / "adapter_config.json").write_text('{"config": {"architecture": "lora"}}')
    assert "AdapterHub" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    assert "no PEFT adapter here" in refusal(folder)


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    folder = export_peft(lora(places("bert")), tmp_path, places("bert"))
    assert "weights are not those of" in refusal(folder, backbone=BACKBONE.model_copy(update={"fingerprint": "0" * 64}))


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (adapter(method="bottleneck"), "no place for method bottleneck"),
        (adapter(tensors={"9.attn.q/A": torch.ones(2, 16)}), "site 9.attn.q is not in this backbone"),
        (adapter(tensors={"0/A": torch.ones(2, 16), "0/B": torch.ones(16, 2)}), "no module's output"),
        (adapter(tensors={"0.attn.q/A": torch.ones(2, 16)}), "where PEFT's LoRA has A and B"),
        (adapter(tensors={"0.attn.q/A": torch.ones(2, 9), "0.attn.q/B": torch.ones(16, 2)}), "reads 16"),
        (lora(places("bert"), dora=True), "has no dora"),
        (adapter(method="ia3", tensors={"0/l": torch.ones(16)}), "no module's output or input"),
        (
            adapter(method="ia3", tensors={"0.mlp.act/l": torch.ones(24), "0.mlp.down/l": torch.ones(16)}),
            "one vector for it",
        ),
        (adapter(method="ia3", tensors={"0.attn.k/l": torch.ones(5)}), "where \\(IA\\)\\^3 has l"),
    ],
)
def test_what_peft_cannot_express(tmp_path: Path, one: Adapter, said: str) -> None:
    with pytest.raises(PolytaskError, match=said) as caught:
        export_peft(one, tmp_path / "out", places("bert"))
    one_line(caught.value)
    assert not (tmp_path / "out").exists()
