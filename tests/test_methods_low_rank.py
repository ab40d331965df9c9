"""PiSSA against PEFT, SMoRA by hand, and elastic LoRA with what is cut from it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace

import peft
import pytest
import tiny
import torch
from jobs import TOKENS, job_of, same, task_of
from made import one_line
from torch import Tensor, nn

from polytask.adapters import Adapter, Card, HeadCard, export_peft
from polytask.backbones import Backbone, Batch, Site, heads
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request
from polytask.methods import build
from polytask.methods.lifting import Active, Columns, Plan
from polytask.recipes.elastic import cut, search, shrink
from polytask.tasks import TaskCard
from polytask.training import train

SITES = {
    "bert": ["*.attn.q", "*.attn.v", "*.mlp.up"],
    "llama": ["*.attn.[qkvo]", "*.mlp.gate", "*.mlp.down"],
    "t5": ["*.attn.[qv]", "*.mlp.down"],
    "gpt2": ["*.attn.o", "*.mlp.up", "*.mlp.down"],
}


def states(model: nn.Module, backbone: Backbone, batch: Batch) -> Tensor:
    reader = model.get_encoder() if backbone.kind == "encoder-decoder" else model
    options = {"use_cache": False} if backbone.kind == "decoder" else {}
    with torch.no_grad():
        return reader(input_ids=batch.ids, attention_mask=batch.mask.long(), **options).last_hidden_state[batch.mask]


def hidden(backbone: Backbone, adapters: list[Active], batch: Batch, weights: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return Plan(backbone, adapters).hidden(batch, weights)[batch.mask]


def shaken(backbone: Backbone, name: str, seed: int = 1, **hyper: object) -> Active:
    """The method's adapter with what is trained moved away from the start."""
    m, draw = build(name, hyper), torch.Generator().manual_seed(seed)
    moved = {
        n: t + 0.2 * torch.randn(t.shape, generator=draw) if m.trains(n) else t for n, t in m.start(backbone, 0).items()
    }
    return Active.of(m, moved)


def count(backbone: Backbone, name: str, **hyper: object) -> int:
    m = build(name, hyper)
    return sum(t.numel() for n, t in m.start(backbone, 0).items() if m.trains(n))


# -- PiSSA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", SITES)
def test_pissa_is_pefts(family, rslora):
    """At the start, and after the same change of A and B. PEFT's frozen weight is the residual."""
    backbone, batch = tiny.backbone(family), tiny.batch(4)
    m = build("pissa", {"r": 3, "alpha": 5, "rslora": rslora, "sites": SITES[family]})
    adapter = Active.of(m, m.start(backbone, 0))
    paths = {site: backbone.sites[site].path for site in adapter.at}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        init_lora_weights="pissa",
        target_modules=list(paths.values()),
        fan_in_fan_out=family == "gpt2",
    )
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval().base_model.model
    plain = hidden(backbone, [], batch)
    torch.testing.assert_close(states(model, backbone, batch), plain, rtol=1e-4, atol=1e-4)
    draw = torch.Generator().manual_seed(1)
    for site, p in adapter.at.items():
        module = model.get_submodule(paths[site])
        A, B = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
        torch.testing.assert_close(p["B0"] @ p["A0"], B @ A, rtol=1e-5, atol=1e-5)
        assert not torch.equal(module.base_layer.weight, backbone.model.get_submodule(paths[site]).weight)
        for name, t in (("A", A), ("B", B)):
            p[name] = t + 0.1 * torch.randn(t.shape, generator=draw)
        module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = p["A"], p["B"]
    theirs = states(model, backbone, batch)
    torch.testing.assert_close(hidden(backbone, [adapter], batch), theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - plain).abs().max() > 1e-1


