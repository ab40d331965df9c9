"""OpAmp attention: the maps written out, the model's own attention run for each by hooks, and answers written with a
cache beside those of whole passes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import TOKENS, job_of, task_of
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from writers import refused, tensors_of, tokenizer, writer

from polytask.adapters import Adapter
from polytask.backbones import Backbone, Batch
from polytask.backbones.text import Asked
from polytask.backbones.weights import fingerprint
from polytask.errors import UsageError
from polytask.inference import Engine, Request
from polytask.inference.engine import WRITER
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.opamp import OpAmp
from polytask.methods.passes import Seat
from polytask.recipes.adapt import adapt
from polytask.training import train

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@cache
def backbone_of(family: str) -> Backbone:
    return tiny.backbone(family, tokenizer=TOKENS if family == "bert" else None)


@cache
def writer_of(family: str) -> Backbone:
    return writer(family)


used: list[Backbone] = []


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Whatever a test does, its backbones are bit by bit what they were, and every module runs as it did."""
    yield
    for backbone in used:
        clean(backbone)
    used.clear()


def base(family: str, *, writes: bool = False) -> Backbone:
    used.append(writer_of(family) if writes else backbone_of(family))
    return used[-1]


def clean(backbone: Backbone) -> None:
    assert fingerprint(backbone.model) == backbone.fingerprint
    for name, module in backbone.model.named_modules():
        assert "forward" not in module.__dict__, name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    before = type(backbone.model)(backbone.model.config)
    for name, module in before.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            assert backbone.model.get_submodule(name).layer_idx == module.layer_idx, name


def shaken(backbone: Backbone, m: OpAmp, seed: int = 0, *, writing: bool = False) -> Active:
    draw = torch.Generator().manual_seed(seed)
    tensors = m.start(backbone, seed, writing=writing)
    return Active.of(m, {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in tensors.items()})


def states(backbone: Backbone, adapters: list[Active], batch: Batch, weights: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return Plan(backbone, adapters).hidden(batch, weights)


# -- the equation ------------------------------------------------------------------------------------------------------


def test_two_maps_by_hand() -> None:
    """10 · (.7 − .5) + (.7 + .5) / 2 = 2.6; 10 · (.2 − .3) + .25 = −.75; 10 · (.1 − .2) + .15 = −.85; the sum is 1."""
    M = build("opamp").amplified(torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2]))
    torch.testing.assert_close(M, torch.tensor([2.6, -0.75, -0.85]))
    half = OpAmp(A_d=1.0, A_c=0.5).amplified(torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2]))
    torch.testing.assert_close(half, torch.tensor([0.5, 0.025, -0.025]))  # .2 + .3, −.1 + .125, −.1 + .075


