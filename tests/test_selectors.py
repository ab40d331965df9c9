"""What is trained of a method is what its selector chose: by the papers' rules, on numbers that can be followed."""

from __future__ import annotations

import json
import random
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
import writers
from commands import run
from jobs import TOKENS, job_of, same, task_of

import polytask as pt
from polytask.adapters.store import TENSORS
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.methods import Params, build, passes, selectors
from polytask.methods.selectors.cofitune import CoFiTune, dropping, normalised
from polytask.methods.selectors.graft import Graft
from polytask.methods.selectors.lottery import largest
from polytask.methods.selectors.selector import SELECTORS, block_of
from polytask.methods.selectors.snip import Snip
from polytask.training import Event, Job, train


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone("bert", tokenizer=TOKENS)


class Looked:
    """A look with gradients and training that were worked out by hand."""

    writing, seed = False, 0

    def __init__(self, tensors: Params, gradients: Params, learnt: Params | None = None) -> None:
        self.tensors, self.given, self.learnt = tensors, gradients, learnt
        self.method = build("bottleneck")
        self.seen: list[Params] = []

    def gradients(self, method: Any, tensors: Params, rows: int, passes: int) -> Any:
        self.seen.append(tensors)
        yield self.given

    def trained(self, *_: Any) -> Params:
        assert self.learnt is not None
        return self.learnt

    def score(self, method: Any, tensors: Params) -> float:
        return -float((tensors["0/θ"] - torch.tensor([[0.5, 1.0, 2.0]])).abs().sum())


def job(method: str, hyper: dict[str, Any] | None = None, n: int = 48, **more: Any) -> Job:
    found, chooser = selectors.build(method, hyper)
    plain = job_of(task_of(n=n, held=0), "head", **more)  # without a validation split the last tensors are kept
    return Job(plain.task, found, plain.head, plain.settings, chooser)


# ------------------- worked examples


def test_the_largest_scores_are_counted_over_all_tensors_and_ties_do_not_add() -> None:
    scores = {"a": torch.tensor([[0.1, 0.5], [0.0, 0.3]]), "b": torch.tensor([0.3, 0.3])}
    M = largest(scores, 3)
    assert M["a"].tolist() == [[0, 1], [0, 1]]
    assert M["b"].tolist() == [1, 0]


def test_snip_keeps_what_changes_the_loss_most() -> None:
    """|p ∘ g| = .2 .1 .2 .1: half of four are the first and the third; the bias and the head are not pruned."""
    p = {"0/D": torch.tensor([[0.5, -1.0, 0.2, 2.0]]), "0/b": torch.zeros(3), "head/W": torch.ones(2, 2)}
    g = {"0/D": torch.tensor([[0.4, -0.1, 1.0, 0.05]]), "0/b": torch.ones(3)}
    choice = Snip(sparsity=0.5).choose(Looked(p, g))  # type: ignore[arg-type]
    assert choice.shares["0/D"].tolist() == [[1, 0, 1, 0]]
    assert choice.tensors["0/D"].tolist() == [[0.5, 0.0, pytest.approx(0.2), 0.0]]
    assert set(choice.shares) == {"0/D"}
    assert choice.tensors.keys() == p.keys()


def test_snip_scores_a_matrix_of_zeros_where_it_is_not_zero() -> None:
    """With U = 0 neither U nor, through it, D would have a score."""
    looked = Looked({"0/U": torch.zeros(2, 2)}, {"0/U": torch.ones(2, 2)})
    choice = Snip(sparsity=0.5).choose(looked)  # type: ignore[arg-type]
    assert looked.seen[0]["0/U"].all()
    assert int(choice.shares["0/U"].sum()) == 2
    assert not choice.tensors["0/U"].any()


