"""Bitune: what the paper's procedure gives when it is run step by step on models with merged LoRAs, in the passes of
training, in shared rows and while writing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from writers import clean, writer

from polytask.adapters import HeadCard, TextCard
from polytask.backbones import Backbone
from polytask.errors import UsageError
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import build, passes
from polytask.methods.bitune import Bitune, _Reading
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat, Unit

DECODERS = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "mistral", "gpt_neox"])
W = torch.ones(1, 1)


def active(backbone: Backbone, seed: int = 0, scale: float = 0.2) -> Active:
    """With LoRAs that do something, and coefficients of either sign."""
    m = build("bitune", {"r": 2, "alpha": 2})
    draw = torch.Generator().manual_seed(seed)
    start = m.start(backbone, 0, writing=True)
    return Active.of(
        m,
        {
            n: t + (0.05 if n.endswith(("w_K", "w_V")) else scale) * torch.randn(t.shape, generator=draw)
            for n, t in start.items()
        },
    )


def merged(backbone: Backbone, one: Active, way: str) -> Any:
    """A copy of the model with W + (α/r) B A of one of the LoRAs."""
    model: Any = copy.deepcopy(backbone.model)
    with torch.no_grad():
        for name, p in one.at.items():
            if "A" + way not in p:
                continue
            site, Δ = backbone.sites[name], p["B" + way] @ p["A" + way]
            weight = model.get_submodule(site.path).weight
            turned = not isinstance(model.get_submodule(site.path), torch.nn.Linear)  # transformers' Conv1D
            rows = weight.data.T if turned else weight.data
            if site.part is None:
                rows += Δ
            else:
                rows.copy_(site.part.put(rows.T, site.part.take(rows.T) + Δ.T).T)
    return model


def by_hand(backbone: Backbone, one: Active, prompt: list[int], answer: list[int]) -> Tensor:
    """Next-token logits after the prompt and after each token of the answer [1 + answer, V], one step at a time."""
    n = len(prompt) - 1
    ids = torch.tensor([prompt[:-1]])
    both, ahead, mixed = DynamicCache(), DynamicCache(), DynamicCache()
    model = merged(backbone, one, "→")
    with torch.no_grad():
        if n:
            nothing: Any = torch.zeros(1, 1, n, n)
            kinds, _ = backbone.windows
            nothing = dict.fromkeys(kinds, nothing) if len(kinds) > 1 else nothing
            merged(backbone, one, "↔")(ids, attention_mask=nothing, past_key_values=both, use_cache=True)
            model(ids, past_key_values=ahead, use_cache=True)
        for i, (there, back) in enumerate(zip(ahead.layers, both.layers, strict=True)):
            k, v = (float(one.at[str(i)][c].abs()) / (0.01 + float(one.at[str(i)][c].abs())) for c in ("w_K", "w_V"))
            mixed.update((1 - k) * there.keys + k * back.keys, (1 - v) * there.values + v * back.values, i)
        found = []
        for token in (prompt[-1], *answer):
            out = model(torch.tensor([[token]]), past_key_values=mixed, use_cache=True)
            found.append(out.logits[0, -1])
    return torch.stack(found)


# ------------------- by hand


@pytest.mark.parametrize(("w", "share"), [(0.01, 0.5), (0.03, 0.75), (-0.5, 0.9804), (0.0, 0.0)])
def test_coefficients_are_the_papers(w: float, share: float) -> None:
    """w / (τ + w): .01 / .02, .03 / .04, .5 / .51."""
    reading = object.__new__(_Reading)
    reading.tau = 0.01
    K = reading.mix(torch.tensor([w]), torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3))
    torch.testing.assert_close(K, torch.full((1, 1, 2, 3), share), rtol=0, atol=5e-5)


@DECODERS
def test_without_loras_and_coefficients_it_is_the_backbone(family: str) -> None:
    backbone = writer(family)
    m = build("bitune")
    tensors = {n: torch.zeros_like(t) if n.endswith(("w_K", "w_V")) else t for n, t in m.start(backbone, 0).items()}
    batch = backbone.pack([[[5, 6, 7, 8], [9, 8]], [[4, 5, 6]]])
    asked = torch.zeros_like(batch.mask)
    asked[0, :2] = asked[0, 4:6] = asked[1, :1] = True
    with torch.no_grad():
        found = Plan(backbone, [Active.of(m, tensors)]).hidden(replace(batch, asked=asked), torch.ones(2, 1))
        plain = backbone.hidden(batch)
    torch.testing.assert_close(found[batch.mask], plain[batch.mask], rtol=1e-4, atol=1e-4)


@DECODERS
def test_it_is_the_papers_procedure_step_by_step(family: str) -> None:
    """On texts longer than a sliding window too (Mistral's, Gemma 2's)."""
    backbone = writer(family, **({"sliding_window": 4} if family in ("gemma2", "mistral") else {}))
    one = active(backbone)
    for prompt, answer in (([5, 6, 7, 8, 9, 4, 5], [6, 7, 30]), ([5, 6], [7]), ([5], [6, 7])):
        batch = backbone.collate([[*prompt, *answer]])
        asked = torch.arange(batch.ids.shape[1])[None] < len(prompt)
        at = torch.tensor([[0, len(prompt) - 1 + k] for k in range(len(answer) + 1)])
        with torch.no_grad():
            found = Plan(backbone, [one]).logits(replace(batch, asked=asked), W, at)
        expected = by_hand(backbone, one, prompt, answer)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        plain = backbone.model(batch.ids).logits[0, at[:, 1]]
        assert (found - plain).abs().max() > 1e-2
    clean(backbone)


def test_numbers_are_two_loras_and_two_to_a_block() -> None:
    backbone = tiny.backbone("llama")  # 3 blocks, d = 32, q and o 32, k and v 16, feed-forward 64
    kv, others = 8 * 2 * (32 + 16), 8 * (2 * (32 + 32) + 3 * (32 + 64))
    start = build("bitune").start(backbone, 0)
    assert sum(t.numel() for t in start.values()) == 3 * (kv + others) + 3 * kv + 2 * others + 2 * 3
    assert all(float(t) == pytest.approx(0.01) for n, t in start.items() if n.endswith(("w_K", "w_V")))
    assert "0" not in build("bitune").only(start).sites
    assert build("bitune").only(start).start(backbone, 0).keys() == start.keys()


# ------------------- in training's passes, and in writing


CARD = HeadCard(kind="generation", text=TextCard(template="plain"))


@DECODERS
def test_training_reads_answers_behind_their_own_prompts(family: str) -> None:
    """Several to a row: what each token of an answer is predicted with is what the procedure gives for it alone."""
    backbone = writer(family)
    one = active(backbone)
    asked = [([5, 6, 7, 8], [9, 4]), ([8, 9, 4, 5, 6, 7], [30]), ([7], [5, 5, 6]), ([4, 4], [7, 8])]
    units = [
        Unit(([*prompt, *answer[:-1]],), [*range(len(prompt) - 1, len(prompt) + len(answer) - 1)], answer)
        for prompt, answer in asked
    ]
    seats = [Seat(CARD, {}, torch.ones(1))]
    found = passes.logprobs(Plan(backbone, [one]), seats, units, [0] * len(units))
    for own, (prompt, answer) in zip(found, asked, strict=True):
        z = by_hand(backbone, one, prompt, answer[:-1]).log_softmax(-1)
        torch.testing.assert_close(own, z[range(len(answer)), answer], rtol=1e-4, atol=1e-4)


@DECODERS
def test_writing_goes_on_from_the_mixed_keys_and_values(family: str) -> None:
    """Greedy writing in a batch, with a LoRA's row among them, gives what the whole sequence gives, read anew for each
    token."""
    backbone = writer(family, **({"sliding_window": 4} if family in ("gemma2", "mistral") else {}))
    lora = build("lora")
    draw = torch.Generator().manual_seed(3)
    other = {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in lora.start(backbone, 0).items()}
    plan = Plan(backbone, [active(backbone), Active.of(lora, other)])
    rows = [([5, 6, 7], [1.0, 0.0]), ([8, 9, 4, 5, 6], [0.0, 1.0]), ([7, 7, 30, 31, 9, 8], [1.0, 0.0]), ([9], [1.0, 0])]
    rule = Sampling(max_tokens=6)
    found = generate(plan, [Prompt(ids, torch.tensor(w), rule) for ids, w in rows], places=2)
    for (ids, w), written in zip(rows, found, strict=True):
        tokens: list[int] = []
        total = 0.0
        for _ in range(len(written.tokens) + (written.ended == "end")):
            batch = backbone.collate([[*ids, *tokens]])
            asked = torch.arange(batch.ids.shape[1])[None] < len(ids)
            at = torch.tensor([[0, len(ids) + len(tokens) - 1]])
            with torch.no_grad():
                z = plan.logits(replace(batch, asked=asked), torch.tensor([w]), at)[0].log_softmax(-1)
            tokens.append(int(z.argmax()))
            total += float(z.max())
        assert tokens[: len(written.tokens)] == list(written.tokens)
        assert written.logprob == pytest.approx(total, abs=1e-3)
    clean(backbone)


def test_gradients_go_through_both_readings_of_the_prompt() -> None:
    """And are right in size: a finite difference along all tensors, in fp64."""
    backbone = writer("llama")
    backbone.model.double()
    backbone.dtype = torch.float64
    m = Bitune(r=2)
    draw = torch.Generator().manual_seed(0)
    start = m.start(backbone, 0, writing=True)
    tensors = {n: (t + 0.2 * torch.randn(t.shape, generator=draw)).double().requires_grad_() for n, t in start.items()}
    step = {n: torch.randn(t.shape, generator=draw, dtype=torch.float64) for n, t in tensors.items()}
    units = [Unit(([5, 6, 7, 8, 9],), [2, 3, 4], [8, 9, 4]), Unit(([4, 5, 6],), [2], [9])]

    def loss(at: dict[str, Tensor]) -> Tensor:
        plan = Plan(backbone, [Active.of(m, at)], training=True)
        [(_, _, z)] = passes.forward(plan, [Seat(CARD, {}, torch.ones(1))], units, [0, 0])
        return z.double().sin().sum()

    loss(tensors).backward()
    assert all(t.grad is not None and bool(t.grad.abs().max() > 0) for t in tensors.values())
    slope = sum(float((t.grad * step[n]).sum()) for n, t in tensors.items() if t.grad is not None)
    with torch.no_grad():
        up, down = ({n: t + s * step[n] for n, t in tensors.items()} for s in (1e-3, -1e-3))
        assert float(loss(up) - loss(down)) / 2e-3 == pytest.approx(slope, rel=5e-2)  # logits are rounded to fp32


def test_what_has_no_causal_mask_to_open_is_refused() -> None:
    for family in ("bert", "t5"):
        with pytest.raises(UsageError, match="opens a decoder's causal mask"):
            build("bitune").start(tiny.backbone(family), 0)
    backbone = tiny.backbone("llama")
    with pytest.raises(UsageError, match="leave it as it is"):
        Plan(backbone, [active(backbone)]).hidden(tiny.batch(2), causal=False)
    clean(backbone)