def test_pissa_by_hand():
    """W = diag(3, 2, 1), s = 4: the largest direction is e₁, s B₀ A₀ = 3 e₁ e₁ᵀ. With A = (0.5, 0, 0), B = (0, 1, 0)ᵀ
    s B A is 2 where column 1 meets row 2, and what was at e₁ is gone."""
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    m = build("pissa", {"r": 1, "alpha": 4})
    p = m.init(Site("0.attn.q", "", "output", 3, 3), torch.Generator(), {"W": W, "b": torch.zeros(())})
    torch.testing.assert_close(p["A"].abs(), torch.tensor([[math.sqrt(3 / 4), 0, 0]]))
    torch.testing.assert_close(4 * p["B0"] @ p["A0"], torch.diag(torch.tensor([3.0, 0.0, 0.0])))
    p |= {"A": torch.tensor([[0.5, 0.0, 0.0]]), "B": torch.tensor([[0.0], [1.0], [0.0]])}
    x = torch.eye(3)
    effective = (x @ W.T + m.delta(m.ready(p, {}), x, x @ W.T)).T
    torch.testing.assert_close(effective, torch.tensor([[0.0, 0, 0], [2, 2, 0], [0, 0, 1]]))


def test_a_small_change_of_a_large_weight_outlives_bf16():
    """Δ is that of fp32 to two digits, where the two products taken apart would be off by more than Δ itself."""
    draw = torch.Generator().manual_seed(0)
    W, x = torch.randn(64, 64, generator=draw), torch.randn(5, 64, generator=draw)
    m = build("pissa", {"r": 8})
    p = m.init(Site("0.attn.q", "", "output", 64, 64), torch.Generator(), {"W": W, "b": torch.zeros(())})
    for name in "AB":
        p[name] = p[name] + 1e-3 * torch.randn(p[name].shape, generator=draw)
    exact = m.delta(m.ready(p, {}), x, x)
    torch.testing.assert_close(exact, x @ (p["B"] @ p["A"] - p["B0"] @ p["A0"]).T, rtol=1e-3, atol=1e-4)
    half = {n: t.bfloat16() for n, t in p.items()}
    ready = {n: t.bfloat16() for n, t in m.ready(p, {}).items()}
    error = (m.delta(ready, x.bfloat16(), x.bfloat16()).float() - exact).norm() / exact.norm()
    apart = x.bfloat16() @ half["A"].T @ half["B"].T - x.bfloat16() @ half["A0"].T @ half["B0"].T
    assert error < 0.02
    assert (apart.float() - exact).norm() / exact.norm() > 0.5


def test_pissa_counts_and_refuses():
    """r (in + out) are trained, and as many are kept beside them."""
    backbone = tiny.backbone("llama")  # 3 blocks, d = 32, q 32, v 16
    assert count(backbone, "pissa", r=4) == 3 * (4 * (32 + 32) + 4 * (32 + 16))
    assert sum(t.numel() for t in build("pissa", {"r": 4}).start(backbone, 0).values()) == 2 * count(
        backbone, "pissa", r=4
    )
    with pytest.raises(UsageError, match=r"r = 17 is more than the 16 of 0\.attn\.v's weight"):
        build("pissa", {"r": 17, "sites": ["*.attn.v"]}).start(backbone, 0)


def test_loras_pissas_and_elastic_loras_of_several_ranks_share_a_product():
    """They are one group, whose hand-tuned path gives what each gives by its own equation."""
    backbone, site = tiny.backbone("llama"), "1.attn.q"
    adapters = [
        shaken(backbone, "lora", 1, r=4, sites=[site]),
        shaken(backbone, "pissa", 2, r=4, sites=[site]),
        shaken(backbone, "elastic", 3, r=6, nested=[2], dropout=0.0, sites=[site]),
        shaken(backbone, "pissa", 4, r=2, rslora=True, sites=[site]),
    ]
    (group,) = Plan(backbone, adapters).groups[site]
    assert group.columns == [0, 1, 2, 3]
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 5, 32, generator=draw) for _ in range(2))
    w = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, -1], [0.2, 0.3, 0.4, 0.5]])
    with torch.no_grad():
        expected = y + torch.stack(
            [
                sum(wk * m.delta(p, xi, yi) for wk, m, p in zip(wi, group.methods, group.params, strict=True))
                for xi, yi, wi in zip(x, y, w, strict=True)
            ]
        )
        torch.testing.assert_close(group.methods[0].mix(group, x, y, Columns(w)), expected, rtol=1e-5, atol=1e-5)


