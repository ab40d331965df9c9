"""Bad data is refused in one line that says what, where and what to do; what can be used is used and noted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from polytask.errors import PolytaskError, UsageError
from polytask.tasks import Task

YAML = "columns: {input: text, output: label}\nsplits: {train: train.csv}\n"


def refused(error: type[PolytaskError], read: Callable[[], Task], *parts: str) -> None:
    """`read` raises exactly `error`, in one line that holds `parts`."""
    with pytest.raises(PolytaskError) as caught:
        read()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def file(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    file(tmp_path, "tickets.csv", "text,label\na,b\n")
    refused(UsageError, lambda: Task.read(tmp_path / "ticket.csv"), "is not there", "did you mean 'tickets.csv'?")
    refused(UsageError, lambda: Task.read(tmp_path / "no" / "where.csv"), "where.csv is not there")
    path = file(tmp_path, "notes.txt", "hello")
    refused(UsageError, lambda: Task.read(path), "no reader for .txt", ".csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", "", "e.csv is empty"),
        ("e.jsonl", "", "e.jsonl is empty"),
        ("e.json", "", "e.json is empty"),
        ("e.parquet", "", "e.parquet is empty"),
        ("e.csv", "\n\n", "e.csv has no header"),
        ("e.jsonl", "\n\n", "e.jsonl has no rows"),
        ("e.json", "[]", "e.json has no rows"),
        ("e.csv", "text,label\n", "has a header ('text', 'label') and no rows"),
        ("e.csv", "text,text\na,b\n", "two columns are named 'text'"),
        ("e.parquet", "not parquet at all", "is no whole Parquet file"),
        ("e.json", '{"rows": 1}', "a JSON dict that is no known task format"),
        ("e.json", "[1, 2]", "row 1: expected an object"),
        ("e.jsonl", '{"text": "a"}\n[1]\n', "line 2: expected an object"),
    ],
)
def test_nothing_to_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = file(tmp_path, name, content)
    refused(PolytaskError, lambda: Task.read(path), message)


def test_wrong_column(tmp_path: Path) -> None:
    path = file(tmp_path, "t.csv", "text,team\na,x\nb,y\nc,x\n")
    refused(UsageError, lambda: Task.read(path, output="teams"), "no column 'teams'", "mean 'team'?", "'text', 'team'")
    refused(UsageError, lambda: Task.read(path, input="team", output="team"), "cannot be both")
    refused(UsageError, lambda: Task.read(path, kind="clasification"), "did you mean 'classification'?")  # type: ignore[arg-type]
    refused(UsageError, lambda: Task.read(path, metric="acuracy"), "did you mean 'accuracy'?")
    refused(UsageError, lambda: Task.read(path, metric="spearman"), "does not fit a classification task")
    refused(UsageError, lambda: Task.read(path, kind="retrieval"), "retrieval")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_not_utf8(tmp_path: Path, suffix: str) -> None:
    rows = {
        ".csv": 'text,label\n"a\nb",x\ncafé,y\n',
        ".tsv": "text\tlabel\n\nfine\tx\ncafé\ty\n",
        ".jsonl": '{"text": "a"}\n\n\n{"text": "café"}\n',
        ".json": '[\n{"text": "a"},\n\n{"text": "café"}]',
    }[suffix]
    data = rows.encode("latin-1")
    path = file(tmp_path, f"t{suffix}", data)
    offset = data.index(b"\xe9")
    refused(PolytaskError, lambda: Task.read(path), "line 4: byte 0xe9", f"offset {offset} is not UTF-8", "iconv")


def test_broken_json_and_quotes(tmp_path: Path) -> None:
    path = file(tmp_path, "t.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": }\n')
    refused(PolytaskError, lambda: Task.read(path), "t.jsonl, line 2: broken JSON", "character 24")
    path = file(tmp_path, "t.json", '[{"text": "a"},\n{"text" "b"}]')
    refused(PolytaskError, lambda: Task.read(path), "t.json, line 2: broken JSON")
    for content in ("[" * 200_000, "9" * 10_000):
        path = file(tmp_path, "deep.jsonl", '{"text": "a"}\n' + content)
        refused(PolytaskError, lambda path=path: Task.read(path), "deep.jsonl, line 2: JSON that cannot be held")
        path = file(tmp_path, "deep.json", content)
        refused(PolytaskError, lambda path=path: Task.read(path), "deep.json: JSON that cannot be held")
    path = file(tmp_path, "t.csv", 'text,label\na,x\n"say "hi",y\n')
    refused(PolytaskError, lambda: Task.read(path), "t.csv, line 3: broken quoting", "twice")
    path = file(tmp_path, "u.csv", 'text,label\na,x\n"never closed,y\nb,x\n')
    refused(PolytaskError, lambda: Task.read(path), "u.csv, line 3: a quoted cell is never closed")


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("t.csv", "text,label\na,x\n,y\n", "line 3: the input is missing"),
        ("t.csv", 'text,label\n"a\nb",x\nb,\n', "line 4: the output is missing"),
        ("t.csv", "text,label\na,x\nb\n", "line 3: 1 cells where the header has 2"),
        ("t.csv", "text,label\na,x\nb, c,y\n", "line 3: 3 cells where the header has 2"),
        ("t.csv", "text,label\na,x\n  ,y\n", "line 3: the input is missing"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: the output is missing"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": null, "label": "y"}\n', "line 2: the input is missing"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": {}, "label": "y"}\n', "line 2: the input is a dict"),
        ("t.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": ""}]', "row 2: the output is missing"),
        ("t.jsonl", '{"s1": "a", "s2": "b", "label": "x"}\n{"s1": "c", "label": "y"}\n', "line 2: the pair is missing"),
        (
            "t.jsonl",
            '{"text": "\\ud800", "label": "x"}\n{"text": "a", "label": "y"}\n',
            "line 1: the input has half of a surrogate pair",
        ),
    ],
)
def test_missing_cells(tmp_path: Path, name: str, content: str, where: str) -> None:
    path = file(tmp_path, name, content)
    refused(PolytaskError, lambda: Task.read(path), f"{name}, {where}")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = file(tmp_path, "t.csv", "text,score\na,0.5\nb,high\n")
    refused(PolytaskError, lambda: Task.read(path, kind="regression"), "line 3: the output 'high' is no finite number")
    path = file(tmp_path, "t.csv", "text,score\na,0.5\nb,nan\n")
    refused(PolytaskError, lambda: Task.read(path, kind="regression"), "line 3: the output 'nan' is no finite number")
    path = file(tmp_path, "t.jsonl", '{"text": "a", "score": true}\n')
    refused(PolytaskError, lambda: Task.read(path, kind="regression"), "line 1: the output True is no finite number")
    path = file(tmp_path, "t.csv", "text,score\na,0.5\nb,\n")
    refused(PolytaskError, lambda: Task.read(path, kind="regression"), "line 3: the output is missing")


def test_duplicate_ids(tmp_path: Path) -> None:
    path = file(tmp_path, "t.csv", "id,text,label\n7,a,x\n8,b,y\n7,c,x\n")
    refused(PolytaskError, lambda: Task.read(path), "line 4: id '7' also stands in line 2")
    file(tmp_path, "train.csv", "id,text,label\n1,a,x\n2,b,y\n")
    file(tmp_path, "test.csv", "id,text,label\n1,c,x\n")
    (tmp_path / "t.csv").unlink()
    assert "ids of test also stand in another split: 1" in Task.read(tmp_path).notes


def test_one_label_is_no_classification(tmp_path: Path) -> None:
    path = file(tmp_path, "t.csv", "text,label\na,x\nb,x\nc,x\n")
    refused(PolytaskError, lambda: Task.read(path), "every row of train has the label 'x'", "two or more")


def test_a_label_seen_once_is_noted(tmp_path: Path) -> None:
    path = file(tmp_path, "t.csv", "text,label\n" + "".join(f"t{n},{'xy'[n % 2]}\n" for n in range(50)) + "odd,rare\n")
    task = Task.read(path)
    assert any(note == "1 label has a single training example: 'rare'" for note in task.notes)
    assert [e.input for e in task.train if e.output == "rare"] == ["odd"]


def test_a_test_label_that_train_never_shows_is_noted(tmp_path: Path) -> None:
    file(tmp_path, "train.csv", "text,label\na,x\nb,y\nc,x\nd,y\n")
    file(tmp_path, "test.csv", "text,label\ne,x\nf,new\n")
    task = Task.read(tmp_path)
    assert (
        "1 of 2 rows of test have labels that train never shows ('new'): a trained model gets them wrong" in task.notes
    )
    assert [label.name for label in task.labels] == ["x", "y"]


def test_long_lines(tmp_path: Path) -> None:
    long = "word " * 200_000
    path = file(tmp_path, "t.csv", f"text,label\na,x\n{long},y\nb,x\n")
    assert max(len(str(e.input)) for e in Task.read(path).train) == 1_000_000
    path = file(
        tmp_path, "t.jsonl", "".join(json.dumps({"text": t, "label": o}) + "\n" for t, o in ((long, "x"), "ay"))
    )
    assert len(str(Task.read(path).train[0].input)) == 1_000_000
    huge = "x" * (16 * 2**20 + 1)
    path = file(tmp_path, "h.csv", f"text,label\na,x\n{huge},y\n")
    refused(PolytaskError, lambda: Task.read(path), "h.csv, line 3: a cell is larger than 16 MB")
    path = file(tmp_path, "h.jsonl", '{"text": "a", "label": "x"}\n{"text": "' + huge + '", "label": "y"}\n')
    refused(PolytaskError, lambda: Task.read(path), "h.jsonl, line 2: the input is larger than 16 MB")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 2: 2 tokens and 1 tags"),
        ({"tokens": ["a", "b"], "tags": ["O", "I_X"]}, "line 2: tag 2 'I_X' is not BIO"),
        ({"tokens": ["a"], "tags": ["B-"]}, "line 2: tag 1 'B-' is not BIO"),
        ({"tokens": ["a"], "tags": ["S-X"]}, "line 2: tag 1 'S-X' is not BIO"),
        ({"tokens": [], "tags": []}, "line 2: the input has no tokens"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "line 2: the input, item 2, is missing"),
    ],
)
def test_tags(tmp_path: Path, row: dict[str, list[str]], message: str) -> None:
    good = {"tokens": ["a", "b"], "tags": ["B-X", "I-X"]}
    path = file(tmp_path, "t.jsonl", f"{json.dumps(good)}\n{json.dumps(row)}\n")
    refused(PolytaskError, lambda: Task.read(path), message)


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("name: [broken\n", ("task.yaml, line 2: broken YAML",)),
        ("nmae: x\n", ("there is no field 'nmae'", "did you mean 'name'?")),
        ("columns: {input: text, out: label}\n", ("columns",)),
        ("kind: sorting\n", ("kind: input should be 'classification'",)),
        ("splits: {training: train.csv}\n", ("no split 'training'",)),
        ("splits: {train: trian.csv}\n", ("the train file 'trian.csv' is not there", "did you mean 'train.csv'?")),
        (YAML + "metric: speed\n", ("no metric 'speed'",)),
        (YAML + "labels: [x, z]\n", ("train.csv, line 3: label 'y' is not among the 2 listed labels",)),
        (YAML + "labels: [x, y, x]\n", ("label 'x' is listed twice",)),
    ],
)
def test_task_yaml(tmp_path: Path, yaml: str, parts: tuple[str, ...]) -> None:
    file(tmp_path, "train.csv", "text,label\na,x\nb,y\n")
    file(tmp_path, "task.yaml", yaml)
    refused(PolytaskError, lambda: Task.read(tmp_path), *parts)


def test_folders(tmp_path: Path) -> None:
    refused(UsageError, lambda: Task.read(tmp_path), "no task.yaml and no file named train, validation or test")
    file(tmp_path, "train.csv", "text,label\na,x\nb,y\n")
    file(tmp_path, "train.jsonl", '{"text": "a"}\n')
    refused(UsageError, lambda: Task.read(tmp_path), "both train.csv and train.jsonl could be train")
    (tmp_path / "train.jsonl").unlink()
    file(tmp_path, "test.csv", "text,lable\na,x\n")
    refused(UsageError, lambda: Task.read(tmp_path), "test.csv has no column 'label'", "did you mean 'lable'?")
    file(tmp_path, "task.json", '{"kind": "retrieval"}')
    refused(PolytaskError, lambda: Task.read(tmp_path), "a retrieval task has a corpus and queries")
    file(tmp_path, "task.json", '{"kind": "riddle"}')
    refused(PolytaskError, lambda: Task.read(tmp_path), "its kind is 'riddle'")


def test_instruction_files(tmp_path: Path) -> None:
    value = {"Definition": ["d"], "Instances": [{"input": "a", "output": ["b"]}, {"input": "", "output": ["b"]}]}
    path = file(tmp_path, "n.json", json.dumps(value))
    refused(PolytaskError, lambda: Task.read(path), "n.json, instance 2: the input is missing")
    refused(UsageError, lambda: Task.read(path, input="x"), "leave input= out")
    path = file(tmp_path, "b.json", json.dumps({"examples": [{"input": "a", "target_scores": {}}]}))
    refused(PolytaskError, lambda: Task.read(path), "example 1: target_scores")
    path = file(tmp_path, "m.json", json.dumps({"Definition": ["d"], "Instances": []}))
    refused(PolytaskError, lambda: Task.read(path), "m.json has no instances")