def test_a_graft_takes_back_what_the_task_does_not_need() -> None:
    """θ₀ = 0 1 2, θ₁ = .5 1 1. γ₀ takes the largest change, the third. The loss falls where the third goes back and the
    first comes in, and after one step of 20 both have."""
    θ0, θ1 = {"0/θ": torch.tensor([[0.0, 1.0, 2.0]])}, {"0/θ": torch.tensor([[0.5, 1.0, 1.0]])}
    looked = Looked(θ0, {"0/θ": torch.tensor([[-1.0, 0.0, -1.0]])}, θ1)
    choice = Graft(share=1 / 3, steps=0).choose(looked)  # type: ignore[arg-type]
    assert choice.tensors["0/θ"].tolist() == [[0, 1, 1]]
    choice = Graft(share=1 / 3, steps=1, rate=20, c=0.0).choose(looked)  # type: ignore[arg-type]
    assert choice.tensors["0/θ"].tolist() == [[0.5, 1, 2]]
    assert choice.done
    γ = looked.seen[0]["0/θ"]  # relaxed: γ₀ + (1 − 2 γ₀) σ(S), S in [0, 1]
    assert 0.5 * 0.5 <= γ[0, 0] <= 0.5 * 0.732
    assert 1 + 0.5 <= γ[0, 2] <= 1 + 0.732


