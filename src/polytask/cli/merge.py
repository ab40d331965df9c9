"""`polytask merge`: several adapters become one, or several checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polytask.cli import options, show
from polytask.errors import UsageError


def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER", help="Names, name@version or ids, of one backbone's adapters.", show_default=False
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule", "-r", metavar="RULE", help="See the merges of `polytask methods`; average if not given."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", "-w", metavar="W,W,...", help="One for each adapter; 1 if not given."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter of the rule. May be given again."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="TASK,TASK,...",
            help="Each adapter's task, in their order, for rules that are fitted to data: files, folders or hub ids.",
        ),
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
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE.yml", help="Merge whole checkpoints, as mergekit's file says."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where to write them; for --config.")
    ] = None,
    shard: Annotated[
        float | None,
        typer.Option("--shard", metavar="GB", help="The size of a file there, in GB; for --config. 5 if not given."),
    ] = None,
    name: Annotated[str, typer.Option("--name", "-n", metavar="NAME", help="What to call the result.")] = "merged",
    library: options.Library = options.LIBRARY,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", metavar="NAME", help="The backbone, where its own name does not load."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Make one adapter of several by a rule, and say how exact it is.

    For example:
      polytask merge tickets questions --head tickets
      polytask merge a b c --rule ties --set density=0.2 --rank 16
      polytask merge a b --rule task-arithmetic -w 1,-0.5 --set scale=1
      polytask merge a b --rule dare-ties --name both --json
      polytask merge a b --rule adamerging --data a.csv,b.csv
      polytask merge --config mergekit.yml --out merged

    What comes out of LoRAs by a linear rule is a LoRA whose rank is the sum of
    theirs, and exact. Any other result is as large as the weights it changes
    unless --rank cuts it; the error is told for each site with --json.

    With --config it is checkpoints that are merged, tensor by tensor, by
    mergekit's linear, task_arithmetic, ties, dare_linear or dare_ties.
    """
    if config is not None:
        given = {"--rule": rule, "--weights": weights, "--set": set_, "--data": data, "--rank": rank, "--head": head}
        if idle := [*(adapters or ()), *(option for option, value in given.items() if value is not None)]:
            raise UsageError(f"--config says what is merged and how; leave out {idle[0]}")
        _checkpoints(config, out, 5.0 if shard is None else shard, json)
        return
    if not adapters:
        raise UsageError("name the adapters to merge, or give --config FILE.yml")
    if out is not None or shard is not None:
        raise UsageError("--out and --shard are for --config; an adapter goes into the library: --name and --library")
    from dataclasses import asdict

    from polytask.backbones import load
    from polytask.composition.merge import merge as merged
    from polytask.composition.merging.rule import build
    from polytask.library import Library
    from polytask.tasks import Task

    how = build(rule or "average", options.pairs(set_ or (), "--set"))
    try:
        numbers = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise UsageError(f"--weights {weights}: write numbers with commas between them, such as 1,0.5") from None
    kept = Library(library, create=False)
    entries = [kept.entry(ref) for ref in adapters]
    whose = None if head is None else kept.entry(head).id
    if head is not None and whose not in {entry.id for entry in entries}:
        raise UsageError(f"--head {head} is none of the adapters that are merged: {', '.join(adapters)}")
    tasks = [Task.read(source) for source in data.split(",")] if data else []
    backbone = load(base or entries[0].backbone)
    parts = [kept.get(entry.id) for entry in entries]
    made, report = merged(backbone, parts, how, rank, tasks=tasks, weights=numbers, head=whose, name=name)
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
                "notes": list(made.card.notes[2:]),
            }
        )
        return
    show.write(f"{entry.name}@{entry.version} ({entry.id}) is in {library}: {made.card.notes[0]}")
    what = f"a LoRA of rank {made.hyperparameters['r']}" if made.method == "lora" else "a full difference"
    show.write(f"{what}, {show.size(entry.bytes)}, {made.card.notes[1]}")
    for note in made.card.notes[2:]:
        show.write(note)
    if made.head is None:
        show.write("it does not answer by itself: merge again with --head, or mix it with an adapter that has a head")


def _checkpoints(config: Path, out: Path | None, shard: float, json: bool) -> None:
    if out is None:
        raise UsageError("--config needs --out: the folder to write the merged checkpoint to")
    from polytask.composition.mergekit import merge_checkpoints, read_mergekit

    recipe = read_mergekit(config)
    tensors = merge_checkpoints(recipe, out, shard=int(shard * 1e9))
    models = [model.ref for model in recipe.models]
    if json:
        said = {"folder": str(out), "method": recipe.method, "models": models, "base": recipe.base}
        show.write_json(said | {"tensors": tensors, "notes": list(recipe.notes)})
        return
    show.write(f"{tensors} tensors of {', '.join(models)}, merged by {recipe.method}, are in {out}")
    for note in recipe.notes:
        show.write(note)
