"""PEFT's other methods as they are: what PEFT computes on the same tensors, beside other adapters, on the disk."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from commands import run, write_table
from jobs import TOKENS, environment, job_of, task_of
from made import adapter, one_line
from torch import Tensor
from writers import tensors_of, tokenizer, writer

from polytask.adapters import Adapter, HeadCard
from polytask.adapters.expression import mix
from polytask.backbones import Backbone, Batch
from polytask.backbones.weights import fingerprint
from polytask.composition.low_rank import as_lora
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.library import Library
from polytask.methods import build, peft_any
from polytask.methods.lifting import Active, Plan
from polytask.recipes.adapt import adapt
from polytask.training import train

SMALL: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 16, "num_subspaces": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 4},
    "LN_TUNING": {},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "LORA": {"r": 4, "use_rslora": True},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": list(range(3, 128, 2))},
    "UNILORA": {},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
TYPES = [kind for kind in SMALL if kind in peft.PeftType.__members__]
every_type = pytest.mark.parametrize("kind", TYPES)


@cache
def backbone_of(family: str) -> Backbone:
    return tiny.backbone(family, tokenizer=TOKENS)


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Whatever a test does, the backbones are bit by bit what they were, and every module is their own."""
    yield
    for family in ("bert", "llama"):
        clean(backbone_of(family))


def clean(backbone: Backbone) -> None:
    assert fingerprint(backbone.model) == backbone.fingerprint
    for name, module in backbone.model.named_modules():
        assert not type(module).__module__.startswith("peft"), name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())
    assert not hasattr(backbone.model, "peft_config")


def hyper_of(kind: str, backbone: Backbone) -> dict[str, Any]:
    """Query and value, or the norms, or the embeddings."""
    hyper = {"type": kind, **SMALL[kind]}
    if kind == "LN_TUNING":
        modules = backbone.base.named_modules()
        return hyper | {"target_modules": [path for path, m in modules if "norm" in type(m).__name__.lower()]}
    if kind == "TRAINABLE_TOKENS":
        return hyper | {"target_modules": ["embed_tokens", "word_embeddings"]}
    return hyper | {"sites": ["*.attn.[qv]"]}


def shaken(backbone: Backbone, kind: str, seed: int = 0, **more: Any) -> Active:
    """With what is trained moved from where it starts."""
    m = build("peft", hyper_of(kind, backbone) | more)
    draw = torch.Generator().manual_seed(seed)
    started = m.start(backbone, seed)
    moved = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in started.items() if m.trains(n)}
    return Active.of(m, started | moved)


def states(backbone: Backbone, adapters: list[Active], batch: Batch, weights: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return Plan(backbone, adapters).hidden(batch, weights)


def reference(backbone: Backbone, active: Active) -> peft.PeftModel:
    """PEFT's own model on a copy, with the same tensors."""
    m: Any = active.method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(backbone.base), m.peft_config(backbone)).eval()
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    named = {n.removeprefix("base_model.model.").replace(".default", ""): t for n, t in own.items()}
    for site, p in active.at.items():
        for name, t in p.items():
            named[f"{site[1:]}.{name.removeprefix('kept.')}"].data.copy_(t)
    return model


