"""The recipe of the embedded decoder, on a made-up stream and a model of 0.3 million parameters."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
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
from polytask.tasks import Example, Label, Task  # noqa: E402
from polytask.tasks.templates import Chat, Plain, Template, render  # noqa: E402

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
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 200)) for _ in range(40)]
    tokenizer = step1.save(step1.train(texts, 400), folder / "tokenizer", 64)
    end, tokens, table = tokenizer.eos_token_id, [], []
    for n, text in enumerate(texts):
        tokens.append([*tokenizer.encode(text), end])
        table.append((len(tokens[-1]), 0, 0, n % 10 == 0))
    for n in range(200):
        word = str(rng.choice(WORDS))
        asked = render(Task("copy", "generation", instruction="Copy."), Example("1", word, word))
        prompt, answer = tokenizer.encode(asked.text), tokenizer.encode(asked.target)
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
        "samples": templates.SAMPLES,
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
    task = Task("copy", "generation", instruction="Copy.", demonstrations=(Example("1", "dog", "dog"),))
    for task_ in (task, dataclasses.replace(task, instruction="")):
        for shown in (0, 1):
            turns = render(task_, Example("2", "cat"), "chat", demonstrations=shown).messages
            text = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert text == templates.chat(turns)
    assert templates.chat(turns) == "<|user|>\ndog\n<|assistant|>\ndog<|endoftext|><|user|>\ncat\n<|assistant|>\n"
    told = render(task, Example("2", "cat"), "chat").messages
    assert templates.chat(told) == "<|user|>\nCopy.\n\ncat\n<|assistant|>\n"
    answered = [*told, {"role": "assistant", "content": "x"}]
    assert loaded.apply_chat_template(answered, tokenize=False) == templates.chat(told) + "x<|endoftext|>"
    assert loaded.encode(templates.chat(told))[0] == loaded.convert_tokens_to_ids("<|user|>")


# --- wordings ----------------------------------------------------------------------------------

TOKENS = ("Fly", "to", "San", "Jose", "next", "week")
SPANS = Task(
    "spans",
    "tagging",
    train=tuple(
        Example(f"t{n}", (*TOKENS, str(n)), ("O", "O", "B-city", "I-city", "B-timeRange", "I-timeRange", "O"))
        for n in range(40)
    ),
    instruction="Find the slots.",
    labels=(Label("city"), Label("timeRange", "when")),
    demonstrations=(Example("d1", ("Hello", "there"), ("O", "O")),),
)
TASKS = [
    SPANS,
    dataclasses.replace(
        SPANS,
        name="several",
        kind="multilabel",
        train=tuple(Example(f"t{n}", f"x {n}", ("timeRange", "city")[: n % 3]) for n in range(40)),
        demonstrations=(),
    ),
    Task(
        "plain_tags",
        "tagging",
        tuple(Example(f"t{n}", ("a", str(n)), ("DET", "NUM")) for n in range(40)),
        instruction="Tag.",
        labels=(Label("DET"), Label("NUM")),
    ),
    Task(
        "many",
        "classification",
        tuple(Example(f"t{n}", f"x {n}", f"label {n % 30}") for n in range(40)),
        instruction="Sort.",
        labels=tuple(Label(f"label {n}") for n in range(30)),
    ),
    Task(
        "pairs",
        "similarity",
        tuple(Example(f"t{n}", f"a {n}", n / 10, f"b {n}") for n in range(40)),
        instruction="Compare.",
    ),
    Task("shown", "generation", tuple(Example(f"t{n}", f" in {n}", f"out {n}") for n in range(40))),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompts_and_answers_are_what_polytask_writes(task: Task, made: SimpleNamespace) -> None:
    source = templates.Source(f"tasks/{task.name}", task, tuple(filter(None, [task.instruction])))
    seen: set[tuple[type[Template], bool]] = set()
    for n in range(400):
        example = task.train[n % 40]
        told, form = templates.ask(source, example, task.train, random.Random(n))
        prompt, answer = templates.render(source, example, task.train, random.Random(n))
        # The task with all its examples, as a user has it, and what was drawn.
        user = dataclasses.replace(
            task, instruction=told.instruction, labels=told.labels, demonstrations=told.demonstrations
        )
        wanted = render(user, example, form, demonstrations=len(told.demonstrations))
        if isinstance(form, Chat):
            text = made.tokenizer.apply_chat_template(wanted.messages, tokenize=False, add_generation_prompt=True)
            assert (prompt, answer) == (text, wanted.answer)
        else:
            assert (prompt, answer) == (wanted.text, wanted.target)
        assert answer.strip() == Plain().answer(task, example)
        assert example not in told.demonstrations
        if form.labels and len(task.labels) > 20:
            assert 7 <= len(told.labels) <= 10
            names = {label.name for label in told.labels}
            assert names.issuperset(e.output for e in (example, *told.demonstrations))
        seen.add((type(form), bool(told.instruction)))
    told_by = templates.FORMS.values() if task.instruction else ()
    assert seen == {(Plain, False), *((form, True) for form in told_by)}


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
@pytest.mark.parametrize("surface", ["superni", "plain", "chat", "fields"])
@pytest.mark.parametrize("shown", [False, True])
def test_the_audit_finds_a_planted_input(text: str, net: str, surface: str, shown: bool) -> None:
    held = audit.HeldOut([("one", "Two Seats"), ("two", LONG_INPUT), ("three", "What is the time here?")])

    def document(first: str, last: str) -> tuple[str, str]:
        task = Task("do", "generation", instruction="Do it.", labels=(Label("a"),))
        task = dataclasses.replace(task, demonstrations=(Example("1", first, "b"),))
        prompt = render(task, Example("2", last, "x"), templates.FORMS[surface](labels=True), demonstrations=1)
        return templates.chat(prompt.messages) if surface == "chat" else prompt.text, " x"

    clean = document("a cat", "a dog")
    planted = document(text, "a dog") if shown else document("a cat", text)
    found = audit.report(held, [clean, planted])
    assert found[net] == 1
    assert held.in_document(*planted)
    assert held.in_document(*clean) is None


@pytest.mark.parametrize("surface", ["superni", "plain", "chat", "fields"])
def test_the_audit_finds_pairs_and_answers_that_were_shown(surface: str) -> None:
    held = audit.HeldOut([("one", "Text 1: a\nText 2: b"), ("two", "What is the time here?"), ("three", "??")])
    for example, net in (
        (Example("1", "a", 1.0, "b"), "exact"),
        (Example("1", "A", 1.0, "b."), "casefolded"),
        (Example("1", "what", "what is the time here"), "lines"),
        (Example("1", "c", 1.0, "What is the time here"), "lines"),
        (Example("1", "??", "1"), "exact"),
    ):
        task = Task("t", "generation", demonstrations=(dataclasses.replace(example, output=str(example.output)),))
        prompt = render(task, Example("2", "c", pair="d"), templates.FORMS[surface](), demonstrations=1)
        text = templates.chat(prompt.messages) if surface == "chat" else prompt.text
        assert audit.report(held, [(text, " x")])[net] == 1


def test_examples_demonstrations_and_descriptions_with_held_out_inputs_are_dropped() -> None:
    held = audit.HeldOut([("t", "Two Seats"), ("t", LONG_INPUT)])
    rows = (Example("1", "two seats", "x"), Example("2", "x", LONG_INPUT), Example("3", "three seats", "x"))
    shown = (Example("4", "two  SEATS", "y"), Example("5", "one", "z"))
    labels = (Label("x", f"For {LONG_INPUT}"), Label("y", "else"))
    task = Task("a", "generation", rows, instruction="Do.", labels=labels, demonstrations=shown)
    dropped = data.Counter()
    kept = data.clean(templates.Source("tasks/a", task, ("Do.",)), held, dropped).task
    assert (kept.train, kept.demonstrations) == (rows[2:], shown[1:])
    assert kept.labels == (Label("x"), Label("y", "else"))
    assert dropped == {"tasks/a (field)": 2}


def test_only_training_rows_are_rendered_and_held_examples_are_not_shown() -> None:
    rows = tuple(Example(str(n), f"input {n}", f"output {n}") for n in range(100))
    task = Task("a", "generation", rows, test=(Example("x", "secret", "secret"),), instruction="Name it.")
    source = templates.Source.of("tasks/a", task, task.train)
    assert source.task.test == ()
    made_of = list(data.rendered(source))
    held = {answer.strip() for _, answer, out in made_of if out}
    assert held == {"output 25", "output 75"}
    assert len(made_of) == 98 * data.VARIANTS + 2
    shown = "\n".join(prompt for prompt, _, out in made_of if not out)
    assert "output 24" in shown
    assert not any(text in shown for text in ("input 25", "input 75", "output 25", "output 75", "secret"))
    asked = [prompt for prompt, _, out in made_of if out]
    assert all(p.startswith("Definition: Name it.\n\n Positive Example 1 -\nInput: input ") for p in asked)
    assert made_of == list(data.rendered(source))


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


def test_training_needs_no_polytask() -> None:
    # A GPU machine has the repository, the packed stream and torch.
    code = "import sys; sys.modules['polytask'] = None; import bases.train, bases.heldout, bases.finish"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


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
