"""What a class can be beside a row of a weight: label embeddings at mask tokens, a description that attends to the
input, several terms to be said for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from commands import run, write_pairs, write_table
from jobs import task_of, timeless
from torch import Tensor
from torch.nn import functional as F
from writers import tokenizer, writer

from polytask.adapters import Adapter, Card, HeadCard, TermCard
from polytask.adapters.store import DESCRIPTION
from polytask.backbones import Backbone, crosstune, heads, load, perfect, text
from polytask.errors import PolytaskError, UsageError
from polytask.inference import Engine, Request
from polytask.inference.answers import Options, choose_normalisation
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat
from polytask.recipes import terms
from polytask.recipes.adapt import adapt, predict
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Label, Task, TaskCard
from polytask.training import Job, Settings, learner, loop, probe, train

MASKED = tiny.words(*"abcdefgh", "[MASK]")
MASKED.mask_token = "[MASK]"
MASK = MASKED.mask_token_id


@cache
def encoder(family: str = "bert") -> Backbone:
    return tiny.backbone(family, tokenizer=MASKED)


def pair_task(n: int = 24) -> Task:
    rows = task_of("similarity", n, held=8)

    def as_labels(examples: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(replace(e, output="a" if e.output else "b") for e in examples)

    kind = task_of(n=1)
    return replace(kind, train=as_labels(rows.train), validation=as_labels(rows.validation))


# -- PERFECT: the equations --------------------------------------------------------------------------------------------

h = torch.tensor([[[1.0, 0.5], [-0.5, 1.0]]])  # one row, two masks
L = torch.tensor([[[0.8, 0.2], [0.0, 1.0]], [[0.1, -0.3], [0.5, 0.5]]])
c = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])


def test_label_embeddings_by_hand() -> None:
    t = perfect.logits({"L": L}, h)
    torch.testing.assert_close(t, torch.tensor([[[0.9, -0.05], [1.0, 0.25]]]))
    # Of class 0: max(0, 1 − 0.9 − 0.05) = 0.05 and max(0, 1 − 1 + 0.25) = 0.25, over K = 2, mean over M = 2.
    assert float(perfect.losses(t, torch.tensor([0]))) == pytest.approx((0.05 / 2 + 0.25 / 2) / 2)
    # Of class 1: max(0, 1 + 0.05 + 0.9) = 1.95 and max(0, 1 − 0.25 + 1) = 1.75.
    assert float(perfect.losses(t, torch.tensor([1]))) == pytest.approx((1.95 / 2 + 1.75 / 2) / 2)
    weighted = perfect.losses(t, torch.tensor([1]), torch.tensor([1.0, 3.0]))
    assert float(weighted) == pytest.approx(3 * (1.95 / 2 + 1.75 / 2) / 2)


def test_prototypes_by_hand() -> None:
    # ĥ₁ = (2, 1)/√5 and ĥ₂ = (−1, 2)/√5 have cosines 2/√5 and 2/√5 with class 0, 1/√5 and −1/√5 with class 1, and
    # ‖û − v̂‖² = 2 − 2 cos.
    near, far = 2 / math.sqrt(5), 1 / math.sqrt(5)
    right = torch.tensor([[-(2 - 2 * near), -(2 - 2 * far)]])
    torch.testing.assert_close(perfect.logits({"L": L, "c": c}, h), right)
    assert [round(math.exp(v), 4) for v in right[0].tolist()] == [0.8097, 0.331]
    torch.testing.assert_close(perfect.logits({"L": L, "c": 7 * c}, 3 * h), right)  # only directions count
    head = HeadCard(kind="classification", targets=("x", "y"), pool="masks", masks=2)
    [answer], [sure] = heads.decode(head, heads.read(head, {"L": L, "c": c}, h))
    assert answer == "x"
    assert sure == pytest.approx(0.8097 / (0.8097 + 0.3310), abs=1e-4)
    assert float(heads.losses(head, heads.read(head, {"L": L}, h), torch.tensor([0]))) == pytest.approx(0.075)


def test_a_class_without_examples_is_never_answered() -> None:
    states = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 2, 2, 0, 0, 2])
    found = perfect.prototypes(states, y, 3)
    torch.testing.assert_close(found[0], states[[0, 3, 4]].mean(0))
    torch.testing.assert_close(found[2], states[[1, 2, 5]].mean(0))
    z = perfect.logits({"L": torch.zeros(3, 2, 4), "c": found}, states)
    assert bool((z[:, 1] == -torch.inf).all())
    assert bool(z[:, [0, 2]].isfinite().all())


def test_the_start_is_the_papers() -> None:
    head = HeadCard(kind="classification", targets=tuple("abc"), pool="masks", masks=5)
    p = heads.start(head, 64, 0)
    assert {n: tuple(t.shape) for n, t in p.items()} == {"L": (3, 5, 64), "c": (3, 5, 64)}
    assert float(p["L"].std()) == pytest.approx(1e-4, rel=0.05)
    assert not p["c"].any()
    assert [build("lora").trains(name) for name in ("head/L", "head/c", "head/W")] == [True, False, True]


# -- PERFECT: masks in the input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "bart"])
def test_masks_stand_behind_the_first_text_and_are_read(family: str) -> None:
    backbone = encoder(family)
    head = Reading(pool="masks", masks=3).design(backbone, task_of(n=4))
    assert (head.pool, head.masks, head.pair) == ("masks", 3, "none")
    units = passes.encode(backbone, head, [Example("0", "a b"), Example("1", ""), Example("2", "a " * 300)])
    assert units[0].ids == ([1, 4, 5, MASK, MASK, MASK, 2],)
    assert units[1].ids == ([1, MASK, MASK, MASK, 2],)
    assert [unit.starts for unit in units[:2]] == [[3, 4, 5], [1, 2, 3]]
    assert len(units[2].ids[0]) == backbone.max_length
    assert units[2].ids[0][-4:] == [MASK, MASK, MASK, 2]
    states = [backbone.hidden(backbone.collate([unit.ids[0]]))[0].float() for unit in units]
    for unit, state, φ in zip(units, states, passes.features(backbone, head, units), strict=True):
        assert unit.starts is not None
        torch.testing.assert_close(φ, state[unit.starts], rtol=2e-5, atol=2e-5)


def test_a_mask_token_in_the_text_is_no_mask_of_ours() -> None:
    backbone = encoder()
    head = Reading(pool="masks", masks=1).design(backbone, task_of(n=4))
    [unit] = passes.encode(backbone, head, [Example("0", "a [MASK] b")])
    assert unit.ids == ([1, 4, MASK, 5, MASK, 2],)
    assert unit.starts == [4]


def test_masks_of_a_pair() -> None:
    backbone, task = encoder(), pair_task()
    head = Reading(pool="masks").design(backbone, task)
    assert (head.pair, head.masks) == ("joint", 2)
    [unit] = passes.encode(backbone, head, [Example("0", "a", None, "b c")])
    assert unit.ids == ([1, 4, MASK, MASK, 2, 5, 6, 2],)
    assert unit.starts == [2, 3]


def test_what_masks_cannot_answer() -> None:
    for kind in ("multilabel", "tagging", "regression", "similarity"):
        with pytest.raises(UsageError, match="is for classification"):
            heads.design(task_of(kind, 4), pool="masks")
    for masks in (0, 33):
        with pytest.raises(UsageError, match=f"masks = {masks}"):
            heads.design(task_of(n=4), pool="masks", masks=masks)
    with pytest.raises(UsageError, match="no mask token"):
        Reading(pool="masks").design(tiny.backbone("llama", tokenizer=tiny.words("a")), task_of(n=4))


# -- PERFECT: training and answers -------------------------------------------------------------------------------------


def job(task: Task, method: str = "pfeiffer", *, masks: int = 2, **more: object) -> Job:
    settings = Settings(**{"epochs": 3, "batch": 16, "lr": 5e-3, "patience": 99, **more})  # type: ignore[arg-type]
    return Job(task, build(method), heads.design(task, pool="masks", masks=masks), settings)


def test_the_loss_of_a_step_is_the_equations() -> None:
    """The first step's loss and gradients, worked out again from hidden states alone."""
    backbone, task = encoder(), task_of(n=16, held=0)
    one = job(task, "lora", epochs=1)
    p = heads.start(one.head, backbone.hidden_size, 0)
    units = passes.encode(backbone, one.head, task.train)
    y = torch.tensor(["abcd".index(str(e.output)) for e in task.train])
    states = torch.stack(passes.features(backbone, one.head, units))
    t = torch.einsum("nmd,kmd->nmk", states, p["L"])
    right = torch.stack([F.multi_margin_loss(t[:, m], y) for m in range(2)]).mean()
    [learned] = train(backbone, [one])
    assert learned.history[0]["loss"] == pytest.approx(float(right), rel=1e-4)
    assert not torch.equal(learned.tensors["head/L"], p["L"])