# -- against PEFT ------------------------------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_computes_what_pefts_own_model_does(family, kind):
    backbone, batch = backbone_of(family), tiny.batch(4)
    active = shaken(backbone, kind)
    model = reference(backbone, active)
    with torch.no_grad():
        options = {"use_cache": False} if family == "llama" else {}
        theirs = model(input_ids=batch.ids, attention_mask=batch.mask.long(), **options).last_hidden_state
    ours = states(backbone, [active], batch)
    torch.testing.assert_close(ours[batch.mask], theirs[batch.mask], rtol=1e-5, atol=1e-5)
    assert (ours - backbone.hidden(batch))[batch.mask].abs().max() > 1e-2
    trained = sum(t.numel() for p in active.at.values() for n, t in p.items() if not n.startswith("kept."))
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@every_type
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_are_pefts(family, kind):
    backbone, batch = backbone_of(family), tiny.batch(3)
    active = shaken(backbone, kind)
    model = reference(backbone, active)
    options = {"use_cache": False} if family == "llama" else {}
    out = model(input_ids=batch.ids, attention_mask=batch.mask.long(), **options).last_hidden_state
    out[batch.mask].square().sum().backward()
    theirs = {id(p): p.grad for p in model.parameters() if p.requires_grad}
    trained = {(at, n): t for at, p in active.at.items() for n, t in p.items() if not n.startswith("kept.")}
    for t in trained.values():
        t.requires_grad_()
    ours = Plan(backbone, [active]).hidden(batch)
    ours[batch.mask].square().sum().backward()
    named = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in model.named_parameters(remove_duplicate=False)
    }
    for (at, n), t in trained.items():
        grad = theirs[id(named[f"{at[1:]}.{n}"])]
        assert t.grad is not None, (at, n)
        scale = grad.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(t.grad / scale, grad / scale, rtol=1e-4, atol=1e-4)


@every_type
def test_what_is_not_stored_follows_from_the_config(kind):
    """Built again with other random numbers: as in a new process."""
    backbone, batch = backbone_of("bert"), tiny.batch(3)
    active = shaken(backbone, kind)
    before = states(backbone, [active], batch)
    layers = peft_any._BUILT[backbone]
    layers[active.method] = peft_any._Layers(active.method, backbone, 99)
    assert torch.equal(states(backbone, [active], batch), before)


def test_dropout_is_for_training_alone():
    backbone, batch = backbone_of("bert"), tiny.batch(2)
    active = shaken(backbone, "VERA", vera_dropout=0.5)
    torch.manual_seed(0)
    drawn_ = Plan(backbone, [active], training=True).hidden(batch).detach()
    assert not torch.allclose(drawn_, states(backbone, [active], batch))
    assert torch.equal(states(backbone, [active], batch), states(backbone, [shaken(backbone, "VERA")], batch))


