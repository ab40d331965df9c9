"""A language model as it writes: what a row gets from the frame is what the model gives for its whole sequence alone,
whatever joins, leaves, moves or is copied around it. Continuations are forced, so that no two rows are alike."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from polytask.backbones import Backbone, Batch
from polytask.backbones.attention import attending
from polytask.backbones.frame import ROOM, Frame, read, start_token, unembed
from polytask.backbones.weights import fingerprint
from polytask.errors import UsageError

CASES = [(family, {}) for family in tiny.LM]
CASES += [(family, {"sliding_window": 4}) for family in ("mistral", "gemma2", "gemma3_text", "phi3")]
CASES += [
    ("llama", {"attn_implementation": "sdpa"}),
    ("gemma3_text", {"attn_implementation": "sdpa", "sliding_window": 4}),
]
CASES += [("bart", {"attn_implementation": "sdpa"})]


def name_of(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


both_ways = pytest.mark.parametrize("quick", [False, True], ids=["modules", "quick"])
every_case = pytest.mark.parametrize(("family", "config"), CASES, ids=name_of)


def writer(family: str, *, precision: str = "fp32", **config: Any) -> Backbone:
    model = tiny.make_lm(family, **{"attn_implementation": "eager", **config})
    return Backbone(model, None, f"tiny-{family}", precision=precision, device="cpu")


def alone(backbone: Backbone, prompt: list[int], written: list[int]) -> Tensor:
    """Logits [written + 1, V] that predict each written token and the next, by the model on the whole sequence."""
    with torch.no_grad():
        if backbone.kind == "encoder-decoder":
            begun = torch.tensor([[start_token(backbone), *written]])
            return backbone.model(input_ids=torch.tensor([prompt]), decoder_input_ids=begun).logits[0]
        ids = torch.tensor([[*prompt, *written]])
        return backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 :]


class Rows:
    """A frame with what was forced into each of its rows, and the logits that it gave."""

    def __init__(self, backbone: Backbone, *, quick: bool = False) -> None:
        self.backbone, self.frame = backbone, Frame(backbone)
        self.quick = quick  # by our own attention, and without modules where the frame can
        self.draw = torch.Generator().manual_seed(0)
        self.rows: list[tuple[list[int], list[int], list[Tensor]]] = []
        self.left: list[tuple[list[int], list[int], list[Tensor]]] = []

    def join(self, *lengths: int | tuple[int, ...]) -> None:
        """Prompts of these lengths; those in brackets share a row as they are read, where the backbone can."""
        packed = [[self.tokens(n) for n in (row if isinstance(row, tuple) else (row,))] for row in lengths]
        prompts = [prompt for row in packed for prompt in row]
        shared = self.backbone.packable and len(prompts) > len(packed)
        with torch.no_grad(), self.attention():
            new = read(self.backbone, self.backbone.pack(packed) if shared else self.backbone.collate(prompts))
            self.frame.join(new)
            self.rows += [(p, [], [z]) for p, z in zip(prompts, unembed(self.backbone, new.hidden), strict=True)]

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            tokens = self.tokens(len(self.rows))
            with torch.no_grad(), self.attention():
                hidden = self.frame.step(torch.tensor(tokens), {} if self.quick else None)
                logits = unembed(self.backbone, hidden)
            for (_, written, found), token, z in zip(self.rows, tokens, logits, strict=True):
                written.append(token)
                found.append(z)

    def keep(self, *index: int) -> None:
        self.left += [row for i, row in enumerate(self.rows) if i not in index]
        self.rows = [(p, [*w], [*z]) for p, w, z in (self.rows[i] for i in index)]
        self.frame.keep(torch.tensor(index, dtype=torch.long))

    def attention(self) -> contextlib.AbstractContextManager[None]:
        return attending(self.backbone.model) if self.quick else contextlib.nullcontext()

    def tokens(self, n: int) -> list[int]:
        return torch.randint(3, 128, (n,), generator=self.draw).tolist()

    def check(self, tolerance: float = 1e-4) -> None:
        for prompt, written, found in self.rows + self.left:
            torch.testing.assert_close(
                torch.stack(found), alone(self.backbone, prompt, written), atol=tolerance, rtol=0.0
            )
        used = 0 if self.backbone.kind == "decoder" else 1
        lengths = [len(w) + (used or len(p)) for p, w, _ in self.rows]
        assert self.frame.lengths.tolist() == lengths
        assert self.frame.rows == len(lengths)


@every_case
@both_ways
def test_rows_that_come_and_go_get_what_the_model_gives_them_alone(family, config, quick):
    backbone = writer(family, **config)
    rows = Rows(backbone, quick=quick)
    rows.join(7, 3, 9)
    rows.step(2)
    rows.join((13,), (2, 5, 1))  # one is longer than all that are there
    rows.step()
    rows.keep(6, 4, 5, 0, 2, 3, 1)
    rows.step()
    rows.keep(0, 1, 4)  # the longest leaves
    assert rows.frame.end == max(rows.frame.lengths.tolist())
    rows.step(2)
    rows.keep(1, 1, 2, 0, 1)  # copies, which then go on differently
    rows.step(2)
    rows.join((1,))
    rows.step(2)
    assert len({tuple(w) for _, w, _ in rows.rows}) == 6
    rows.keep()
    rows.join((4, 3), 6)
    rows.step(2)
    rows.check()
    assert len(rows.left) == 4 + 6
    assert fingerprint(backbone.model) == backbone.fingerprint
    assert not any(module._forward_hooks for module in backbone.model.modules())
    assert backbone.model.config._attn_implementation == config.get("attn_implementation", "eager")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "t5", "bart"])
def test_a_frame_grows_as_long_as_rows_go_on(family):
    window = {"sliding_window": 5} if family == "gemma2" else {}
    rows = Rows(writer(family, max_position_embeddings=256, **window), quick=True)
    rows.join((3, 1))
    rows.step(ROOM + 6)
    rows.join(2)
    rows.step(ROOM)
    rows.keep(2, 1)
    rows.step(10)
    assert rows.frame.end > 2 * ROOM + 6
    rows.check()


@both_ways
@pytest.mark.parametrize("family", ["llama", "gemma2", "t5", "bart"])
def test_in_bf16_a_row_is_about_as_far_from_fp32_as_the_whole_model(family, quick):
    backbone, exact = writer(family, precision="bf16"), writer(family)
    rows = Rows(backbone, quick=quick)
    rows.join(7, (3, 4))
    rows.step(4)
    rows.join(9)
    rows.step(4)
    for prompt, written, found in rows.rows:
        right, whole, stepped = alone(exact, prompt, written), alone(backbone, prompt, written), torch.stack(found)
        assert stepped.dtype == torch.float32
        assert (stepped - right).norm() < 2 * (whole.float() - right).norm() + 1e-3 * right.norm()
        assert (stepped - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize(
    ("family", "config"), [case for case in CASES if tiny.LM[case[0]] is not AutoModelForSeq2SeqLM], ids=name_of
)
def test_sequences_that_share_a_row_do_not_see_each_other(family, config):
    backbone = writer(family, **config)
    draw = torch.Generator().manual_seed(0)
    rows = [
        [torch.randint(3, 128, (n,), generator=draw).tolist() for n in lengths]
        for lengths in [(6, 2, 7), (11, 1), (9,)]
    ]
    batch = backbone.pack(rows)
    assert batch.positions[1, :12].tolist() == [*range(11), 0]
    with torch.no_grad():
        together = backbone.hidden(batch)
        for r, row in enumerate(rows):
            at = 0
            for ids in row:
                own = backbone.hidden(backbone.collate([ids]))[0, : len(ids)]
                torch.testing.assert_close(together[r, at : at + len(ids)], own, atol=1e-4, rtol=0.0)
                at += len(ids)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(tiny.LM))
def test_the_head_is_the_models_own(family, tied):
    """Ties, T5's scale, BART's bias and Gemma's cap included. T5's weights are tied always; "untied" there, as version
    1.1 says of itself, means that nothing is scaled."""
    config: dict[str, Any] = {"tie_word_embeddings": tied}
    if family == "gemma3":
        config["text_config"] = {**tiny.CONFIGS[family]["text_config"], **config}
    if family in ("gemma2", "gemma3_text"):
        config["final_logit_softcapping"] = 2.0
    backbone = writer(family, **config)
    if hasattr(backbone.model, "final_logits_bias"):
        backbone.model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    head, embeddings = backbone.model.get_output_embeddings(), backbone.model.get_input_embeddings()
    assert (head.weight is embeddings.weight) == (tied or family in ("t5", "mt5", "umt5"))
    batch = tiny.batch(3)
    if backbone.kind == "encoder-decoder":
        written = tiny.batch(3, seed=1).ids
        out = backbone.model(input_ids=batch.ids, attention_mask=batch.mask.long(), decoder_input_ids=written)
        hidden = backbone.hidden(Batch(batch.ids, batch.mask, written=written))
    else:
        out = backbone.model(input_ids=batch.ids, attention_mask=batch.mask.long())
        hidden = backbone.hidden(batch)
    where = torch.ones_like(batch.mask) if backbone.kind == "encoder-decoder" else batch.mask
    torch.testing.assert_close(unembed(backbone, hidden)[where], out.logits[where], atol=1e-5, rtol=1e-5)


def test_what_cannot_write_is_refused():
    encoder = tiny.backbone("bert")
    masked = Backbone(tiny.make("bert", auto=AutoModelForMaskedLM), None, "masked", precision="fp32", device="cpu")
    bare = tiny.backbone("llama")
    drawn = Backbone(tiny.make_lm("llama"), None, "drawn", precision="fp32", device="cpu", headless=True)
    for backbone in (encoder, masked, bare, drawn):
        assert not backbone.writes
        with pytest.raises(UsageError, match=f"{backbone.name} has no language-model head") as error:
            unembed(backbone, torch.zeros(1, 32))
        assert "\n" not in str(error.value)
    assert writer("llama").writes


def test_where_an_encoder_decoder_begins():
    backbone = writer("bart", decoder_start_token_id=7)
    assert start_token(backbone) == 7
    rows = Rows(backbone)
    rows.join(3)
    rows.check()  # `alone` begins there too
    backbone.model.config.decoder_start_token_id = None
    assert start_token(backbone) == tiny.SIZES["bos_token_id"]
    for name in ("bos_token_id", "pad_token_id"):
        setattr(backbone.model.config, name, None)
    with pytest.raises(UsageError, match="decoder_start_token_id"):
        start_token(backbone)