def test_prototypes_are_those_of_the_adapted_states() -> None:
    backbone, task = encoder(), task_of(n=40)
    for start in (0, 2):
        sites = {"sites": ["*.mlp"]} if start == 0 else {"sites": ["2.mlp"]}
        one = replace(job(task), method=build("pfeiffer", sites))
        [learned] = train(backbone, [one])
        units = passes.encode(backbone, one.head, task.train)
        own = {n: t for n, t in learned.tensors.items() if not n.startswith("head/")}
        states = torch.stack(passes.features(backbone, one.head, units, terms=((1.0, Active.of(one.method, own)),)))
        y = torch.tensor(["abcd".index(str(e.output)) for e in task.train])
        right = torch.stack([states[y == k].mean(0) for k in range(4)])
        torch.testing.assert_close(learned.tensors["head/c"], right, rtol=1e-4, atol=1e-4)
        assert learned.validation == max(row["score"] for row in learned.history)


def test_training_learns_and_beats_the_frozen_states() -> None:
    backbone, task = encoder(), task_of(n=96, length=6)
    [learned] = train(backbone, [job(task, "lora", epochs=15, lr=1e-2)])
    assert learned.validation >= learned.probe + 0.2
    assert learned.validation > 0.75


def test_masks_and_rows_of_weights_are_trained_together_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = encoder()
    plain = Job(task_of(seed=1, held=16), build("lora"), heads.design(task_of(seed=1)), Settings(epochs=2, batch=16))
    jobs = [job(task_of(held=16), epochs=2), plain, job(pair_task(), "ia3", masks=1, epochs=2)]
    together = train(backbone, jobs)
    for each, one in zip(jobs, together, strict=True):
        [alone] = train(backbone, [each])
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(one.tensors[name], tensor, rtol=2e-3, atol=2e-3)
        assert [row["score"] for row in timeless(one)] == [row["score"] for row in timeless(alone)]


