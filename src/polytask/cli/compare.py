"""`polytask compare`: which method is best on a task?"""

from __future__ import annotations

import hashlib
import json as jsons
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polytask.cli import options, show
from polytask.cli.checkpoints import resumable
from polytask.cli.progress import Progress
from polytask.errors import UsageError

if TYPE_CHECKING:
    from polytask.evaluation.comparison import Trial
    from polytask.training import Event


def compare(
    task: options.TaskSource,
    methods: Annotated[
        str, typer.Option("--methods", "-m", metavar="A,B,...", help="Methods of `polytask methods`, in any order.")
    ] = "head,lora,bottleneck,ia3,full",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Train each this often; scores are averaged.")] = 1,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Where the page goes; beside the results if not given."),
    ] = None,
    runs: Annotated[
        Path, typer.Option("--runs", metavar="DIR", help="Results are kept here as they come, and found again.")
    ] = Path("runs"),
    base: options.Base = None,
    input: options.Input = None,
    output: options.Output = None,
    pair: options.Pair = None,
    kind: options.Kind = None,
    metric: options.Metric = None,
    epochs: options.Epochs = None,
    batch: options.BatchSize = None,
    balanced: options.Balanced = False,
    pool: options.Pool = None,
    pair_mode: options.PairMode = "separate",
    bidirectional: options.Bidirectional = False,
    text: options.InText = None,
    template: options.TemplateName = "plain",
    precision: options.Precision = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train several methods on one task, one after the other, and compare them.

    Five methods on your file:
      polytask compare tickets.csv --input text --output team
    Three of them, each trained three times:
      polytask compare my-task/ --methods head,lora,full --seeds 3

    Prints a table and writes a page, one file without outside parts, with
    learning curves and the score against trained parameters and seconds. Each
    method trains at its own default rate. Results that are there already are
    not computed again: after a stop the same command goes on.
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods: give at least one, such as --methods head,lora")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least 1 is needed")
    data = options.read_task(task, input=input, output=output, pair=pair, kind=kind, metric=metric)
    chosen = options.settings(epochs=epochs, batch=batch, balanced=balanced)

    from polytask import __version__
    from polytask.backbones import load
    from polytask.evaluation.compare_page import page
    from polytask.recipes.compare import compare as run

    reading = options.reading(text, template, pool, pair_mode, bidirectional)
    options.check(data, {name: {} for name in names}, reading)
    backbone = load(options.base_for(base, data, reading), precision=precision)  # type: ignore[arg-type]
    says = [
        __version__,
        backbone.fingerprint,
        str(backbone.dtype),
        data.card().model_dump(mode="json"),
        vars(chosen),
        vars(reading),
    ]
    key = hashlib.sha256(jsons.dumps(says, sort_keys=True).encode()).hexdigest()[:8]
    folder = runs / f"{_plain(data.name)}-{key}"

    quiet = quiet or json
    order = [(name, seed) for name in dict.fromkeys(names) for seed in range(seeds)]
    titles = [name if seeds == 1 else f"{name}, seed {seed}" for name, seed in order]
    at = 0
    with (
        resumable(folder, keep=True),
        Progress(titles, quiet=quiet) as progress,
    ):

        def on_event(event: Event) -> None:
            from dataclasses import replace

            progress(replace(event, job=at))

        def on_trial(trial: Trial, *, new: bool) -> None:
            nonlocal at
            progress.finish(at)
            if not new:
                progress.say(f"{titles[at]}: found in {folder}")
            at += 1

        found = run(
            backbone,
            data,
            names,
            seeds=seeds,
            settings=chosen,
            reading=reading,
            folder=folder,
            on_event=on_event,
            on_trial=on_trial,
        )
    target = html or folder / "compare.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(page(found), encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    if json:
        show.write_json(found.report() | {"html": str(target), "runs": str(folder)})
        return
    right = ("trained", "%", "seconds", "size")
    table = show.table("method", f"{found.metric} on {found.split} [95 %]", *right, right=right)
    for row in found.rows:
        table.add_row(
            row.method,
            show.score(row.score, row.low, row.high),
            f"{row.trained_parameters:,}",
            show.share(row.trained_parameters, found.backbone.parameters).removesuffix(" %"),
            f"{row.seconds:.1f}",
            show.size(row.bytes),
        )
    show.write(table, f"The page: {target}")


def _plain(name: str) -> str:
    """A name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60] or "task"
