"""The recipe of the embedded decoder, on a made-up stream and a model of 0.3 million parameters."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

from bases import audit, data, finish, packing, templates, train  # noqa: E402
from bases import tokenizer as step1  # noqa: E402

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "home", "at", "noon"]
TINY = train.Settings(
    size="tiny",
    tokens=12 * 4 * 64,
    length=64,
    rows=4,
    accumulate=1,
    lr=1e-2,
    warmup=2,
    precision="fp32",
    attention="sdpa",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A cache of novels that repeat themselves and of tasks that copy a word, with its tokenizer."""
    folder = tmp_path_factory.mktemp("cache")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 200)) for _ in range(40)]
    tokenizer = step1.save(step1.train(texts, 400), folder / "tokenizer", 64)
    end, tokens, table = tokenizer.eos_token_id, [], []
    for n, text in enumerate(texts):
        tokens.append([*tokenizer.encode(text), end])
        table.append((len(tokens[-1]), 0, 0, n % 10 == 0))
    for n in range(200):
        word = str(random.choice(WORDS))
        prompt, answer = tokenizer.encode(templates.definition("Copy.", [], word)), tokenizer.encode(f" {word}")
        tokens.append([*prompt, *answer, end])
        table.append((len(tokens[-1]), len(prompt), 1, n % 10 == 0))
    np.save(folder / "tokens.npy", np.concatenate(tokens).astype(np.uint16))
    np.save(folder / "documents.npy", np.array(table, data.DOCUMENT))
    source = {"licence": "CC0", "documents": 1, "tokens": 1, "bytes": 1, "held_documents": 1}
    nothing = {"documents": 1, "13-gram": 0}
    manifest = {
        "vocabulary": 400,
        "tokens": sum(map(len, tokens)),
        "sources": {"novels": source, "tasks/copy": source},
        "dropped": {},
        "audit": {"held_out_inputs": 1, "task part": nothing, "text part": nothing},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    special = {"vocabulary": len(tokenizer), "pad": tokenizer.pad_token_id, "end": end}
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, special=special, cache=packing.Cache.open(folder))


def trainer(made: SimpleNamespace, **changed: object) -> train.Trainer:
    wanted = dataclasses.replace(TINY, **changed)  # type: ignore[arg-type]
    return train.Trainer(wanted, made.cache, device="cpu", **made.special)


# --- tokenizer and texts ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin-1"))))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = _bytes_only()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def _bytes_only(found: list[PreTrainedTokenizerFast] = []) -> PreTrainedTokenizerFast:  # noqa: B006
    if not found:
        built = step1.train(["the cat sat on the mat " * 5], 300)
        found.append(PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False))
    return found[0]


def test_digits_stand_alone_and_the_chat_template_is_what_was_trained(made: SimpleNamespace) -> None:
    loaded = AutoTokenizer.from_pretrained(made.folder / "tokenizer")
    assert len(loaded.encode("1234")) == 4
    turn = [{"role": "user", "content": "Copy.\n\ncat"}]
    assert loaded.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == templates.chat(
        "Copy.", "cat"
    )
    said = [
        {"role": "system", "content": "Copy."},
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": "x"},
    ]
    assert loaded.apply_chat_template(said, tokenize=False) == templates.chat("Copy.", "cat") + "x<|endoftext|>"
    assert loaded.encode(templates.chat("Copy.", "cat"))[0] == loaded.convert_tokens_to_ids("<|user|>")


def test_tags_become_text() -> None:
    tokens, tags = ["Book", "two", "seats", "in", "New", "York"], ["O", "B-n", "O", "O", "B-city", "I-city"]
    assert data.tags_as_text(tokens, tags) == "n = two; city = New York"
    assert data.tags_as_text(["a", "b", "c"], ["B-x", "B-x", "I-y"]) == "x = a; x = b; y = c"
    assert data.tags_as_text(["a"], ["O"]) == "none"
    assert data.tags_as_text(["Cats", "sleep"], ["NOUN", "VERB"]) == "Cats/NOUN sleep/VERB"


# --- audit ----------------------------------------------------------------------------------

LONG_INPUT = "please book me a quiet table for five people near the old harbour on friday night at eight"


@pytest.mark.parametrize(
    ("text", "net"),
    [
        ("Two Seats", "exact"),
        ("two seats!", "casefolded"),
        (f"He said: {LONG_INPUT.upper()}, and left", "13-gram"),
        ("what is the time here", "lines"),
    ],
)
@pytest.mark.parametrize("surface", ["definition", "shown", "plain", "chat"])
def test_the_audit_finds_a_planted_input(text: str, net: str, surface: str) -> None:
    held = audit.HeldOut([("one", "Two Seats"), ("two", LONG_INPUT), ("three", "What is the time here?")])
    clean = (templates.definition("Do it.", [("a cat", "b")], "a dog"), " an owl that sees")
    prompt = {
        "definition": templates.definition("Do it.", [("a", "b")], text),
        "shown": templates.definition("Do it.", [(text, "b")], "a"),
        "plain": f"Do it.\n\n{text}\n\n",
        "chat": templates.chat("Do it.", text),
    }[surface]
    found = audit.report(held, [clean, (prompt, " x")])
    assert found[net] == 1
    assert held.in_document(prompt, " x")
    assert held.in_document(*clean) is None