def test_an_interrupted_training_comes_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, one = encoder(), job(task_of(held=16), epochs=4)
    [whole] = train(backbone, [one])

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if getattr(event, "kind", "") == "step" and getattr(event, "step", 0) == 8:
            raise Stop

    with pytest.raises(Stop):
        train(backbone, [one], folder=tmp_path, on_event=stop)
    assert loop.checkpoint.found(tmp_path)
    [resumed] = train(backbone, [one], folder=tmp_path)
    for name, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor), name
    assert timeless(resumed) == timeless(whole)


def test_a_row_of_masks_in_a_mixed_batch_gets_what_it_gets_alone() -> None:
    backbone, task = encoder(), task_of(n=12)
    adapters, seats = [], []
    for s, (method, head) in enumerate(
        [
            ("pfeiffer", heads.design(task, pool="masks", masks=3)),
            ("lora", heads.design(task)),
            ("ia3", heads.design(task, pool="masks", masks=1)),
        ]
    ):
        m = build(method)
        draw = torch.Generator().manual_seed(s)
        tensors = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, s).items()}
        adapters.append(Active.of(m, tensors))
        p = {n: t + torch.randn(t.shape, generator=draw) for n, t in heads.start(head, 32, s).items()}
        seats.append(Seat(head, p, torch.eye(3)[s]))
    which = [i % 3 for i in range(12)]
    units = [passes.encode(backbone, seats[s].head, [e])[0] for s, e in zip(which, task.train, strict=True)]
    mixed = passes.answer(Plan(backbone, adapters), seats, units, which)
    for s, (adapter, seat) in enumerate(zip(adapters, seats, strict=True)):
        own = [i for i in range(12) if which[i] == s]
        alone = Seat(seat.head, seat.params, torch.ones(1))
        found = passes.answer(Plan(backbone, [adapter]), [alone], [units[i] for i in own], [0] * 4)
        for i, (output, sure) in zip(own, found, strict=True):
            assert mixed[i] == (output, pytest.approx(sure, abs=1e-5))


@pytest.mark.parametrize("method", ["head", "lora", "auto"])
def test_an_adapter_with_masks_is_whole_on_disk(method: str, tmp_path: Path) -> None:
    backbone, task = encoder(), task_of(n=48, length=6)
    task = replace(task, test=task.validation)
    made = adapt(backbone, task, method, settings=Settings(epochs=2, lr=5e-3), reading=Reading(pool="masks"))
    made.save(tmp_path / "one")
    read = Adapter.load(tmp_path / "one")
    assert read.id == made.id
    answers = predict(backbone, read, task.test)
    right = sum(a == e.output for a, e in zip(answers, task.test, strict=True)) / len(task.test)
    assert right == pytest.approx(read.card.scores["test"].value)
    engine = Engine(backbone, adapters=[read])
    [one] = engine.answer([Request("e a f", adapter=read.id)])
    assert one.output in "abcd"
    assert one.probability is not None
    assert 0.25 <= one.probability <= 1
    kept = {n: t.numel() for n, t in read.tensors.items() if not n.startswith("task/")}
    assert read.card.trained_parameters == sum(kept.values()) - kept["head/c"]
    assert kept["head/L"] == kept["head/c"] == 4 * 2 * 32