def test_fisher_scores_blocks_by_squared_gradients_of_single_examples(backbone: Backbone) -> None:
    """Against the definition, by autograd on the model's own weights, with a head of zeros but one."""
    one = job("full@fisher", {"select.examples": 5, "select.share": 0.3}, epochs=1)
    seen: list[Any] = []
    fisher = one.selector
    assert fisher is not None

    class Keep(type(fisher)):  # type: ignore[misc]
        def choose(self, look: Any) -> Any:
            seen.append((self.scores(look), {n: t.clone() for n, t in look.tensors.items()}))
            return super().choose(look)

    object.__setattr__(one, "selector", Keep(share=0.3, examples=5))
    [learned] = train(backbone, [one])
    scores, start = seen[0]
    model, W, b = backbone.model, start["head/W"], start["head/b"]
    for p in model.parameters():
        p.requires_grad_()
    expected = dict.fromkeys(scores, 0.0)
    squares: dict[str, torch.Tensor] = {}
    units = passes.encode(backbone, one.head, one.task.train, 256)
    for i in random.Random(0).sample(range(len(units)), len(units))[:5]:
        batch = backbone.collate([units[i].ids[0]])
        with torch.enable_grad():
            h = model(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
            φ = (h * batch.mask[..., None]).sum(1) / batch.mask.sum()
            loss = torch.nn.functional.cross_entropy(
                φ @ W.T + b, torch.tensor([one.head.targets.index(one.task.train[i].output)])
            )
            names = [n for n, _ in model.named_parameters() if "encoder.layer" in n]
            grads = torch.autograd.grad(loss, [model.get_parameter(n) for n in names])
        for n, g in zip(names, grads, strict=True):
            squares[n] = squares.get(n, torch.zeros(())) + g**2
    for p in model.parameters():
        p.requires_grad_(False)
    for n, s in squares.items():
        expected[n.split(".")[2]] += float((s / 5).norm())
    assert scores == pytest.approx(expected, rel=1e-4)
    best = max(scores, key=lambda block: scores[block])
    assert {block_of(backbone, n.rpartition("/")[0]) for n in learned.tensors if n.startswith(":")} == {best}


# ------------------- what training does with it


def test_half_leaves_half_of_each_block_bit_for_bit(backbone: Backbone) -> None:
    [learned] = train(backbone, [job("full@half", epochs=1)])
    whole = build("full").start(backbone, 0)
    kept = {n.rpartition("/")[0] for n in learned.tensors if n.startswith(":")}
    groups: dict[tuple[str, str], list[str]] = {}
    for place in dict.fromkeys(n.rpartition("/")[0] for n in whole):
        if place[1:] in backbone.places:
            groups.setdefault(backbone.places[place[1:]], []).append(place)
        else:
            assert place in kept  # embeddings
    assert len(groups) == 3 * len(backbone.blocks)
    for places in groups.values():
        assert len(places) / 2 == pytest.approx(len(kept.intersection(places)), abs=0.5)
    assert all(bool(t.any()) for n, t in learned.tensors.items() if n.startswith(":") and "word" not in n)


def test_half_draws_a_matrix_of_an_adapter_with_its_partner(backbone: Backbone) -> None:
    [learned] = train(backbone, [job("lora@half", {"sites": "*.attn.[qkvo],*.mlp.up,*.mlp.down"}, epochs=1)])
    sites = [n.rpartition("/")[0] for n in learned.tensors if n.endswith("/A")]
    assert sites == [n.rpartition("/")[0] for n in learned.tensors if n.endswith("/B")]
    assert len([s for s in sites if s.startswith("0.attn")]) == 2
    assert len([s for s in sites if s.startswith("0.mlp")]) == 1
    assert learned.method.hyperparameters()["sites"] == sites


def test_a_lottery_ticket_moves_only_its_numbers_and_no_norm(backbone: Backbone) -> None:
    [learned] = train(backbone, [job("full@lottery", {"select.share": 0.02}, lr=1e-3, epochs=2)])
    own = {n: t for n, t in learned.tensors.items() if n.startswith(":")}
    assert not any("LayerNorm" in n for n in own)
    K = round(0.02 * sum(t.numel() for t in own.values()))
    moved = sum(int(t.count_nonzero()) for t in own.values())
    assert 0.9 * K < moved <= K
    assert learned.chosen == K + sum(t.numel() for n, t in learned.tensors.items() if n.startswith("head/"))


def test_the_penalty_of_a_lottery_is_in_its_first_training(backbone: Backbone) -> None:
    """With a penalty that outweighs the loss the first training moves next to nothing, so another ticket is drawn."""
    plain, strong = (job("full@lottery", {"select.share": 0.01, "select.l1": l1}, epochs=1) for l1 in (0, 1e6))
    first, second = train(backbone, [plain])[0], train(backbone, [strong])[0]
    assert any(not torch.equal(first.tensors[n] != 0, t != 0) for n, t in second.tensors.items())


def test_pruned_numbers_of_an_adapter_stay_zero(backbone: Backbone) -> None:
    [learned] = train(backbone, [job("bottleneck@snip", {"reduction": 4, "select.sparsity": 0.75}, epochs=2, lr=1e-2)])
    matrices = [t for n, t in learned.tensors.items() if n.rpartition("/")[2] in "DU"]
    left = sum(int(t.count_nonzero()) for t in matrices) / sum(t.numel() for t in matrices)
    assert 0.2 < left <= 0.25
    assert learned.chosen < sum(t.numel() for t in learned.tensors.values())


def test_lofit_offsets_the_heads_that_its_first_step_found(backbone: Backbone) -> None:
    [learned] = train(backbone, [job("lofit", {"select.share": 0.25}, epochs=2, lr=1e-2)])
    own = {n: t for n, t in learned.tensors.items() if n.endswith("/v")}
    H = backbone.heads
    heads = torch.cat([t.unflatten(0, (H, -1)).abs().sum(1) for t in own.values()])
    assert int((heads > 0).sum()) == round(0.25 * H * len(backbone.blocks))
    assert set(learned.method.hyperparameters()["sites"]) == {n.rpartition("/")[0] for n in own}


def test_a_graft_keeps_few_numbers_of_full_training(backbone: Backbone) -> None:
    [learned] = train(backbone, [job("full@graft", {"select.share": 0.01, "select.steps": 2}, lr=1e-3, epochs=2)])
    assert learned.examples == 0
    moved = sum(int(t.count_nonzero()) for n, t in learned.tensors.items() if n.startswith(":"))
    N = sum(t.numel() for t in build("full").start(backbone, 0).values())
    assert 0 < moved < 0.05 * N


@pytest.mark.parametrize("name", ["full@lottery", "bottleneck@snip", "lora@fisher", "lofit"])
def test_a_selected_job_that_was_interrupted_goes_on_to_the_same_bits(
    backbone: Backbone, tmp_path: Path, name: str
) -> None:
    def stop(event: Event) -> None:
        if event.kind == "score" and event.step >= 6:
            raise KeyboardInterrupt

    whole = train(backbone, [job(name, epochs=3)])[0]
    with pytest.raises(KeyboardInterrupt):
        train(backbone, [job(name, epochs=3)], folder=tmp_path, on_event=stop)
    again = train(backbone, [job(name, epochs=3)], folder=tmp_path)[0]
    same(whole, again)
    assert whole.method == again.method


@pytest.mark.parametrize("name", ["full@half", "full@lottery", "lora@half"])
def test_what_was_learnt_before_and_is_not_chosen_stays(backbone: Backbone, name: str) -> None:
    method = name.partition("@")[0]
    task = task_of(n=32)
    first = pt.adapt(backbone, task, method, settings=pt.Settings(epochs=1, batch=16))
    moved = {n: t + 0.01 if not n.startswith(("head/", "task/")) else t for n, t in first.tensors.items()}
    first = replace(first, tensors=moved)
    again = pt.adapt(backbone, task, name, settings=pt.Settings(epochs=1, batch=16), begin=first)
    own = {n for n in first.tensors if not n.startswith(("head/", "task/"))}
    assert own <= again.tensors.keys()
    still = [n for n in own if torch.equal(again.tensors[n], first.tensors[n])]
    assert 0 < len(still) < len(own)
    assert pt.Engine(backbone, adapters=[again]).answer([pt.Request("a e f", adapter=again.id)])


def test_a_checkpoint_of_another_selector_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    train(backbone, [job("full@half", epochs=1)], folder=tmp_path)
    with pytest.raises(PolytaskError, match="other work"):
        train(backbone, [job("full@half", {"select.share": 0.3}, epochs=1)], folder=tmp_path)


# ------------------- as a user meets them


@pytest.mark.parametrize("name", ["full@half", "lora@fisher", "full@lottery", "lofit", "bottleneck@snip"])
def test_what_was_selected_is_kept_and_answers(backbone: Backbone, tmp_path: Path, name: str) -> None:
    task = task_of(n=32)
    skill = pt.adapt(backbone, task, name, settings=pt.Settings(epochs=1, batch=16, lr=1e-2))
    back = pt.Adapter.load(skill.save(tmp_path / "a"))
    assert back.id == skill.id
    texts = [pt.Request(e.text) for e in task.validation]
    one, two = (pt.Engine(backbone, adapters=[a]).answer(texts) for a in (skill, back))
    assert [a.probability for a in one] == [a.probability for a in two]
    assert skill.card.recipe["selector"]["name"] == selectors.named(name)[1]
    assert "@" not in skill.method


def test_a_sparse_difference_is_small_on_disk_and_the_same_again(tmp_path: Path) -> None:
    wide = tiny.backbone("bert", tokenizer=TOKENS, hidden_size=64, intermediate_size=256)
    dense, sparse = (
        pt.adapt(wide, task_of(held=0), name, settings=pt.Settings(epochs=1)) for name in ("full", "full@lottery")
    )
    size = (dense.save(tmp_path / "0") / TENSORS).stat().st_size
    folder = sparse.save(tmp_path / "s")
    assert (folder / TENSORS).stat().st_size < 0.5 * size
    said = json.loads((folder / "adapter.json").read_text())
    assert said["format_version"] == 2
    assert said["sparse"]
    back = pt.Adapter.load(folder)
    assert all(torch.equal(back.tensors[n], t) for n, t in sparse.tensors.items())
    plain = pt.adapt(wide, task_of(), "lora", settings=pt.Settings(epochs=1)).save(tmp_path / "l")
    assert json.loads((plain / "adapter.json").read_text())["format_version"] == 1  # older readers can read it


def test_a_difference_that_is_nothing_takes_no_room(tmp_path: Path) -> None:
    wide = tiny.backbone("bert", tokenizer=TOKENS, hidden_size=64, intermediate_size=256)
    skill = pt.adapt(wide, task_of(held=0), "full", settings=pt.Settings(epochs=1))
    none = replace(skill, tensors={n: torch.zeros_like(t) if n[0] == ":" else t for n, t in skill.tensors.items()})
    folder = none.save(tmp_path / "a")
    assert (folder / TENSORS).stat().st_size < 0.2 * (skill.save(tmp_path / "b") / TENSORS).stat().st_size
    back = pt.Adapter.load(folder)
    assert all(torch.equal(back.tensors[n], t) for n, t in none.tensors.items())


def test_values_beyond_a_tensors_end_are_damage(tmp_path: Path) -> None:
    """A file whose hashes fit and whose places do not, as another program could write it."""
    from polytask.adapters.store import _whole, describe

    wide = tiny.backbone("bert", tokenizer=TOKENS, hidden_size=64, intermediate_size=256)
    folder = pt.adapt(wide, task_of(held=0), "full@lottery", settings=pt.Settings(epochs=1)).save(tmp_path / "a")
    stored = describe(folder)
    name = stored.sparse[0]
    parts = {f"{name}.places": torch.tensor([10**9]), f"{name}.values": torch.ones(1)}
    with pytest.raises(PolytaskError, match="has values beyond its end"):
        _whole(parts, stored, folder / TENSORS)
    with pytest.raises(PolytaskError, match="has no places and values for"):
        _whole({}, stored, folder / TENSORS)


def test_wrong_selectors_are_refused(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="no selector 'luck'; the selectors are cofitune, esft, fisher"):
        selectors.build("full@luck")
    with pytest.raises(UsageError, match=r"select\.share is a selector's: name one, as in full@lottery"):
        selectors.build("full", {"select.share": 0.1})
    with pytest.raises(UsageError, match="lottery has no hyperparameter 'part'"):
        selectors.build("full@lottery", {"select.part": 0.1})
    with pytest.raises(UsageError, match="no tensors at what attention heads put out"):
        train(backbone, [job("lora@heads", epochs=1)])
    with pytest.raises(UsageError, match="no weight of tiny-bert matches"):
        build("full", {"weights": "*nothing*"}).start(backbone, 0)


def test_every_selector_is_listed_with_its_paper() -> None:
    listed = {row["name"]: row for row in run("methods", "--json").json if row["kind"] == "selector"}
    assert set(listed) == {f"@{name}" for name in SELECTORS} == {f"@{name}" for name in selectors.selectors()}
    assert all("arXiv" in row["paper"] and row["equation"] for row in listed.values())


# ------------------- CoFiTune


def test_importance_is_how_far_a_units_gradient_is_from_the_mean() -> None:
    """Mean 4, unbiased deviation 4.0825: z = −.7348 −.4899 −.2449 1.4697."""
    found = normalised(torch.tensor([1.0, 2.0, 3.0, 10.0]))
    torch.testing.assert_close(found, torch.tensor([0.6260, 0.4541, 0.2402, 0.8995]), rtol=0, atol=1e-4)
    assert normalised(torch.full((3,), 0.1)).tolist() == [0, 0, 0]


def middle(backbone: Backbone, **hyper: Any) -> list[str]:
    look = types.SimpleNamespace(backbone=backbone, writing=True)
    return CoFiTune(**hyper).middle(look)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "hyper", "blocks"),
    [
        (32, {}, range(8, 16)),
        (40, {}, range(10, 20)),
        (6, {}, range(1, 3)),
        (3, {}, range(1)),
        (4, {"first": 0.5, "last": 1.0}, range(2, 4)),
        (1, {}, range(0)),
    ],
)
def test_the_lower_middle_is_the_second_quarter_of_the_blocks(layers: int, hyper: Any, blocks: range) -> None:
    backbone = tiny.backbone("llama", num_hidden_layers=layers, hidden_size=8, head_dim=2, intermediate_size=8)
    assert middle(backbone, **hyper) == [f"{i}.mlp.{name}" for i in blocks for name in ("up", "down")]


