"""JSON formats of instruction tuning: Super-NaturalInstructions, BIG-bench, Alpaca, ShareGPT.

All of them give outputs as texts, so an answer "42" is an answer and not a measurement. A format is known by its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytask.errors import PolytaskError
from polytask.tasks.draft import Draft
from polytask.tasks.tables import Row, Table
from polytask.tasks.task import Label

_HUMAN = ("human", "user")
_MODEL = ("gpt", "assistant", "chatgpt", "model")


def from_document(file: str, value: Any) -> Draft | None:
    """The task in a JSON object; None where its keys are those of no known format."""
    if not isinstance(value, dict):
        return None
    if "Instances" in value and "Definition" in value:
        return _superni(file, value)
    if isinstance(value.get("examples"), list):
        return _bigbench(file, value)
    return None


def from_instructions(table: Table) -> Draft | None:
    """The task in rows with the columns of Alpaca or of conversations; None for other rows."""
    turns = next((column for column in ("conversations", "messages") if column in table.columns), None)
    if turns:
        return _conversations(table, turns)
    if {"instruction", "output"} <= set(table.columns):
        return _alpaca(table)
    return None


def _superni(file: str, value: Mapping[str, Any]) -> Draft:
    """Wang et al. 2022, arXiv:2204.07705."""
    instances = _objects(file, "instance", value["Instances"])
    definitions = _texts(value["Definition"])
    notes = [f"{len(definitions)} definitions; the first is the instruction"] if len(definitions) > 1 else []
    shown = _objects(file, "positive example", value.get("Positive Examples") or [])
    refused = _objects(file, "negative example", value.get("Negative Examples") or [])
    splits: dict[str, list[Row]] = {}
    for number, instance in enumerate(instances, 1):
        split = str(instance.get("split") or "train")
        name = "validation" if split in ("dev", "valid") else split
        if name not in ("train", "validation", "test"):
            raise PolytaskError(f"{file}, instance {number}: split {split!r}; one of train, validation, test")
        output = _texts(instance.get("output"))
        row = _row(file, "instance", number, instance, output[0] if len(output) == 1 else list(dict.fromkeys(output)))
        splits.setdefault(name, []).append(row)
    if not splits:
        raise PolytaskError(f"{file} has no instances; it needs at least a few")
    return Draft(
        name=Path(file).stem,
        source=file,
        splits=splits,
        instruction=definitions[0] if definitions else "",
        language=", ".join(_texts(value.get("Input_language"))),
        licence=", ".join(_texts(value.get("Instance License"))),
        demonstrations=[
            _row(file, "positive example", number, example, example.get("output"))
            for number, example in enumerate(shown, 1)
        ],
        negatives=[
            _row(file, "negative example", number, example, example.get("output"))
            for number, example in enumerate(refused, 1)
        ],
        notes=notes,
        texts=True,
    )


def _bigbench(file: str, value: Mapping[str, Any]) -> Draft:
    """Srivastava et al. 2022, arXiv:2206.04615; also the files of BIG-bench Hard."""
    examples = _objects(file, "example", value["examples"])
    if not examples:
        raise PolytaskError(f"{file} has no examples; it needs at least a few")
    draft = Draft(
        name=str(value.get("name") or Path(file).stem),
        source=file,
        splits={"train": []},
        instruction=str(value.get("task_prefix") or value.get("description") or ""),
        texts=True,
    )
    scored = [example.get("target_scores") for example in examples]
    same = all(isinstance(s, dict) and list(s) == list(scored[0] or ()) for s in scored)
    if same:
        draft.kind, draft.labels = "classification", tuple(Label(option) for option in scored[0] or ())
        draft.notes.append("kind guessed: classification, since every example has the same options")
    for number, example in enumerate(examples, 1):
        scores = example.get("target_scores")
        if scores is not None and not (isinstance(scores, dict) and scores):
            raise PolytaskError(f"{file}, example {number}: target_scores must map each option to its score")
        target = max(scores, key=lambda option: float(scores[option])) if scores else example.get("target")
        row = _row(file, "example", number, {k: v for k, v in example.items() if k != "target_scores"}, target)
        if scores and not same and row.extra is not None:
            row.extra["options"] = list(scores)
        draft.splits["train"].append(row)
    if value.get("canary"):
        draft.notes.append("carries a canary: meant for evaluation, not for training")
    return draft


def _alpaca(table: Table) -> Draft:
    """Rows of instruction, input (may be empty) and output; one instruction for all rows becomes the task's."""
    instructions = {str(row.get("instruction")) for _, row in table.rows}
    shared = len(instructions) == 1 and all(row.get("input") for _, row in table.rows)
    rows = []
    for number, row in table.rows:
        parts = [row.get("input")] if shared else [row.get("instruction"), row.get("input")]
        text = "\n\n".join(str(part) for part in parts if part)
        rows.append(_row(table.file, table.unit, number, {**row, "input": text}, row.get("output")))
    return Draft(
        name=table.stem,
        source=table.file,
        splits={"train": rows},
        kind="generation",
        instruction=instructions.pop() if shared else "",
        notes=[*table.notes, "read as instructions (Alpaca): generation"],
    )


def _conversations(table: Table, column: str) -> Draft:
    """The first human turn and the first answer to it; a system turn that all rows share becomes the instruction."""
    rows, systems, longer = [], set(), 0
    for number, record in table.rows:
        turns = record.get(column)
        where = f"{table.file}, {table.unit} {number}"
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise PolytaskError(f"{where}: {column} must be a list of turns")
        said = [(str(t.get("from", t.get("role"))), t.get("value", t.get("content"))) for t in turns]
        asked = next((n for n, (who, _) in enumerate(said) if who in _HUMAN), len(said))
        answer = next((what for who, what in said[asked:] if who in _MODEL), None)
        if answer is None:
            raise PolytaskError(f"{where}: no human turn with an answer; remove it or name the turns human and gpt")
        systems.add(next((str(what) for who, what in said if who == "system"), ""))
        longer += len(said) - (said[0][0] == "system") > 2
        rest = {key: what for key, what in record.items() if key != column}
        rows.append(_row(table.file, table.unit, number, {**rest, "input": said[asked][1]}, answer))
    notes = [*table.notes, "read as conversations: the first human turn and its answer"]
    if longer:
        notes.append(f"later turns of {longer} conversations are not used")
    if len(systems) > 1:
        notes.append("the system turns differ and are not used")
    return Draft(
        name=table.stem,
        source=table.file,
        splits={"train": rows},
        kind="generation",
        instruction=systems.pop() if len(systems) == 1 else "",
        notes=notes,
    )


def _row(file: str, unit: str, number: int, record: Mapping[str, Any], output: Any) -> Row:
    id = record.get("id")
    extra = {key: value for key, value in record.items() if key not in ("id", "input", "output", "target", "split")}
    return Row(file, unit, number, record.get("input"), output, id=None if id is None else str(id), extra=extra)


def _objects(file: str, what: str, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list):
        raise PolytaskError(f"{file}: expected a list of {what}s, got {type(values).__name__}")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise PolytaskError(f"{file}, {what} {number}: expected an object {{...}}, got {type(value).__name__}")
    return values


def _texts(value: Any) -> list[str]:
    return [] if value is None else [str(item) for item in value] if isinstance(value, list) else [str(value)]