def test_the_embedded_encoder_has_a_mask_token_and_takes_masks() -> None:
    minilm = load(precision="fp32", device="cpu")
    task = task_of(n=4)
    head = Reading(pool="masks").design(minilm, task)
    [unit] = passes.encode(minilm, head, [Example("0", "hello")])
    pieces = minilm.tokenizer.convert_ids_to_tokens(unit.ids[0])
    assert pieces == ["[CLS]", "hello", "[MASK]", "[MASK]", "[SEP]"]


def test_masks_on_the_command_line(tmp_path: Path) -> None:
    data = write_table(tmp_path / "table.csv")
    command = ("adapt", data, "--library", tmp_path / "skills", "--epochs", "1", "--json")
    done = run(*command, "--method", "head", "--pool", "masks", "--masks", "1")
    assert done.status == 0, done.err
    saved = json.loads(next((tmp_path / "skills").rglob(DESCRIPTION)).read_text(encoding="utf-8"))
    assert (saved["head"]["pool"], saved["head"]["masks"]) == ("masks", 1)
    assert done.json["score"] > 0.6
    asked = run("predict", "--library", tmp_path / "skills", "--adapter", "table", stdin=b"where is the drill\n")
    assert asked.status == 0, asked.err
    assert "--pool masks" in run(*command, "--masks", "3").error
    assert "masks = 0" in run(*command, "--pool", "masks", "--masks", "0").error
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    done = run(
        "adapt", pairs, "-i", "first", "--pair", "second", "-o", "same", "--method", "head", "--pool", "masks",
        "--library", tmp_path / "skills", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err


# -- labels that attend ------------------------------------------------------------------------------------------------


def test_labels_that_attend_by_hand() -> None:
    """Two labels along the axes, tokens (1, 0) and (1, 1), one head, no projections. ĥ = (√2, 0), (1, 1) and
    u = (√2, 0), (0, √2), so u·ĥ/√2 is √2 and 1 for label 0, 0 and 1 for label 1."""
    p = {**crosstune.start(2, 2), "E": torch.tensor([[3.0, 0.0], [0.0, 0.1]]), "b": torch.tensor([0.0, 0.5])}
    tokens = torch.tensor([[[2.0, 0.0], [5.0, 5.0], [-7.0, 1.0]]])
    a = math.exp(math.sqrt(2)) / (math.exp(math.sqrt(2)) + math.e)
    b = 1 / (1 + math.e)
    right = [a * math.sqrt(2) + (1 - a), (1 - b) + 0.5]
    assert [round(v, 4) for v in right] == [1.2494, 1.2311]
    found = crosstune.logits(p, tokens, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([right]))


def test_the_attention_is_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    C, d, T = 3, 16, 5
    p = {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in crosstune.start(C, d).items()}
    tokens, mask = torch.randn(2, T, d, generator=draw), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    theirs = torch.nn.MultiheadAttention(d, crosstune.HEADS, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p["Q"], p["K"], p["V"]]))
        theirs.out_proj.weight.copy_(p["O"])
        ĥ, u = (math.sqrt(d) * F.normalize(t, dim=-1) for t in (tokens, p["E"]))
        z, _ = theirs(u.expand(2, C, d), ĥ, ĥ, key_padding_mask=~mask)
        right = (z * u).sum(-1) / math.sqrt(d) + p["b"]
    torch.testing.assert_close(crosstune.logits(p, tokens, mask), right, rtol=1e-5, atol=1e-5)


def test_labels_are_embedded_with_what_they_mean() -> None:
    assert text.described(Label("card_arrival-late")) == "card arrival late"
    assert text.described(Label("app", "The mobile app.")) == "app: The mobile app."
    head = heads.design(task_of(n=4), pool="labels")
    p = heads.start(head, 32, 0)
    assert {n: tuple(t.shape) for n, t in p.items()} == {
        "E": (4, 32), "Q": (32, 32), "K": (32, 32), "V": (32, 32), "O": (32, 32), "b": (4,)
    }  # fmt: skip
    assert not build("lora").trains("head/E")
    for kind in ("tagging", "regression", "similarity"):
        with pytest.raises(UsageError, match="is for classification and multilabel"):
            heads.design(task_of(kind, 4), pool="labels")


