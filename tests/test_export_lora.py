"""An adapter as the nearest LoRA: by hand, against the real PEFT, and what has no place in a LoRA."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from commands import run
from made import adapter, one_line
from torch import Tensor

from polytask.adapters import Adapter, HeadCard, export_peft
from polytask.backbones import Backbone, load
from polytask.composition.low_rank import as_lora, nearest
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine
from polytask.library import Library
from polytask.methods import build, methods
from polytask.methods.lifting import Active, Plan


@cache
def backbone_of(family: str) -> Backbone:
    return tiny.backbone(family)


def made(backbone: Backbone, name: str, hyper: dict[str, Any] | None = None, scale: float = 0.2) -> Adapter:
    """With tensors that have been moved from where they start, and a head."""
    m = build(name, hyper or {})
    draw = torch.Generator().manual_seed(1)
    tensors = {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, 0).items()}
    tensors |= {"head/W": torch.randn(2, backbone.hidden_size, generator=draw), "head/b": torch.zeros(2)}
    head = HeadCard(kind="classification", targets=("a", "b"))
    return adapter(
        name, tensors=tensors, method=name, hyperparameters=m.hyperparameters(), head=head, backbone=backbone.card()
    )


def states(backbone: Backbone, one: Adapter) -> Tensor:
    batch = tiny.batch(4)
    active = Active.of(build(one.method, one.hyperparameters), one.tensors)
    with torch.no_grad():
        return Plan(backbone, [active]).hidden(batch)[batch.mask]


def plain(backbone: Backbone) -> Tensor:
    batch = tiny.batch(4)
    return backbone.hidden(batch)[batch.mask]


def weight(one: Adapter, backbone: Backbone, site: str) -> Tensor:
    """B A, in fp64; α = r, so that the scale is 1."""
    assert one.hyperparameters["alpha"] == one.hyperparameters["r"]
    return one.at(site)["B"].double() @ one.at(site)["A"].double()


# -- the mathematics ---------------------------------------------------------------------------------------------------


def test_by_hand():
    """diag(3, 4) has singular values 4 and 3; of rank one, diag(0, 4) is nearest, and 3 / √(3² + 4²) = 0.6 is missing.
    √4 = 2 stands in A and in B."""
    ΔW = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    A, B = nearest(ΔW, 1)
    torch.testing.assert_close(B @ A, torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(A.abs(), torch.tensor([[0.0, 2.0]]))
    torch.testing.assert_close(B.abs(), torch.tensor([[0.0], [2.0]]))
    assert float((ΔW - B @ A).norm() / ΔW.norm()) == pytest.approx(0.6)
    A, B = nearest(ΔW, 3)  # one more than it has
    assert A.shape == (3, 2)
    assert B.shape == (2, 3)
    torch.testing.assert_close(B @ A, ΔW)


def test_full_by_hand():
    """A difference of two weights by known matrices: q's of rank one, v's diag(3, 4) beside zeros."""
    backbone = backbone_of("bert")
    u, w = torch.zeros(32), torch.zeros(32)
    u[5], w[7] = 2.0, 1.0
    v = torch.zeros(32, 32)
    v[0, 0], v[1, 1] = 3.0, 4.0
    path = backbone.sites["1.attn.q"].path
    tensors = {f":{path}/weight": torch.outer(u, w), f":{path.replace('query', 'value')}/weight": v}
    names = [name[1:].replace("/", ".") for name in tensors]
    one = adapter(tensors=tensors, method="full", hyperparameters={"weights": names}, backbone=backbone.card())
    lora, off = as_lora(backbone, one, 1)
    assert list(off.sites) == ["1.attn.q", "1.attn.v"]
    assert off.sites["1.attn.q"] == pytest.approx(0, abs=1e-7)
    assert off.sites["1.attn.v"] == pytest.approx(0.6)
    assert off.whole == pytest.approx(3 / math.sqrt(2**2 + 3**2 + 4**2))
    assert off.left_out == 0
    torch.testing.assert_close(weight(lora, backbone, "1.attn.q"), torch.outer(u, w).double())
    assert lora.at("1.attn.q")["A"].abs().max() == pytest.approx(math.sqrt(2))  # shared evenly
    assert "off by 55.71% in all, by 60.00% at most (1.attn.v)" in str(off)


EVERYWHERE = ["*.attn.[qkvo]", "*.mlp.up", "*.mlp.down"]
LINEAR = [
    ("lora", {"r": 3, "alpha": 5, "sites": EVERYWHERE}),
    ("lora", {"r": 3, "alpha": 5, "rslora": True}),
    ("dora", {"r": 3, "sites": EVERYWHERE}),
    ("kasa", {"r": 3}),
]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox", "modernbert", "phi3", "t5"])
@pytest.mark.parametrize(("name", "hyper"), LINEAR)
def test_at_full_rank_it_computes_the_same(family, name, hyper):
    backbone = backbone_of(family)
    one = made(backbone, name, hyper)
    lora, off = as_lora(backbone, one, 64)
    assert off.whole < 1e-6
    assert off.left_out == 0
    assert set(off.sites) == set(one.sites) == set(lora.sites)
    torch.testing.assert_close(states(backbone, lora), states(backbone, one), rtol=1e-5, atol=2e-5)
    assert (states(backbone, one) - plain(backbone)).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name in methods() if name not in ("head", "peft", "full", "reprogram")])
def test_every_method_computes_the_same_or_says_no(name):
    """Those of peft are in test_peft_any."""
    backbone = backbone_of("llama")
    one = made(backbone, name)
    try:
        lora, off = as_lora(backbone, one, 64)
    except UsageError as error:
        one_line(error)
        assert name not in ("lora", "dora", "kasa", "pissa", "elastic")
        return
    assert off.whole < 1e-6
    torch.testing.assert_close(states(backbone, lora), states(backbone, one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_lora_is_itself_at_its_own_rank(family):
    backbone = backbone_of(family)
    one = made(backbone, "lora", {"r": 3, "alpha": 5, "sites": EVERYWHERE})
    lora, off = as_lora(backbone, one, 3)
    assert off.whole < 1e-6
    assert max(off.sites.values()) < 1e-6
    torch.testing.assert_close(states(backbone, lora), states(backbone, one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_missing_is_what_eckart_and_young_say(family):
    """DoRA's W' − W by PEFT's merge, and its small singular values."""
    backbone = backbone_of(family)
    one = made(backbone, "dora", {"r": 4})
    _, off = as_lora(backbone, one, 2)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, use_dora=True, target_modules=[backbone.sites[site].path for site in one.sites]
    )
    model = peft.get_peft_model(copy.deepcopy(backbone.model).double(), config)
    for site in one.sites:
        module = model.base_model.model.get_submodule(backbone.sites[site].path)
        p = one.at(site)
        module.lora_A["default"].weight.data = p["A"].double()
        module.lora_B["default"].weight.data = p["B"].double()
        module.lora_magnitude_vector["default"].weight.data = p["m"].double()
    merged = model.merge_and_unload()
    missed, whole = 0.0, 0.0
    for site in one.sites:
        path = backbone.sites[site].path
        W = backbone.model.get_submodule(path).weight.double()
        σ = torch.linalg.svdvals(merged.get_submodule(path).weight - W)
        assert off.sites[site] == pytest.approx(float(σ[2:].norm() / σ.norm()), rel=1e-4)
        missed, whole = math.hypot(missed, float(σ[2:].norm())), math.hypot(whole, float(σ.norm()))
    assert off.whole == pytest.approx(missed / whole, rel=1e-4)
    assert 0.01 < off.whole < 1


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox", "phi3", "modernbert", "t5", "bart"])
def test_full_at_full_rank_is_the_difference_without_what_is_left_out(family):
    backbone = backbone_of(family)
    one = made(backbone, "full", scale=0.02)
    with pytest.raises(UsageError, match="has no place in a LoRA") as error:
        as_lora(backbone, one, 128)
    one_line(error.value)
    lora, off = as_lora(backbone, one, 128, drop=True)
    assert off.whole < 1e-6
    maps = {backbone.model.get_submodule(s.path) for s in backbone.sites.values() if s.point == "output"}
    held = {}
    for name, Δθ in one.tensors.items():
        module = backbone.base.get_submodule(name[1:].rpartition("/")[0]) if name[0] == ":" else None
        held[name] = Δθ if module is None or (module in maps and name.endswith("/weight")) else torch.zeros_like(Δθ)
    only = adapter(tensors=held, method="full", hyperparameters=one.hyperparameters, backbone=backbone.card())
    torch.testing.assert_close(states(backbone, lora), states(backbone, only), rtol=1e-4, atol=2e-5)
    total = math.hypot(*(float(t.double().norm()) for n, t in one.tensors.items() if n[0] == ":"))
    rest = math.hypot(*(float((t - held[n]).double().norm()) for n, t in one.tensors.items()))
    assert off.left_out == pytest.approx(rest / total)
    assert f"{rest / total:.2%} of the norm" in str(error.value)
    assert f"left out: {rest / total:.2%}" in str(off)