# -- SMoRA -------------------------------------------------------------------------------------------------------------


def test_smora_by_hand():
    """R x = (0, ln 3, −ln 3, −ln 4) is p = (1/2, 3/4, 1/4, 1/5). Two of four: g = 2 (1/2, 3/4) / (5/4) = (4/5, 6/5).
    A x = (2, 5, 7, 9), g ∘ A x = (1.6, 6, 0, 0); B of it is (1.6 + 6, 2 · 6) and s = α/k = 3 makes it (22.8, 36)."""
    p = {
        "A": torch.tensor([[2.0, 0.0], [5.0, 0.0], [7.0, 0.0], [9.0, 0.0]]),
        "B": torch.tensor([[1.0, 1.0, 10.0, 10.0], [0.0, 2.0, 10.0, 10.0]]),
        "R": torch.tensor([0.0, math.log(3), -math.log(3), -math.log(4)])[:, None] * torch.tensor([1.0, 0.0]),
    }
    m = build("smora", {"r": 4, "k": 2, "alpha": 6})
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    Δ = m.delta(p, x, x)
    torch.testing.assert_close(Δ[0], torch.tensor([22.8, 36.0]))
    # The other token has p = (1/2, 1/4, 3/4, 4/5) and takes the last two: g = 2 (15, 16) / 31.
    last = -3 * 10 * (7 * 30 / 31 + 9 * 32 / 31)
    torch.testing.assert_close(Δ[1], torch.tensor([last, last]))


