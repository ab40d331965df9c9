"""`polytask adapt`: teach a task to a frozen backbone, and keep the adapter in a library."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polytask.cli import options, recipes, show
from polytask.cli.checkpoints import folder_for, resumable
from polytask.cli.progress import Progress
from polytask.errors import UsageError

if TYPE_CHECKING:
    from polytask.adapters import Adapter
    from polytask.backbones import Backbone
    from polytask.library import Library
    from polytask.recipes.adapt import Plan


def adapt(
    task: options.TaskSource,
    base: options.Base = None,
    library: options.Library = options.LIBRARY,
    name: Annotated[
        str | None, typer.Option("--name", "-n", metavar="NAME", help="What to call it; the task's name if not given.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            metavar="NAME",
            help="A method of `polytask methods`; auto: lora, if it beats frozen features (of few examples, the best "
            "of three trainings); race: the winner among lora at two rates, parallel and bitfit, in about twice the "
            "time; elrea: a lora, and experts for clusters of examples; distil: those of --over teach one adapter, on "
            "rows without an answer too; or tada: from inputs in a dialect and outputs in standard words, what "
            "adapters of tasks can stand on.",
        ),
    ] = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter of the method; may be given again."),
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option("--begin", metavar="NAME", help="An adapter of the library whose numbers training begins with."),
    ] = None,
    above: Annotated[
        list[str] | None,
        typer.Option(
            "--above",
            metavar="NAME",
            help="An adapter of the library that stays as it is below the new one, in training and ever after; may be "
            "given again, the lowest first.",
        ),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            "--over",
            metavar="NAME,NAME,...",
            help="The adapters of the library that a method such as fusion joins, or distil learns from.",
        ),
    ] = None,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse",
            help="Try what the library's adapters know first, by cross-validation: for tasks with few examples.",
        ),
    ] = False,
    input: options.Input = None,
    output: options.Output = None,
    pair: options.Pair = None,
    kind: options.Kind = None,
    metric: options.Metric = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="RATE",
            help="Peak learning rate; the method's own if not given.",
            rich_help_panel="Training",
        ),
    ] = None,
    epochs: options.Epochs = None,
    batch: options.BatchSize = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all random numbers.", rich_help_panel="Training")] = 0,
    balanced: options.Balanced = False,
    pool: options.Pool = None,
    masks: options.Masks = None,
    pair_mode: options.PairMode = "separate",
    bidirectional: options.Bidirectional = False,
    open_blocks: options.OpenBlocks = None,
    text: options.InText = None,
    template: options.TemplateName = "plain",
    decide: options.Decide = "auto",
    terms: options.Terms = None,
    recipe: options.Recipe = None,
    precision: options.Precision = "auto",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="DIR",
            help="Keep checkpoints in this folder, and leave the last one there; hidden in the library if not given.",
            rich_help_panel="Training",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on from the checkpoint of the same command where one is left.",
            rich_help_panel="Training",
        ),
    ] = True,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Learn a task from examples and keep the adapter.

    From a file; columns are guessed where that is clear:
      polytask adapt tickets.csv
      polytask adapt tickets.csv --input text --output team
    Pairs of texts:
      polytask adapt pairs.jsonl -i first --pair second -o same
    A method of your choice, with its hyperparameters:
      polytask adapt my-task/ --method lora --set r=16 --epochs 20
      polytask adapt my-task/ --method lora+bitfit --set lora.r=16
    Outputs that are texts are written by a decoder; nothing has to be said:
      polytask adapt questions.csv
    A few examples, each with one of several answers:
      polytask adapt few.csv --recipe tfew
    A handful of examples, and a library that knows similar tasks:
      polytask adapt few.csv --reuse
    Examples of many kinds, with an expert for each of four clusters:
      polytask adapt mixed.csv --method elrea --set clusters=4
    What several adapters know, in one, with rows that nobody labelled:
      polytask adapt some.csv --method distil --over tickets,questions
    A dialect, from pairs of texts, below adapters that were taught without it:
      polytask adapt pairs.csv -i dialect -o standard --method tada --name dialect
      polytask predict --adapter "stack(dialect, tickets)"
    On top of an adapter that knows the language or the domain:
      polytask adapt tickets.csv --above german
    A dataset of the Hugging Face hub on another backbone:
      polytask adapt hf:SetFit/sst2 --base roberta-base

    Missing validation and test splits are made, with a fixed seed. The score
    is that of the test split with its 95 % interval; the baseline is a linear
    head on frozen features, or the backbone alone where the answer is a text.
    If it is stopped, the same command goes on.
    """
    if method == "tada":
        kind, text = kind or "generation", False
    columns = {"input": input, "output": output, "pair": pair, "kind": kind}
    data = options.read_task(task, **columns, name=name, metric=metric, unlabelled=method == "distil")
    given = {"lr": lr, "epochs": epochs, "batch": batch, "seed": seed, "balanced": balanced}
    chosen, objective = options.settings(**given), "likelihood"
    if recipe is not None:
        if recipe != "tfew":
            raise UsageError(f"--recipe {recipe}: tfew is the only one")

        from polytask.recipes import tfew

        chosen, objective = tfew.settings(len(data.train), **{n: v for n, v in given.items() if v is not None}), "tfew"
        method = tfew.METHOD if method == "auto" and begin is None else method
        text = True if text is None else text
        decide = "likelihood" if decide == "auto" else decide

    from polytask.backbones import load
    from polytask.library import Library
    from polytask.recipes.adapt import Plan, adapt_many

    hyperparameters = options.pairs(set_ or (), "--set")
    reading = options.reading(
        text,
        template,
        pool,
        pair_mode,
        bidirectional,
        open_blocks=open_blocks,
        masks=masks,
        decide=decide,
        terms=terms,
        objective=objective,
    )
    kept = Library(library)
    first = kept.get(begin) if begin else None
    trained = "lora" if method in ("auto", "race") else method
    checked: Mapping[str, Mapping[str, Any]] = {trained: {} if first else hyperparameters}
    if method in recipes.NAMES:
        recipes.alone(method, begin=begin, above=above, over=bool(over), reuse=reuse)
        checked = recipes.trains(method, hyperparameters)
    if checked:
        options.check(data, checked, reading)
    backbone = load(options.base_for(base, data, reading), precision=precision)  # type: ignore[arg-type]
    below = [kept.get(ref) for ref in above or ()]
    joined = [kept.get(ref.strip()) for ref in over.split(",")] if over else []
    plan = Plan(data, method, hyperparameters, chosen, reading, first, below, joined, kept)
    folder = checkpoint or folder_for(library, backbone, [plan])
    if reuse:
        if method != "auto" or first or below or joined:
            raise UsageError("--reuse finds its own way: leave out --method, --begin, --above and --over")
        adapter = _reused(kept, backbone, plan, quiet=quiet or json)
        _report(adapter, library, plan, json=json)
        return
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    quiet = quiet or json
    with (
        resumable(folder, keep=checkpoint is not None),
        Progress([data.name], quiet=quiet) as progress,
    ):
        progress.say(
            f"{data.name}: {data.kind}, {len(data.train)} training examples; {backbone.name} on {backbone.device}"
        )
        if method in recipes.NAMES:
            *support, adapter = recipes.learn(backbone, plan, folder, progress)
        else:
            support, [adapter] = [], adapt_many(backbone, [plan], folder=folder, on_event=progress)
        progress.finish(0)
        for one in (*support, adapter):
            kept.add(one)
    _report(adapter, library, plan, json=json)