# -- PEFT reads it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("name", ["dora", "kasa", "full"])
def test_peft_serves_it(family, name, tmp_path):
    """At a rank that is too low, so that it is the LoRA's numbers that are compared. The file has that rank for each
    module, fused or not."""
    backbone = backbone_of(family)
    hyper = {} if name == "full" else {"sites": ["*.attn.[qkv]", "*.mlp.up"]}
    lora, off = as_lora(backbone, made(backbone, name, hyper, 0.1), 4, drop=True)
    assert 0.05 < off.whole < 1
    folder = export_peft(lora, tmp_path / "out", backbone.sites)
    said = json.loads((folder / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"], said["rank_pattern"]) == ("LORA", 4, 4, {})
    batch = tiny.batch(4)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder).eval()
    options = {"use_cache": False} if backbone.kind == "decoder" else {}
    with torch.no_grad():
        theirs = model(input_ids=batch.ids, attention_mask=batch.mask.long(), **options).last_hidden_state
    torch.testing.assert_close(states(backbone, lora), theirs[batch.mask], rtol=1e-5, atol=2e-5)
    assert (theirs[batch.mask] - plain(backbone)).abs().max() > 1e-2


# -- the adapter that comes out ----------------------------------------------------------------------------------------


def test_it_is_an_adapter_like_any_other():
    backbone = tiny.backbone("bert", tokenizer=tiny.words("a", "b"))
    one = made(backbone, "dora")
    lora, off = as_lora(backbone, one, 2)
    assert (lora.method, lora.hyperparameters["r"], lora.head) == ("lora", 2, one.head)
    assert torch.equal(lora.at("head")["W"], one.at("head")["W"])
    assert lora.card.lineage.parents == (one.id,)
    assert lora.card.scores == {}
    assert str(off) in lora.card.notes[-1]
    [answer] = Engine(backbone, adapters=[lora]).answer([request("a b", lora)])
    assert answer.output in ("a", "b")


def request(text: str, one: Adapter) -> Any:
    from polytask.inference import Request

    return Request(text, adapter=one.id)


# -- what has no place in a LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "hyper", "says"),
    [
        ("bert", "bitfit", {}, "changes no weight of a linear map here"),
        ("bert", "head", {}, "changes no weight of a linear map here"),
        ("bert", "bottleneck", {}, "bottleneck at 0.attn.o is not linear in what it reads"),
        ("bert", "pfeiffer", {}, r"acts at 0.sum, which is no linear map's output \(sum\)"),
        ("bert", "lora", {"sites": ["embed"]}, r"acts at embed, which is no linear map's output \(stream\)"),
        ("bert", "lora", {"sites": ["*.mlp"]}, r"acts at 0.mlp, which is no linear map's output \(across\)"),
        ("bert", "ia3", {"sites": ["*.attn.k"]}, "of the norm of its difference has no place .* the bias part at"),
        ("llama", "ia3", {}, r"acts at 0.mlp.act, which is no linear map's output \(input\)"),
    ],
)
def test_what_no_lora_holds_is_refused(family, name, hyper, says):
    backbone = backbone_of(family)
    with pytest.raises(UsageError, match=says) as error:
        as_lora(backbone, made(backbone, name, hyper), 4)
    one_line(error.value)
    if name == "bitfit":  # there is nothing beside what would be left out
        with pytest.raises(UsageError, match="changes no weight"):
            as_lora(backbone, made(backbone, name, hyper), 4, drop=True)


