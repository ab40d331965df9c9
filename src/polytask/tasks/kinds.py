"""From raw rows to examples: which kind of task they are, and each value in the form that the kind asks for.

A value that does not fit is an error with its file, line and field; nothing is dropped or repaired on the way.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from polytask.errors import PolytaskError
from polytask.tasks.tables import FIELD_LIMIT, Row, near
from polytask.tasks.task import Example, Kind, Output, is_bio

LABEL_LENGTH = 80  # characters; a longer text is read by people, not chosen from a list
CLASS_IDS = 20  # so many different whole numbers may still be classes
TEXT_LABELS = 30  # more different outputs than this are not labels in a format of texts, or if copied from the input
_BIO = re.compile(r"O|[BI]-.+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def guess_kind(rows: Sequence[Row], *, texts: bool = False) -> tuple[Kind, str]:
    """The kind that the values of `rows` speak for, and why.

    `texts`: the format gives every output as a text, so numbers are answers and not measurements.
    """
    if any(isinstance(row.input, list | tuple) for row in rows):
        return "tagging", "the input is a list of tokens"
    if all(isinstance((row.extra or {}).get("options"), list | tuple) for row in rows):
        return "choice", "every row has a list of options"
    outputs = [row.output for row in rows if row.output is not None]
    if any(isinstance(output, list | tuple) for output in outputs):
        sets = [output if isinstance(output, list | tuple) else [output] for output in outputs]
        flat = [str(item) for items in sets for item in items]
        several = any(len(items) != 1 for items in sets)
        if not _repeat(flat):
            return "generation", "lists of answers that rarely repeat"
        if several and not texts:
            return "multilabel", "lists of labels"
        if several:
            return "generation", "several accepted answers"
        return "classification", "few different answers that repeat"
    if not texts and outputs and all(_number(output) is not None for output in outputs):
        number: Kind = "regression" if all(row.pair is None for row in rows) else "similarity"
        whole = all(isinstance(output, int) or re.fullmatch(r"\s*[+-]?\d+\s*", str(output)) for output in outputs)
        if not whole:
            return number, "the output is a number with a fraction"
        values = [str(output) for output in outputs]
        if len(set(values)) > CLASS_IDS or not _repeat(values):
            return number, "the output is one of many whole numbers"
        return "classification", f"the output is one of {len(set(values))} whole numbers"
    values = [str(output) for output in outputs]
    if values and _repeat(values):
        different = len(set(values))
        if different > TEXT_LABELS and (texts or _quoted(rows)):
            return "generation", f"{different} different outputs, " + (
                "more than labels of this format" if texts else "most of which stand in their inputs"
            )
        return "classification", f"{different} short outputs that repeat in {len(values)} rows"
    return "generation", "long outputs, or outputs that rarely repeat"


def _repeat(values: Sequence[str]) -> bool:
    """True for short values that come back so often that they look like labels."""
    counts = Counter(values)
    if max(map(len, counts), default=0) > LABEL_LENGTH:
        return False
    if len(values) < 20:
        return len(counts) < len(values)
    alone = sum(count == 1 for count in counts.values())
    return len(counts) * 2 <= len(values) and alone * 20 <= len(values)


def _quoted(rows: Sequence[Row]) -> bool:
    """True where nine outputs of ten stand in their inputs: then they are copied from there and not chosen."""
    inside = sum(str(row.output).casefold() in str(row.input).casefold() for row in rows)
    return inside * 10 >= len(rows) * 9


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def to_example(row: Row, kind: Kind, id: str) -> Example:
    """`row` as an example of a task of this kind."""
    extra = dict(row.extra or {})
    pair = None if row.pair is None else _text(row, "pair", row.pair)
    if kind == "tagging":
        tokens = _strings(row, "input", row.input)
        tags = _strings(row, "output", row.output)
        if len(tokens) != len(tags):
            raise PolytaskError(f"{row.where}: {len(tokens)} tokens and {len(tags)} tags; give each token one tag")
        return Example(id, tokens, tags, pair, extra)
    text = _text(row, "input", row.input)
    output: Output
    if kind in ("regression", "similarity"):
        number = None if missing(row.output) else _number(row.output)
        if number is None or not math.isfinite(number):
            what = "is missing" if missing(row.output) else f"{row.output!r} is no finite number"
            raise PolytaskError(f"{row.where}: the output {what}; a {kind} task needs one in every row")
        output = number
    elif kind == "multilabel":
        output = _labels(row)
    elif kind == "generation" and isinstance(row.output, list | tuple):
        answers = tuple(dict.fromkeys(_text(row, "output", answer) for answer in row.output))
        if not answers:
            raise PolytaskError(f"{row.where}: the list of accepted answers is empty; give at least one")
        output = answers if len(answers) > 1 else answers[0]
    elif isinstance(row.output, list | tuple):
        if len(row.output) != 1:
            raise PolytaskError(
                f"{row.where}: the output is a list of {len(row.output)}; {kind} takes one (kind='multilabel' many)"
            )
        output = _text(row, "output", row.output[0])
    else:
        output = _text(row, "output", row.output)
    if kind == "choice":
        options = tuple(_text(row, "options", option) for option in extra.get("options") or ())
        if not options:
            raise PolytaskError(f"{row.where}: no options; a choice task has a list in the column 'options'")
        if output not in options:
            raise PolytaskError(f"{row.where}: the output {output!r} is none of the {len(options)} options")
        extra["options"] = options
    return Example(id, text, output, pair, extra)


def to_input(row: Row, kind: Kind, id: str) -> Example:
    """`row` as an example whose output nobody knows."""
    given = _strings(row, "input", row.input) if kind == "tagging" else _text(row, "input", row.input)
    return Example(id, given, None, None if row.pair is None else _text(row, "pair", row.pair), dict(row.extra or {}))


def label_names(examples: Iterable[Example], kind: Kind) -> list[str]:
    """The labels that stand in `examples`, sorted; span types for BIO tags; none for kinds without labels."""
    if kind == "classification":
        names = {str(e.output) for e in examples}
    elif kind in ("multilabel", "tagging"):
        names = {label for e in examples if isinstance(e.output, tuple) for label in e.output}
        if kind == "tagging" and is_bio(names):
            names = {name[2:] for name in names if name != "O"}
    else:
        return []
    if all(re.fullmatch(r"[+-]?\d{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def check_bio(rows: Iterable[tuple[Row, Example]]) -> None:
    """Raise for a tag that is not BIO, where any of the tags is."""
    pairs = list(rows)
    tags = {tag for _, e in pairs if isinstance(e.output, tuple) for tag in e.output}
    wrong = {tag for tag in tags if not _BIO.fullmatch(tag)}
    if not wrong or not is_bio(tags):
        return
    for row, example in pairs:
        for place, tag in enumerate(example.output if isinstance(example.output, tuple) else (), 1):
            if tag in wrong:
                raise PolytaskError(
                    f"{row.where}: tag {place} {tag!r} is not BIO (O, B-type or I-type), as other tags are"
                    f"{near(tag, tags - wrong)}"
                )


def missing(value: Any) -> bool:
    """Whether a cell has nothing in it."""
    return value is None or (isinstance(value, str) and not value.strip())


def _text(row: Row, field: str, value: Any) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int | float):
        text = str(value)
    elif value is None:
        text = ""
    else:
        raise PolytaskError(f"{row.where}: the {field} is a {type(value).__name__}; it must be a text")
    if not text.strip():
        raise PolytaskError(f"{row.where}: the {field} is missing; fill it in or remove the row")
    if len(text) > FIELD_LIMIT:
        raise PolytaskError(f"{row.where}: the {field} is larger than {FIELD_LIMIT // 2**20} MB; shorten it")
    if _SURROGATE.search(text):
        raise PolytaskError(f"{row.where}: the {field} has half of a surrogate pair (\\ud800 to \\udfff); mend it")
    return text


def _strings(row: Row, field: str, value: Any) -> tuple[str, ...]:
    """A list of tokens or tags; a text (a CSV cell) is split at white space."""
    if isinstance(value, str):
        value = value.split()
    if value is None or len(value) == 0:
        raise PolytaskError(f"{row.where}: the {field} has no tokens; fill it in or remove the row")
    return tuple(_text(row, f"{field}, item {n},", item) for n, item in enumerate(value, 1))


def _labels(row: Row) -> tuple[str, ...]:
    """The labels of a row: a list, a JSON list in a cell, or a cell with `|` between labels."""
    value = row.output
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise PolytaskError(f"{row.where}: the output is a broken JSON list ({error.msg})") from None
        else:
            value = [part.strip() for part in value.split("|")]
    if not isinstance(value, list | tuple):
        value = [value]
    return tuple(dict.fromkeys(_text(row, "output", item) for item in value))