def test_both_stacks_of_an_encoder_decoder_have_a_middle() -> None:
    assert middle(tiny.backbone("t5")) == [
        f"{tower}.0.mlp.{name}" for tower in ("enc", "dec") for name in ("up", "down")
    ]


class Watched(CoFiTune):
    """Keeps what it looked at, as it was then."""

    looks: ClassVar[list[Any]] = []

    def choose(self, look: Any) -> Any:
        choice = super().choose(look)
        look.tensors = {n: t.clone() for n, t in look.tensors.items()}
        self.looks.append(look)
        return choice


def watched(backbone: Backbone, method: str = "full@cofitune", **more: Any) -> tuple[Any, Any]:
    one = job(method, **more)
    assert one.selector is not None
    object.__setattr__(one, "selector", Watched(**one.selector.hyperparameters()))
    [learned] = train(backbone, [one])
    return learned, Watched.looks.pop()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3"])
def test_importance_is_the_gradient_of_scaling_what_a_map_puts_out(family: str) -> None:
    """∂/∂v_j of y ← v ∘ (W x + b) is Σ_k W_jk ∂/∂W_jk + b_j ∂/∂b_j: by the weights' own gradients, in the same dropout.
    Of a backbone without dropout of its own I' would be zero."""
    backbone = tiny.backbone(family, tokenizer=TOKENS)
    _, look = watched(backbone, epochs=1)
    site = backbone.sites["1.mlp.up"]
    found = CoFiTune(rows=20).importance(look, ["1.mlp.up", "1.mlp.down"])["1.mlp.up"]
    full = build("full", {"weights": [f"{site.path}.*"]})
    Δ = {n: t.requires_grad_() for n, t in full.start(backbone, 0).items()}
    head = {n: t for n, t in look.tensors.items() if n.startswith("head/")}
    total = {n: torch.zeros_like(t) for n, t in Δ.items()}
    with dropping(backbone, 0.1, look.seed):
        for one, two in look.outputs(full, head | Δ, 20, 0, 2):
            assert not torch.equal(one, two)
            p, q = one.softmax(-1), two.softmax(-1)
            KL = (q * (q / p).log()).sum() / len(one)
            for n, g in zip(Δ, torch.autograd.grad(KL, [*Δ.values()]), strict=True):
                total[n] += g
    module, slope = backbone.model.get_submodule(site.path), 0
    for n, g in total.items():
        θg = module.get_parameter(n.rpartition("/")[2]) * g
        slope = slope + (θg if θg.ndim == 1 else θg.sum(0 if family == "gpt2" else 1))
    slope = site.part.take(slope) if site.part else slope
    torch.testing.assert_close(found, ((slope - slope.mean()) / slope.std()).tanh().abs(), rtol=1e-3, atol=1e-3)
    same_again = CoFiTune(rows=20).importance(look, ["1.mlp.up", "1.mlp.down"])["1.mlp.up"]
    assert torch.equal(found, same_again)
    assert not any(module._forward_hooks for module in backbone.model.modules())


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3"])
def test_a_unit_of_the_middle_moves_the_less_the_more_it_matters(family: str) -> None:
    """Of the step that full fine-tuning of these weights takes, 1 − I is left."""
    backbone = tiny.backbone(family, tokenizer=TOKENS)
    hyper = {"select.last": 0.9, "select.first": 0.4}
    learned, look = watched(backbone, hyper=hyper, epochs=1, batch=48)
    weights = learned.method.hyperparameters()["weights"]
    [whole] = train(backbone, [job("full", {"weights": weights}, epochs=1, batch=48)])
    I = CoFiTune(first=0.4, last=0.9).importance(look, ["1.mlp.up", "1.mlp.down"])  # noqa: E741
    own = {n for n in learned.tensors if n.startswith(":")}
    sites = {name: backbone.sites[name] for name in I}
    assert {n.rpartition("/")[0] for n in own} == {f":{site.path}" for site in sites.values()}
    for name, site in sites.items():
        Δ, all_of_it = (run.tensors[f":{site.path}/weight"] for run in (learned, whole))
        if family != "gpt2":
            Δ, all_of_it = Δ.T, all_of_it.T
        if site.part:  # phi3's gate stands before its up
            assert not Δ[:, : site.part.start].any()
            Δ, all_of_it = site.part.take(Δ), site.part.take(all_of_it)
        assert all_of_it.any(0).all()
        torch.testing.assert_close(Δ, all_of_it * (1 - I[name]), rtol=1e-4, atol=1e-8)
    kept = sum(len(I[name]) * site.reads for name, site in sites.items())
    biases = 0 if family == "phi3" else sum(len(I[name]) for name in sites)
    assert learned.chosen == kept + biases + sum(t.numel() for n, t in learned.tensors.items() if n.startswith("head/"))