def test_an_untrained_adapter_is_no_lora():
    """DoRA's m is ‖W‖ in fp32, so that its ΔW is what was rounded: of full rank, and nothing."""
    backbone = backbone_of("bert")
    with pytest.raises(UsageError, match="changes no weight"):
        as_lora(backbone, made(backbone, "dora", scale=0.0), 4)


def test_a_method_of_activations_that_is_linear_is_one():
    """(IA)³ at the output of a map without bias is diag(l) W."""
    backbone = backbone_of("llama")
    one = made(backbone, "ia3", {"sites": ["*.attn.k"]})
    lora, _ = as_lora(backbone, one, 16)
    W = backbone.model.get_submodule(backbone.sites["2.attn.k"].path).weight
    expected = (one.at("2.attn.k")["l"] - 1)[:, None] * W
    torch.testing.assert_close(weight(lora, backbone, "2.attn.k"), expected.double(), rtol=1e-5, atol=1e-6)


def test_a_bias_part_is_left_out_where_that_is_asked_for():
    """Of (IA)³ on a map with a bias: ΔW = diag(l − 1) W stays, (l − 1) ∘ b does not."""
    backbone = backbone_of("bert")
    one = made(backbone, "ia3", {"sites": ["1.attn.k"]})
    _, off = as_lora(backbone, one, 32, drop=True)
    module: Any = backbone.model.get_submodule(backbone.sites["1.attn.k"].path)
    change = one.at("1.attn.k")["l"] - 1
    bias, all_ = (change * module.bias).norm(), (change[:, None] * module.weight).norm()
    assert off.left_out == pytest.approx(float(bias / torch.hypot(bias, all_)), rel=1e-5)
    assert off.whole < 1e-6


