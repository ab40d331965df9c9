"""Mixtures of experts: what stands at their one site, which methods need others, and the experts that a task needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
import writers
from jobs import TOKENS, job_of, task_of
from torch import Tensor
from torch.nn import functional as F

import polytask as pt
from polytask.backbones import Backbone, Batch, families
from polytask.backbones.frame import Frame, read
from polytask.backbones.lean import Lean
from polytask.errors import UsageError
from polytask.methods import build, methods, passes, selectors
from polytask.methods.lifting import Active, Plan
from polytask.methods.selectors.esft import ESFT, reached
from polytask.training import Job, Learned, train
from polytask.training.look import Looking

every_mixture = pytest.mark.parametrize("family", tiny.MIXTURES)


def by_hand(backbone: Backbone, block: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the experts make of tokens x [N, d], one after another, and the weights [N, experts] they go there with."""
    at = families.experts(backbone.base)[block]
    W, maps = backbone.base.get_submodule(at.router).weight, backbone.base.get_submodule(at.maps)
    p = (x @ W.T).softmax(-1)
    kept, which = p.topk(2)
    if backbone.family == "mixtral" or backbone.model.config.norm_topk_prob:
        kept = kept / kept.sum(-1, keepdim=True)
    g = torch.zeros_like(p).scatter(1, which, kept)
    y = torch.zeros_like(x)
    for i in range(4):
        gate, up = (x @ maps.gate_up_proj[i].T).chunk(2, -1)
        y += g[:, i, None] * ((F.silu(gate) * up) @ maps.down_proj[i].T)
    return y, g


def seen(backbone: Backbone, batch: Batch, path: str) -> tuple[Tensor, Tensor]:
    """What a module reads and puts out in a pass over a batch."""
    found: list[Tensor] = []
    handle = backbone.model.get_submodule(path).register_forward_hook(lambda _, args, y: found.extend((args[0], y)))
    backbone.hidden(batch)
    handle.remove()
    x, y = found
    return x, y


# ------------------- the site


@every_mixture
@pytest.mark.parametrize("scaled", [True, False])
def test_a_mixture_is_one_site_that_is_the_weighted_sum_of_its_experts(family: str, scaled: bool) -> None:
    backbone = tiny.backbone(family, **({} if family == "mixtral" else {"norm_topk_prob": scaled}))
    assert [n for n in backbone.sites if ".mlp" in n] == ["0.mlp", "1.mlp", "2.mlp"]
    for block in "012":
        site = backbone.sites[f"{block}.mlp"]
        assert (site.point, site.reads, site.width, site.source) == ("across", 32, 32, site.path)
        x, y = seen(backbone, tiny.batch(3), site.path)
        torch.testing.assert_close(y.flatten(0, 1), by_hand(backbone, block, x.flatten(0, 1))[0], rtol=1e-4, atol=1e-4)


def test_blocks_without_experts_have_the_sites_of_plain_ones() -> None:
    """Of Qwen 3, where the config says which."""
    backbone = tiny.backbone("qwen3_moe", mlp_only_layers=[1])
    assert list(families.experts(backbone.model)) == ["0", "2"]
    assert [n for n in backbone.sites if ".mlp." in n] == ["1.mlp.gate", "1.mlp.up", "1.mlp.act", "1.mlp.down"]
    assert {n.rpartition("/")[0] for n in build("lora", {"sites": "*.mlp.up"}).start(backbone, 0)} == {"1.mlp.up"}
    inner = {path: where for path, where in backbone.places.items() if ".mlp" in path}
    assert {where for where in inner.values() if where[1] == "mlp"} == {("0", "mlp"), ("1", "mlp"), ("2", "mlp")}
    assert inner["layers.0.mlp.experts"] == inner["layers.0.mlp.gate"] == ("0", "mlp")


@every_mixture
@pytest.mark.parametrize("name", [n for n in methods() if n not in ("head", "peft", "reprogram")])
def test_a_method_whose_sites_are_within_the_network_says_which_is_not_there(family: str, name: str) -> None:
    backbone, m = tiny.backbone(family), build(name)
    absent = [pattern for pattern in m.sites if ".mlp." in pattern]
    if absent:
        with pytest.raises(UsageError) as error:
            m.start(backbone, 0)
        assert str(error.value).startswith(f"no site matches {absent[0]!r}; near it: *.mlp")
    else:
        assert m.start(backbone, 0)


