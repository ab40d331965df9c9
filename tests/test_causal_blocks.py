"""The causal mask dropped in some blocks: every block gets the mask that it should, in every decoder family."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run, write_tags
from jobs import TOKENS, job_of, task_of
from pydantic import ValidationError
from torch import Tensor

from polytask.adapters import Adapter, BackboneCard, Card, HeadCard, TextCard
from polytask.adapters.store import DESCRIPTION, describe
from polytask.backbones import Backbone, Batch, families, heads
from polytask.errors import UsageError
from polytask.methods import build, passes
from polytask.methods.lifting import Active, Plan
from polytask.recipes.adapt import adapt
from polytask.recipes.reading import Reading
from polytask.tasks import TaskCard
from polytask.training import Settings, loop, train

DECODERS = [f for f in tiny.FAMILIES if families.FAMILIES[f].kind == "decoder"]
every_decoder = pytest.mark.parametrize("family", DECODERS)
FOUR = {"num_hidden_layers": 4}


@cache
def backbone_of(family: str) -> Backbone:
    config = {"text_config": {**tiny.CONFIGS[family]["text_config"], **FOUR}} if family == "gemma3" else FOUR
    return tiny.backbone(family, tokenizer=TOKENS, **config)


def by_hand(backbone: Backbone, batch: Batch, opened: list[bool]) -> Tensor:
    """A pass in which the attention module of each block is given its mask by hand: scores are masked where a row's own
    blocks see them, whatever mask the model makes."""
    R, T = batch.ids.shape
    column = torch.arange(T)
    real = batch.mask[:, None, None, :].expand(R, 1, T, T)
    kinds, window = backbone.windows
    config: Any = backbone.model.config
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or [next(iter(kinds), "full_attention")] * len(backbone.blocks)
    handles = []
    for block, open_, kind in zip(backbone.blocks, opened, layer_types, strict=True):
        seen = real if open_ else real & (column[:, None] >= column)
        slides = kind == "sliding_attention" or (not kinds and window is not None)
        if slides and not open_ and window is not None:
            seen = seen & (column[:, None] - column < window)
        scores = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        attention = next(m for n, m in block.named_children() if n in ("attn", "attention", "self_attn"))

        def give(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scores: Tensor = scores) -> Any:
            assert "attention_mask" in kwargs
            return args, {**kwargs, "attention_mask": scores}

        handles.append(attention.register_forward_pre_hook(give, with_kwargs=True))
    try:
        return backbone.hidden(batch)
    finally:
        for handle in handles:
            handle.remove()


# -- masks -------------------------------------------------------------------------------------------------------------


@every_decoder
def test_each_block_gets_the_mask_it_should(family: str) -> None:
    backbone, batch = backbone_of(family), tiny.batch(3)
    found = {}
    for pattern in ("1100", "0011", "0110", "01", "10"):
        opened = backbone.opened(pattern)
        assert opened == [pattern[i * len(pattern) // len(opened)] == "1" for i in range(len(opened))]
        found[pattern] = backbone.hidden(batch, causal=pattern)
        right = by_hand(backbone, batch, opened)
        torch.testing.assert_close(found[pattern][batch.mask], right[batch.mask], rtol=1e-5, atol=1e-5)
    found["causal"], found["open"] = backbone.hidden(batch), backbone.hidden(batch, causal=False)
    assert torch.equal(found.pop("01"), found["0011"])
    assert torch.equal(found.pop("10"), found["1100"])
    states = list(found.values())
    for i, one in enumerate(states):
        for other in states[:i]:
            assert (one - other)[batch.mask].abs().max() > 1e-4


@every_decoder
def test_all_open_and_all_causal_are_what_they_were_bit_for_bit(family: str) -> None:
    backbone, batch = backbone_of(family), tiny.batch(3)
    assert torch.equal(backbone.hidden(batch, causal="1111"), backbone.hidden(batch, causal=False))
    assert torch.equal(backbone.hidden(batch, causal="0000"), backbone.hidden(batch, causal=True))
    assert not any(block._forward_pre_hooks for block in backbone.blocks)


@every_decoder
def test_a_token_sees_the_last_one_only_through_open_blocks(family: str) -> None:
    backbone, batch = backbone_of(family), tiny.batch(3)
    ids = batch.ids.clone()
    last = batch.mask.sum(1) - 1
    ids[torch.arange(3), last] = torch.where(ids[torch.arange(3), last] == 5, 9, 5)
    changed = Batch(ids, batch.mask)
    n = len(backbone.blocks)
    for pattern in ("1" + "0" * (n - 1), "0" * (n - 1) + "1"):
        first = pattern.index("1")
        for block in range(n):
            one, two = (backbone.upto(b, block, causal=pattern)[:, 0] for b in (batch, changed))
            assert bool(((one - two).abs().amax(-1) > 0).all()) == (block > first), (pattern, block)


@every_decoder
def test_padding_and_neighbours_in_a_packed_row_change_nothing(family: str) -> None:
    backbone, batch = backbone_of(family), tiny.batch(4)
    rows = [row[real].tolist() for row, real in zip(batch.ids, batch.mask, strict=True)]
    for causal in ("0011", "1100", False):
        bare = [Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)) for ids in rows]
        alone = [backbone.hidden(one, causal=causal)[0] for one in bare]
        together = backbone.hidden(batch, causal=causal)
        packed = backbone.pack([rows[:2], rows[2:]])
        side_by_side = backbone.hidden(packed, causal=causal)
        for i, one in enumerate(alone):
            torch.testing.assert_close(together[i, : len(one)], one, rtol=2e-5, atol=2e-5)
            r, begin = divmod(i, 2)
            begin = begin * len(rows[2 * r])
            torch.testing.assert_close(side_by_side[r, begin : begin + len(one)], one, rtol=2e-5, atol=2e-5)


@every_decoder
def test_a_pass_resumed_at_any_block_is_the_whole_pass(family: str) -> None:
    backbone, batch = backbone_of(family), tiny.batch(4)
    whole = backbone.hidden(batch, causal="0110")
    for block in range(len(backbone.blocks)):
        later = Batch(batch.ids, batch.mask, block, backbone.upto(batch, block, causal="0110"))
        assert torch.equal(backbone.hidden(later, causal="0110"), whole)
    assert not any("forward" in block.__dict__ or block._forward_pre_hooks for block in backbone.blocks)


def test_an_encoder_has_no_mask_to_drop() -> None:
    backbone, batch = tiny.backbone("bert", tokenizer=TOKENS), tiny.batch(3)
    assert torch.equal(backbone.hidden(batch, causal="0011"), backbone.hidden(batch))


def test_sdpa_takes_the_masks_too() -> None:
    eager = backbone_of("llama")
    batch = tiny.batch(3)
    model = tiny.make("llama", attn_implementation="sdpa", **FOUR)
    sdpa = Backbone(model, TOKENS, "sdpa", precision="fp32", device="cpu")
    for causal in ("0011", "1000", False):
        a, b = (one.hidden(batch, causal=causal)[batch.mask] for one in (eager, sdpa))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_rows_of_several_patterns_share_no_pass_and_get_what_they_get_alone() -> None:
    backbone = backbone_of("qwen3")
    task = task_of(n=12)
    m = build("lora")
    draw = torch.Generator().manual_seed(0)
    adapters, seats = [], []
    for s, causal in enumerate((True, "0011", False, "1100")):
        tensors = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in m.start(backbone, s).items()}
        adapters.append(Active.of(m, tensors))
        head = heads.design(task, causal=causal)
        seats.append(passes.Seat(head, heads.start(head, backbone.hidden_size, s), torch.eye(4)[s]))
    units = passes.encode(backbone, seats[0].head, task.train)
    which = [i % 4 for i in range(12)]
    plan = Plan(backbone, adapters)
    packs = list(passes.schedule(seats, units, which))
    assert all(len({seats[which[i]].head.causal for i in pack}) == 1 for pack in packs)
    mixed = passes.answer(plan, seats, units, which)
    for s in range(4):
        own = [i for i in range(12) if which[i] == s]
        seat = passes.Seat(seats[s].head, seats[s].params, torch.ones(1))
        alone = passes.answer(Plan(backbone, [adapters[s]]), [seat], [units[i] for i in own], [0] * len(own))
        for i, one in zip(own, alone, strict=True):
            assert mixed[i][0] == one[0]
            assert mixed[i][1] == pytest.approx(one[1], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_training_over_a_cached_prefix_is_training_without_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(family)
    job = job_of(task_of("tagging", 24, held=0), "lora", {"sites": ["3.attn.q"]}, causal="0110")
    [cached] = train(backbone, [job])
    monkeypatch.setattr(loop, "CACHE_BYTES", 0)
    [plain] = train(backbone, [job])
    for name, tensor in cached.tensors.items():
        torch.testing.assert_close(tensor, plain.tensors[name], rtol=2e-3, atol=2e-3)
    [causal] = train(backbone, [job_of(task_of("tagging", 24, held=0), "lora", {"sites": ["3.attn.q"]})])
    assert not torch.allclose(causal.tensors["head/W"], cached.tensors["head/W"])


# -- cards and the command line ----------------------------------------------------------------------------------------

OLD = {  # ids, digests and heads as written before a head could say more
    "f2bc79d595fea4d9": HeadCard(kind="classification", targets=("a", "b", "c")),
    "7ef5c7911ae2d2df": HeadCard(kind="tagging", targets=("O", "B-X", "I-X"), causal=False, pool="last"),
    "0b3f99a1728cb6dc": HeadCard(kind="choice", text=TextCard(template="plain", decide="likelihood", normalise="pmi")),
}
DIGESTS = {
    "f2bc79d595fea4d9": "b910775a9b0cd99e54028b3dc85c6f6047ae320f01ddc3921f20af8e92490787",
    "7ef5c7911ae2d2df": "4255e2018a25b4aa185e795902778c7115915db109d53a815cacf83cf518c9e9",
    "0b3f99a1728cb6dc": "73d5edf8cc2b270890f6eb571e6009c57db69a28aacc4255140f388048ea78c8",
}
SHA256 = {
    "f2bc79d595fea4d9": "4d3e8ecc942935291942a175c2593116a3a724d36d13f8e62b7b0287b9355133",
    "7ef5c7911ae2d2df": "4d3e8ecc942935291942a175c2593116a3a724d36d13f8e62b7b0287b9355133",
    "0b3f99a1728cb6dc": "404b8c0f07f721b180731481cdbb86f9dd712fdaa66c2f019c31bce692eb0e9c",
}


def old_adapter(id: str) -> Adapter:
    A = torch.arange(8.0).reshape(2, 4)
    W, b = torch.arange(12.0).reshape(3, 4), torch.zeros(3)
    tensors = {"0.attn.q/A": A} if OLD[id].text else {"0.attn.q/A": A, "head/W": W, "head/b": b}
    backbone = BackboneCard(name="tiny", fingerprint="f" * 64, family="llama", hidden_size=4, parameters=10)
    card = Card(name="x", task=TaskCard(name="x", kind="classification"))
    return Adapter("lora", {"r": 2, "alpha": 4.0}, tensors, backbone, card, OLD[id])


@pytest.mark.parametrize("id", list(OLD))
def test_adapters_that_were_saved_before_keep_their_ids_and_are_read(id: str, tmp_path: Path) -> None:
    assert old_adapter(id).id == id
    fields: dict[str, Any] = OLD[id].model_dump(mode="json")
    known = ("kind", "targets", "pool", "pair", "causal", "text")
    texts = ("template", "options", "instruction", "labels", "spans", "decide", "normalise", "stop", "max_tokens")
    head = {name: fields[name] for name in known}
    if head["text"] is not None:
        head["text"] = {name: head["text"][name] for name in (*texts, "limit")}
    shapes = {"0.attn.q/A": "float32 2x4", "head/W": "float32 3x4", "head/b": "float32 3"}
    written = {
        "format_version": 1,
        "id": id,
        "method": "lora",
        "hyperparameters": {"r": 2, "alpha": 4.0},
        "backbone": old_adapter(id).backbone.model_dump(mode="json"),
        "head": head,
        "sha256": SHA256[id],
        "tensors": {"0.attn.q/A": "float32 2x4"} if head["text"] else shapes,
        "digest": DIGESTS[id],
        "card": old_adapter(id).card.model_dump(mode="json"),
    }
    (tmp_path / DESCRIPTION).write_text(json.dumps(written), encoding="utf-8")
    assert describe(tmp_path).head == OLD[id]


def test_a_card_says_true_false_or_which_blocks() -> None:
    for said, read in (("true", True), ("false", False), ('"0011"', "0011"), ('"1"', "1")):
        head = HeadCard.model_validate_json(f'{{"kind": "tagging", "causal": {said}}}')
        assert head.causal == read
        assert type(head.causal) is type(read)
        assert json.dumps(head.model_dump(mode="json")["causal"]) == said
    for wrong in ('""', '"0012"', '"open"'):
        with pytest.raises(ValidationError):
            HeadCard.model_validate_json(f'{{"kind": "tagging", "causal": {wrong}}}')


def test_what_cannot_be_opened() -> None:
    task = task_of("tagging", 8)
    with pytest.raises(UsageError, match="open blocks '0021'"):
        heads.design(task, causal="0021")
    with pytest.raises(UsageError, match="no causal mask to drop"):
        Reading(causal="0011").design(tiny.backbone("bert", tokenizer=TOKENS), task)
    with pytest.raises(UsageError, match="5 groups, and tiny-llama has 4 blocks"):
        Reading(causal="00111").design(backbone_of("llama"), task)
    assert Reading(causal="0011").design(backbone_of("llama"), task).causal == "0011"


def test_an_adapter_with_open_blocks_is_saved_and_answers_as_it_did(tmp_path: Path) -> None:
    backbone, task = backbone_of("llama"), task_of("tagging", 24)
    settings = Settings(epochs=1, lr=5e-3)
    made = adapt(backbone, task, "lora", settings=settings, reading=Reading(causal="0011"))
    made.save(tmp_path / "one")
    read = Adapter.load(tmp_path / "one")
    assert read.id == made.id
    assert read.head is not None
    assert read.head.causal == "0011"
    other = adapt(backbone, task, "lora", settings=settings, reading=Reading())
    assert other.id != made.id


def test_the_switch_on_the_command_line(tmp_path: Path) -> None:
    tiny.make_lm("llama", **FOUR, vocab_size=128).save_pretrained(tmp_path / "base")
    tiny.words(*"abcdefgh").save_pretrained(tmp_path / "base")
    data = write_tags(tmp_path / "tags.jsonl")
    command = ("adapt", data, "--base", tmp_path / "base", "--library", tmp_path / "skills", "--epochs", "1", "--json")
    done = run(*command, "--method", "lora", "--open-blocks", "0011")
    assert done.status == 0, done.err
    saved = json.loads(next((tmp_path / "skills").rglob(DESCRIPTION)).read_text(encoding="utf-8"))
    assert saved["head"]["causal"] == "0011"
    assert "0012" in run(*command, "--open-blocks", "0012").error
    assert "give one of the two" in run(*command, "--open-blocks", "0011", "--bidirectional").error