def test_smora_with_blocks_is_smora_with_scores_that_come_in_twos():
    """Experts of b ranks are b ranks with one score, taken or left together."""
    draw = torch.Generator().manual_seed(0)
    r, k, b = 12, 6, 2
    A, B, R = (torch.randn(*shape, generator=draw) for shape in ((r, 5), (4, r), (r // b, 5)))
    x = torch.randn(7, 5, generator=draw)
    found = build("smora", {"r": r, "k": k, "block": b, "alpha": 3}).delta({"A": A, "B": B, "R": R}, x, x)
    for token, Δ in zip(x, found, strict=True):
        u = torch.sigmoid(R @ token).repeat_interleave(b)
        taken = sorted(range(r), key=lambda i: -float(u[i]))[:k]
        total = sum(float(u[i]) for i in taken)
        right = sum(k * float(u[i]) / total * float(A[i] @ token) * B[:, i] for i in taken)
        torch.testing.assert_close(Δ, 3 / k * right, rtol=1e-4, atol=1e-5)


def test_smora_that_takes_all_ranks_alike_is_lora():
    backbone, batch = tiny.backbone("bert"), tiny.batch(3)
    dense = shaken(backbone, "lora", r=6, alpha=5)
    routed = {site: dict(p) | {"R": torch.zeros(6, 32)} for site, p in dense.at.items()}
    routed_all = Active(build("smora", {"r": 6, "k": 6, "alpha": 5}), routed)
    torch.testing.assert_close(hidden(backbone, [routed_all], batch), hidden(backbone, [dense], batch))


def test_only_the_ranks_that_a_token_takes_learn_from_it():
    draw = torch.Generator().manual_seed(0)
    shapes = {"A": (6, 5), "B": (4, 6), "R": (6, 5)}
    p = {n: torch.randn(*shape, generator=draw, requires_grad=True) for n, shape in shapes.items()}
    x = torch.randn(1, 5, generator=draw)
    build("smora", {"r": 6, "k": 2}).delta(p, x, x).square().sum().backward()
    taken = (p["R"] @ x[0]).topk(2).indices.tolist()
    for moved in (p["A"].grad, p["B"].grad.T, p["R"].grad):
        assert [i for i in range(6) if moved[i].abs().max() > 0] == sorted(taken)


def test_smora_counts_and_refuses():
    """r (in + out), and the router's r/b · in."""
    backbone = tiny.backbone("bert")
    assert count(backbone, "smora", r=8, k=4) == 3 * 2 * (8 * (32 + 32) + 8 * 32)
    assert count(backbone, "smora", r=8, k=4, block=4) == 3 * 2 * (8 * (32 + 32) + 2 * 32)
    divided, least = "k is at most r, and block divides both", "at least 1 is needed"
    for wrong, said in (
        ({"k": 65}, divided),
        ({"k": 6, "block": 4}, divided),
        ({"r": 10, "k": 4, "block": 4}, divided),
        ({"k": 0}, least),
        ({"block": 0}, least),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            build("smora", wrong)
        one_line(caught.value)


# -- elastic LoRA ------------------------------------------------------------------------------------------------------

SMALL = {"r": 6, "nested": [4, 2], "alpha": 9, "dropout": 0.0, "sites": ["*.attn.[qv]", "*.mlp.up"]}


def drawn(plan: Plan, batch: Batch) -> dict[str, int]:
    """The rank that each site had in one pass of training."""
    plan.hidden(batch)
    return {site: int((group.params[0]["B"] != 0).any(0).sum()) for site, (group,) in plan.groups.items()}


def test_a_pass_of_training_draws_a_rank_for_each_site():
    backbone, batch = tiny.backbone("bert"), tiny.batch(2)
    adapter = shaken(backbone, "elastic", **SMALL)
    plan = Plan(backbone, [adapter], training=True)
    with torch.no_grad():
        torch.manual_seed(0)
        passes = [drawn(plan, batch) for _ in range(200)]
        torch.manual_seed(0)
        assert [drawn(plan, batch) for _ in range(3)] == passes[:3]
    for site in adapter.at:
        counts = Counter(one[site] for one in passes)
        assert counts.keys() == {2, 4, 6}
        assert all(40 < n < 95 for n in counts.values())  # of 200 / 3; 95 is four deviations away
    both = Counter((one["0.attn.q"], one["0.attn.v"]) for one in passes)
    assert len(both) == 9
    # Outside training it is a LoRA of the largest rank.
    plain = Active(build("lora", {"r": 6, "alpha": 9}), adapter.at)
    assert torch.equal(hidden(backbone, [adapter], batch), hidden(backbone, [plain], batch))


def test_what_a_pass_leaves_out_gets_no_gradient_and_the_rest_that_of_a_small_lora():
    backbone, batch = tiny.backbone("llama"), tiny.batch(2)
    adapter = shaken(backbone, "elastic", **{**SMALL, "sites": ["1.attn.q"]})
    p = adapter.at["1.attn.q"]
    for t in p.values():
        t.requires_grad_()
    for seed in range(8):
        torch.manual_seed(seed)
        plan = Plan(backbone, [adapter], training=True)
        h = plan.hidden(batch)
        ρ = int((plan.groups["1.attn.q"][0].params[0]["B"] != 0).any(0).sum())
        grads = torch.autograd.grad(h[batch.mask].sin().sum(), [p["A"], p["B"]])
        small = {"A": p["A"][:ρ].detach().requires_grad_(), "B": p["B"][:, :ρ].detach().requires_grad_()}
        alone = Plan(backbone, [Active(build("lora", {"r": 6, "alpha": 9}), {"1.attn.q": small})])
        wanted = torch.autograd.grad(alone.hidden(batch)[batch.mask].sin().sum(), list(small.values()))
        torch.testing.assert_close(grads[0][:ρ], wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads[1][:, :ρ], wanted[1], rtol=1e-4, atol=1e-5)
        assert not grads[0][ρ:].any()
        assert not grads[1][:, ρ:].any()


def test_elastic_training_that_was_interrupted_goes_on_to_the_same_bits(tmp_path):
    backbone = tiny.backbone("bert", tokenizer=TOKENS)
    jobs = [job_of(task_of(held=0), "elastic", {**SMALL, "dropout": 0.2}, epochs=4)]
    (whole,) = train(backbone, jobs)

    def stop(event) -> None:
        if event.kind == "step" and event.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(backbone, jobs, folder=tmp_path, on_event=stop)
    (resumed,) = train(backbone, jobs, folder=tmp_path)
    same(resumed, whole)


def test_elastic_counts_and_refuses():
    backbone = tiny.backbone("bert")
    assert count(backbone, "elastic", **SMALL) == 3 * 6 * (2 * (32 + 32) + (32 + 64))
    assert build("elastic", {"r": 8, "nested": "4,2"}).ranks == (8, 4, 2)
    assert build("elastic", build("elastic").hyperparameters()) == build("elastic")
    for wrong, says in (({"nested": [32]}, "32 in nested"), ({"nested": [0]}, "0 in nested"), ({"nested": "a"}, "'a'")):
        with pytest.raises(UsageError, match=says) as caught:
            build("elastic", wrong)
        one_line(caught.value)


# -- what is cut from it -----------------------------------------------------------------------------------------------

HEAD = HeadCard(kind="classification", targets=("x", "y", "z"))


def adapter_of(backbone: Backbone, name: str, method: str, **hyper: object) -> Adapter:
    active = shaken(backbone, method, **hyper)
    own = {f"{site}/{n}": t for site, p in active.at.items() for n, t in p.items()}
    head = {f"head/{n}": 20 * t for n, t in heads.start(HEAD, backbone.hidden_size, 0).items()}
    return Adapter(
        method=method,
        hyperparameters=active.method.hyperparameters(),
        tensors=own | head,
        backbone=backbone.card(),
        card=Card(name=name, task=TaskCard(name=name, kind="classification")),
        head=HEAD,
    )


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


@pytest.fixture(scope="module")
def whole(backbone) -> Adapter:
    return adapter_of(backbone, "whole", "elastic", **SMALL)


def several(adapter: Adapter) -> dict[str, int]:
    """Other ranks at other sites, the largest of them 4."""
    return {site: (4, 2, 2)[i % 3] for i, site in enumerate(adapter.sites)}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_cut_is_a_lora_that_computes_what_was_trained(backbone, whole, rslora):
    """B[:, :ρ] A[:ρ] at the scale of the largest rank: the elastic adapter with zeros beyond ρ. PEFT says so too."""
    whole = replace(whole, hyperparameters={**whole.hyperparameters, "rslora": rslora})
    ranks = several(whole)
    small = cut(whole, ranks)
    assert (small.method, small.hyperparameters["r"]) == ("lora", 4)
    assert small.card.lineage.parents == (whole.id,)
    assert small.parameters == sum(
        ρ * sum(whole.at(site)["A"].shape[1:] + whole.at(site)["B"].shape[:1]) for site, ρ in ranks.items()
    ) + sum(t.numel() for t in whole.at("head").values())
    assert small.card.trained_parameters == small.parameters
    zeroed = {
        site: {"A": whole.at(site)["A"], "B": whole.at(site)["B"] * (torch.arange(6) < ρ)} for site, ρ in ranks.items()
    }
    batch = tiny.batch(3)
    expected = hidden(backbone, [Active(build("elastic", whole.hyperparameters), zeroed)], batch)
    active = Active.of(build("lora", small.hyperparameters), small.tensors)
    torch.testing.assert_close(hidden(backbone, [active], batch), expected, rtol=1e-5, atol=1e-5)
    assert (expected - hidden(backbone, [], batch)).abs().max() > 1e-2


def test_pefts_lora_of_a_cut_is_the_same(backbone, whole, tmp_path):
    """Ranks and alphas by module, in a folder that PEFT itself loads."""
    small = cut(whole, several(whole))
    export_peft(small, tmp_path / "peft", backbone.sites)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path / "peft").eval()
    batch = tiny.batch(3)
    active = Active.of(build("lora", small.hyperparameters), small.tensors)
    theirs = states(model.base_model.model, backbone, batch)
    torch.testing.assert_close(hidden(backbone, [active], batch), theirs, rtol=1e-5, atol=1e-5)


def test_the_engine_answers_with_cuts_beside_others(backbone, whole):
    adapters = [
        whole,
        replace(cut(whole, several(whole)), card=Card(name="cut", task=whole.card.task)),
        adapter_of(backbone, "pissa", "pissa"),
        adapter_of(backbone, "smora", "smora"),
        adapter_of(backbone, "lora", "lora"),
    ]
    texts = ["a b c", "d", "e f g h a b", "h g"]
    requests = [Request(text, adapter=adapter.name) for adapter in adapters for text in texts]
    together = Engine(backbone, adapters=adapters).answer(requests)
    for adapter in adapters:
        alone = Engine(backbone, adapters=[adapter]).answer([Request(text, adapter=adapter.name) for text in texts])
        mine = [a for a in together if a.adapter == adapter.id]
        assert [a.output for a in mine] == [a.output for a in alone]
        assert [a.probability for a in mine] == pytest.approx([a.probability for a in alone], abs=1e-5)


def test_a_lora_whose_tensors_do_not_fit_each_other_is_refused(backbone, whole):
    site = whole.sites[0]
    small = cut(whole, several(whole))
    A, B = small.at(site)["A"], small.at(site)["B"]
    for edit, says in (
        ({"A": A[:3]}, rf"{site}/B is \[32, 4\], lora with its hyperparameters makes \[32, 3\]"),
        ({"B": B[:, :3]}, rf"{site}/B is \[32, 3\], lora with its hyperparameters makes \[32, 4\]"),
        ({"A": A[:0], "B": B[:, :0]}, rf"{site}/A is \[0, 32\]"),
        ({"A": A[:, :5]}, rf"{site}/A is \[4, 5\]"),
        ({"A": torch.zeros(5, 32), "B": torch.zeros(32, 5)}, rf"{site}/A is \[5, 32\]"),
        ({"A": torch.zeros(())}, rf"{site}/A is \[\]"),
    ):
        wrong = replace(small, tensors={**small.tensors, **{f"{site}/{n}": t for n, t in edit.items()}})
        with pytest.raises(PolytaskError, match=says) as caught:
            Engine(backbone, adapters=[wrong])
        one_line(caught.value)
    pissa = adapter_of(backbone, "pissa", "pissa", r=3)
    fewer = {n: t[:2] if n.endswith("/A") else t[:, :2] if n.endswith("/B") else t for n, t in pissa.tensors.items()}
    with pytest.raises(PolytaskError, match=r"pissa with its hyperparameters makes \[3, 32\]"):
        Engine(backbone, adapters=[replace(pissa, tensors=fewer)])


def test_what_cannot_be_cut_is_refused(backbone, whole):
    ranks = several(whole)
    site = next(iter(ranks))
    for adapter, asked, says in (
        (adapter_of(backbone, "plain", "lora"), ranks, "plain is of method lora; only an elastic one can be cut"),
        (whole, {**ranks, site: 3}, rf"rank 3 at {site}; its ranks are 6, 4, 2"),
        (whole, {s: ρ for s, ρ in ranks.items() if s != site}, rf"rank None at {site}"),
        (whole, {**ranks, "9.attn.q": 2}, r"rank 2 at 9\.attn\.q"),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            cut(adapter, asked)
        one_line(caught.value)


# -- the search --------------------------------------------------------------------------------------------------------

PRICES = {"a": 10, "b": 10, "c": 20, "d": 20}
GAINS = {"a": 5.0, "b": 0.0, "c": 3.0, "d": 0.0}


def gain(ranks) -> float:
    """Two sites gain by the root of their rank, the others nothing."""
    return sum(GAINS[site] * math.sqrt(ρ) for site, ρ in ranks.items())


def test_the_search_finds_the_best_ranks_under_a_budget():
    """The best of all 3⁴, found with fewer scores."""
    choices, budget = (16, 8, 4), 8 * 60
    every = [(i, j, k, n) for i in choices for j in choices for k in choices for n in choices]
    fits = [one for one in every if sum(ρ * price for ρ, price in zip(one, PRICES.values(), strict=True)) <= budget]
    right = max(fits, key=lambda one: (gain(dict(zip(PRICES, one, strict=True))), -sum(one)))
    tried = search(PRICES, choices, gain, budget)
    best = max(tried, key=lambda one: one.worth)
    assert tuple(best.ranks.values()) == right == (16, 4, 8, 4)
    assert best.numbers == 16 * 10 + 4 * 10 + 8 * 20 + 4 * 20 <= budget
    assert best.score == gain(best.ranks) > gain(dict.fromkeys(PRICES, 8)) == tried[0].score
    # The middle rank first, then the others that fit; none twice, none over the budget, in the same order again.
    assert [set(one.ranks.values()) for one in tried[:2]] == [{8}, {4}]
    assert len({tuple(one.ranks.values()) for one in tried}) == len(tried) < len(fits)
    assert all(one.numbers <= budget for one in tried)
    assert search(PRICES, choices, gain, budget) == tried


def test_the_search_minds_its_tries_and_its_budget():
    assert len(search(PRICES, (16, 8, 4), gain, 480, tries=3)) == 2 + 3
    assert [one.ranks for one in search(PRICES, (16, 8, 4), gain, 240)] == [dict.fromkeys(PRICES, 4)]
    with pytest.raises(UsageError, match="rank 4 at every site is 240 numbers, more than the budget of 239") as caught:
        search(PRICES, (16, 8, 4), gain, 239)
    one_line(caught.value)


def test_of_two_that_score_alike_the_smaller_is_better():
    tried = search(PRICES, (16, 8, 4), lambda ranks: min(ranks["a"], 8), 960, tries=99)
    best = max(tried, key=lambda one: one.worth)
    assert best.ranks == {"a": 8, "b": 4, "c": 4, "d": 4}


def test_an_adapter_is_shrunk_by_its_tasks_validation_split(backbone):
    """After training with drawn ranks, half of the numbers answer about as well as all of them."""
    task = task_of(n=96, held=48)
    hyper = {"r": 8, "nested": (4, 2), "dropout": 0.0, "sites": SITES["bert"]}
    (learned,) = train(backbone, [job_of(task, "elastic", hyper, epochs=20, lr=1e-2)])
    adapter = replace(adapter_of(backbone, "taught", "elastic", **hyper), tensors=learned.tensors)
    adapter = replace(adapter, head=job_of(task).head)
    small = shrink(backbone, task, adapter, 0.5, tries=6)
    numbers = sum(t.numel() for n, t in small.tensors.items() if not n.startswith("head/"))
    assert numbers <= 0.5 * 8 * sum(32 + adapter.at(site)["B"].shape[0] for site in adapter.sites)
    assert small.method == "lora"
    assert small.card.scores.keys() == {"validation"}
    assert small.card.scores["validation"].value >= learned.validation - 0.1
    assert "with all" in small.card.notes[-1]
    with pytest.raises(PolytaskError, match="no validation examples to choose ranks on"):
        shrink(backbone, replace(task, validation=()), adapter, 0.5)
    with pytest.raises(UsageError, match="only an elastic one can be cut"):
        shrink(backbone, task, small, 0.5)


def test_mtl_lora_by_hand() -> None:
    """A = I, Λ = [1 .5; 0 1], B = I, swap, ones, w = [.2 −.1 0], τ = .5: p = [.4506 .2473 .3021], s = 2, x = [1 2]."""
    m = build("mtl_lora", {"r": 2, "n": 3, "tau": 0.5, "alpha": 4})
    p = {
        "A": torch.eye(2),
        "B": torch.stack([torch.eye(2), torch.eye(2).flip(0), torch.ones(2, 2)]),
        "L": torch.tensor([[1.0, 0.5], [0.0, 1.0]]),
        "w": torch.tensor([0.2, -0.1, 0.0]),
    }
    x = torch.tensor([[1.0, 2.0]])
    Δ = m.delta(m.ready(p, {}), x, torch.zeros(1, 2))
    torch.testing.assert_close(Δ, torch.tensor([[5.2083, 5.2083]]), rtol=0, atol=1e-4)