def _reused(kept: Library, backbone: Backbone, plan: Plan, *, quiet: bool) -> Adapter:
    """The best way to use what the library has."""
    from polytask.recipes.reuse import reuse

    newest = {entry.name: entry for entry in reversed(kept.list(fingerprint=backbone.fingerprint))}
    known = [kept.get(entry.id) for entry in newest.values()]
    if not known:
        raise UsageError(f"the library has no adapter of {backbone.name} to reuse: leave out --reuse")
    if not quiet:
        typer.echo(f"{plan.task.name}: {len(plan.task.train)} examples, {len(known)} adapters to try", err=True)
    found = reuse(
        backbone,
        plan.task,
        known,
        settings=plan.settings,
        reading=plan.reading,
        source=kept,
        tell=lambda said: None if quiet else typer.echo(said, err=True),
    )
    for one in (*found.support, found.adapter):
        kept.add(one)
    return found.adapter


def _report(adapter: Adapter, library: Path, plan: Plan, *, json: bool) -> None:
    data = plan.task
    result = report(adapter, library)
    if json:
        show.write_json(result)
        return
    rows = show.table("", "")
    rows.add_row("adapter", f"{result['name']} ({result['adapter']})")
    rows.add_row("task", f"{data.kind}, {', '.join(f'{n} {split}' for split, n in result['sizes'].items())}")
    rows.add_row("method", f"{result['method']} on {result['base']}")
    rows.add_row(result["metric"], f"{show.score(result['score'], *result['interval'])} on {result['split']}")
    if result["baseline"] is not None:
        rows.add_row("without it" if plan.reading.writes(data) else "frozen features", f"{result['baseline']:.3f}")
    trained, whole = result["trainable_params"], result["backbone_params"]
    rows.add_row("trained", f"{trained:,} parameters, {show.share(trained, whole)} of the backbone")
    rows.add_row("time, size", f"{result['seconds']:.1f} s, {show.size(result['bytes'])}")
    for note in result["notes"]:
        rows.add_row("note", note)
    rows.show_header = False
    where = "" if library == options.LIBRARY else f" --library {shlex.quote(str(library))}"
    asked = data.name if adapter.head else f"stack({data.name}, TASK)"
    show.write(
        rows, f"Kept in {library}. Ask it: echo 'a text' | polytask predict{where} --adapter {shlex.quote(asked)}"
    )


def report(adapter: Adapter, library: Path) -> dict[str, Any]:
    """What a program is told about a new adapter."""
    card = adapter.card
    split = next((s for s in ("test", "validation") if s in card.scores), None)
    found = card.scores[split] if split else None
    baseline = card.scores.get("baseline")
    return {
        "adapter": adapter.id,
        "name": adapter.name,
        "task": card.task.name,
        "kind": card.task.kind,
        "base": adapter.backbone.name,
        "method": adapter.method,
        "metric": card.task.metric,
        "score": found.value if found else None,
        "interval": [found.low, found.high] if found else [None, None],
        "split": split,
        "baseline": baseline.value if baseline else None,
        "trainable_params": card.trained_parameters,
        "backbone_params": adapter.backbone.parameters,
        "seconds": card.seconds,
        "bytes": adapter.bytes,
        "sizes": card.task.sizes,
        "notes": list(card.notes),
        "library": str(library),
    }
