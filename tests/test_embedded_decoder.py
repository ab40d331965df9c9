"""The decoder that comes with polytask: it loads without a network, is what its card says, and learns to answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import run, run_alone
from transformers import AutoModelForCausalLM, AutoTokenizer

import polytask as pt
from polytask.backbones.loading import writer_folder
from polytask.inference.decoding.constraints import Constraint

HOME = Path(pt.__file__).parent / "demo/home"


@pytest.fixture(scope="module")
def base() -> pt.Backbone:
    return pt.load("polytask-base")


def test_it_is_what_its_card_says(base: pt.Backbone) -> None:
    card = (writer_folder() / "README.md").read_text(encoding="utf-8")
    millions = re.search(r"model of ([\d.]+) million parameters", card)
    assert millions
    assert float(millions[1]) == pytest.approx(base.parameters / 1e6, abs=0.06)
    assert base.kind == "decoder"
    assert base.writes
    assert base.packable
    for path in writer_folder().iterdir():
        assert path.stat().st_size < 16_000_000, path.name


def test_hugging_face_loads_it_and_writes_the_same(base: pt.Backbone) -> None:
    model = AutoModelForCausalLM.from_pretrained(writer_folder(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(writer_folder())
    exact = pt.load("polytask-base", precision="fp32")
    prompt = "Definition: Say what the person wants.\n\nInput: play some jazz\nOutput:"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    [ours] = pt.Engine(exact).generate([pt.Ask(prompt, sampling=pt.Sampling(max_tokens=12))])
    assert list(ours.tokens) == theirs[0, ids.shape[1] :].tolist()


def test_it_has_learnt_english_and_the_form_of_tasks(base: pt.Backbone) -> None:
    """An answer in the right form is more probable than the same words out of order, and so is a sentence."""
    engine = pt.Engine(base)
    asks = [pt.Ask("It was the best of times"), pt.Ask("She looked at him and")]
    right, wrong = [", and the worst", " said nothing"], ["the and worst ,", "nothing ed said"]
    good, bad = (engine.logprobs(asks, texts, end=False) for texts in (right, wrong))
    for a, b in zip(good, bad, strict=True):
        assert float(a.mean()) > float(b.mean())
    options = ["positive", "negative"]
    prompt = "Definition: Is the opinion positive or negative?\n\nInput: I hate this phone.\nOutput:"
    p = engine.logprobs([pt.Ask(prompt)] * 3, [*(f" {o}" for o in options), " of the"], end=False)
    assert max(float(p[0].sum()), float(p[1].sum())) > float(p[2].sum())


def test_constraints_stand_on_its_tokens(base: pt.Backbone) -> None:
    pattern = r"light [a-z]+ (on|off)"
    rule = pt.Sampling(max_tokens=20, constraint=Constraint.regex(pattern))
    [found] = pt.Engine(base).generate([pt.Ask("Turn on the light.\n", sampling=rule)])
    assert re.fullmatch(pattern, found.text)


def test_free_text_needs_no_flags(tmp_path: Path) -> None:
    """A file whose outputs are texts: its kind and the decoder are found, and what is kept writes."""
    rows = [json.loads(line) for line in (HOME / "train.jsonl").read_text().splitlines()][:120]
    table = tmp_path / "wishes.jsonl"
    table.write_text("".join(json.dumps({"text": r["request"], "command": r["command"]}) + "\n" for r in rows))
    skills = ("--library", tmp_path / "skills")
    done = run_alone("adapt", table, "--epochs", "2", "--json", *skills)
    assert done.status == 0, done.err
    assert (done.json["kind"], done.json["base"]) == ("generation", "polytask-base")
    assert done.json["metric"] == "rouge_l"  # of five words and more
    asked = run_alone("predict", "--adapter", "wishes", "--json", *skills, stdin=b"turn on the light in the attic\n")
    assert asked.status == 0, asked.err
    assert isinstance(asked.lines[0]["output"], str)


@pytest.mark.slow
def test_the_demo_that_writes_to_its_end(tmp_path: Path) -> None:
    done = run("demo", "--generate", "--json", "--library", tmp_path / "skills")
    assert done.status == 0, done.err
    assert [a["task"] for a in done.json["adapters"]] == ["home", "tickets"]
    for one in done.json["adapters"]:
        assert one["score"] > one["baseline"]
    assert len(done.json["answers"]) == 10