def test_examples_with_held_out_inputs_are_dropped_and_demonstrations_cut() -> None:
    held = audit.HeldOut([("t", "Two Seats"), ("t", LONG_INPUT)])
    rows = [
        templates.Example("tasks/a", ("Do.",), "two seats", "x"),
        templates.Example("tasks/a", ("Do.",), "x", LONG_INPUT),
        templates.Example("tasks/a", ("Do.",), "three seats", "x", (), (("two  SEATS", "y"), ("one", "z"))),
    ]
    (kept,) = data.clean(rows, held, data.Counter())
    assert (kept.input, kept.demonstrations) == ("three seats", (("one", "z"),))


def test_only_training_rows_are_rendered_and_held_examples_are_not_shown() -> None:
    rows = [templates.Example("tasks/a", ("Name it.",), f"input {n}", f"output {n}", ("u", "v")) for n in range(100)]
    made_of = list(data.rendered(rows))
    held = {answer.strip() for *_, answer, out in made_of if out}
    assert held == {"output 25", "output 75"}
    assert len(made_of) == 98 * data.VARIANTS + 2
    assert not any(f"{text}\n" in prompt for text in held for _, prompt, _, out in made_of if not out)
    assert made_of == list(data.rendered(rows))


@pytest.mark.slow
@pytest.mark.skipif("POLYTASK_DATA" not in os.environ, reason="needs POLYTASK_DATA")
def test_a_stream_from_the_real_tasks_is_clean(tmp_path: Path) -> None:
    source = Path(os.environ["POLYTASK_DATA"])
    texts = [text for _, text in step1.sample(source, 500_000)]
    step1.save(step1.train(texts, 1000), tmp_path / "tokenizer")
    manifest = data.build(source, tmp_path, limit=5)
    assert data.is_clean(manifest["audit"])
    forbidden = set((source / "tasks/superni/test_tasks.txt").read_text().split())
    assert not any(name.split("/")[-1] in forbidden or "bbh" in name for name in manifest["sources"])


# --- packing ----------------------------------------------------------------------------------


def test_a_document_does_not_see_its_neighbours(made: SimpleNamespace) -> None:
    model = trainer(made).model.eval()
    p = packing.rows_of(made.cache, np.arange(40, 60), 64)
    batch = packing.collate(made.cache, p, range(2), 64, made.special["pad"])
    first, second = batch.document[0, 0], batch.document[0][batch.document[0] != batch.document[0, 0]][0]
    a, b = batch.document == first, batch.document == second
    with torch.no_grad():
        before = _logits(model, batch)
        changed = dataclasses.replace(batch, tokens=torch.where(a, 7, batch.tokens))
        after = _logits(model, changed)
        alone = model(input_ids=batch.tokens[b][None]).logits[0]
    assert torch.equal(before[b], after[b])
    assert not torch.equal(before[a], after[a])
    torch.testing.assert_close(before[b], alone, rtol=1e-4, atol=1e-5)


def _logits(model: torch.nn.Module, batch: packing.Batch) -> torch.Tensor:
    mask = train.mask_of(batch.document, "sdpa")
    return model(input_ids=batch.tokens, position_ids=batch.position, attention_mask=mask, use_cache=False).logits


def test_a_pass_has_each_open_token_once_and_no_held_one(made: SimpleNamespace) -> None:
    sizes = [int(made.cache.documents["length"][made.cache.documents["source"] == n].sum()) for n in (0, 1)]
    p = packing.plan(made.cache, {"novels": 0.9 * sizes[0], "tasks": 0.9 * sizes[1]}, 64, seed=3, number=0)
    places = np.concatenate([np.arange(s, s + n) for s, n in zip(p.start, p.length, strict=True)])
    open_ = np.repeat(made.cache.documents["held"] == 0, made.cache.documents["length"])
    novels = places < sizes[0]
    assert sorted(places[novels]) == list(np.flatnonzero(open_[: sizes[0]]))
    assert open_[places].all()
    other = packing.plan(made.cache, {"novels": 0.9, "tasks": 0.1}, 64, seed=3, number=1)
    assert other.start[:50].tolist() != p.start[:50].tolist()


def test_rows_are_full() -> None:
    sizes = np.random.default_rng(0).integers(5, 50, 5000)
    cache = packing.Cache.of(
        np.zeros(sizes.sum(), np.uint16), np.array([(n, 0, 0, 0) for n in sizes], data.DOCUMENT), ("novels",)
    )
    p = packing.plan(cache, {"novels": 1.0}, 128, seed=0, number=0)
    rows = np.add.reduceat(p.length, p.first[:-1])
    assert rows.max() <= 128
    assert rows.mean() > 0.98 * 128
    assert sorted(p.start) == cache.starts.tolist()


