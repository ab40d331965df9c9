"""Which columns of a table are the input, the second text, the output and the id: as asked for, or as their names say.

Nothing is guessed between two candidates: the error lists the columns and the arguments to give.
"""

from __future__ import annotations

from dataclasses import dataclass

from polytask.errors import UsageError
from polytask.tasks.tables import Row, Table, listed

IDS = ("id", "idx", "uid", "guid")
TOGETHER = (("input", "output"), ("tokens", "tags"), ("text", "label"), ("sentence", "label"))
INPUTS = (
    *("input", "text", "sentence", "question", "utterance", "query", "prompt", "instruction", "content"),
    *("document", "tweet", "review", "comment", "message", "tokens", "words", "source"),
)
OUTPUTS = (
    *("output", "label", "labels", "target", "answer", "class", "category", "intent", "tags", "ner_tags", "pos_tags"),
    *("score", "rating", "completion", "response", "summary", "sentiment", "topic"),
)
PAIRS = (
    *(("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("text_a", "text_b"), ("sentence_a", "sentence_b"), ("query", "passage"), ("s1", "s2")),
)


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of a table's columns, by what they are for."""

    input: str
    output: str
    pair: str | None = None
    id: str | None = None

    def rows(self, table: Table) -> list[Row]:
        """The table's rows; its other columns go to `extra`."""
        used = {self.input, self.output, self.pair, self.id}
        rest = [column for column in table.columns if column not in used]
        self.check(table)
        return [
            Row(
                table.file,
                table.unit,
                number,
                row.get(self.input),
                row.get(self.output),
                # An empty pair cell must be told from a task without pairs.
                None if self.pair is None else "" if row.get(self.pair) is None else row[self.pair],
                None if self.id is None or row.get(self.id) in (None, "") else str(row[self.id]),
                {column: row[column] for column in rest if column in row},
            )
            for number, row in table.rows
        ]

    def check(self, table: Table) -> None:
        """Raise UsageError unless the table has all of them, each for one purpose."""
        roles = {"input": self.input, "pair": self.pair, "output": self.output, "id": self.id}
        named = {role: column for role, column in roles.items() if column is not None}
        for role, column in named.items():
            table.require(column, role)
        for role, column in named.items():
            same = next((other for other, c in named.items() if c == column and other != role), None)
            if same:
                raise UsageError(f"{table.file}: column {column!r} cannot be both {role} and {same}")


def choose(
    table: Table, *, input: str | None = None, output: str | None = None, pair: str | None = None
) -> tuple[Columns, list[str]]:
    """The columns of `table`, and a note where some were guessed.

    What is not given is guessed from well-known names, from there being only two columns, or from which of two columns
    repeats itself. UsageError, listing the columns, where that leaves a choice.
    """
    for what, name in (("input", input), ("output", output), ("pair", pair)):
        if name is not None:
            table.require(name, what)
    given = (input, output, pair)
    known = {column.casefold(): column for column in table.columns if column not in given}
    id = next((known.pop(name) for name in IDS if name in known), None)

    if input is None and pair is None:
        both = next((names for names in PAIRS if all(name in known for name in names)), None)
        if both:
            input, pair = known.pop(both[0]), known.pop(both[1])
    if input is None and output is None:
        both = next((names for names in TOGETHER if all(name in known for name in names)), None)
        if both:
            input, output = known.pop(both[0]), known.pop(both[1])
    if output is None:
        output = _only(known, OUTPUTS, alone=input is not None)
    if input is None:
        input = _only(known, INPUTS, alone=output is not None)
        if input is not None and output is None:
            output = _only(known, OUTPUTS, alone=True)
    if input is None and output is None and len(known) == 2:
        input, output = _two(table, *known.values())
    if input is None or output is None:
        missing = " and ".join(name for name, value in (("input", input), ("output", output)) if value is None)
        raise UsageError(
            f"{table.file}: which column is the {missing}? Name them: --input and --output, and --pair for a second "
            f"text (input=, output= and pair= in Python); its columns are {listed(table.columns)}"
        )
    columns = Columns(input, output, pair, id)
    if given == (input, output, pair):
        return columns, []
    second = f", pair {pair!r}" if pair else ""
    unused = [c for c in table.columns if c not in (input, output, pair, id)]
    kept = f"; not used: {listed(unused)}" if unused else ""
    return columns, [f"columns guessed: input {input!r}{second}, output {output!r}{kept}"]


def inputs(table: Table) -> tuple[str, str | None]:
    """The column of the input and that of its second text, if any, of a table that need not have an output.

    UsageError, listing the columns, where that leaves a choice.
    """
    known = {column.casefold(): column for column in table.columns if column.casefold() not in IDS}
    both = next((names for names in PAIRS if all(name in known for name in names)), None)
    if both:
        return known[both[0]], known[both[1]]
    second = known.pop("pair", None)
    input = _only(known, INPUTS, alone=True)
    if input is None:
        raise UsageError(
            f"{table.file}: which column is the input? Call it input; its columns are {listed(table.columns)}"
        )
    return input, second


def _only(known: dict[str, str], names: tuple[str, ...], *, alone: bool) -> str | None:
    """The one column with a well-known name, or (`alone`) the one column that is left; taken out of `known`."""
    found = [name for name in names if name in known]
    if len(found) == 1:
        return known.pop(found[0])
    if alone and not found and len(known) == 1:
        return known.popitem()[1]
    return None


def _two(table: Table, first: str, second: str) -> tuple[str, str]:
    """Input and output of two columns with unknown names: the one that repeats itself is the output."""
    distinct = [len({str(value) for value in table.column(name)}) for name in (first, second)]
    return (second, first) if distinct[0] * 2 <= distinct[1] else (first, second)
