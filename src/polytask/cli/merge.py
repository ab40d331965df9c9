"""`polytask merge`: several adapters become one."""

from __future__ import annotations

from typing import Annotated

import typer

from polytask.cli import options, show
from polytask.errors import UsageError


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER", help="Names, name@version or ids, of one backbone's adapters.", show_default=False
        ),
    ],
    rule: Annotated[
        str, typer.Option("--rule", "-r", metavar="RULE", help="See the merges of `polytask methods`.")
    ] = "average",
    weights: Annotated[
        str | None,
        typer.Option("--weights", "-w", metavar="W,W,...", help="One for each adapter; 1 if not given."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter of the rule. May be given again."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="R", help="Keep the nearest LoRA of this rank. If not given, all of it is kept."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            metavar="ADAPTER",
            help="Whose head and task the result gets. If not given, the one that all have, or none.",
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", "-n", metavar="NAME", help="What to call the result.")] = "merged",
    library: options.Library = options.LIBRARY,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", metavar="NAME", help="The backbone, where its own name does not load."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Make one adapter of several, without data or training, and say how exact it is.

    For example:
      polytask merge tickets questions --head tickets
      polytask merge a b c --rule ties --set density=0.2 --rank 16
      polytask merge a b --rule task-arithmetic -w 1,-0.5 --set scale=1
      polytask merge a b --rule dare-ties --name both --json

    What comes out of LoRAs by a linear rule is a LoRA whose rank is the sum of
    theirs, and exact. Any other result is as large as the weights it changes
    unless --rank cuts it; the error is told for each site with --json.
    """
    from dataclasses import asdict

    from polytask.backbones import load
    from polytask.composition.merge import merge as merged
    from polytask.composition.merging.rule import build
    from polytask.library import Library

    how = build(rule, options.pairs(set_ or (), "--set"))
    try:
        numbers = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise UsageError(f"--weights {weights}: write numbers with commas between them, such as 1,0.5") from None
    kept = Library(library, create=False)
    entries = [kept.entry(ref) for ref in adapters]
    whose = None if head is None else kept.entry(head).id
    if head is not None and whose not in {entry.id for entry in entries}:
        raise UsageError(f"--head {head} is none of the adapters that are merged: {', '.join(adapters)}")
    backbone = load(base or entries[0].backbone)
    parts = [kept.get(entry.id) for entry in entries]
    made, report = merged(backbone, parts, how, rank, weights=numbers, head=whose, name=name)
    entry = kept.entry(kept.add(made))
    if json:
        show.write_json(
            {
                "adapter": entry.id,
                "name": entry.name,
                "version": entry.version,
                "rule": how.name,
                "hyperparameters": asdict(how),  # type: ignore[call-overload]
                "parents": {e.id: w for e, w in zip(entries, made.card.recipe["weights"], strict=True)},
                "method": made.method,
                "rank": made.hyperparameters.get("r"),
                "head": whose if made.head else None,
                "bytes": entry.bytes,
                "error": report.whole,
                "errors": dict(report.sites),
                "conflict": report.conflict,
                "conflicts": dict(report.conflicts),
            }
        )
        return
    show.write(f"{entry.name}@{entry.version} ({entry.id}) is in {library}: {made.card.notes[0]}")
    what = f"a LoRA of rank {made.hyperparameters['r']}" if made.method == "lora" else "a full difference"
    show.write(f"{what}, {show.size(entry.bytes)}, {made.card.notes[1]}")
    if made.head is None:
        show.write("it does not answer by itself: merge again with --head, or mix it with an adapter that has a head")