def test_what_cofitune_cannot_choose_from_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match=r"lora has no weights of up and down in the blocks from 0\.25 to 0\.5"):
        train(backbone, [job("lora@cofitune", epochs=1)])
    with pytest.raises(UsageError, match="full has no weights of up and down"):
        train(tiny.backbone("mixtral", tokenizer=TOKENS), [job("full@cofitune", epochs=1)])
    with pytest.raises(UsageError, match=r"cofitune\.dropout = 0\.0: a number between 0 and 1"):
        train(backbone, [job("full@cofitune", {"select.dropout": 0}, epochs=1)])
    found, chooser = selectors.build("full@cofitune")
    plain = job_of(task_of("regression", held=0), "head", epochs=1)
    with pytest.raises(UsageError, match="compares probabilities of answers"):
        train(backbone, [Job(plain.task, found, plain.head, plain.settings, chooser)])


def test_answers_in_text_have_importance_too() -> None:
    backbone = writers.writer("llama")
    examples = tuple(pt.Example(str(i), text, "two dogs") for i, text in enumerate(["the cat", "a dog"] * 4))
    task = pt.Task("t", "generation", examples)
    skill = pt.adapt(backbone, task, "full@cofitune", settings=pt.Settings(epochs=1, batch=4))
    own = [n for n in skill.tensors if n.startswith(":")]
    assert own == [":layers.0.mlp.up_proj/weight", ":layers.0.mlp.down_proj/weight"]
    assert all(bool(skill.tensors[n].any()) for n in own)


def test_numbers_that_make_no_method_are_one_line(backbone: Backbone) -> None:
    for name, hyper in (
        ("prompt", {"n": "0"}),
        ("prefix", {"n": "-3"}),
        ("lora", {"r": "0"}),
        ("bottleneck", {"reduction": 0}),
    ):
        with pytest.raises(UsageError, match="at least 1 is needed"):
            build(name, hyper)
    for value in ("-1", "0", "1.5"):
        with pytest.raises(UsageError, match="leaves nothing to train, or is no share"):
            selectors.build("full@lottery", {"select.share": value})
    with pytest.raises(UsageError, match="leaves nothing to train, or is no share"):
        selectors.build("bottleneck@snip", {"select.sparsity": 1})
    with pytest.raises(UsageError, match="600 virtual tokens leave no room for a text"):
        build("prefix", {"n": 600}).start(backbone, 0)
