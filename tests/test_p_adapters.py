"""P-Adapters: the network by hand, sequences that do not meet, and where there is nothing to rewrite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from jobs import job_of, task_of
from torch import Tensor
from writers import writer

from polytask.adapters import HeadCard, TextCard
from polytask.backbones import Backbone
from polytask.backbones.frame import start_token
from polytask.errors import UsageError
from polytask.inference.generation import generate
from polytask.inference.writing import Prompt, Sampling
from polytask.methods import Params, build, p_adapter, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.passes import Seat, Unit
from polytask.training import train

BOTH = pytest.mark.parametrize("name", ["p_adapter", "p_adapter_prefix"])


def active(backbone: Backbone, name: str, seed: int = 0, **hyper: Any) -> Active:
    m = build(name, hyper)
    draw = torch.Generator().manual_seed(seed)
    return Active.of(m, {n: t + 0.2 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, 0).items()})


def hidden(backbone: Backbone, one: Active, ids: list[list[int]], causal: bool | str = True) -> Tensor:
    with torch.no_grad():
        return Plan(backbone, [one]).hidden(backbone.collate(ids), causal=causal)


# ------------------- by hand


def counting() -> Params:
    """d = 2. Layer 1 counts: all gates are open and g = 1, so c_t = t from the left, T − t + 1 from the right, and
    h = tanh c. Layer 2 forgets: its h is tanh of tanh of what it reads from layer 1 in the same direction."""
    p: Params = {}
    for layer in (0, 1):
        for side, way in enumerate(("", "_reverse")):
            i, f, g, o = 40.0, 40.0 if layer == 0 else -40.0, 40.0 if layer == 0 else 0.0, 40.0
            p[f"weight_ih_l{layer}{way}"] = torch.zeros(4, 2)
            p[f"weight_ih_l{layer}{way}"][2, side] = float(layer)
            p[f"weight_hh_l{layer}{way}"] = torch.zeros(4, 1)
            p[f"bias_ih_l{layer}{way}"] = torch.tensor([i, f, g, o])
            p[f"bias_hh_l{layer}{way}"] = torch.zeros(4)
    return p


# tanh 1 = .7616, of that .6420, of that .5663; of 2: .9640, .7461, .6328; of 3: .9951, .7595, .6408.
THRICE = {1: 0.5663, 2: 0.6328, 3: 0.6408}


def test_each_direction_counts_a_sequences_own_tokens() -> None:
    p = counting()
    two, three = p_adapter.states(p, [torch.ones(2, 2), torch.ones(3, 2)])
    expected = [[THRICE[1], THRICE[2]], [THRICE[2], THRICE[1]]]
    torch.testing.assert_close(two, torch.tensor(expected), rtol=0, atol=5e-5)
    expected = [[THRICE[1], THRICE[3]], [THRICE[2], THRICE[2]], [THRICE[3], THRICE[1]]]
    torch.testing.assert_close(three, torch.tensor(expected), rtol=0, atol=5e-5)


def seen(backbone: Backbone, one: Active, ids: list[list[int]]) -> Tensor:
    """What the table's module gives [R, T, d] with an adapter."""
    found: list[Tensor] = []
    batch = backbone.collate(ids)
    if one.method.slots:
        batch, *_ = backbone.widened(batch, torch.full((len(ids),), one.method.slots))
    table: Any = backbone.model.get_input_embeddings()
    with torch.no_grad(), one.method.inside(backbone, one.at):
        handle = table.register_forward_hook(lambda _m, _args, out: found.append(out))
        backbone.hidden(batch)
        handle.remove()
    return found[0]


