"""`polytask library picture`: the adapters of a library, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polytask.cli import options, show
from polytask.errors import PolytaskError, UsageError

if TYPE_CHECKING:
    from polytask.inference import Request


def picture(
    library: options.Library = options.LIBRARY,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")] = Path("library.html"),
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs", metavar="FILE", help="Inputs to route: a text a line, or a table as `polytask adapt` reads it."
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option("--router", metavar="NAME", help="Who routes them: as in `polytask predict`; nearest-task."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter of the router; may be given again."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", metavar="NAME", help="The backbone, where the adapters' own name does not load."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Draw the adapters: how alike they are, who needs and helped whom, where inputs go.

    For example:
      polytask library picture --out library.html
      polytask library picture --inputs new.txt --router lora-retriever
      polytask library picture --json

    Writes a page, one file without outside parts, with the same in tables.
    Nothing is answered: inputs are only routed. A tab in a line of text stands
    between the two texts of a pair.
    """
    if inputs is None and (router is not None or set_ or base is not None):
        raise UsageError("--router, --set and --base are for --inputs: name a file of inputs")
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise UsageError(f"--out {out}: cannot be written there; give a file in a folder that is there")
    given = None if inputs is None else _read(inputs)

    from polytask.evaluation.library_map import Input, Picture, Routing
    from polytask.evaluation.library_page import page
    from polytask.skills import Library

    kept = Library(library, create=False)
    routing = None
    if given is not None:
        from polytask.backbones import load
        from polytask.tasks import Example

        if base is not None:
            kept.use(load(base))
        engine = kept.engine()
        how = kept.router(router or "nearest-task", options.pairs(set_ or (), "--set"))
        said = [Example("", one.input, pair=one.pair).text for one in given]
        embeddings = engine.embed(said)
        read = embeddings if how.reads == "gist" else engine.embed(said, reads=how.reads)
        routed = engine.route(read, [one.pair is not None for one in given], how)
        texts = [_said(one) for one in given]
        taken = (Input(text, one.weights, one.sure) for text, one in zip(texts, routed, strict=True))
        routing = Routing(how.name, engine.backbone.fingerprint, tuple(taken), embeddings)
    found = Picture.of(kept, routing)
    try:
        out.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise PolytaskError(f"{out}: cannot be written: {error.strerror}") from None
    if json:
        show.write_json(found.json() | {"page": str(out)})
    else:
        show.write(f"{len(found.entries)} adapters of {library} are drawn in {out}")


def _read(path: Path) -> list[Request]:
    """The inputs of a file."""
    from polytask.inference import Request
    from polytask.tasks.columns import inputs
    from polytask.tasks.tables import SUFFIXES, check_file, read_table

    check_file(path)
    if path.suffix.lower() in SUFFIXES:
        table = read_table(path)
        first, second = inputs(table)
        found = []
        for number, row in table.rows:
            text, pair = row.get(first), row.get(second) if second else None
            whole = isinstance(text, list) and all(isinstance(word, str) for word in text)
            if not text or not (isinstance(text, str) or whole) or not (pair is None or isinstance(pair, str)):
                raise PolytaskError(f"{path}, {table.unit} {number}: {first} is no text; mend it or leave it out")
            found.append(Request(tuple(text) if isinstance(text, list) else text, pair))
        return found
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise PolytaskError(f"{path}: byte {error.start + 1} is not UTF-8; save the text as UTF-8") from None
    texts = [line.split("\t") if line.count("\t") == 1 else [line] for line in lines if line.strip()]
    if not texts:
        raise PolytaskError(f"{path}: is empty; give one input a line")
    return [Request(text[0], text[1] if len(text) > 1 else None) for text in texts]


def _said(one: Request) -> str:
    text = " ".join(one.input) if isinstance(one.input, tuple) else one.input
    return text if one.pair is None else f"{text}  ⇄  {one.pair}"