def attending(task: Task, method: str = "head", **more: object) -> Job:
    settings = Settings(**{"epochs": 2, "batch": 16, "lr": 5e-3, "patience": 99, **more})  # type: ignore[arg-type]
    return Job(task, build(method), heads.design(task, pool="labels"), settings)


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_a_head_that_attends_learns_on_frozen_features_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient is asked of the backbone, and what is kept as E is its embedding of the labels."""
    backbone, task = encoder(), task_of(kind, 96, length=6)
    hidden = Backbone.hidden

    def watched(self: Backbone, *args: object, **more: object) -> Tensor:
        states = hidden(self, *args, **more)  # type: ignore[arg-type]
        assert not states.requires_grad
        return states

    monkeypatch.setattr(Backbone, "hidden", watched)
    monkeypatch.setattr(probe, "RATE", 1e-2)  # the tiny model is twelve times as narrow
    [learned] = train(backbone, [attending(task)])
    assert learned.history == []
    E = passes.embed(backbone, list("abcd"))
    assert torch.equal(learned.tensors["head/E"], E)
    untrained = heads.start(attending(task).head, 32, 0) | {"E": E}
    units = passes.encode(backbone, attending(task).head, task.validation)
    held = passes.features(backbone, attending(task).head, units)
    outputs, _ = heads.decode(attending(task).head, probe.tokenwise(attending(task).head, untrained, held))
    before = learner.score(task, outputs, task.validation, resamples=0).value
    assert learned.validation > before + 0.1
    assert learned.validation > (0.85 if kind == "classification" else 0.6)


def test_states_that_do_not_fit_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = encoder(), task_of(n=40, held=0)
    units = passes.encode(backbone, attending(task).head, task.train)
    seen: list[int] = []
    descend = probe.descend

    def watched(head: HeadCard, φ: list[Tensor], y: Tensor, *rest: object, **more: object) -> dict[str, Tensor]:
        seen.extend(map(len, φ))
        assert len(φ) == len(y)
        return descend(head, φ, y, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "descend", watched)
    for tokens, all_ in ((200, False), (10**6, True)):
        seen.clear()
        monkeypatch.setattr(learner, "CACHE_BYTES", 4 * 32 * tokens)
        train(backbone, [attending(task)])
        assert (sum(seen) == sum(len(unit.ids[0]) for unit in units)) == all_
        assert 0 < sum(seen) <= tokens


def test_an_untrained_label_may_be_answered() -> None:
    """Without a single training example of `d`, its own embedding finds it in some of the texts that have it."""
    backbone, task = encoder(), task_of(n=120, length=2)
    seen = replace(task, train=tuple(e for e in task.train if e.output != "d"), validation=())
    [learned] = train(backbone, [attending(seen)])
    seat = Seat(attending(seen).head, {n.removeprefix("head/"): t for n, t in learned.tensors.items()})
    rows = [e for e in task.validation if e.output == "d"]
    units = passes.encode(backbone, seat.head, rows)
    answers = passes.answer(Plan(backbone, []), [seat], units, [0] * len(units))
    assert all(set(output) <= set("abcd") for output, _ in answers)
    plain = heads.start(seat.head, 32, 0) | {"E": passes.embed(backbone, list("abcd"))}
    zero = passes.answer(Plan(backbone, []), [Seat(seat.head, plain)], units, [0] * len(units))
    assert any(output == "d" for output, _ in zero)


def test_a_method_trains_along_with_labels_that_attend() -> None:
    backbone, task = encoder(), task_of(n=48, length=6)
    [learned] = train(backbone, [attending(task, "lora", epochs=4)])
    assert len(learned.history) == 4
    assert learned.history[-1]["loss"] < learned.history[0]["loss"]
    assert torch.equal(learned.tensors["head/E"], learned.probe_tensors["head/E"])
    [alone] = train(backbone, [attending(task, "lora", epochs=4, seed=0)])
    for name, tensor in learned.tensors.items():
        assert torch.equal(tensor, alone.tensors[name]), name


def test_rows_whose_labels_attend_get_in_a_mixed_batch_what_they_get_alone() -> None:
    backbone, task = encoder(), task_of(n=12)
    adapters, seats = [], []
    for s, (method, pool) in enumerate(
        [("pfeiffer", "labels"), ("lora", "mean"), ("ia3", "labels"), ("lora", "masks")]
    ):
        m, head = build(method), heads.design(task, pool=pool)
        draw = torch.Generator().manual_seed(s)
        tensors = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, s).items()}
        adapters.append(Active.of(m, tensors))
        p = {n: t + torch.randn(t.shape, generator=draw) for n, t in heads.start(head, 32, s).items()}
        seats.append(Seat(head, p, torch.eye(4)[s]))
    which = [i % 4 for i in range(12)]
    units = [passes.encode(backbone, seats[s].head, [e])[0] for s, e in zip(which, task.train, strict=True)]
    mixed = passes.answer(Plan(backbone, adapters), seats, units, which)
    for i, s in enumerate(which):
        one = Seat(seats[s].head, seats[s].params, torch.ones(1))
        [(output, sure)] = passes.answer(Plan(backbone, [adapters[s]]), [one], [units[i]], [0])
        assert mixed[i] == (output, pytest.approx(sure, abs=1e-5))


@pytest.mark.parametrize("method", ["head", "lora"])
def test_an_adapter_whose_labels_attend_needs_no_task(method: str, tmp_path: Path) -> None:
    backbone, task = encoder(), task_of(n=48, length=6)
    task = replace(task, test=task.validation)
    made = adapt(backbone, task, method, settings=Settings(epochs=1, lr=5e-3), reading=Reading(pool="labels"))
    made.save(tmp_path / "one")
    read = Adapter.load(tmp_path / "one")
    answers = predict(backbone, read, task.test)
    right = sum(a == e.output for a, e in zip(answers, task.test, strict=True)) / len(task.test)
    assert right == pytest.approx(read.card.scores["test"].value)
    kept = {n: t.numel() for n, t in read.tensors.items() if not n.startswith("task/")}
    assert read.card.trained_parameters == sum(kept.values()) - kept["head/E"]
    if method == "head":
        assert read.card.trained_parameters == 4 * 32 * 32 + 4
    pairs = pair_task()
    joint = adapt(backbone, pairs, "head", reading=Reading(pool="labels"))
    assert joint.head is not None
    assert joint.head.pair == "joint"
    assert len(predict(backbone, joint, pairs.validation)) == 8


def test_labels_that_attend_on_the_command_line(tmp_path: Path) -> None:
    data = write_table(tmp_path / "table.csv")
    command = ("adapt", data, "--library", tmp_path / "skills", "--json", "--method", "head", "--pool", "labels")
    done = run(*command)
    assert done.status == 0, done.err
    assert done.json["score"] > 0.8
    asked = run("predict", "--library", tmp_path / "skills", "--adapter", "table", stdin=b"where is the drill\n")
    assert "tool" in asked.out


# -- terms for a label -------------------------------------------------------------------------------------------------


@cache
def decoder() -> Backbone:
    return writer("llama", max_position_embeddings=256, num_hidden_layers=2)


PETS = Task(
    "pets",
    "classification",
    (Example("0", "the cat sat", "cat"), Example("1", "two dogs run home", "dog"), Example("2", "a café", "cat")),
    instruction="Which?",
    labels=(Label("cat", "an animal that meows"), Label("dog", "an animal that barks")),
)


def termed(*own: dict[str, float]) -> HeadCard:
    """A card of PETS by likelihood, with these terms for its labels."""
    head = text.design(PETS, decide="likelihood")
    assert head.text is not None
    cards = tuple(tuple(TermCard(term=term, weight=w) for term, w in label.items()) for label in own)
    return head.model_copy(update={"text": head.text.model_copy(update={"terms": cards})})


def alone(head: HeadCard, method: str = "head") -> Adapter:
    made = build(method)
    tensors = made.start(decoder(), 0, writing=True)
    card = Card(name="pets", task=TaskCard(name="pets", kind="classification"))
    return Adapter(method, made.hyperparameters(), tensors, decoder().card(), card, head)


def log_p(prompt: str, answer: str) -> Tensor:
    """log p of the answer's tokens and the end's, from the Hugging Face model alone."""
    ids = tokenizer()(prompt)["input_ids"]
    target = [*tokenizer()(f"{prompt} {answer}")["input_ids"][len(ids) :], tokenizer().eos_token_id]
    with torch.no_grad():
        z = decoder().model(input_ids=torch.tensor([[*ids, *target[:-1]]])).logits[0, len(ids) - 1 :]
    return z.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]


def test_a_labels_score_is_the_weighted_mean_of_its_terms_by_hand() -> None:
    # Two labels, of two terms and one: shares ¾ and ¼, and 1.
    one = Options(
        ("a", "b"),
        torch.tensor([-1.0, -5.0, -2.5]),
        torch.tensor([-1.0, -3.0, -0.5]),
        torch.tensor([1, 2, 5]),
        torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]),
    )
    assert one.scores("raw").tolist() == pytest.approx([-2.0, -2.5])
    assert one.scores("length").tolist() == pytest.approx([-1.375, -0.5])
    assert one.scores("pmi").tolist() == pytest.approx([-0.5, -2.0])
    assert [one.best(way).output for way in ("raw", "length", "pmi")] == ["a", "b", "a"]
    assert one.best("raw").probability == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert choose_normalisation([one], ["b"]) == "length"


def test_terms_are_weighed_by_the_models_own_logits() -> None:
    own = ({"cat": 1.0, "mat": 0.5}, {"dog": 1.0, "dogs run": 0.6, "home": 0.4})
    said = [term for label in own for term in label]
    listed = "Which?\n\nLabels:\n- cat: an animal that meows\n- dog: an animal that barks\n\nInput: {}\nOutput:"
    given, without = ([float(log_p(listed.format(x), term).sum()) for term in said] for x in ("it sat", ""))
    engine = Engine(decoder(), adapters=[alone(termed(*own))])
    [found] = engine.weigh([Request("it sat", adapter="pets")])
    assert found.names == ("cat", "dog")
    assert found.log_p.tolist() == pytest.approx(given, abs=1e-4)
    assert found.log_p_alone.tolist() == pytest.approx(without, abs=1e-4)
    right = [(given[0] + 0.5 * given[1]) / 1.5, (given[2] + 0.6 * given[3] + 0.4 * given[4]) / 2.0]
    assert found.scores("raw").tolist() == pytest.approx(right, abs=1e-4)
    [answer] = engine.answer([Request("it sat", adapter="pets")])
    assert answer.output == ("cat", "dog")[right.index(max(right))]
    assert answer.probability == pytest.approx(float(torch.tensor(right).softmax(0).max()), abs=1e-4)
    assert answer.mass == pytest.approx(sum(map(math.exp, given)), rel=1e-3)


def test_terms_labels_and_writers_share_a_batch() -> None:
    card = Card(name="plain", task=TaskCard(name="plain", kind="classification"))
    plain = replace(alone(text.design(PETS, decide="likelihood")), card=card)
    many = alone(termed({"cat": 1.0, "mat": 0.5}, {"dog": 1.0}), "lora")
    both = Engine(decoder(), adapters=[plain, many])
    requests = [Request(said, adapter=who) for said in ("it sat", "two dogs") for who in ("plain", "pets")]
    for request, found in zip(requests, both.answer(requests), strict=True):
        [one] = Engine(decoder(), adapters=[plain, many]).answer([request])
        assert (found.output, found.adapter) == (one.output, one.adapter)
        assert found.probability == pytest.approx(one.probability, abs=1e-4)


def test_one_term_for_each_label_is_its_likelihood() -> None:
    one, same = (
        Engine(decoder(), adapters=[alone(head)]).weigh([Request("it sat", adapter="pets")])[0]
        for head in (text.design(PETS, decide="likelihood"), termed({"cat": 0.3}, {"dog": 1.0}))
    )
    for way in ("raw", "length", "pmi"):
        assert torch.equal(one.scores(way), same.scores(way))


def test_answers_to_learn_are_drawn_from_the_terms() -> None:
    head = termed({"cat": 3.0, "mat": 1.0}, {"dog": 1.0})
    examples = [Example(str(i), "x", "cat") for i in range(400)]
    drawn = [text.taught(head, e).answer for e in examples]
    assert drawn == [text.taught(head, e).answer for e in examples]
    assert 0.68 < drawn.count("cat") / 400 < 0.82
    assert set(drawn) == {"cat", "mat"}
    assert text.taught(head, Example("0", "x", "dog")).answer == "dog"
    assert text.taught(head, Example("0", "x")).answer is None
    plain = text.design(PETS, decide="likelihood")
    assert text.taught(plain, examples[0]) == text.ask(plain, examples[0])
    [unit] = passes.encode(decoder(), head, [examples[drawn.index("mat")]])
    assert unit.target is not None
    assert tokenizer().decode(unit.target[:-1]) == " mat"


SHOP = Task(
    "shop",
    "classification",
    tuple(
        Example(str(i), said, label)
        for i, (said, label) in enumerate(
            [
                ("the parcel and the delivery are late", "shipping"),
                ("a parcel without delivery", "shipping"),
                ("my invoice and my payment", "billing"),
                ("an invoice and a payment", "billing"),
                ("the weather and the cat", "billing"),
                ("the weather and a zebra", "shipping"),
            ]
        )
    ),
    labels=(Label("shipping", "Getting an order to the customer."), Label("billing", "Money for orders.")),
)


def test_words_are_those_of_more_than_one_text() -> None:
    assert terms.words(SHOP.train) == ["and", "the", "delivery", "invoice", "parcel", "payment", "weather"]


def test_terms_go_to_the_label_they_fit_and_count_by_how_well(monkeypatch: pytest.MonkeyPatch) -> None:
    head = text.design(SHOP, decide="likelihood")
    likely = torch.ones(len(tokenizer()), dtype=torch.bool)
    monkeypatch.setattr(terms, "likely_starts", lambda *_: likely)
    found = terms.find(decoder(), SHOP, head)
    assert found.text is not None
    assert found.text.terms is not None
    shipping, billing = ({t.term: t.weight for t in own} for own in found.text.terms)
    assert list(shipping) == ["shipping", "delivery", "parcel"]
    assert next(iter(billing)) == "billing"
    assert set(billing) == {"billing", "payment", "invoice"}
    assert shipping["shipping"] == billing["billing"] == 1
    minilm = load(precision="fp32", device="cpu")
    name, described, word = F.normalize(
        passes.embed(minilm, ["shipping", "shipping: Getting an order to the customer.", "parcel"]), dim=-1
    )
    right = float(F.cosine_similarity(name + described, word, dim=0))
    assert shipping["parcel"] == pytest.approx(right, abs=2e-3)
    listed = terms.find(decoder(), SHOP, head, ("Express delivery", "invoice payment", "shipping", "purple"))
    assert listed.text is not None
    assert listed.text.terms is not None
    own = [[t.term for t in label] for label in listed.text.terms]
    assert own == [["shipping", "Express delivery"], ["billing", "invoice payment"]]
    [said] = text.encode(decoder(), head, [text.ask(head, replace(SHOP.train[0], output="parcel"))])
    assert said.target is not None
    likely[said.target[0]] = False
    fewer = terms.find(decoder(), SHOP, head)
    assert fewer.text is not None
    assert fewer.text.terms is not None
    assert "parcel" not in [t.term for t in fewer.text.terms[0]]


def test_the_likelier_half_is_that_of_the_mean_over_prompts() -> None:
    head = text.design(SHOP, decide="likelihood")
    found = terms.likely_starts(decoder(), head, SHOP.train)
    listed = (
        "Labels:\n- shipping: Getting an order to the customer.\n- billing: Money for orders.\n\nInput: {}\nOutput:"
    )
    with torch.no_grad():
        z = [
            decoder().model(input_ids=torch.tensor([tokenizer()(listed.format(e.text))["input_ids"]])).logits[0, -1]
            for e in SHOP.train
        ]
    mean = torch.stack(z).log_softmax(-1).mean(0)
    assert int(found.sum()) == len(mean) - len(mean) // 2
    assert float(mean[found].min()) > float(mean[~found].max())


def test_what_has_no_terms() -> None:
    choice = Task("pick", "choice", (Example("0", "x", "a", extra={"options": ["a", "b"]}),))
    with pytest.raises(UsageError, match="terms stand for the labels"):
        Reading(decide="terms").design(decoder(), choice)
    with pytest.raises(UsageError, match="cannot be listed"):
        Reading(in_text="yes", decide="terms").design(decoder(), task_of("regression", 4))
    with pytest.raises(PolytaskError, match="no training examples"):
        Reading(in_text="yes", decide="terms").design(decoder(), replace(SHOP, train=()))


def test_an_adapter_with_terms_is_whole_on_disk(tmp_path: Path) -> None:
    task = replace(SHOP, validation=SHOP.train[:4], test=SHOP.train[2:])
    reading = Reading(in_text="yes", decide="terms", terms=("delivery", "payment"))
    made = adapt(decoder(), task, "lora", settings=Settings(epochs=8, batch=4, lr=2e-2), reading=reading)
    made.save(tmp_path / "one")
    read = Adapter.load(tmp_path / "one")
    assert read.id == made.id
    assert read.head == made.head
    assert read.head is not None
    assert read.head.text is not None
    assert read.head.text.terms is not None
    assert all(own[0].term == label.name for own, label in zip(read.head.text.terms, SHOP.labels, strict=True))
    answers = predict(decoder(), read, task.test)
    right = [a == e.output for a, e in zip(answers, task.test, strict=True)]
    assert set(answers) <= {"shipping", "billing"}
    assert sum(right) / 4 == pytest.approx(read.card.scores["test"].others.get("accuracy", sum(right) / 4))
    other = adapt(decoder(), task, "lora", settings=Settings(epochs=1), reading=replace(reading, terms=()))
    assert other.id != made.id


def test_terms_on_the_command_line(tmp_path: Path) -> None:
    decoder().model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    data = write_table(tmp_path / "table.csv")
    listed = tmp_path / "terms.txt"
    listed.write_text("food\n\nrepairs\n", encoding="utf-8")
    command = ("adapt", data, "--base", tmp_path / "base", "--library", tmp_path / "skills", "--epochs", "1", "--json")
    done = run(*command, "--method", "lora", "--text", "--decide", "terms", "--terms", listed)
    assert done.status == 0, done.err
    saved = json.loads(next((tmp_path / "skills").rglob(DESCRIPTION)).read_text(encoding="utf-8"))
    card = saved["head"]["text"]
    assert card["decide"] == "likelihood"
    assert {t["term"] for own in card["terms"] for t in own} <= {"fruit", "tool", "food", "repairs"}
    assert [own[0]["term"] for own in card["terms"]] == ["fruit", "tool"]
    assert "--decide terms is for answers in text" in run(*command, "--decide", "terms").error
    assert "one of auto" in run(*command, "--text", "--decide", "often").error
    assert "goes with --decide terms" in run(*command, "--text", "--terms", listed).error
    assert "no list of terms" in run(*command, "--text", "--decide", "terms", "--terms", tmp_path / "none.txt").error
