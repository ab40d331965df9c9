"""The way through on the command line: adapt, keep, ask; with the embedded encoder on tiny files."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import made
import pytest
from commands import run, run_alone, start, write_pairs, write_table, write_tags

from polytask.cli.predict import batches
from polytask.library import Library

FIELDS = {
    *("adapter", "name", "task", "kind", "base", "method", "metric", "score", "interval", "split", "baseline"),
    *("trainable_params", "backbone_params", "seconds", "bytes", "sizes", "notes", "library"),
}
ANSWER = {"input", "pair", "output", "probability", "adapter", "name", "routed"}


@pytest.fixture(scope="module", autouse=True)
def one_backbone() -> Iterator[None]:
    """The encoder is loaded once for all commands of this file that run in this process."""
    from functools import cache

    import polytask.backbones

    real = polytask.backbones.load
    polytask.backbones.load = cache(real)
    yield
    polytask.backbones.load = real


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with a classifier, a pair classifier and a tagger."""
    folder = tmp_path_factory.mktemp("work")
    library = folder / "skills"
    for source, options in (
        (write_table(folder / "things.csv"), ["--method", "lora", "--epochs", "1", "--set", "r=2"]),
        (write_pairs(folder / "pairs.jsonl"), ["--pair", "second", "-i", "first", "-o", "same", "--method", "head"]),
        (write_tags(folder / "colours.jsonl"), ["--method", "head"]),
    ):
        done = run("adapt", source, "--library", library, "--json", *options)
        assert done.status == 0, done.err
        assert done.err == ""
    return library


@pytest.fixture
def own(skills: Path, tmp_path: Path) -> Path:
    """A copy of the library that a test may spoil."""
    return Path(shutil.copytree(skills, tmp_path / "skills"))


def test_adapt_prints_one_json_object(tmp_path: Path) -> None:
    table = write_table(tmp_path / "things.csv")
    with table.open("a") as file:
        file.write(f"a bird in the bush,bird\n{'sour ' * 200_000}lemons,fruit\n")  # a line of 1 MB
    done = run("adapt", table, "--method", "lora", "--epochs", "1", "--library", tmp_path / "skills", "--json")
    assert done.err == ""
    assert done.out.count("\n") == 1
    said = done.json
    assert set(said) == FIELDS
    assert (said["task"], said["name"], said["base"], said["method"]) == ("things", "things", "minilm", "lora")
    assert (said["metric"], said["split"]) == ("accuracy", "test")
    assert said["interval"][0] <= said["score"] <= said["interval"][1]
    assert 0 <= said["baseline"] <= 1
    # 6 blocks × (q, v) × (A [8, 384], B [384, 8]) and a head of 3 labels.
    assert said["trainable_params"] == 6 * 2 * 2 * 8 * 384 + 3 * 385
    assert said["backbone_params"] > 22_000_000
    assert said["bytes"] == 4 * (said["trainable_params"] + 2 * 384 + 4)  # and what routing knows of the task
    assert any("single training example: 'bird'" in note for note in said["notes"])
    kept = Library(tmp_path / "skills", create=False)
    assert kept.entry("things").id == said["adapter"]
    assert not (tmp_path / "skills" / ".training").exists()


def test_adapt_for_people_shows_progress_and_a_table(tmp_path: Path) -> None:
    table = write_table(tmp_path / "things.csv")
    done = run("adapt", table, "--method", "ia3", "--epochs", "1", "-l", tmp_path / "skills", "--name", "kinds")
    assert done.status == 0
    progress = done.err.splitlines()
    assert any("epoch 1" in line and "loss" in line and "accuracy" in line for line in progress)
    assert "kinds (" in done.out
    assert "polytask predict --library" in done.out
    quiet = run("adapt", table, "--method", "head", "-l", tmp_path / "skills", "--name", "quiet", "--quiet")
    assert (quiet.status, quiet.err) == (0, "")


def test_options_reach_the_training(tmp_path: Path) -> None:
    options = ["--method", "bottleneck", "--set", "reduction=32", "--lr", "0.002", "--batch", "16", "--seed", "3"]
    options += ["--epochs", "1", "--balanced", "--pool", "first", "--precision", "fp32"]
    done = run("adapt", write_table(tmp_path / "t.csv"), *options, "--library", tmp_path / "skills", "--json")
    adapter = Library(tmp_path / "skills").get(done.json["adapter"])
    assert adapter.hyperparameters["reduction"] == 32
    assert adapter.head is not None
    assert adapter.head.pool == "first"
    settings = adapter.card.recipe["settings"]
    assert (settings["lr"], settings["batch"], settings["seed"], settings["balanced"]) == (0.002, 16, 3, True)
    assert settings["epochs"] == 1


