"""`polytask predict`: answers to lines of text, by the adapter that is named or the one that the router picks."""

from __future__ import annotations

import json as jsons
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from polytask.cli import options, show
from polytask.errors import PolytaskError, UsageError

if TYPE_CHECKING:
    from polytask.adapters.expression import Expression
    from polytask.backbones import Backbone
    from polytask.inference import Answer, Engine, Request
    from polytask.library import Entry
    from polytask.skills import Library

BATCH = 256  # lines answered together, at most
LINE_LIMIT = 1 << 20  # bytes; a longer line is a file that lost its line ends


def predict(
    library: options.Library = options.LIBRARY,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="REF",
            help="Who answers: a name, name@version, an id, or a mixture such as '0.7*a + 0.3*b'. Routed if not given.",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            "--router",
            metavar="NAME",
            help="How adapters are picked: see the routers of `polytask methods`; nearest-task if not given.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter of the router; may be given again."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Lines to read; standard input if not given.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", metavar="NAME", help="The backbone, where the adapters' own name does not load."),
    ] = None,
    precision: options.Precision = "auto",
    json: options.Json = False,
) -> None:
    r"""Answer lines of text with the adapters of a library.

    The adapter is picked for each line:
      echo "my card was charged twice" | polytask predict
    One adapter, and JSON lines for a program:
      polytask predict --file new.txt --adapter tickets --json
    A mixture of two:
      polytask predict --file new.txt --adapter "0.7*first + 0.3*second"
    The three nearest adapters together, for each line:
      polytask predict --file new.txt --router lora-retriever --set k=3
    Pairs of texts, with a tab between, or as JSON:
      printf 'How do I thaw bread?\tCan I freeze bread?' | polytask predict
      echo '{"input": "one", "pair": "two"}' | polytask predict --json

    Each line is one input. Without --adapter the router picks the adapter
    whose task is nearest, or says "none of these" (in JSON, output and adapter
    are null). Where it lets several answer, "by" has them with their weights.
    With --json a line may also be an object with "input" (a text,
    or a list of words for a tagger), "pair" and "adapter".
    """
    if file is not None and not file.is_file():
        from polytask.tasks.tables import check_file

        check_file(file)
        raise UsageError(f"{file}: is no file; give a file with one input a line")

    from polytask.skills import Library

    if adapter is not None and (router is not None or set_):
        raise UsageError(f"--adapter {adapter} says who answers, and --router and --set who is to pick: give one")
    kept = Library(library, create=False)
    engine, ref = _who(kept, adapter, base, precision)
    if adapter is None:
        engine.router = kept.router(router or "nearest-task", options.pairs(set_ or (), "--set"))
    if file is None:
        if sys.stdin.isatty():
            print("one input a line; Ctrl-D ends", file=sys.stderr)
        _answer(engine, ref, sys.stdin.buffer, "standard input", json)
    else:
        with file.open("rb") as stream:
            _answer(engine, ref, stream, str(file), json)


def _who(kept: Library, adapter: str | None, base: str | None, precision: str) -> tuple[Engine, Expression | None]:
    """The engine and who is to answer. Only what is asked for is loaded: a library may hold thousands."""
    from polytask.adapters.expression import understood
    from polytask.backbones import load
    from polytask.inference import Engine

    if adapter is None:
        entries = kept.list()
        if entries:
            kept.use(_backbone(entries, base, precision, load))
        return kept.engine(), None
    ref = understood(adapter, kept.entry)
    entries = tuple(map(kept.entry, ref.names()))
    engine = Engine(_backbone(entries, base, precision, load), source=kept)
    for entry in entries:
        engine.add(kept.get(entry.id))
    return engine, ref.named(lambda name: kept.entry(name).id)


def _backbone(entries: tuple[Entry, ...], base: str | None, precision: str, load: Any) -> Backbone:
    """The one backbone of these adapters."""
    names = sorted({entry.backbone for entry in entries})
    if base is None and len({entry.fingerprint for entry in entries}) > 1:
        raise UsageError(f"these adapters belong to several backbones ({', '.join(names)}); say which with --base")
    found: Backbone = load(base or names[0], precision=precision)
    return found


def _answer(engine: Engine, ref: str | Expression | None, stream: IO[bytes], where: str, json: bool) -> None:
    """Answers as the lines come: what has arrived is answered together, so a slow pipe does not wait for a batch."""
    for lines in batches(stream):
        requests = [_request(text, f"{where}, line {n}", ref, json) for n, text in lines]
        asked = [i for i, request in enumerate(requests) if request.input]
        found = dict(zip(asked, engine.answer([requests[i] for i in asked]), strict=True))
        for i, request in enumerate(requests):
            row = described(engine, request, found.get(i))
            if json:
                show.write_json(row)
            else:
                print(_line(row))
        sys.stdout.flush()


