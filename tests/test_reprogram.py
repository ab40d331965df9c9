"""Reprogramming: a foreign alphabet's table, how its symbols are found, and a task of them from a file to an answer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from writers import writer

import polytask as pt
from polytask.adapters import HeadCard
from polytask.backbones import Backbone
from polytask.errors import UsageError
from polytask.inference import Engine, Request
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.tasks import Example

LETTERS = tiny.words("A", "C", "G", "T", "x", "the")


def test_symbols_are_mixtures_of_words_by_hand() -> None:
    """θ = [.5 .5 0; 0 0 1] on E = [1 0; 0 1; 2 2] is [.5 .5; 2 2]. Symbol 0 comes as token 1, symbol 1 as tokens 0 and
    2: their rows of E become those of θE, and what is no row of E stays."""
    θ, E = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    m = build("reprogram", {"alphabet": "AC"})
    p = m.ready({"θ": θ}, {"E": E, "token": torch.tensor([1, 0, 2]), "symbol": torch.tensor([0, 1, 1])})
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [2.0, 2.1], [0.0, 0.0]])
    expected = [[0.5, 0.5], [2.0, 2.0], [2.0, 2.0], [2.0, 2.1], [0.0, 0.0]]
    torch.testing.assert_close(y + m.delta(p, y, y), torch.tensor(expected))


@pytest.mark.parametrize("family", ["bert", "llama", "gemma2", "t5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_the_model_with_other_rows_in_its_table(family: str, precision: str) -> None:
    """θE in the rows of A, C, G and T of the model's own table (over Gemma's scale) gives the same states."""
    backbone = tiny.backbone(family, tokenizer=LETTERS, precision=precision)
    m = build("reprogram", {"alphabet": "TGCA"})
    start = m.start(backbone, 0)
    [(name, θ)] = start.items()
    batch = backbone.collate([[4, 5, 20, 7, 8], [6, 6]])
    table = backbone.model.get_input_embeddings()
    own = table.weight.detach().clone()
    E = backbone.linear(backbone.sites[name.rpartition("/")[0]])["E"]
    scale = float(getattr(table, "embed_scale", 1.0))
    with torch.no_grad():
        found = Plan(backbone, [Active.of(m, start)]).hidden(batch)
        table.weight[[7, 6, 5, 4]] = ((θ @ E.float()) / scale).to(backbone.dtype)
        expected = backbone.hidden(batch)
        table.weight.copy_(own)
    limit = 1e-5 if precision == "fp32" else 0.03
    assert (found - expected)[batch.mask].float().norm() <= limit * expected[batch.mask].float().norm()
    assert (found - backbone.hidden(batch))[batch.mask].abs().max() > 1e-2


def test_numbers_are_those_of_the_map() -> None:
    backbone = tiny.backbone("bert", tokenizer=LETTERS)
    [θ] = build("reprogram", {"alphabet": "ACG"}).start(backbone, 0).values()
    assert θ.shape == (3, 128)
    assert 0.017 < θ.std() < 0.023


@pytest.fixture(scope="module")
def embedded() -> Backbone:
    return pt.load("minilm", precision="fp32", device="cpu")


# ------------------- symbols


def test_a_symbol_may_have_a_token_for_a_beginning_and_one_for_behind_a_space() -> None:
    backbone = writer("llama")  # byte-level
    m = build("reprogram", {"alphabet": "ac"})
    own = backbone.tokenizer
    token = own.convert_tokens_to_ids
    assert m.forms(backbone) == {token("a"): 0, token("Ġa"): 0, token("c"): 1, token("Ġc"): 1}  # type: ignore[attr-defined]


def test_texts_are_taken_apart_into_symbols() -> None:
    backbone = tiny.backbone("bert", tokenizer=LETTERS)
    card = HeadCard(kind="classification", targets=("a", "b"), alphabet="ACGT")
    [one] = passes.encode(backbone, card, [Example("0", "the GATxA C")])
    assert LETTERS.convert_ids_to_tokens(one.ids[0]) == ["[CLS]", "the", "G", "A", "T", "x", "A", "C", "[SEP]"]
    pair = card.model_copy(update={"pair": "joint"})
    [both] = passes.encode(backbone, pair, [Example("0", "GA", pair="TC")])
    assert LETTERS.convert_ids_to_tokens(both.ids[0]) == ["[CLS]", "G", "A", "[SEP]", "T", "C", "[SEP]"]
    [plain] = passes.encode(backbone, card.model_copy(update={"alphabet": None}), [Example("0", "the GATxA C")])
    assert LETTERS.convert_ids_to_tokens(plain.ids[0]) == ["[CLS]", "the", "[UNK]", "C", "[SEP]"]
    odd = card.model_copy(update={"alphabet": "]^-\\"})  # what a pattern would read otherwise
    assert passes._spelt(odd, "a]b^c-d\\e") == "a ] b ^ c - d \\ e"


@pytest.mark.parametrize(
    ("alphabet", "said"),
    [
        ("", "needs an alphabet"),
        ("AA", "'A' in the alphabet"),
        ("A C", "' ' in the alphabet"),
        ("AZ", "'Z' is no token"),
    ],
)
def test_alphabets_that_cannot_be_are_refused_in_one_line(alphabet: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        build("reprogram", {"alphabet": alphabet}).start(tiny.backbone("bert", tokenizer=LETTERS), 0)
    assert "\n" not in str(error.value)


def test_two_symbols_of_one_token_and_answers_in_text_are_refused(embedded: Backbone) -> None:
    with pytest.raises(UsageError, match="'A' and 'a' are one"):
        build("reprogram", {"alphabet": "Aa"}).start(embedded, 0)
    with pytest.raises(UsageError, match="by a head"):
        build("reprogram", {"alphabet": "AC"}).start(writer("llama"), 0, writing=True)
    with pytest.raises(UsageError, match="acts at the site 'tokens'"):
        build("reprogram", {"alphabet": "AC", "sites": ["0.mlp"]}).start(embedded, 0)


# ------------------- from a file to an answer


def test_a_task_of_a_foreign_alphabet_is_learned(tmp_path: Path) -> None:
    """Which of two letters there are more of, in texts that no dictionary has."""
    backbone = tiny.backbone("bert", tokenizer=tiny.words("H", "P", "Q"))
    draw = random.Random(0)
    rows = ["text,label"]
    for i in range(60):
        kind = i % 2
        text = [draw.choice("HHHHPQ" if kind else "PPPPHQ") for _ in range(10)]
        rows.append(f"{''.join(text)},{'h' if kind else 'p'}")
    (tmp_path / "chains.csv").write_text("\n".join(rows) + "\n")
    task = pt.Task.read(tmp_path / "chains.csv", input="text", output="label")
    settings = pt.Settings(epochs=10, batch=16, lr=1e-2, head_lr=1e-2)
    one = pt.adapt(backbone, task, "reprogram", hyperparameters={"alphabet": "HPQ"}, settings=settings)
    assert one.card.scores["test"].value > 0.8
    assert one.head is not None
    assert one.head.alphabet == "HPQ"
    answers = Engine(backbone, adapters=[one]).answer([Request("HHPHHHQHHH"), Request("PPPPHPPQPP")])
    assert [answer.output for answer in answers] == ["h", "p"]
    assert pt.adapt(backbone, task, "head", settings=settings).card.scores["test"].value < 0.7  # whole texts are [UNK]