def test_predict_by_name(skills: Path) -> None:
    done = run("predict", "-l", skills, "-a", "things", "--json", stdin=b"a ripe mango\nan old axe")
    fruit, tool = done.lines
    assert set(fruit) == ANSWER
    assert (fruit["input"], fruit["output"], tool["output"]) == ("a ripe mango", "fruit", "tool")
    assert fruit["name"] == "things"
    assert fruit["adapter"] == Library(skills).entry("things").id
    assert 0.5 < fruit["probability"] <= 1
    assert fruit["routed"] is None


def test_predict_routes_by_kind_and_topic_and_says_none(skills: Path) -> None:
    lines = [
        "I bought a melon",
        "I bought a saw\tthe saw is mine",
        "take the red hammer home",
        "Le congrès a ratifié le traité hier soir à Genève.",
    ]
    done = run("predict", "-l", skills, "--json", stdin="\n".join(lines).encode())
    single, pair, tags, foreign = done.lines
    assert single["name"] == "things"
    assert 0 < single["routed"] <= 1
    assert (pair["input"], pair["pair"], pair["name"]) == ("I bought a saw", "the saw is mine", "pairs")
    assert tags["name"] == "colours"
    assert tags["tokens"] == ["take", "the", "red", "hammer", "home"]
    assert len(tags["output"]) == 5
    assert foreign["output"] is None
    assert foreign["adapter"] is None
    shown = run("predict", "-l", skills, stdin="\n".join(lines).encode()).out.splitlines()
    assert [line.split("\t")[2] for line in shown] == ["things", "pairs", "colours", "-"]
    assert shown[3].startswith("none of these")


def test_predict_reads_json_lines_and_keeps_the_order_of_lines(skills: Path) -> None:
    records = [
        {"input": "I bought a plum", "adapter": "things"},
        {"input": "I bought a saw", "pair": "the pear is mine"},
        {"input": ["the", "green", "drill"], "adapter": "colours"},
        {"input": ""},
    ]
    text = "\n".join(json.dumps(record) for record in records[:3]) + "\r\n\n{curly} is a text\n"
    found = run("predict", "-l", skills, "--json", stdin=text.encode()).lines
    assert [row["name"] for row in found[:3]] == ["things", "pairs", "colours"]
    assert found[2]["tokens"] == found[2]["input"] == ["the", "green", "drill"]
    assert found[3] == {**dict.fromkeys(ANSWER), "input": ""}
    assert found[4]["input"] == "{curly} is a text"