def test_these_methods_want_other_sites_on_a_mixture() -> None:
    lacking = {n for n in methods() if any(".mlp." in pattern for pattern in methods()[n].sites)}
    assert {"bitfit", "bottleneck", "compacter", "elastic", "ia3"} <= lacking
    assert lacking.isdisjoint({"lora", "dora", "pfeiffer", "parallel", "full", "prefix", "prompt", "lofit"})


@every_mixture
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_texts_and_rows_alone_go_to_the_same_experts(family: str, precision: str) -> None:
    backbone = tiny.backbone(family, precision=precision)
    texts = [[5, 6, 7], [9, 8], [20, 21, 22, 23]]
    packed = backbone.hidden(backbone.pack([texts[:2], texts[2:]]))
    alone = [backbone.hidden(backbone.collate([ids]))[0, : len(ids)] for ids in texts]
    for found, right in zip((packed[0, :3], packed[0, 3:5], packed[1, :4]), alone, strict=True):
        limit = 1e-5 if precision == "fp32" else 0.06
        assert (found - right).float().norm() <= limit * right.float().norm()


@every_mixture
def test_writing_a_token_at_a_time_is_reading_all(family: str) -> None:
    backbone = tiny.backbone(family)
    assert not Lean.fits(backbone)
    texts = [[5, 6, 7, 30, 31], [9, 8, 40, 41]]
    frame = Frame(backbone)
    with torch.no_grad():
        frame.join(read(backbone, backbone.collate([ids[:-2] for ids in texts])))
        for step in (-2, -1):
            h = frame.step(torch.tensor([ids[step] for ids in texts]), {})
    for i, ids in enumerate(texts):
        torch.testing.assert_close(
            h[i], backbone.hidden(backbone.collate([ids]))[0, len(ids) - 1], rtol=1e-4, atol=1e-4
        )


@every_mixture
def test_an_adapter_of_a_mixture_writes(family: str) -> None:
    backbone = writers.writer(family)
    examples = tuple(pt.Example(str(i), text, "two dogs") for i, text in enumerate(["the cat", "a dog", "the mat"] * 4))
    task = pt.Task("t", "generation", examples, examples[:2])
    skill = pt.adapt(backbone, task, "lora", settings=pt.Settings(epochs=8, batch=4, lr=2e-2))
    [answer] = pt.Engine(backbone, adapters=[skill]).answer([pt.Request("the cat")])
    assert answer.output == "two dogs"


# ------------------- the experts that a task needs (ESFT)


def job(hyper: dict[str, Any] | None = None, method: str = "full@esft", **more: Any) -> Job:
    found, chooser = selectors.build(method, hyper)
    plain = job_of(task_of(held=0), "head", pool="last", **more)
    return Job(plain.task, found, plain.head, plain.settings, chooser)


def learn(backbone: Backbone, **more: Any) -> tuple[Learned, Looking]:
    """What training gives, and what the selector looked at."""
    one, looks = job(**more), []
    assert one.selector is not None

    class Keep(type(one.selector)):  # type: ignore[misc]
        def choose(self, look: Looking) -> Any:
            looks.append(look)
            return super().choose(look)

    object.__setattr__(one, "selector", Keep(**one.selector.hyperparameters()))
    return train(backbone, [one])[0], looks[0]


@pytest.mark.parametrize(
    ("score", "p", "chosen"),
    [
        ([0.5, 0.3, 0.2, 0.0], 0.2, [0]),
        ([0.25, 0.25, 0.25, 0.25], 0.3, [0, 1]),  # 0.25 is less, 0.5 is not
        ([0.1, 0.5, 0.4, 0.0], 0.9, [1, 2]),
        ([0.1, 0.2, 0.0, 0.1], 0.5, [1, 0, 3, 2]),  # gates that do not sum to one may never get there
    ],
)
def test_experts_are_taken_until_their_scores_reach_p(score: list[float], p: float, chosen: list[int]) -> None:
    assert reached(torch.tensor(score, dtype=torch.double), p).tolist() == chosen