def batches(stream: IO[bytes]) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines without their ends, as many as there are to read now and BATCH at most."""
    read = getattr(stream, "read1", stream.read)
    number, rest = 0, b""
    while chunk := read(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LINE_LIMIT:
            raise PolytaskError(f"line {number + len(lines) + 1} is longer than 1 MB; give one input a line")
        numbered = [(number + n, line) for n, line in enumerate(lines, 1)]
        number += len(lines)
        for begin in range(0, len(numbered), BATCH):
            yield numbered[begin : begin + BATCH]
    if rest:
        yield [(number + 1, rest)]


def _request(line: bytes, where: str, ref: str | Expression | None, json: bool) -> Request:
    from polytask.inference import Request

    try:
        text = line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise PolytaskError(f"{where}: byte {error.start + 1} is not UTF-8; save the text as UTF-8") from None
    if json and re.match(r'\s*\{\s*"', text):
        return _record(text, where, ref)
    if not text.strip():
        return Request("", adapter=ref)
    if text.count("\t") == 1:
        first, second = text.split("\t")
        if not first.strip() or not second.strip():
            raise PolytaskError(f"{where}: one of the two texts of the pair is missing")
        return Request(first, second, ref)
    return Request(text, adapter=ref)


def _record(text: str, where: str, ref: str | Expression | None) -> Request:
    """An input written as a JSON object."""
    from polytask.inference import Request

    shape = '{"input": "a text", "pair": "a second one, if any"}'
    try:
        record = jsons.loads(text)
    except ValueError as error:
        raise PolytaskError(f"{where}: broken JSON ({getattr(error, 'msg', error)}); write {shape}") from None
    given, pair, adapter = record.get("input"), record.get("pair"), record.get("adapter")
    words = isinstance(given, list) and bool(given) and all(isinstance(word, str) for word in given)
    if not (isinstance(given, str) or words):
        raise PolytaskError(f"{where}: the object has no text as its input; write {shape}")
    for name, value in (("pair", pair), ("adapter", adapter)):
        if value is not None and not isinstance(value, str):
            raise PolytaskError(f"{where}: {name} is a {type(value).__name__}; it must be a text")
    if re.search("[\ud800-\udfff]", f"{given}{pair}"):
        raise PolytaskError(f"{where}: has half of a surrogate pair (\\ud800 to \\udfff); mend it")
    if isinstance(given, str) and not given.strip():
        return Request("", adapter=ref)
    return Request(tuple(given) if words else given, pair, adapter or ref)


def described(engine: Engine, request: Request, answer: Answer | None) -> dict[str, Any]:
    """One answer as JSON has it; `answer` is None for an empty input."""
    from polytask.inference.requests import split_words

    given = request.input
    row: dict[str, Any] = {
        "input": list(given) if isinstance(given, tuple) else given,
        "pair": request.pair,
        "output": None,
        "probability": None,
        "adapter": None,
        "name": None,
        "routed": None,
    }
    if answer is None:
        return row
    output = answer.output
    row["output"] = list(output) if isinstance(output, tuple) else output
    row |= {"probability": answer.probability, "adapter": answer.adapter, "name": answer.name, "routed": answer.routed}
    if answer.by is not None:
        row["by"] = answer.by
    if answer.parts:
        row["parts"] = [described(engine, request, part) for part in answer.parts]
    reader = engine.adapter(answer.adapter)
    if reader is not None and reader.head is not None and reader.head.kind == "tagging":
        row["tokens"] = list(given) if isinstance(given, tuple) else list(split_words(given))
    return row


def _line(row: dict[str, Any]) -> str:
    """Answer, how sure, by whom, and the input, in columns that a tab separates."""
    if row["output"] is None and "parts" in row:  # several answers to one input
        return "\n".join(map(_line, row["parts"]))
    output = show.answer(tuple(row["output"]) if isinstance(row["output"], list) else row["output"], row.get("tokens"))
    given = " ".join(row["input"]) if isinstance(row["input"], list) else row["input"]
    text = given if row["pair"] is None else f"{given}  ⇄  {row['pair']}"
    return "\t".join([output, show.percent(row["probability"]), row.get("by") or row["name"] or "-", text])