# -- beside others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rows_of_a_batch_get_what_their_adapters_alone_give(family):
    """Two of one type (one set of layers), two of other types, LoRA, full, a mixture, and the backbone alone."""
    backbone = backbone_of(family)
    made = [build(name) for name in ("lora", "full")]
    others = [Active.of(m, {n: t + 0.02 for n, t in m.start(backbone, 0).items()}) for m in made]
    adapters = [
        shaken(backbone, "VERA", 1),
        shaken(backbone, "VERA", 2),
        shaken(backbone, "HRA", 3),
        shaken(backbone, "LN_TUNING", 4),
        *others,
    ]
    weights = torch.cat([torch.eye(6), torch.tensor([[0, 0, 0, 0, 0.5, 0.7], [0.0] * 6, [1, 0, 0, 0, 0, 0]])])
    batch = tiny.batch(len(weights))
    together = states(backbone, adapters, batch, weights)
    for i, row in enumerate(weights):
        one = batch.rows(torch.tensor([i]))
        mine = [k for k in range(6) if row[k]]
        alone = backbone.hidden(one)
        if mine:
            alone = states(backbone, [adapters[k] for k in mine], one, row[mine][None])
        torch.testing.assert_close(together[i][batch.mask[i]], alone[0][one.mask[0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", [[0.5, 0.0], [1.0, 0.5], [2.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
def test_it_is_not_mixed_and_that_is_told_before_anything_runs(row, monkeypatch):
    backbone = backbone_of("bert")
    lora = Active.of(m := build("lora"), m.start(backbone, 0))
    plan = Plan(backbone, [shaken(backbone, "VERA"), lora])
    monkeypatch.setattr(backbone, "hidden", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(UsageError, match="cannot be mixed: ask for it alone, with weight 1") as error:
        plan.hidden(tiny.batch(2), torch.tensor([row, [0.0, 1.0]]))
    one_line(error.value)


def test_an_exception_leaves_the_backbones_own_modules():
    backbone = backbone_of("bert")
    plan = Plan(backbone, [shaken(backbone, "VERA")])
    with pytest.raises(IndexError):
        plan.hidden(Batch(torch.full((2, 3), 9999), torch.ones(2, 3, dtype=torch.bool)))
    clean(backbone)


def test_tensors_of_other_layers_are_refused():
    backbone = backbone_of("bert")
    active = shaken(backbone, "VERA")
    moved = Active(active.method, {f"{site}.deeper": p for site, p in active.at.items()})
    with pytest.raises(PolytaskError, match=r"no tensor encoder\.layer\.0.*of another version") as error:
        states(backbone, [moved], tiny.batch(2))
    one_line(error.value)


def test_an_encoder_decoder_is_adapted_where_its_head_reads():
    backbone = tiny.backbone("t5")
    m = build("peft", {"type": "VERA", "sites": ["*.attn.[qv]"]})
    read, written = (m.start(backbone, 0, writing=writing) for writing in (False, True))
    assert {name.split(".")[0] for name in read} == {":encoder"}
    assert {name.split(".")[0] for name in written} == {":encoder", ":decoder"}
    assert read.keys() < written.keys()


@pytest.mark.parametrize(("family", "kind"), [("llama", "LOHA"), ("gpt2", "FOURIERFT")])
def test_what_it_writes_is_what_pefts_model_writes(family, kind):
    """A llama's rows that are LoRA's take another way of decoding at the same time."""
    backbone = writer(family)
    active = shaken(backbone, kind)
    lora = Active.of(build("lora"), tensors_of(backbone, "lora", 1))
    ids = [torch.randint(4, len(tokenizer()), (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 9, 6)]
    ids = [each.tolist() for each in ids]
    rule = Sampling(max_tokens=8)
    rows = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0]])
    written = generate(Plan(backbone, [active, lora]), [Prompt(i, w, rule) for i, w in zip(ids, rows, strict=True)])
    model: Any = reference(backbone, active).base_model.model
    whole: Any = copy.deepcopy(backbone.model)
    setattr(whole, whole.base_model_prefix, model)
    for i in (0, 2):
        given = {"input_ids": torch.tensor([ids[i]]), "attention_mask": torch.ones(1, len(ids[i]), dtype=torch.long)}
        end = tokenizer().eos_token_id
        theirs = whole.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=end)
        assert list(written[i].tokens) == [t for t in theirs[0, len(ids[i]) :].tolist() if t != end]
    alone = generate(Plan(backbone, []), [Prompt(i, None, rule) for i in ids])
    assert [one.tokens for one in alone] != [one.tokens for one in written]
    [plain] = generate(Plan(backbone, [lora]), [Prompt(ids[1], torch.ones(1), rule)])
    assert plain.tokens == written[1].tokens
    clean(backbone)


# -- as a LoRA ---------------------------------------------------------------------------------------------------------

NO_LORA = {
    "ADAMSS": "does not run in fp64",
    "BEFT": "changes no weight of a linear map here",  # but biases
    "LILY": "is not linear in what it reads",
    "LN_TUNING": "input_layernorm has a layer of peft's and is no linear map",
    "TRAINABLE_TOKENS": "embed_tokens has a layer of peft's and is no linear map",
}


@every_type
def test_as_a_lora_it_computes_the_same_where_it_is_linear(kind):
    backbone, batch = backbone_of("llama"), tiny.batch(4)
    active = shaken(backbone, kind)
    tensors = {f"{site}/{n}": t for site, p in active.at.items() for n, t in p.items()}
    said = active.method.hyperparameters()
    one = adapter(kind, tensors=tensors, method="peft", hyperparameters=said, backbone=backbone.card())
    if kind in NO_LORA:
        with pytest.raises(UsageError, match=NO_LORA[kind]) as error:
            as_lora(backbone, one, 32)
        one_line(error.value)
        return
    lora, off = as_lora(backbone, one, 32)
    assert off.whole < 1e-6
    ours = states(backbone, [Active.of(build("lora", lora.hyperparameters), lora.tensors)], batch)
    torch.testing.assert_close(ours[batch.mask], states(backbone, [active], batch)[batch.mask], rtol=1e-4, atol=1e-4)


# -- trained, kept, asked ----------------------------------------------------------------------------------------------


def test_it_learns_beside_another_as_it_learns_alone():
    backbone = backbone_of("bert")
    task = task_of(n=48, length=20, metric="accuracy")
    loha = {"type": "LOHA", "r": 4, "sites": ["*.attn.[qkvo]", "*.mlp.up", "*.mlp.down"]}
    jobs = [job_of(task, "peft", loha, "first", lr=1e-2, epochs=6), job_of(task, "lora", {}, "first", epochs=6)]
    both, alone = train(backbone, jobs)[0], train(backbone, jobs[:1])[0]
    assert both.history[-1]["loss"] < 0.7 * both.history[0]["loss"]
    assert both.history[-1]["loss"] == pytest.approx(alone.history[-1]["loss"], rel=1e-3)
    assert all(not t.requires_grad for t in both.tensors.values())


def test_an_adapter_is_kept_and_answers_in_a_new_process(tmp_path: Path):
    """Every type at once, with tensors of the config's and of its own random numbers."""
    backbone = backbone_of("bert")
    library = Library(tmp_path / "skills")
    draw = torch.Generator().manual_seed(5)
    found = {}
    for kind in TYPES:
        active = shaken(backbone, kind, 3)
        tensors = {f"{site}/{n}": t for site, p in active.at.items() for n, t in p.items()}
        tensors |= {"head/W": torch.randn(2, 32, generator=draw), "head/b": torch.zeros(2)}
        head = HeadCard(kind="classification", targets=("a", "b"))
        said = active.method.hyperparameters()
        one = adapter(kind, tensors=tensors, method="peft", hyperparameters=said, head=head, backbone=backbone.card())
        assert library.add(one) == one.id
        found[kind] = ask(Engine(backbone, library), kind)
    code = (
        "import sys, json, tiny\n"
        "from jobs import TOKENS\n"
        "from test_peft_any import ask\n"
        "from polytask.inference import Engine\n"
        "from polytask.library import Library\n"
        "engine = Engine(tiny.backbone('bert', tokenizer=TOKENS), Library(sys.argv[1]))\n"
        "print(json.dumps({name: ask(engine, name) for name in sys.argv[2:]}))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "skills"), *TYPES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads(done.stdout.splitlines()[-1])
    assert again == {kind: pytest.approx(values, abs=1e-6) for kind, values in found.items()}
    assert len({tuple(values) for values in found.values()}) == len(TYPES)


def ask(engine: Engine, name: str) -> list[float | None]:
    return [a.probability for a in engine.answer([Request(text, adapter=name) for text in ("a b c", "h g e f")])]


def test_whole_numbers_stay_whole(tmp_path: Path):
    """Super-tuning keeps the places of its numbers, which fp32 could not hold in a large weight."""
    backbone = backbone_of("bert")
    hyper = {"type": "SUPERTUNING", "sparsity": 0.9, "sites": ["*.attn.q"]}
    one = adapt(backbone, task_of(n=24), "peft", hyperparameters=hyper, settings=job_of(task_of(), epochs=1).settings)
    kept = {n: t for n, t in one.tensors.items() if "/kept." in n}
    assert len(kept) == 3
    assert all(not t.is_floating_point() for t in kept.values())
    one.save(tmp_path / "one")
    assert Engine(backbone, adapters=[Adapter.load(tmp_path / "one")]).answer([Request("a b", adapter=one.id)])


def test_the_engine_refuses_it_in_a_mixture(monkeypatch):
    backbone = backbone_of("bert")
    task = task_of(n=24, metric="accuracy")
    both = [
        adapt(backbone, replace(task, name=name), name, hyperparameters=hyper, settings=job_of(task, epochs=1).settings)
        for name, hyper in (("peft", {"type": "vera", "r": "8", "sites": "*.attn.q"}), ("lora", {}))
    ]
    assert both[0].hyperparameters["r"] == 8
    assert both[0].card.trained_parameters == 3 * (32 + 8) + 4 * 32 + 4  # λ_b, λ_d, head
    engine = Engine(backbone, adapters=both)
    assert engine.answer([Request("a b", adapter="peft")])[0].output in "abcd"
    monkeypatch.setattr(backbone, "hidden", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(UsageError, match="cannot be mixed"):
        engine.answer([Request("a b", adapter="lora"), Request("a b", adapter=mix({"peft": 0.5, "lora": 0.5}))])


def test_the_command(tmp_path: Path):
    table, own = write_table(tmp_path / "t.csv"), tmp_path / "skills"
    options = ("--method", "peft", "--set", "type=VERA", "--set", "r=64", "--set", "sites=*.attn.q,*.attn.v")
    done = run("adapt", table, *options, "--epochs", "1", "-l", own, "--json")
    assert done.status == 0, done.err
    assert done.json["method"] == "peft"
    assert done.json["trainable_params"] == 12 * (384 + 64) + 2 * 384 + 2
    assert run("predict", "-l", own, "-a", "t", "--json", stdin=b"I bought a melon").lines[0]["name"] == "t"
    assert "type = VERA" in run("library", "show", "t", "-l", own).out


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "says"),
    [
        ({}, "peft needs a type, as in --set type=VERA, and got ''; one of ADAMSS, BEFT"),
        ({"type": "VERRA"}, "got 'VERRA'"),
        ({"type": "PREFIX_TUNING"}, "it learns virtual tokens"),
        ({"type": "ADALORA"}, "calls in every step of training"),
        ({"type": "XLORA"}, "mix or route adapters"),
        ({"type": "VERA", "rank": 3}, "peft VERA has no hyperparameter 'rank'; it has .*target_modules"),
        ({"type": "VERA", "bias": "all"}, "would train the backbone's biases; see bitfit"),
        ({"type": "VERA", "sites": "*.attn.q", "target_modules": "q,v"}, "both say where"),
        ({"type": "ADAMSS", "use_asa": "true"}, "use_asa needs calls"),
        ({"type": "LORA", "layer_replication": [[0, 2], [1, 3]]}, "more blocks than the backbone has"),
        ({"type": "LOHA", "layers_pattern": "h"}, "peft LOHA: "),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(hyper, says):
    with pytest.raises(UsageError, match=says) as error:
        build("peft", hyper)
    one_line(error.value)


@pytest.mark.parametrize(
    ("hyper", "says"),
    [
        ({"type": "VERA", "sites": "*.mlp.act"}, "0.mlp.act is not the output of a linear map"),
        ({"type": "VERA", "target_modules": ["nowhere"]}, "peft VERA on tiny-bert: No layers types compatible"),
        ({"type": "MISS", "r": 64, "sites": "*.attn.q"}, "peft MISS on tiny-bert: .*less than or equal"),
        ({"type": "VERA", "target_modules": ["pooler.dense"]}, "changes nothing that tiny-bert reads here"),
        ({"type": "LORA", "init_lora_weights": "pissa", "sites": "*.attn.q"}, "its start changes the frozen encoder"),
    ],
)
def test_what_does_not_fit_the_backbone_is_told_when_it_starts(hyper, says):
    """PiSSA's start in PEFT takes the principal part out of W; W stays here."""
    backbone = backbone_of("bert")
    with pytest.raises(UsageError, match=says) as error:
        build("peft", hyper).start(backbone, 0)
    one_line(error.value)
    clean(backbone)


@pytest.mark.skipif(not peft.__version__.startswith("0.21."), reason="the types are those of PEFT 0.21")
def test_every_type_of_this_peft_is_tried_or_refused():
    assert {each.value for each in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING} == SMALL.keys() | peft_any.REFUSED.keys()
    assert not SMALL.keys() & peft_any.REFUSED.keys()


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="pip install peft") as error:
        build("peft", {"type": "VERA"})
    one_line(error.value)