@pytest.mark.parametrize("score", ["token", "gate"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_scores_are_means_over_examples_of_means_over_their_tokens(family: str, score: str) -> None:
    """Worked out one example at a time, so without padding, and by the router's weights."""
    backbone = tiny.backbone(family, tokenizer=TOKENS)
    one = job()
    units = passes.encode(backbone, one.head, one.task.train, 256)
    assert len({len(unit.ids[0]) for unit in units}) > 1
    _, look = learn(backbone, epochs=1)
    found = ESFT(score=score, rows=7).scores(look, families.experts(backbone.base))
    expected = dict.fromkeys("012", torch.zeros(4))
    for unit in units:
        for block in "012":
            x, _ = seen(backbone, backbone.collate([unit.ids[0]]), backbone.sites[f"{block}.mlp"].path)
            _, g = by_hand(backbone, block, x[0, : len(unit.ids[0])])
            expected[block] = expected[block] + (g if score == "gate" else (g > 0) / 2).mean(0) / len(units)
    for block, right in expected.items():
        torch.testing.assert_close(found[block].float(), right, rtol=1e-4, atol=1e-5)
        if score == "token" or family == "mixtral":
            assert float(found[block].sum()) == pytest.approx(1)
        else:
            assert float(found[block].sum()) < 0.99  # OLMoE leaves the gates of the two as they are
    assert not any(module._forward_hooks for module in backbone.model.modules())


@every_mixture
def test_only_the_chosen_experts_are_trained(family: str) -> None:
    backbone = tiny.backbone(family, tokenizer=TOKENS)
    learned, look = learn(backbone, hyper={"select.p": 0.5}, epochs=2)
    mixtures = families.experts(backbone.base)
    scores = ESFT().scores(look, mixtures)
    own = {n for n in learned.tensors if not n.startswith("head/")}
    assert own == {f":{at.maps}/{name}" for at in mixtures.values() for name in ("gate_up_proj", "down_proj")}
    numbers = 0
    for block, at in mixtures.items():
        chosen = sorted(reached(scores[block], 0.5).tolist())
        assert 0 < len(chosen) < 4
        for name in ("gate_up_proj", "down_proj"):
            Δ = learned.tensors[f":{at.maps}/{name}"]
            assert Δ.flatten(1).any(1).nonzero()[:, 0].tolist() == chosen
            numbers += len(chosen) * Δ[0].numel()
    assert numbers == sum(len(reached(scores[b], 0.5)) * 3 * 32 * 64 for b in mixtures)  # Σ |E| 3 d d_e
    assert learned.chosen == numbers + sum(t.numel() for n, t in learned.tensors.items() if n.startswith("head/"))


def test_a_chosen_experts_difference_is_in_the_answers() -> None:
    """The adapter's states are those of a model whose experts have other weights."""
    backbone = tiny.backbone("olmoe", tokenizer=TOKENS)
    learned, _ = learn(backbone, epochs=2)
    model, batch = copy.deepcopy(backbone.model), tiny.batch(3)
    for name, Δ in learned.tensors.items():
        if not name.startswith("head/"):
            path, _, parameter = name[1:].rpartition("/")
            model.get_submodule(path).get_parameter(parameter).data += Δ
    with torch.no_grad():
        right = model(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        active = Active.of(learned.method, learned.tensors)
        found = Plan(backbone, [active]).hidden(batch)
    torch.testing.assert_close(found[batch.mask], right[batch.mask], rtol=1e-5, atol=1e-5)
    assert (right - backbone.hidden(batch))[batch.mask].abs().max() > 1e-4


def test_experts_are_chosen_only_where_there_are_some() -> None:
    with pytest.raises(UsageError, match="tiny-bert is not a mixture of experts"):
        train(tiny.backbone("bert", tokenizer=TOKENS), [job(epochs=1)])
    mixture = tiny.backbone("mixtral", tokenizer=TOKENS)
    with pytest.raises(UsageError, match="lora has no weights of experts"):
        train(mixture, [job(method="lora@esft", epochs=1)])
    with pytest.raises(UsageError, match=r"esft\.score = 'gates': one of token, gate"):
        train(mixture, [job({"select.score": "gates"}, epochs=1)])
