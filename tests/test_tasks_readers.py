"""Every source format is read as it was written, and what was guessed is said."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import polars
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polytask
from polytask.errors import PolytaskError, UsageError
from polytask.tasks import Task
from polytask.tasks.tables import read_table

DEMO = Path(polytask.__file__).parent / "demo"
TEAMS = [("my card was charged twice", "billing"), ("where is my parcel", "shipping")]


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def rows_of(task: Task) -> list[tuple[Any, Any]]:
    return sorted((e.input, e.output) for split in ("train", "validation", "test") for e in task.split(split))


# -- tables ------------------------------------------------------------------------------------------------------------

cell = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda s: bool(s.strip()))
table = st.lists(st.tuples(cell, cell), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(table, st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet"]))
def test_rows_come_back_as_they_were_written(rows: list[tuple[str, str]], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        records = [{"text": text, "answer": answer} for text, answer in rows]
        if suffix in (".csv", ".tsv"):
            write_csv(path, list(rows), ("text", "answer"))
        elif suffix == ".jsonl":
            write_jsonl(path, records)
        elif suffix == ".json":
            write_json(path, records)
        else:
            polars.DataFrame(records).write_parquet(path)
        task = Task.read(path, input="text", output="answer", kind="generation")
    assert rows_of(task) == sorted(rows)


@settings(max_examples=30, deadline=None)
@given(table)
def test_polars_csv_is_read(rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        polars.DataFrame(rows, schema=["a", "b"], orient="row").write_csv(path)
        assert [(row["a"], row["b"]) for _, row in read_table(path).rows] == rows


def test_lines_are_counted_through_quoted_newlines_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n"one\ntwo",x\n\nthree,y\n')
    assert [number for number, _ in read_table(path).rows] == [2, 5]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [number for number, _ in read_table(path).rows] == [1, 3]


def test_byte_order_mark_windows_lines_and_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes("\ufefftext;label\r\nfoo, bar;a\r\nbaz;b\r\nqux;a\r\n".encode())
    task = Task.read(path)
    assert rows_of(task) == [("baz", "b"), ("foo, bar", "a"), ("qux", "a")]
    assert any("read with ';'" in note for note in task.notes)


def test_tsv_without_quoting(tmp_path: Path) -> None:
    path = tmp_path / "plain.tsv"
    path.write_text('text\tlabel\n"Never again\ta\nsaid "so" twice\tb\n"fine" he said\ta\n')
    task = Task.read(path)
    assert rows_of(task) == [('"Never again', "a"), ('"fine" he said', "a"), ('said "so" twice', "b")]
    assert any("quotation marks" in note for note in task.notes)


def test_reading_twice_gives_an_equal_task_and_hashes(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [(f"text {n}", "ab"[n % 2]) for n in range(100)])
    one, two = Task.read(path), Task.read(path)
    assert one == two
    assert one.card() == two.card()
    assert Task.read(path, seed=1).card().sha256 != one.card().sha256


# -- columns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (("text", "label"), ("text", None, "label")),
        (("Text", "Label", "when"), ("Text", None, "Label")),
        (("id", "sentence1", "sentence2", "label"), ("sentence1", "sentence2", "label")),
        (("premise", "hypothesis", "verdict"), ("premise", "hypothesis", "verdict")),
        (("input", "output", "rationale"), ("input", None, "output")),
        (("ticket", "team"), ("ticket", None, "team")),
        (("ticket", "intent"), ("ticket", None, "intent")),
        (("text", "mood"), ("text", None, "mood")),
    ],
)
def test_columns_guessed(tmp_path: Path, header: tuple[str, ...], expected: tuple[str, str | None, str]) -> None:
    rows = [tuple(f"{name} {n}" if name != header[-1] else "xy"[n % 2] for name in header) for n in range(6)]
    path = write_jsonl(tmp_path / "t.jsonl", [dict(zip(header, row, strict=True)) for row in rows])
    task = Task.read(path, output=None if "rationale" not in header else "output")
    first = dict(zip(header, rows[0], strict=True))
    example = next(e for s in ("train", "validation", "test") for e in task.split(s) if e.input == first[expected[0]])
    assert (example.input, example.pair, example.output) == (
        first[expected[0]],
        first[expected[1]] if expected[1] else None,
        first[expected[2]],
    )
    assert any(note.startswith("columns guessed: ") for note in task.notes)


def test_the_repeating_one_of_two_unknown_columns_is_the_output(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("ab"[n % 2], f"words {n}") for n in range(40)], ("x", "y"))
    assert {e.output for e in Task.read(path).train} == {"a", "b"}


def test_unused_columns_are_kept_and_named(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("a", "x", "7"), ("b", "y", "8"), ("c", "x", "9")], ("text", "label", "age"))
    task = Task.read(path)
    assert task.train[0].extra == {"age": "7"}
    assert "not used: 'age'" in " ".join(task.notes)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("id", "left", "middle", "right"), "which column is the input and output?"),
        (("text", "category", "intent"), "which column is the output?"),
        (("review", "comment", "label"), "which column is the input?"),
    ],
)
def test_ambiguous_columns_are_asked_for(tmp_path: Path, header: tuple[str, ...], message: str) -> None:
    path = write_csv(tmp_path / "t.csv", [tuple("abcd"[: len(header)])], header)
    with pytest.raises(UsageError) as error:
        Task.read(path)
    assert message in str(error.value)
    assert all(repr(name) in str(error.value) for name in header)
    assert "\n" not in str(error.value)


# -- kinds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (["a", "b"] * 20, "classification"),
        (["0", "1", "2", "1"] * 10, "classification"),
        ([0, 1] * 20, "classification"),
        ([True, False] * 20, "classification"),
        ([str(n) for n in range(40)], "regression"),
        ([n / 7 for n in range(40)], "regression"),
        ([0.0, 1.0] * 20, "regression"),
        (["0.5", "1.5"] * 20, "regression"),
        ([f"answer number {n}" for n in range(40)], "generation"),
        (["x" * 81, "y" * 81] * 20, "generation"),
        (["a", "b"] * 35 + [f"answer {n}" for n in range(30)], "generation"),
        ([["a"], ["a", "b"]] * 20, "multilabel"),
        ([["a"], ["b"]] * 20, "classification"),
        ([[f"one {n}", f"two {n}"] for n in range(40)], "generation"),
    ],
)
def test_kind_guessed_and_said(tmp_path: Path, outputs: list[Any], kind: str) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"t {n}", "label": o} for n, o in enumerate(outputs)])
    task = Task.read(path)
    assert task.kind == kind
    assert any(note.startswith(f"kind guessed: {kind}") for note in task.notes)


def test_numbers_about_pairs_are_similarity(tmp_path: Path) -> None:
    rows = [{"text1": f"a {n}", "text2": f"b {n}", "score": n / 3} for n in range(20)]
    task = Task.read(write_jsonl(tmp_path / "t.jsonl", rows))
    assert (task.kind, task.pair, task.metric) == ("similarity", True, "spearman")


def test_answers_copied_from_the_input_are_no_labels(tmp_path: Path) -> None:
    words = [f"w{n:02d}" for n in range(40)]
    rows = [{"input": f"{words[n % 40]} {words[(n * 7 + 1) % 40]}", "output": words[n % 40]} for n in range(400)]
    assert Task.read(write_jsonl(tmp_path / "t.jsonl", rows)).kind == "generation"


def test_class_ids_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [(f"t {n}", str(n % 12)) for n in range(240)])
    assert [label.name for label in Task.read(path).labels] == [str(n) for n in range(12)]


def test_true_and_false_are_written_as_in_json(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"t {n}", "label": n % 2 == 0} for n in range(10)])
    assert [label.name for label in Task.read(path).labels] == ["false", "true"]


def test_multilabel_from_cells(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("one", "a|b"), ("two", '["b"]'), ("three", "a | c")])
    task = Task.read(path, kind="multilabel")
    assert [e.output for e in task.train] == [("a", "b"), ("b",), ("a", "c")]
    assert [label.name for label in task.labels] == ["a", "b", "c"]


def test_tagging_labels_are_span_types(tmp_path: Path) -> None:
    rows = [{"tokens": ["go", "to", "Bonn"], "tags": ["O", "O", "B-CITY"]}, {"tokens": ["hm"], "tags": ["O"]}]
    task = Task.read(write_jsonl(tmp_path / "t.jsonl", rows))
    assert (task.kind, task.metric, task.targets) == ("tagging", "span_f1", ("O", "B-CITY", "I-CITY"))
    assert task.train[0].input == ("go", "to", "Bonn")
    rows = [{"tokens": ["go", "to", "Bonn"], "tags": ["VERB", "ADP", "PROPN"]}]
    task = Task.read(write_jsonl(tmp_path / "u.jsonl", rows))
    assert (task.metric, task.targets) == ("token_accuracy", ("ADP", "PROPN", "VERB"))


def test_choice(tmp_path: Path) -> None:
    rows = [{"question": f"q {n}", "options": ["yes", f"no {n}"], "answer": "yes"} for n in range(4)]
    task = Task.read(write_jsonl(tmp_path / "t.jsonl", rows))
    assert (task.kind, task.train[0].extra["options"]) == ("choice", ("yes", "no 0"))
    write_jsonl(tmp_path / "t.jsonl", [*rows, {"question": "q", "options": ["a", "b"], "answer": "c"}])
    with pytest.raises(PolytaskError, match=r"line 5: the output 'c' is none of the 2 options"):
        Task.read(tmp_path / "t.jsonl")


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tickets", "questions", "calendar"])
def test_demo_tasks(name: str) -> None:
    task = Task.read(DEMO / name)
    assert task.name == name
    assert task.instruction
    assert all(label.description for label in task.labels)
    assert min(len(task.train), len(task.validation), len(task.test)) >= 20
    assert task.notes == ()
    assert Task.read(DEMO / name / "task.yaml") == task


def test_task_yaml(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [("1", "hi", "no"), ("2", "ho", "yes")], ("key", "words", "verdict"))
    write_jsonl(tmp_path / "b.jsonl", [{"key": 1, "words": "he", "verdict": "no"}])
    (tmp_path / "task.yaml").write_text(
        "name: verdicts\nlanguage: no\nlabels: [no, {name: yes, description: as you like}]\nmetric: Macro-F1\n"
        "columns: {id: key, input: words, output: verdict}\nsplits: {train: a.csv, test: b.jsonl}\n"
    )
    task = Task.read(tmp_path)
    assert (task.name, task.kind, task.metric, task.language) == ("verdicts", "classification", "macro_f1", "no")
    assert [(label.name, label.description) for label in task.labels] == [("no", ""), ("yes", "as you like")]
    assert [(e.id, e.input, e.output) for e in task.train] == [("1", "hi", "no"), ("2", "ho", "yes")]
    assert Task.read(tmp_path, name="mine", metric="accuracy").metric == "accuracy"


def test_plain_folder(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [(f"t {n}", "ab"[n % 2]) for n in range(20)])
    write_jsonl(tmp_path / "dev.jsonl", [{"text": "v", "label": "a"}])
    write_csv(tmp_path / "test.tsv", [("u", "b")])
    task = Task.read(tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 1, 1)
    assert task.name == tmp_path.name


def test_ids_in_one_file_only(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [("7", "a", "x"), ("8", "b", "y"), ("9", "c", "x")], ("id", "text", "label"))
    write_csv(tmp_path / "test.csv", [("d", "x")])
    task = Task.read(tmp_path)
    assert [e.id for e in (*task.train, *task.test)] == ["7", "8", "9", "test-1"]


def test_task_json_folder(tmp_path: Path) -> None:
    card = {
        "name": "moods", "kind": "classification", "definition": "Say the moods.", "labels": ["joy", "fear"],
        "label_descriptions": {"joy": "is glad"}, "metric": "macro_f1 (multi-label)", "language": "en",
        "source": {"repo": "a/b", "commit": "0123456789abcdef", "paths": ["x.tsv"]},
        "positive_examples": [{"input": "wow", "output": ["joy"], "explanation": "glad"}],
    }  # fmt: skip
    write_json(tmp_path / "task.json", card)
    for split in ("train", "validation", "test"):
        rows = [{"id": f"{split}{n}", "input": f"{split} {n}", "output": ["joy", "fear"][: n % 3]} for n in range(3)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    task = Task.read(tmp_path)
    assert (task.kind, task.metric, task.source) == ("multilabel", "macro_f1", "a/b@0123456789: x.tsv")
    assert [e.output for e in task.train] == [(), ("joy",), ("joy", "fear")]
    assert [(e.input, e.output) for e in task.demonstrations] == [("wow", ("joy",))]
    assert task.labels[0].description == "is glad"
    write_json(tmp_path / "task.json", {**card, "metric": "bleurt"})
    task = Task.read(tmp_path)
    assert task.metric == "micro_f1"
    assert "metric 'bleurt' is not known here; micro_f1 is used" in task.notes


def test_task_json_pairs(tmp_path: Path) -> None:
    card = {"name": "p", "kind": "similarity", "metric": "spearman", "positive_examples": [{"input": "x", "output": 1}]}
    write_json(tmp_path / "task.json", card)
    rows = [{"id": str(n), "input": "1: a\n2: b", "text1": f"a {n}", "text2": "b", "output": 1.0} for n in range(3)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    task = Task.read(tmp_path)
    assert [(e.input, e.pair, e.output) for e in task.train] == [(f"a {n}", "b", 1.0) for n in range(3)]
    assert "not kept: 1 positive examples, whose fields are not those of the rows" in task.notes


# -- instruction formats -----------------------------------------------------------------------------------------------


def superni(outputs: list[list[str]], **more: Any) -> dict[str, Any]:
    return {
        "Definition": ["Do it."],
        "Input_language": ["English"],
        "Instance License": ["MIT"],
        "Positive Examples": [{"input": "p", "output": "q", "explanation": "so"}],
        "Negative Examples": [{"input": "n", "output": "m"}],
        "Instances": [{"id": f"i{n}", "input": f"in {n}", "output": o} for n, o in enumerate(outputs)],
        **more,
    }


def test_superni_generation(tmp_path: Path) -> None:
    outputs = [[f"out {n}", f"or {n}"] if n % 2 else [f"out {n}"] for n in range(40)]
    task = Task.read(write_json(tmp_path / "task001_x.json", superni(outputs)))
    assert (task.name, task.kind, task.instruction, task.language) == ("task001_x", "generation", "Do it.", "English")
    assert {e.id: e.output for e in (*task.train, *task.validation, *task.test)} == {
        f"i{n}": tuple(o) if len(o) > 1 else o[0] for n, o in enumerate(outputs)
    }
    assert [(e.input, e.output) for e in task.demonstrations] == [("p", "q")]
    assert [(e.input, e.output) for e in task.negatives] == [("n", "m")]


def test_superni_classification_and_given_splits(tmp_path: Path) -> None:
    value = superni([["Yes"], ["No"]] * 20)
    for n, instance in enumerate(value["Instances"]):
        instance["split"] = "train" if n < 30 else "test"
    task = Task.read(write_json(tmp_path / "t.json", value))
    assert (task.kind, len(task.test), len(task.train) + len(task.validation)) == ("classification", 10, 30)
    numbers = Task.read(write_json(tmp_path / "n.json", superni([[str(n)] for n in range(40)])))
    assert numbers.kind == "generation"


def test_bigbench_targets_and_options(tmp_path: Path) -> None:
    examples = [{"input": f"q {n}", "target": ["True", "False"][n % 2]} for n in range(40)]
    task = Task.read(write_json(tmp_path / "bbh.json", {"canary": "c", "examples": examples}))
    assert (task.kind, [label.name for label in task.labels]) == ("classification", ["False", "True"])
    examples = [{"input": f"q {n}", "target": str(n)} for n in range(40)]
    assert Task.read(write_json(tmp_path / "sums.json", {"examples": examples})).kind == "generation"
    examples = [{"input": f"q {n}", "target_scores": {f"a{n}": 0, f"b{n}": 1}} for n in range(4)]
    task = Task.read(write_json(tmp_path / "o.json", {"name": "pick", "description": "Pick.", "examples": examples}))
    assert (task.name, task.kind, task.instruction) == ("pick", "choice", "Pick.")
    assert (task.train[0].output, task.train[0].extra["options"]) == ("b0", ("a0", "b0"))
    examples = [{"input": f"q {n}", "target_scores": {"no": n % 2, "yes": 1 - n % 2}} for n in range(4)]
    task = Task.read(write_json(tmp_path / "s.json", {"examples": examples}))
    assert (task.kind, [label.name for label in task.labels]) == ("classification", ["no", "yes"])
    assert [e.output for e in task.train] == ["yes", "no", "yes", "no"]


def test_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Sum.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    task = Task.read(write_json(tmp_path / "a.json", rows))
    assert (task.kind, task.instruction) == ("generation", "")
    assert [(e.input, e.output) for e in task.train] == [("Sum.\n\n1 2", "3"), ("Say hi.", "hi")]
    same = [{"instruction": "Sum.", "input": f"{n} 1", "output": str(n + 1)} for n in range(3)]
    task = Task.read(write_jsonl(tmp_path / "b.jsonl", same))
    assert (task.instruction, task.train[2].input) == ("Sum.", "2 1")


def test_conversations(tmp_path: Path) -> None:
    share = [
        {
            "id": "c1",
            "conversations": [
                {"from": "system", "value": "Be kind."}, {"from": "gpt", "value": "Well?"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "hello"}, {"from": "human", "value": "bye"}, {"from": "gpt", "value": "ciao"},
            ],
        }
    ]  # fmt: skip
    task = Task.read(write_json(tmp_path / "s.json", share))
    assert [(e.id, e.input, e.output) for e in task.train] == [("c1", "hi", "hello")]
    assert (task.kind, task.instruction) == ("generation", "Be kind.")
    assert "later turns of 1 conversations are not used" in task.notes
    chat = [{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}]
    assert rows_of(Task.read(write_jsonl(tmp_path / "c.jsonl", chat))) == [("2+2", "4")]
    with pytest.raises(PolytaskError, match=r"line 1: no human turn with an answer"):
        Task.read(write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "?"}]}]))


# -- hub ---------------------------------------------------------------------------------------------------------------


def test_hub_folder_with_class_names_and_a_hidden_test(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    parts = {
        "train": {"sentence": [f"s {n}" for n in range(40)], "label": [n % 2 for n in range(40)]},
        "test": {"sentence": ["t 1", "t 2"], "label": [-1, -1]},
        "unsupervised": {"sentence": ["u"], "label": [-1]},
    }
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict(v, features=features) for k, v in parts.items()})
    saved.save_to_disk(str(tmp_path / "reviews"))
    task = Task.read(f"hf:{tmp_path / 'reviews'}")
    assert (task.name, task.kind, [label.name for label in task.labels]) == (
        "reviews",
        "classification",
        ["pos", "neg"],
    )
    assert len(task.train) + len(task.validation) + len(task.test) == 40
    assert {"split 'test' is not used: its labels are hidden", "split 'unsupervised' is not used"} <= set(task.notes)


def test_hub_tags_and_a_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["O", "B-X", "I-X"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[1, 2], [0]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "ner"))
    task = Task.read(f"hf:{tmp_path / 'ner'}")
    assert [(e.input, e.output) for e in task.train] == [(("a", "b"), ("B-X", "I-X")), (("c",), ("O",))]
    assert [label.name for label in task.labels] == ["X"]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    write_csv(tmp_path / "files" / "train.csv", [(f"t {n}", "ab"[n % 2]) for n in range(10)])
    assert Task.read(f"hf:{tmp_path / 'files'}").kind == "classification"


def test_hub_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'polytask\[datasets\]'"):
        Task.read("hf:ag_news")


# -- imports -----------------------------------------------------------------------------------------------------------


def test_importing_tasks_is_light() -> None:
    code = (
        "import sys, polytask.tasks.readers\n"
        "heavy = ('pandas', 'sklearn', 'polars', 'torch', 'datasets', 'seqeval', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
