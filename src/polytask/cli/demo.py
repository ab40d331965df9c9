"""`polytask demo`: small tasks adapted at once, kept, and asked ten questions."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

from typer import Option

from polytask.cli import options, show
from polytask.cli.adapt import report
from polytask.cli.checkpoints import folder_for, resumable
from polytask.cli.predict import described
from polytask.cli.progress import Progress

HERE = Path(__file__).parent.parent / "demo"
READ = ("tickets", "calendar", "questions")
WRITTEN = ("home", "tickets")


def demo(
    generate: Annotated[bool, Option("--generate", help="Two tasks whose answers are written by a decoder.")] = False,
    library: options.Library = options.LIBRARY,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """See the whole way through, offline: three small tasks, one frozen model, ten mixed questions.

    For example:
      polytask demo
      polytask demo --generate
      polytask demo --library /tmp/skills

    tickets     which of 8 teams should deal with a customer's message
    calendar    what, when, where and how long in a request to a calendar
    questions   do two questions ask the same thing

    All three are learned at once over one pass of the embedded MiniLM,
    measured on their test splits, and kept in the library. Then ten unlabelled
    inputs are answered, each by the adapter that the router picks for it.

    With --generate, the embedded decoder learns to answer in text:

    home        the command for a request to a house
    tickets     the team's name, as the words that it writes
    """
    began = time.perf_counter()

    from polytask.backbones import load
    from polytask.inference import Engine, Request
    from polytask.inference.requests import parted
    from polytask.library import Library
    from polytask.recipes.adapt import Plan, adapt_many, automatic
    from polytask.recipes.reading import Reading
    from polytask.tasks import Task
    from polytask.training import Settings

    tasks = [Task.read(HERE / name) for name in (WRITTEN if generate else READ)]
    backbone = load("polytask-base" if generate else "minilm")
    reading = Reading(in_text="yes" if generate else "auto")
    own = {"home": Settings(epochs=8, batch=8), "tickets": Settings(epochs=4, batch=16)} if generate else {}
    plans = [Plan(t, settings=own.get(t.name, Settings(epochs=12)), reading=reading) for t in tasks]
    if not generate:  # one training each, where `auto` has three
        plans = [automatic(backbone, plan) for plan in plans]
    kept = Library(library)
    folder = folder_for(library, backbone, plans)
    with resumable(folder), Progress([t.name for t in tasks], quiet=quiet or json) as progress:
        count = {2: "two", 3: "three"}[len(tasks)]
        size = f"{backbone.parameters / 1e6:.0f} million parameters"
        progress.say(f"{backbone.name}, {size}, frozen; {count} tasks at once")
        adapters = adapt_many(backbone, plans, folder=folder, on_event=progress)
        for adapter in adapters:
            kept.add(adapter)
    reports = [report(adapter, library) for adapter in adapters]

    inputs = (HERE / ("requests.txt" if generate else "inputs.txt")).read_text(encoding="utf-8").splitlines()
    requests = [parted(Request(text)) for text in inputs]
    engine = Engine(backbone, adapters=adapters)
    answers = [described(engine, r, found) for r, found in zip(requests, engine.answer(requests), strict=True)]
    seconds = time.perf_counter() - began
    if json:
        show.write_json({"adapters": reports, "answers": answers, "library": str(library), "seconds": seconds})
        return

    right = ("as it is" if generate else "frozen features", "trained", "%", "seconds", "size")
    table = show.table("task", "method", "score on test [95 %]", *right, right=right)
    for r in reports:
        table.add_row(
            r["task"],
            r["method"],
            f"{r['metric']} {show.score(r['score'], *r['interval'])}",
            f"{r['baseline']:.3f}",
            f"{r['trainable_params']:,}",
            show.share(r["trainable_params"], r["backbone_params"]).removesuffix(" %"),
            f"{r['seconds']:.1f}",
            show.size(r["bytes"]),
        )
    asked = show.table("input", "routed to", "p(route)", "answer", "p(answer)", right=("p(route)", "p(answer)"))
    for a in answers:
        text = a["input"] if a["pair"] is None else f"{a['input']}  ⇄  {a['pair']}"
        output = show.answer(tuple(a["output"]) if isinstance(a["output"], list) else a["output"], a.get("tokens"))
        asked.add_row(
            text,
            a["name"] or "-",
            show.percent(a["routed"] if a["name"] else None),
            output,
            show.percent(a["probability"]),
        )
    show.write(
        table,
        "Ten new inputs, each answered by the adapter that the router picked:",
        asked,
        f"{count.capitalize()} adapters are kept in {library} ({seconds:.0f} s in all). Next:",
        f"  echo 'my parcel never came' | polytask predict{_where(library)}",
        f"  polytask library list{_where(library)}",
        "  polytask adapt your.csv --input text --output label",
    )


def _where(library: Path) -> str:
    return "" if library == options.LIBRARY else f" --library {shlex.quote(str(library))}"