def test_predict_with_a_mixture_and_from_a_file(skills: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a ripe mango\n" * 600)
    alone = run("predict", "-l", skills, "-a", "things", "--json", "--file", tmp_path / "lines.txt").lines
    assert len(alone) == 600
    whole = run("predict", "-l", skills, "-a", "1*things", "--json", stdin=b"a ripe mango").lines
    mixed = run("predict", "-l", skills, "-a", "0.7*things + 0.3*colours", "--json", stdin=b"a ripe mango").lines
    assert whole[0]["probability"] == pytest.approx(alone[0]["probability"], abs=2e-2)
    assert (mixed[0]["name"], mixed[0]["output"]) == ("things", "fruit")


def test_lines_are_answered_as_they_come() -> None:
    class Slow(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read(7)

    got = list(batches(Slow(b"one\ntwo\nthree\n\nfive")))
    assert [line for lines in got for line in lines] == [
        (1, b"one"),
        (2, b"two"),
        (3, b"three"),
        (4, b""),
        (5, b"five"),
    ]
    assert len(got) > 1
    assert [len(lines) for lines in batches(io.BytesIO(b"x\n" * 600))] == [256, 256, 88]


WRONG_LINES = {
    "not UTF-8": (b"good\nb\xe4d\n", ["line 2", "UTF-8"]),
    "broken JSON": (b'good\n{"input": "x", \n', ["line 2", "JSON"]),
    "no input": (b'{"text": "x"}\n', ["line 1", '"input"']),
    "half a pair": (b"one\t \n", ["line 1", "pair"]),
    "a surrogate": (b'{"input": "\\ud800"}\n', ["line 1", "surrogate"]),
    "a long line": (b"x" * (3 << 20), ["line 1", "1 MB"]),
    "a number as pair": (b'{"input": "x", "pair": 3}\n', ["line 1", "pair"]),
}


@pytest.mark.parametrize("case", WRONG_LINES)
def test_lines_that_cannot_be_read(skills: Path, case: str) -> None:
    stdin, says = WRONG_LINES[case]
    done = run("predict", "-l", skills, "-a", "things", "--json", stdin=stdin)
    assert done.status == 1
    for words in says:
        assert words in done.error


def test_asking_whom_there_is_not(skills: Path, tmp_path: Path) -> None:
    for arguments, says in (
        (["-l", tmp_path / "nowhere"], "no library here"),
        (["-l", skills, "-a", "thing"], "no such adapter"),
        (["-l", skills, "-a", "0.5*things+0.5*birds"], "birds"),
        (["-l", skills, "-a", "much*things"], "0.7*a"),
        (["-l", skills, "-a", "pairs"], "two texts"),
        (["-l", skills, "-f", tmp_path / "no.txt"], "not there"),
        (["-l", skills, "-f", tmp_path], "one input a line"),
    ):
        done = run("predict", *arguments, stdin=b"a text")
        assert done.status == 2
        assert says in done.error
    assert not (tmp_path / "nowhere").exists()


def test_an_adapter_of_another_backbone_is_refused(own: Path) -> None:
    stranger = made.adapter("stranger", backbone=made.BACKBONE.model_copy(update={"name": "minilm"}))
    Library(own).add(stranger)
    done = run("predict", "-l", own, "-a", "stranger", stdin=b"a text")
    assert done.status == 1
    assert "was trained on minilm with the weights ffffffffffff…" in done.error
    routed = run("predict", "-l", own, stdin=b"a text")
    assert routed.status == 2
    assert "several backbones" in routed.error
    named = run("predict", "-l", own, "--base", "minilm", "--json", stdin=b"I bought a melon")
    assert named.lines[0]["name"] == "things"
    peft = run("library", "export", "stranger", own.parent / "out", "--format", "peft", "-l", own)
    assert peft.status == 1
    assert "other weights" in peft.error


def test_a_damaged_file_is_told(own: Path) -> None:
    entry = Library(own).entry("things")
    path = own / "adapters" / entry.id / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    done = run("predict", "-l", own, "-a", "things", stdin=b"a text")
    assert done.status == 1
    assert str(path) in done.error
    checked = run("library", "verify", "-l", own, "--json")
    assert checked.status == 1
    assert "1 damaged" in checked.err
    assert [damage["id"] for damage in json.loads(checked.out)] == [entry.id]
    path.write_bytes(b"\x80\x04.")  # a pickle
    assert run("library", "show", "things", "-l", own).status == 1


def test_a_library_of_a_newer_polytask_is_left_alone(own: Path) -> None:
    (own / "format.json").write_text('{"format": "polytask-library", "version": 99}\n')
    for arguments in (["library", "list"], ["predict"], ["adapt", write_table(own.parent / "t.csv"), "-m", "head"]):
        done = run(*arguments, "-l", own, stdin=b"a text")
        assert done.status == 1
        assert "version 99" in done.error.splitlines()[-1]


def test_library_commands(own: Path, tmp_path: Path) -> None:
    things = Library(own).entry("things").id
    rows = run("library", "list", "-l", own, "--json").json
    assert [row["name"] for row in rows] == ["colours", "pairs", "things"]
    assert {"adapter", "base", "interval", "trainable_params", "bytes", "score", "metric"} <= set(rows[0])
    assert [row["name"] for row in run("library", "list", "-l", own, "--method", "lora", "--json").json] == ["things"]
    assert "things@1" in run("library", "list", "-l", own).out
    assert run("library", "search", "fruit", "-l", own, "--json").json[0]["adapter"] == things
    assert run("library", "search", "zebra", "-l", own).out == "nothing found\n"
    shown = run("library", "show", "things", "-l", own, "--json").json
    assert shown["card"]["task"]["kind"] == "classification"
    assert shown["hyperparameters"]["r"] == 2
    assert "fruit, tool" in run("library", "show", things[:6], "-l", own).out

    assert run("library", "export", "things", tmp_path / "out", "-l", own, "--json").json["adapter"] == things
    peft = run("library", "export", "things", tmp_path / "peft", "--format", "peft", "-l", own)
    assert peft.status == 0, peft.err
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    refused = run("library", "export", "pairs", tmp_path / "p", "--format", "peft", "-l", own)
    assert "no place for method head; only for lora, dora, " in refused.error
    for folder, options in (("out", []), ("peft", ["--base", "minilm"])):
        done = run("library", "import", tmp_path / folder, "-l", tmp_path / folder / "lib", *options, "--json")
        assert done.json["adapter"] == things
    assert "--base" in run("library", "import", tmp_path / "peft", "-l", own).error

    assert run("library", "rm", "things", "-l", own, "--json").json == {"adapter": things}
    assert "in the trash" in run("library", "show", "things", "-l", own).error
    assert [row["name"] for row in run("library", "list", "-l", own, "--removed", "--json").json] == ["things"]
    assert run("library", "restore", "things", "-l", own, "--json").json == {"adapter": things}
    refused = run("library", "forget", "things", "-l", own)
    assert refused.status == 2
    assert "--yes" in refused.error
    gone = run("library", "forget", "things", "-l", own, "--yes", "--reason", "asked", "--json")
    assert gone.json == {"adapter": things, "reason": "asked"}
    assert not (own / "adapters" / things).exists()
    assert run("library", "verify", "-l", own).out == "2 adapters, all as they were saved\n"
    assert run("library", "import", tmp_path / "nothing", "-l", own).status == 2


def test_the_real_commands_in_a_pipe(tmp_path: Path, skills: Path) -> None:
    table = write_table(tmp_path / "things.csv")
    adapted = run_alone("adapt", table, "--method", "head", "--library", tmp_path / "skills", "--json")
    assert adapted.status == 0, adapted.err
    assert set(adapted.json) == FIELDS
    assert adapted.err == ""
    asked = run_alone("predict", "--library", tmp_path / "skills", "--json", stdin="I bought a melón\n".encode())
    assert asked.err == ""
    [answer] = asked.lines
    assert set(answer) == ANSWER
    assert answer["adapter"] == adapted.json["adapter"]
    assert answer["output"] == "fruit"


def test_ctrl_c_in_training_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    table, library = write_table(tmp_path / "things.csv"), tmp_path / "skills"
    options = ["--method", "lora", "--epochs", "12", "--batch", "8", "--precision", "fp32"]
    process = start("adapt", table, *options, "--library", library, "--json")
    until = time.monotonic() + 90
    while not list(library.glob(".training/*/training.safetensors")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err.decode() == "polytask: stopped; the same command goes on from its checkpoint\n"
    assert os.listdir(library / "adapters") == []
    [kept] = library.glob(".training/*")
    assert os.listdir(kept) == ["training.safetensors"]

    done = run("adapt", table, *options, "--library", library)
    assert done.status == 0, done.err
    first = next(line for line in done.err.splitlines() if "epoch" in line)
    assert "epoch 1," not in first
    assert not (library / ".training").exists()
    straight = run("adapt", table, *options, "--library", tmp_path / "other", "--json")
    assert straight.json["adapter"] == Library(library).entry("things").id


def test_a_checkpoint_can_be_kept_and_refused(tmp_path: Path) -> None:
    table, folder = write_table(tmp_path / "things.csv"), tmp_path / "kept"
    options = ["--epochs", "1", "--method", "ia3", "--library", tmp_path / "skills", "--checkpoint", folder]
    assert run("adapt", table, *options, "--json").status == 0
    assert os.listdir(folder) == ["training.safetensors"]
    other = run("adapt", table, *options, "--seed", "1", "--json")
    assert other.status == 1
    assert "other work" in other.error
    assert run("adapt", table, *options, "--seed", "1", "--no-resume", "--json").status == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["-m", "elrea", "--over", "a"],
            "elrea begins at the backbone: leave out --begin, --above, --over and --reuse",
        ),
        (["-m", "distil", "--reuse"], "distil begins at the backbone: leave out --begin, --above and --reuse"),
        (["-m", "tada", "--set", "critic=-1"], "tada.critic = -1.0: 0 or more is needed"),
        (["-m", "distil", "--set", "student=none"], "none"),
        (["-m", "elrea", "--set", "q=3"], "lora has no hyperparameter 'q'"),
    ],
)
def test_recipes_are_refused_before_a_backbone_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], says: str
) -> None:
    monkeypatch.setattr("polytask.backbones.load", lambda *_, **__: pytest.fail("a backbone is loaded"))
    done = run("adapt", write_table(tmp_path / "things.csv"), "-l", tmp_path / "skills", *given)
    assert done.status == 2, done.err
    assert says in done.err
    assert done.error
