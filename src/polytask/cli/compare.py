"""`polytask compare`: which method is best on a task?"""

from __future__ import annotations

import hashlib
import json as jsons
import os
from functools import partial
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
        str,
        typer.Option(
            "--methods", "-m", metavar="A,B,...", help="Methods of `polytask methods`, in any order, or all that fit."
        ),
    ] = "head,lora,bottleneck,ia3,full",
    tries: Annotated[
        int | None,
        typer.Option(
            "--tries",
            metavar="N",
            help="Learning rates a method: its default, a third of it, three times it, ... The best on validation is "
            "kept. If not given, 1, and 3 for all.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Train each this often; scores are averaged.")] = 1,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            metavar="N",
            help="Train so many at once, each in a process with its share of the processor; if not given, one for two "
            "cores.",
            show_default=False,
        ),
    ] = None,
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
    """Train several methods on one task and compare them.

    Five methods on your file:
      polytask compare tickets.csv --input text --output team
    Three of them, each trained three times:
      polytask compare my-task/ --methods head,lora,full --seeds 3
    All that fit, each at three learning rates, four trainings at once:
      polytask compare my-task/ --methods all --jobs 4

    Prints a table and writes a page, one file without outside parts, with
    learning curves and the score against trained parameters and seconds.
    Latency is measured last, alone. A method is on the front (*) where no other
    is at least as good in score, parameters, seconds and latency and better in
    one. Results that are there already are not computed again: after a stop the
    same command goes on.
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods: give at least one, such as --methods head,lora")
    for option, number in (("--seeds", seeds), ("--tries", tries), ("--jobs", jobs)):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number}: at least 1 is needed")
    every = names == ["all"]
    if "all" in names and not every:
        raise UsageError("--methods: all stands alone")
    data = options.read_task(task, input=input, output=output, pair=pair, kind=kind, metric=metric)
    chosen = options.settings(epochs=epochs, batch=batch, balanced=balanced)

    from polytask import __version__
    from polytask.backbones import load
    from polytask.evaluation.compare_page import page
    from polytask.recipes.compare import compare as run
    from polytask.recipes.compare import schedule

    reading = options.reading(text, template, pool, pair_mode, bidirectional)
    options.check(data, {} if every else {name: {} for name in names}, reading)
    get = partial(load, options.base_for(base, data, reading), precision=precision)  # type: ignore[arg-type]
    backbone = get()
    planned = schedule(
        backbone,
        data,
        None if every else names,
        seeds=seeds,
        tries=tries or (3 if every and data.validation else 1),
        settings=chosen,
        reading=reading,
    )
    says = [
        __version__,
        backbone.fingerprint,
        backbone.precision,
        data.card().model_dump(mode="json"),
        vars(chosen),
        vars(reading),
    ]
    key = hashlib.sha256(jsons.dumps(says, sort_keys=True).encode()).hexdigest()[:8]
    folder = runs / f"{_plain(data.name)}-{key}"

    quiet = quiet or json
    titles = planned.titles
    with (
        resumable(folder, keep=True),
        Progress(titles, quiet=quiet) as progress,
    ):

        def on_event(at: int, event: Event) -> None:
            from dataclasses import replace

            progress(replace(event, job=at))

        def on_trial(at: int, trial: Trial | str, *, new: bool) -> None:
            progress.finish(at)
            if isinstance(trial, str):
                progress.say(f"{titles[at]}: {trial}")
            elif not new:
                progress.say(f"{titles[at]}: found in {folder}")

        found = run(
            backbone,
            data,
            planned,
            folder=folder,
            jobs=jobs or (_cores() // 2 if backbone.device.type == "cpu" else 1) or 1,
            load=get,
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
    right = ["trained", "%", "seconds", "latency", "memory", "size", *(["rate"] if len(found.factors) > 1 else [])]
    table = show.table("method", "", f"{found.metric} on {found.split} [95 %]", *right, right=right)
    for row in found.rows:
        cells = [
            row.method,
            "*" if row.front else "",
            show.score(row.score, row.low, row.high),
            f"{row.trained_parameters:,}",
            show.share(row.trained_parameters, found.backbone.parameters).removesuffix(" %"),
            f"{row.seconds:.1f}",
            "" if row.latency is None else f"{row.latency:.2f}",
            "" if row.memory is None else show.size(row.memory),
            show.size(row.bytes),
        ]
        if len(found.factors) > 1:
            cells.append(f"{row.lr:.3g}" if row.method != "head" else "")
        table.add_row(*cells)
    lines = [f"Left out: {name}: {reason}" for name, reason in found.left_out.items()]
    lines += [
        f"Failed: {failure.method} at {failure.lr:.3g}, seed {failure.seed}: {failure.reason}"
        for failure in found.failures
        if failure.method not in found.left_out
    ]
    show.write(table, *lines, f"The page: {target}")


def _cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(name: str) -> str:
    """A name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60] or "task"