def test_the_embeddings_are_the_map_of_the_networks_states() -> None:
    """W = [[2, 0], [0, −1]] and b = [0, 1]: E′ = [2 h→, 1 − h←], whatever the words are."""
    backbone = tiny.backbone("bert", hidden_size=2, num_attention_heads=1)
    W, b = torch.tensor([[2.0, 0.0], [0.0, -1.0]]), torch.tensor([0.0, 1.0])
    one = Active(build("p_adapter"), {"tokens": counting() | {"W": W, "b": b}})
    E = seen(backbone, one, [[5, 6], [7, 8, 9]])
    expected = [[2 * THRICE[1], 1 - THRICE[2]], [2 * THRICE[2], 1 - THRICE[1]]]
    torch.testing.assert_close(E[0, :2], torch.tensor(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(E[1, 2], torch.tensor([2 * THRICE[3], 1 - THRICE[1]]), rtol=0, atol=1e-4)


def test_a_prefix_is_made_of_the_largest_states() -> None:
    """Of three tokens both maxima are THRICE[3] = .6408. relu([m, −m]) = [m, 0]; two vectors, [m, 1] and [−m, 0]."""
    backbone = tiny.backbone("bert", hidden_size=2, num_attention_heads=1)
    p = counting() | {
        "W1": torch.tensor([[1.0, 0.0], [0.0, -1.0]]),
        "b1": torch.zeros(2),
        "W2": torch.tensor([[1.0, 9.0], [0.0, 9.0], [-1.0, 9.0], [0.0, 9.0]]),
        "b2": torch.tensor([0.0, 1.0, 0.0, 0.0]),
    }
    ids = [[5, 6, 7], [8]]
    E = seen(backbone, Active(build("p_adapter_prefix", {"n": 2}), {"tokens": p}), ids)
    torch.testing.assert_close(E[0, :2], torch.tensor([[0.6408, 1.0], [-0.6408, 0.0]]), rtol=0, atol=5e-5)
    torch.testing.assert_close(E[1, :2], torch.tensor([[0.5663, 1.0], [-0.5663, 0.0]]), rtol=0, atol=5e-5)
    table: Any = backbone.model.get_input_embeddings()
    assert torch.equal(E[0, 2:5], table.weight[ids[0]])
    assert torch.equal(E[1, 2], table.weight[8])


def test_a_network_that_changes_nothing_leaves_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p_adapter, "states", lambda _p, E: E)
    for family in ("bert", "llama", "gemma2", "t5"):
        backbone = tiny.backbone(family)
        d = backbone.hidden_size
        at = "enc.tokens" if family == "t5" else "tokens"
        one = Active(build("p_adapter"), {at: {"W": torch.eye(d), "b": torch.zeros(d)}})
        ids = [[5, 6, 7, 8], [9, 8]]
        with torch.no_grad():
            plain = backbone.hidden(backbone.collate(ids))
        torch.testing.assert_close(hidden(backbone, one, ids)[1, :2], plain[1, :2], rtol=1e-6, atol=1e-6)


@BOTH
def test_numbers_are_those_of_the_network(name: str) -> None:
    d, n = 32, 3
    hyper = {"n": n} if name == "p_adapter_prefix" else {}
    count = sum(t.numel() for t in build(name, hyper).start(tiny.backbone("bert"), 0).values())
    network = 12 * d * d + 16 * d
    assert count == network + d * d + d + (n * (d * d + d) if hyper else 0)


# ------------------- sequences that do not meet


@BOTH
@pytest.mark.parametrize("causal", [True, False, "010"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_rows_and_their_neighbours_in_a_row_are_read_alone(name: str, family: str, causal: bool | str) -> None:
    backbone = tiny.backbone(family)
    one = active(backbone, name)
    texts = [[5, 6, 7], [8, 9, 4, 5, 6], [7, 7], [4]]
    alone = [hidden(backbone, one, [ids], causal)[0, : len(ids)] for ids in texts]
    side_by_side = backbone.pack([texts[:2], texts[2:]])
    with torch.no_grad():
        packed = Plan(backbone, [one]).hidden(side_by_side, causal=causal)
    padded = hidden(backbone, one, texts, causal)
    for i, (r, begin) in enumerate([(0, 0), (0, 3), (1, 0), (1, 2)]):
        n = len(texts[i])
        torch.testing.assert_close(packed[r, begin : begin + n], alone[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(padded[i, :n], alone[i], rtol=1e-5, atol=1e-5)


# ------------------- writing


@BOTH
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_writes_from_what_was_rewritten(name: str, family: str) -> None:
    backbone = writer(family)
    m = build(name)
    start = m.start(backbone, 0, writing=True)
    assert {n.rpartition("/")[0] for n in start} == {"enc.tokens"}
    draw = torch.Generator().manual_seed(1)
    one = Active.of(m, {n: t + 0.5 * torch.randn(t.shape, generator=draw) for n, t in start.items()})
    plan = Plan(backbone, [one])
    rows = [([5, 6, 7], 1.0), ([5, 6, 7], 0.0), ([7, 7, 9, 4], 1.0)]
    found = generate(plan, [Prompt(ids, torch.tensor([w]), Sampling(max_tokens=5)) for ids, w in rows])
    for (ids, w), written in zip(rows, found, strict=True):
        tokens: list[int] = []
        for _ in written.tokens:
            batch = replace(backbone.collate([ids]), written=torch.tensor([[start_token(backbone), *tokens]]))
            with torch.no_grad():
                z = plan.logits(batch, torch.tensor([[w]]), torch.tensor([[0, len(tokens)]]))
            tokens.append(int(z.argmax()))
        assert tokens == list(written.tokens)
    assert found[0].logprob != found[1].logprob


PLAIN = HeadCard(kind="generation", text=TextCard(template="plain"))


def rewritten(backbone: Backbone, one: Active, prompt: list[int], answer: list[int]) -> Tensor:
    """Next-token logits after the prompt and each token of the answer [1 + answer, V], from the model itself, which is
    given the embeddings that the network makes of the prompt, and the answer's own."""
    [p], table = one.at.values(), backbone.model.get_input_embeddings()
    E = table(torch.tensor(prompt))
    [h] = p_adapter.states(p, [E])
    if one.method.slots:
        vectors = torch.relu(h.amax(0) @ p["W1"].T + p["b1"]) @ p["W2"].T + p["b2"]
        E = torch.cat([vectors.view(-1, E.shape[1]), E])
    else:
        E = h @ p["W"].T + p["b"]
    E = torch.cat([E, table(torch.tensor(answer, dtype=torch.long))])
    logits: Tensor = backbone.model(inputs_embeds=E[None]).logits[0]
    return logits[-len(answer) - 1 :]


@BOTH
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_decoders_answer_is_no_part_of_what_is_rewritten(name: str, family: str) -> None:
    """In the passes of training, several texts to a row, and in writing, rows of a LoRA among them: what the model
    gives for the prompt's rewritten embeddings with the answer's own behind them."""
    backbone = writer(family)
    one = active(backbone, name)
    asked = [([5, 6, 7, 8], [9, 4]), ([8, 9, 4, 5, 6, 7], [30]), ([7], [5, 5, 6]), ([4, 4], [7, 8])]
    units = [
        Unit(([*prompt, *answer[:-1]],), [*range(len(prompt) - 1, len(prompt) + len(answer) - 1)], answer)
        for prompt, answer in asked
    ]
    found = passes.logprobs(Plan(backbone, [one]), [Seat(PLAIN, {}, torch.ones(1))], units, [0] * len(units))
    with torch.no_grad():
        for own, (prompt, answer) in zip(found, asked, strict=True):
            z = rewritten(backbone, one, prompt, answer[:-1]).log_softmax(-1)
            torch.testing.assert_close(own, z[range(len(answer)), answer], rtol=1e-4, atol=1e-4)
        plan = Plan(backbone, [one, active(backbone, "lora")])
        weights = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
        prompts = [
            Prompt(ids, torch.tensor(w), Sampling(max_tokens=5)) for (ids, _), w in zip(asked, weights, strict=True)
        ]
        for (prompt, _), w, written in zip(asked, weights, generate(plan, prompts, places=2), strict=True):
            tokens = list(written.tokens)
            if w[0] and tokens:
                assert rewritten(backbone, one, prompt, tokens[:-1]).argmax(-1).tolist() == tokens


@BOTH
def test_only_embeddings_are_rewritten(name: str) -> None:
    with pytest.raises(UsageError, match="acts at the site 'tokens'") as error:
        build(name, {"sites": ["0.mlp"]}).start(tiny.backbone("llama"), 0)
    assert "\n" not in str(error.value)


@BOTH
def test_the_heads_own_score_does_not_keep_training_out(name: str, backbone: Backbone) -> None:
    """A head fitted on the backbone's features is better than an epoch of this, and is not what the random network that
    training starts with would have."""
    job = job_of(task_of(), name, epochs=1, lr=1e-3)
    [learned] = train(backbone, [job])
    assert learned.probe > learned.validation
    start = build(name).start(backbone, job.settings.seed)
    assert all(not torch.equal(learned.tensors[n].cpu(), t) for n, t in start.items())