def test_targets_and_what_they_are_part_of(made: SimpleNamespace) -> None:
    p = packing.rows_of(made.cache, np.array([40]), 64)
    batch = packing.collate(made.cache, p, range(1), 64, 1)
    size, answer = (int(made.cache.documents[40][name]) for name in ("length", "answer"))
    assert batch.target[0, : size - 1].tolist() == batch.tokens[0, 1:size].tolist()
    wanted = [packing.PROMPT] * (answer - 1) + [packing.ANSWER] * (size - answer) + [-1] * (64 - size + 1)
    assert batch.part[0].tolist() == wanted
    assert train.weights_of(batch.part)[0].sum().item() == pytest.approx(0.1 * (answer - 1) + size - answer)


def test_a_long_example_keeps_its_end_and_a_long_text_all() -> None:
    table = np.array([(100, 90, 1, 0), (100, 0, 0, 0)], data.DOCUMENT)
    cache = packing.Cache.of(np.arange(200, dtype=np.uint16), table, ("novels", "tasks/a"))
    assert packing.pieces(cache, np.array([0, 1]), 32).tolist() == [
        [68, 32, 22],
        *([100, 32, -1], [132, 32, -1], [164, 32, -1], [196, 4, -1]),
    ]


def test_pack_and_unpack(made: SimpleNamespace, tmp_path: Path) -> None:
    data.pack(made.folder, tmp_path / "stream.bin.xz")
    data.unpack(tmp_path / "stream.bin.xz", tmp_path / "there")
    for name in ("tokens.npy", "documents.npy", "manifest.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "there" / name).read_bytes() == (made.folder / name).read_bytes()


# --- training ----------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_decays() -> None:
    s = dataclasses.replace(TINY, tokens=100 * 256, warmup=10, lr=1.0)
    assert s.steps == 100
    assert [s.rate(n) for n in (0, 9, 50, 79, 80, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 1, 0.5, 0.05])


def test_the_loss_falls_and_a_resumed_run_is_the_same_bit_by_bit(made: SimpleNamespace, tmp_path: Path) -> None:
    whole = trainer(made, tokens=40 * 4 * 64)
    assert whole.run(report=8)
    curve = [point[2] for point in whole.state.curve]
    assert curve[-1] < curve[0] - 1

    part = trainer(made, tokens=40 * 4 * 64)
    batches = part.batches()
    sums = torch.zeros(2, 3)
    for _ in range(13):  # not at a point of the curve
        sums += torch.stack(part.step(next(batches)))
        if part.state.step == 8:
            part.state.curve.append(whole.state.curve[0])
            sums.zero_()
    part.state.sums = sums.tolist()
    folder = part.save(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "optimiser.safetensors", "state.json"}

    rest = train.Trainer(train.settings_of(folder), made.cache, device="cpu", **made.special)
    rest.load(train.last(tmp_path))
    assert rest.run(report=8)
    for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (rest.state.curve, rest.state.at, rest.state.tokens) == (
        whole.state.curve,
        whole.state.at,
        whole.state.tokens,
    )


def test_a_checkpoint_is_whole_or_not_there(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(made)
    one.step(next(one.batches()))
    one.save(tmp_path)
    monkeypatch.setattr(train, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    one.step(next(one.batches()))
    with pytest.raises(OSError, match="no space"):
        one.save(tmp_path)
    assert train.last(tmp_path).name == "step-0000001"


def test_a_finished_folder_loads_in_small_shards(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(made)
    one.run(report=4, out=tmp_path / "run")
    monkeypatch.setattr(finish, "SHARD", "20KB")
    monkeypatch.setattr(finish, "LIMIT", 100_000)
    out = finish.finish(train.last(tmp_path / "run"), made.folder, tmp_path / "polytask-base")
    model = out / "polytask_base/model"
    assert len(list(model.glob("*.safetensors"))) > 1
    assert all(path.stat().st_size < 100_000 for path in model.iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, dict(one.model.named_parameters())[name].to(torch.bfloat16).to(p.dtype)), name
    text = (out / "README.md").read_text()
    assert "12 of 12 steps" in text
    assert "| tasks/copy |" in text
    assert "{" not in text.split("What it wrote")[0]
    namespace: dict[str, object] = {"__file__": str(out / "polytask_base/__init__.py")}
    exec((out / "polytask_base/__init__.py").read_text(), namespace)
    assert namespace["folder"]() == model  # type: ignore[operator]

    monkeypatch.setattr(finish, "LIMIT", 1000)
    with pytest.raises(SystemExit, match="too many"):
        finish.finish(train.last(tmp_path / "run"), made.folder, tmp_path / "polytask-base")
    assert model.exists()