def test_wrong_use():
    backbone = backbone_of("bert")
    with pytest.raises(UsageError, match="rank = 0"):
        as_lora(backbone, made(backbone, "lora"), 0)
    with pytest.raises(PolytaskError, match="belongs to other weights than those of tiny-llama"):
        as_lora(backbone_of("llama"), made(backbone, "lora"), 4)


# -- on the command line -----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path):
    base = load("minilm", precision="fp32")
    own = tmp_path / "skills"
    with_ = {"sites": ["[0-1].attn.[qv]"]}
    Library(own).add(made(base, "dora", with_))
    Library(own).add(made(base, "bitfit", with_))
    done = run("library", "export", "dora", tmp_path / "one", "--format", "lora", "--rank", "8", "-l", own)
    assert done.status == 0, done.err
    assert "as a LoRA of rank 8, off by " in done.out.replace("\n", " ")
    said = run(
        "library", "export", "dora", tmp_path / "two", "--format", "lora", "--rank", "3", "-l", own, "--json"
    ).json
    assert said["rank"] == 3
    assert list(said["errors"]) == ["0.attn.q", "0.attn.v", "1.attn.q", "1.attn.v"]
    assert 0 < min(said["errors"].values()) <= said["error"] <= max(said["errors"].values()) < 1
    assert said["left_out"] == 0
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 3, "minilm")
    refused = run("library", "export", "bitfit", tmp_path / "three", "--format", "lora", "-l", own)
    assert refused.status == 2
    assert "no LoRA stands for it" in refused.error
    assert not (tmp_path / "three").exists()
    strange = run("library", "export", "dora", tmp_path / "four", "--format", "gguf", "-l", own)
    assert "one of polytask, peft, lora" in strange.error