def test_an_adapter_by_hand() -> None:
    """z = [1, −2], W_d = [[1, 1], [2, 0]], W_u = [[1, 0], [0, 3]]: W_d z = [−1, 2], gelu [−.158655, 1.954500]."""
    p = {"W_d2": torch.tensor([[1.0, 1.0], [2.0, 0.0]]), "W_u2": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}
    torch.testing.assert_close(build("opamp").E(p, 2, torch.tensor([1.0, -2.0])), torch.tensor([0.841345, 3.863499]))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_is_attention_with_the_two_maps_combined(family: str) -> None:
    """Heads of the first block from its weights alone: in a Llama with rotation behind the adapters, two query heads to
    each key head, and no map that looks ahead."""
    backbone, batch = base(family), tiny.batch(3)
    active = shaken(backbone, OpAmp(m=5, A_d=3.0, A_c=0.5, sites=("0.attn.[qk]",)))
    seen: dict[str, Tensor] = {}
    model: Any = backbone.model
    q, o = (model.get_submodule(backbone.sites[f"0.attn.{letter}"].path) for letter in "qo")
    handles = [
        q.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        backbone.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(block=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
    ]
    found = heads_of(backbone, [active], batch, o)
    for handle in handles:
        handle.remove()
    maps = [backbone.linear(backbone.sites[f"0.attn.{letter}"]) for letter in "qkv"]
    z = [seen["x"] @ m["W"].T + m["b"] for m in maps]
    R, T = batch.ids.shape
    p = [active.at["0.attn.q"], active.at["0.attn.k"]]
    allowed = batch.mask[:, None, None, :].expand(R, 1, T, T)
    if family == "llama":
        allowed = allowed & torch.ones(T, T, dtype=torch.bool).tril()
    M = []
    v = z[2].view(R, T, -1, 8).transpose(1, 2)
    for i in (1, 2):
        E = [own @ t[f"W_u{i}"].T + y for t, y in zip(p, z, strict=False) for own in [F.gelu(y @ t[f"W_d{i}"].T)]]
        qi, ki = (t.view(R, T, -1, 8).transpose(1, 2) for t in E)
        if family == "llama":
            cos, sin = model.rotary_emb(seen["block"], torch.arange(T)[None])
            qi, ki = apply_rotary_pos_emb(qi, ki, cos, sin)
            ki = ki.repeat_interleave(2, dim=1)
        M.append((qi @ ki.mT / 8**0.5).masked_fill(~allowed, -torch.inf).softmax(-1))
    if family == "llama":
        v = v.repeat_interleave(2, dim=1)
    combined = 3.0 * (M[0] - M[1]) + 0.5 * (M[0] + M[1]) / 2
    right = (combined @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found[batch.mask], right[batch.mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(combined.sum(-1), torch.full((R, 4, T), 0.5), rtol=1e-4, atol=1e-5)


def heads_of(backbone: Backbone, adapters: list[Active], batch: Batch, o: Any) -> Tensor:
    """What the output projection `o` reads, in the run that counts."""
    inner, heads = type(o).forward, []

    def forward(x: Tensor) -> Tensor:
        heads.append(x)
        return inner(o, x)

    o.forward = forward
    plain = Plan(backbone, adapters)
    try:
        with torch.no_grad(), plain.acting(torch.ones(len(batch.ids), 1)):
            backbone.hidden(batch)
    finally:
        o.__dict__.pop("forward", None)
    return heads[-1]


@every_family
def test_each_map_is_the_models_own_attention_with_other_queries_and_keys(family: str) -> None:
    """With hooks that put E behind the projections, one pass for each map: norms, rotations, windows, caps and relative
    positions are the model's."""
    backbone, batch = base(family), tiny.batch(3)
    tower = "enc." if backbone.kind == "encoder-decoder" else ""
    m = OpAmp(m=5, A_d=2.0, A_c=0.7, sites=(f"{tower}0.attn.[qk]",))
    active = shaken(backbone, m)
    o: Any = backbone.model.get_submodule(backbone.sites[f"{tower}0.attn.o"].path)

    def with_map(i: int) -> Tensor:
        heads, handles = [], []

        def behind(site: Any, p: dict[str, Tensor]) -> Any:
            def hook(_module: Any, _args: Any, y: Tensor) -> Tensor:
                z = y if site.part is None else site.part.take(y)
                z = z + F.gelu(z @ p[f"W_d{i}"].T) @ p[f"W_u{i}"].T
                return z if site.part is None else site.part.put(y, z)

            return backbone.model.get_submodule(site.path).register_forward_hook(hook)

        handles = [behind(backbone.sites[name], p) for name, p in active.at.items()]
        handles.append(o.register_forward_pre_hook(lambda _, args: heads.append(args[0])))
        with torch.no_grad():
            backbone.hidden(batch)
        for handle in handles:
            handle.remove()
        return heads[0]

    h1, h2 = with_map(1), with_map(2)
    right = 2.0 * (h1 - h2) + 0.7 * (h1 + h2) / 2
    found: list[Tensor] = []
    handle = o.register_forward_hook(lambda _, __, y: found.append(y))
    states(backbone, [active], batch)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(found[-1][batch.mask], o(right)[batch.mask], rtol=1e-5, atol=1e-5)
    assert len(found) == 1
    assert (h1 - h2)[batch.mask].abs().max() > 1e-3


def test_the_count_is_that_of_the_equation() -> None:
    """4 · 2 · m · D for each block, D = 32; in a Llama with 16 features of keys, 2 · 2 · m · (32 + 16)."""
    count = {
        family: sum(t.numel() for t in build("opamp").start(base(family), 0).values()) for family in ("bert", "llama")
    }
    assert count == {"bert": 3 * 4 * 2 * 64 * 32, "llama": 3 * 2 * 2 * 64 * (32 + 16)}


def test_dropout_is_for_training_alone() -> None:
    backbone, batch = base("bert"), tiny.batch(2)
    m = OpAmp(dropout=0.5)
    active = shaken(backbone, m)
    plain = Active(OpAmp(dropout=0.0), active.at)
    assert torch.equal(states(backbone, [active], batch), states(backbone, [plain], batch))
    trained = Plan(backbone, [active], training=True)
    assert not torch.equal(trained.hidden(batch), trained.hidden(batch))


# -- writing -----------------------------------------------------------------------------------------------------------


def prompts_of(n: int, weights: Tensor, **more: Any) -> list[Prompt]:
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 24, (n,), generator=draw).tolist()
    ids = [torch.randint(4, len(tokenizer()), (length,), generator=draw).tolist() for length in lengths]
    return [
        Prompt(own, weights[i % len(weights)], Sampling(max_tokens=4 + 3 * i % 9, **more)) for i, own in enumerate(ids)
    ]


def as_in_whole_passes(plan: Plan, prompts: list[Prompt], places: int) -> None:
    """Write with the cache, and check that each answer is as probable as one pass over prompt and answer says, and that
    the adapters have a say in it."""
    moved = torch.zeros(len(plan.adapters))
    for prompt, one in zip(prompts, generate(plan, prompts, places=places), strict=True):
        asked = passes.answered(plan.backbone, [Asked([*prompt.ids], [*one.tokens])])
        [log_p] = passes.logprobs(plan, [Seat(WRITER, {}, prompt.weights)], asked, [0])
        assert one.logprob == pytest.approx(float(log_p.sum()), abs=1e-3)
        [plain] = passes.logprobs(Plan(plan.backbone, []), [Seat(WRITER, {})], asked, [0])
        moved = moved.maximum(prompt.weights * (plain - log_p).abs().max())
    assert bool((moved > 0.02).all())


@pytest.mark.parametrize("family", [*tiny.LM])
def test_what_is_written_with_a_cache_is_what_whole_passes_say(family: str) -> None:
    """Rows of two such adapters on other blocks, of a LoRA and of none come and go; cross-attentions too."""
    backbone = base(family, writes=True)
    paired = backbone.kind == "encoder-decoder"
    made = [
        shaken(backbone, OpAmp(m=4), 1, writing=True),
        shaken(backbone, OpAmp(m=4, sites=("1-.attn.k", *["0.cross.[qk]"] * paired)), 2, writing=True),
        Active.of(build("lora"), tensors_of(backbone, "lora", 3)),
    ]
    weights = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    with torch.no_grad():
        as_in_whole_passes(Plan(backbone, made), prompts_of(12, weights), 3)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_search_finds_what_whole_passes_say(family: str) -> None:
    backbone = base(family, writes=True)
    made = [shaken(backbone, OpAmp(m=4, A_d=2.0), 1, writing=True)]
    with torch.no_grad():
        as_in_whole_passes(Plan(backbone, made), prompts_of(3, torch.ones(1, 1), beams=3), 6)


# -- trained, kept, refused --------------------------------------------------------------------------------------------


def test_it_learns_beside_another_as_it_learns_alone() -> None:
    backbone = base("bert")
    task = task_of(n=48, metric="accuracy")
    own = {"m": 8, "dropout": 0.0}
    jobs = [job_of(task, "opamp", own, "first", lr=2e-2), job_of(task, "lora", {}, "first")]
    both, alone = train(backbone, jobs)[0], train(backbone, jobs[:1])[0]
    assert both.history[-1]["loss"] < 0.9 * both.history[0]["loss"]
    assert both.history[-1]["loss"] == pytest.approx(alone.history[-1]["loss"], rel=1e-3)


def test_an_adapter_is_kept_and_answers(tmp_path: Path) -> None:
    backbone, task = base("bert"), task_of(n=24, metric="accuracy")
    one = adapt(
        backbone, task, "opamp", hyperparameters={"m": "4", "A_d": "5"}, settings=job_of(task, epochs=1).settings
    )
    one.save(tmp_path / "one")
    asked = [Request(text, adapter=one.id) for text in ("a b c", "h g e f")]
    first, again = (Engine(backbone, adapters=[each]).answer(asked) for each in (one, Adapter.load(tmp_path / "one")))
    assert [a.probability for a in first] == [a.probability for a in again]
    assert one.hyperparameters["A_d"] == 5.0


def test_sites_that_are_no_queries_or_keys_are_refused() -> None:
    for sites in (("*.attn.[qkv]",), ("*.attn",), ("*",)):
        refused(lambda sites=sites: OpAmp(sites=sites).start(base("bert"), 0), "opamp acts on queries and keys, and 0")


def test_it_is_not_mixed() -> None:
    backbone = base("bert")
    with pytest.raises(UsageError, match="an adapter by opamp cannot be mixed"):
        states(backbone, [shaken(backbone, OpAmp(m=4))], tiny.batch(2), torch.tensor([[0.5], [1.0]]))


def test_an_exception_leaves_the_backbone_as_it_was() -> None:
    backbone = base("llama")
    plan = Plan(backbone, [shaken(backbone, OpAmp(m=4))])

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    batch, plain = tiny.batch(2), backbone.hidden(tiny.batch(2))
    for letter in "qo":  # within the first run, and between the runs of a block
        handle = backbone.model.get_submodule(backbone.sites[f"1.attn.{letter}"].path).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            plan.hidden(batch)
        handle.remove()
    clean(backbone)
    assert torch.equal(backbone.hidden(batch), plain)
