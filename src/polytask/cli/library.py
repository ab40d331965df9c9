"""`polytask library`: what has been kept."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polytask.cli import options, show
from polytask.cli.library_picture import picture
from polytask.errors import PolytaskError, UsageError

if TYPE_CHECKING:
    from polytask.library import Entry, Library

app = typer.Typer(no_args_is_help=False, rich_markup_mode="rich")
app.command()(picture)

Ref = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A name (its newest version), name@version, an id, or an id's beginning.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """What has been kept: list, search, show, move in and out, remove, check.

    For example:
      polytask library list
      polytask library search "delivery"
      polytask library show tickets
      polytask library export tickets /tmp/tickets --format peft
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("list")
def list_(
    library: options.Library = options.LIBRARY,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Only versions of this name.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Only adapters by this method.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only tasks of this kind.")] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="Only adapters of this backbone.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Only adapters with this tag.")] = None,
    removed: Annotated[bool, typer.Option("--removed", help="What is in the trash instead.")] = False,
    json: options.Json = False,
) -> None:
    """List the adapters, by name, the newest version first.

    For example:
      polytask library list
      polytask library list --method lora --json
      polytask library list --removed
    """
    kept = _open(library)
    _entries(kept.list(name=name, method=method, kind=kind, backbone=base, tag=tag, removed=removed), json)


@app.command()
def search(
    words: Annotated[str, typer.Argument(metavar="WORDS", show_default=False, help="Words of a task, label or note.")],
    library: options.Library = options.LIBRARY,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="How many, at most.")] = 20,
    json: options.Json = False,
) -> None:
    """Find adapters by words of their names, tasks, labels, instructions and notes, the best first.

    For example:
      polytask library search "refund billing"
    """
    _entries(_open(library).search(words, limit=limit), json)


@app.command("show")
def show_(
    ref: Ref,
    library: options.Library = options.LIBRARY,
    json: options.Json = False,
) -> None:
    """Show one adapter: its task, scores, training, and where it comes from.

    For example:
      polytask library show tickets
      polytask library show tickets@1 --json
    """
    kept = _open(library)
    entry = kept.entry(ref)
    adapter = kept.get(entry.id)
    relatives = kept.lineage(entry.id)
    card = adapter.card
    if json:
        said = {
            **_json(entry),
            "hyperparameters": dict(adapter.hyperparameters),
            "sites": list(adapter.sites),
            "head": adapter.head.model_dump(mode="json") if adapter.head else None,
            "backbone_card": adapter.backbone.model_dump(mode="json"),
            "card": card.model_dump(mode="json"),
            "parents": [parent.id for parent in relatives.parents] + list(relatives.missing),
            "children": [child.id for child in relatives.children],
        }
        show.write_json(said, indent=2)
        return
    rows = show.table("", "")
    rows.show_header = False
    task = card.task
    rows.add_row("adapter", f"{entry.name}@{entry.version}  {entry.id}")
    rows.add_row("task", f"{task.kind}{', pairs of texts' if task.pair else ''}; {task.source}")
    if task.instruction:
        rows.add_row("instruction", task.instruction)
    if task.labels:
        rows.add_row("labels", ", ".join(label.name for label in task.labels))
    rows.add_row("examples", ", ".join(f"{n} {split}" for split, n in task.sizes.items()))
    for split, found in card.scores.items():
        title = "frozen features, test" if split == "baseline" else split
        rows.add_row(title, f"{found.metric} {show.score(found.value, found.low, found.high)} over {found.n}")
    settings = ", ".join(
        f"{k} = {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in adapter.hyperparameters.items()
    )
    rows.add_row("method", f"{adapter.method}{' (' + settings + ')' if settings else ''}")
    rows.add_row("backbone", f"{adapter.backbone.name}, weights {adapter.backbone.fingerprint[:12]}…")
    share = show.share(card.trained_parameters, adapter.backbone.parameters)
    rows.add_row("trained", f"{card.trained_parameters:,} parameters, {share} of the backbone, {card.seconds:.1f} s")
    rows.add_row("size", show.size(entry.bytes))
    rows.add_row(
        "made", f"{card.created} by {card.lineage.made_by or 'unknown'}, licence {card.licence or 'not stated'}"
    )
    for relation, members in (("from", relatives.parents), ("led to", relatives.children)):
        if members:
            rows.add_row(relation, ", ".join(f"{e.name}@{e.version} {e.id}" for e in members))
    if entry.tags:
        rows.add_row("tags", ", ".join(entry.tags))
    for note in card.notes:
        rows.add_row("note", note)
    show.write(rows)


@app.command()
def export(
    ref: Ref,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False, help="A new folder to write.")],
    library: options.Library = options.LIBRARY,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="polytask|peft|lora",
            help="peft: what Hugging Face PEFT and vLLM read. lora: the same, of the nearest LoRA.",
        ),
    ] = "polytask",
    base: Annotated[
        str | None,
        typer.Option(
            "--base", "-b", metavar="NAME", help="For peft, lora: the backbone, where its own name does not load."
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="For lora: its rank.")] = 8,
    drop: Annotated[bool, typer.Option("--drop", help="For lora: leave out what has no place in one.")] = False,
    json: options.Json = False,
) -> None:
    """Write an adapter to a folder of its own.

    For example:
      polytask library export tickets /tmp/tickets
      polytask library export tickets /tmp/tickets-peft --format peft
      polytask library export tickets /tmp/tickets-lora --format lora --rank 16

    PEFT's format has a place for lora, dora, ia3, prompt and prefix; pissa
    and kasa go as a LoRA and ptuning as a prompt that computes the same. As a
    LoRA of a chosen rank goes whatever changes weights; it is told how far
    off that is.
    """
    if format not in ("polytask", "peft", "lora"):
        raise UsageError(f"--format {format}: one of polytask, peft, lora")
    kept = _open(library)
    entry = kept.entry(ref)
    line, said = "", dict[str, Any]()
    if format in ("peft", "lora"):
        from polytask.backbones import load

        backbone = load(base or entry.backbone)
        if backbone.fingerprint != entry.fingerprint:
            raise PolytaskError(
                f"adapter {entry.name} ({entry.id}) belongs to other weights than those of {backbone.name}; "
                "name its own backbone with --base"
            )
        if format == "peft":
            kept.export(entry.id, folder, format="peft", sites=backbone.sites, model=backbone)
        else:
            from polytask.adapters import export_peft
            from polytask.composition.low_rank import as_lora

            lora, off = as_lora(backbone, kept.get(entry.id), rank, drop=drop)
            export_peft(lora, folder, backbone.sites)
            said = {"rank": rank, "error": off.whole, "left_out": off.left_out, "errors": dict(off.sites)}
            line = f"; as a LoRA of rank {rank}, {off}"
    else:
        kept.export(entry.id, folder, format=format)  # type: ignore[arg-type]
    where = f"{entry.name}@{entry.version} is in {folder}{line}"
    _done(json, where, adapter=entry.id, folder=str(folder), format=format, **said)


@app.command("import")
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", show_default=False, help="A folder by polytask or by PEFT.")
    ],
    library: options.Library = options.LIBRARY,
    base: Annotated[
        str | None, typer.Option("--base", "-b", metavar="NAME", help="For a PEFT folder: the backbone it belongs to.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", "-n", metavar="NAME", help="For a PEFT folder by others: what to call it."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="For a PEFT folder by others: its kind of task.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Add the adapter of a folder to the library.

    For example:
      polytask library import /tmp/tickets
      polytask library import /tmp/lora --base gpt2 --name a --kind generation
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: is no folder; give one with adapter.json (polytask) or adapter_config.json (PEFT)")

    from polytask.adapters import Card
    from polytask.adapters.peft import is_peft
    from polytask.skills import Library
    from polytask.tasks import TaskCard

    if not is_peft(folder):
        from polytask.adapters import load as read

        read(folder)  # told before a new library is made for it
        added = Library(library).import_(folder)
    else:
        if base is None:
            raise UsageError(f"{folder}: PEFT's format names modules; say which backbone it is for with --base")
        if (name is None) != (kind is None):
            raise UsageError("--name and --kind go together: they describe an adapter that polytask did not make")
        from polytask.backbones import load

        backbone = load(base)
        card = None
        if name is not None:
            card = Card(name=name, task=TaskCard(name=name, kind=kind))  # type: ignore[arg-type]
        kept = Library(library)
        added = kept.import_(folder, sites=backbone.sites, model=backbone, backbone=backbone.card(), card=card)
    entry = _open(library).entry(added)
    _done(json, f"{entry.name}@{entry.version} ({entry.id}) is in {library}", adapter=entry.id, name=entry.name)


@app.command()
def route(
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK...", help="Those of all adapters, as `polytask adapt` reads them.", show_default=False
        ),
    ],
    library: options.Library = options.LIBRARY,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", metavar="NAME", help="The backbone, where the adapters' own name does not load."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Train the dlp-lora router on the tasks' inputs, and keep it here.

    For example:
      polytask library route tickets.csv questions.jsonl
      polytask predict --router dlp-lora --set p=0.6

    It takes seconds, and is to be done again when an adapter is added or
    removed. The other routers need no training.
    """
    from polytask.backbones import load
    from polytask.skills import Library

    kept = Library(library, create=False)
    read = [options.read_task(source) for source in tasks]
    if base is not None:
        kept.use(load(base))
    found = kept.learn_routing(read)
    said = f"dlp-lora in {library} picks among {', '.join(found.names)}; {found.right:.1%} right on inputs kept apart"
    _done(json, said, router="dlp-lora", adapters=list(found.ids), names=list(found.names), right=found.right)


@app.command()
def build(
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK...", help="Files or folders, as `polytask adapt` reads them.", show_default=False),
    ],
    base: options.Base = None,
    library: options.Library = options.LIBRARY,
    method: Annotated[str, typer.Option("--method", "-m", metavar="NAME", help="For all of them.")] = "lora",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter of the method; may be given again."),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            "--over",
            metavar="NAME,NAME,...",
            help="The adapters of the library that a method such as meteora joins; what is made is named TASK.METHOD.",
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option("--examples", metavar="N", help="Of each task's training split, at most; all if not given."),
    ] = None,
    together: Annotated[
        int,
        typer.Option(
            "--together",
            metavar="N",
            help="How many adapters are trained over one frozen pass; all of them where the method shares tensors.",
        ),
    ] = 8,
    epochs: options.Epochs = None,
    batch: options.BatchSize = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all random numbers.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Train those too that the library has already.")] = False,
    precision: options.Precision = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make an adapter for each of many tasks, several at a time.

    For example:
      polytask library build tasks/*.csv
      polytask library build suite/*/ --method pfeiffer --examples 600 --epochs 6
    Gates over adapters that are there, which send each token to those it needs:
      polytask library build a.csv b.csv --method meteora --over a,b

    A task that cannot be read or learned is told and left out. If it is
    stopped, the same command goes on: what is kept is not trained again.
    """
    import random
    from dataclasses import replace

    from polytask.backbones import load
    from polytask.cli.checkpoints import folder_for, resumable
    from polytask.cli.progress import Progress
    from polytask.library import Library
    from polytask.recipes.adapt import Plan, adapt_many, shares
    from polytask.recipes.reading import Reading

    if together < 1 or (examples is not None and examples < 1):
        raise UsageError(f"--together {together}, --examples {examples}: at least 1 is needed")
    kept = Library(library)
    hyperparameters = options.pairs(set_ or (), "--set")
    settings = options.settings(epochs=epochs, batch=batch, seed=seed)
    there = {entry.name for entry in kept.list(method=method)}
    joined = [kept.get(ref.strip()) for ref in over.split(",")] if over else []
    suffix = f".{method}" if over else ""  # so that a task's name stays that of the adapter which is joined
    plans: dict[str, Plan] = {}
    failed: dict[str, str] = {}
    known: list[str] = []
    for source in tasks:
        try:
            task = options.read_task(source)
            options.check(task, {method: hyperparameters}, Reading())
        except PolytaskError as error:
            failed[source] = str(error)
            continue
        if task.name in plans or task.name in known:
            failed[source] = f"another of these tasks is called {task.name} too; rename one"
        elif f"{task.name}{suffix}" in there and not again:
            known.append(task.name)
        else:
            if examples is not None and examples < len(task.train):
                task = replace(task, train=tuple(random.Random(seed).sample(task.train, examples)))
            plans[task.name] = Plan(task, method, hyperparameters, settings, over=joined, library=kept)
    if shared := shares(method, hyperparameters):
        if known and plans:
            raise UsageError(
                f"{', '.join(known)}: there already, and {method} learns {shared} for all tasks at once; "
                "--again trains all of them anew"
            )
        together = max(1, len(plans))
    groups: dict[str, list[Plan]] = {}
    for plan in plans.values():
        groups.setdefault(options.base_for(base, plan.task, plan.reading), []).append(plan)
    made = []
    for name, own in groups.items():
        backbone = load(name, precision=precision)  # type: ignore[arg-type]
        for plan in [*own]:
            try:
                plan.reading.design(backbone, plan.task, plan.settings.limit)
            except PolytaskError as error:
                failed[plan.task.name] = str(error)
                own.remove(plan)
        parts = [own[begin : begin + together] for begin in range(0, len(own), together)]
        while parts:
            part = parts.pop(0)
            folder = folder_for(library, backbone, part)
            with resumable(folder), Progress([plan.task.name for plan in part], quiet=quiet or json) as progress:
                try:
                    adapters = adapt_many(backbone, part, folder=folder, on_event=progress)
                except PolytaskError as error:
                    if len(part) == 1 or shared:
                        failed |= {plan.task.name: str(error) for plan in part}
                    else:  # the others do not fail with the one that does
                        parts = [[plan] for plan in part] + parts
                    continue
                for adapter in adapters:
                    card = adapter.card.model_copy(update={"name": f"{adapter.name}{suffix}"})
                    try:
                        made.append(kept.entry(kept.add(replace(adapter, card=card))))
                    except UsageError as error:  # the same is there under another name
                        failed[adapter.name] = str(error)
    if json:
        show.write_json({"made": [_json(entry) for entry in made], "known": known, "failed": failed})
    else:
        _entries(tuple(made), False)
        if known:
            typer.echo(f"in {library} already: {', '.join(known)}; --again trains them anew", err=True)
        for source, why in failed.items():
            typer.echo(f"left out: {source}: {why}", err=True)
    if failed and not made and not known:
        raise PolytaskError(f"none of {len(tasks)} tasks was learned")


@app.command()
def rm(
    ref: Ref,
    library: options.Library = options.LIBRARY,
    json: options.Json = False,
) -> None:
    """Put an adapter in the trash, from where `restore` takes it back.

    For example:
      polytask library rm tickets
      polytask library rm tickets@1
    """
    gone = _open(library).remove(ref)
    _done(json, f"{gone} is in the trash; `polytask library restore {gone}` takes it back", adapter=gone)


@app.command()
def restore(
    ref: Ref,
    library: options.Library = options.LIBRARY,
    json: options.Json = False,
) -> None:
    """Take an adapter out of the trash.

    For example:
      polytask library restore tickets
    """
    back = _open(library).restore(ref)
    _done(json, f"{back} is back", adapter=back)


@app.command()
def forget(
    ref: Ref,
    library: options.Library = options.LIBRARY,
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Kept in the ledger of what was forgotten.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
    json: options.Json = False,
) -> None:
    """Delete an adapter for good: its files, its rows, its words.

    For example:
      polytask library forget tickets@1 --reason "the customer asked"

    The ledger forgotten.jsonl in the library keeps its id, the time and the
    reason, and nothing else.
    """
    kept = _open(library)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"forgetting {ref} cannot be undone; add --yes")
        typer.confirm(f"Forget {ref} for good? It cannot be undone", abort=True, err=True)
    gone = kept.forget(ref, reason=reason)
    _done(json, f"{gone} is forgotten", adapter=gone, reason=reason)


@app.command()
def verify(
    library: options.Library = options.LIBRARY,
    json: options.Json = False,
) -> None:
    """Read and hash every adapter; exit status 1 if one is damaged, lost or strange.

    For example:
      polytask library verify
    """
    kept = _open(library)
    damaged = kept.verify()
    if json:
        show.write_json([asdict(damage) for damage in damaged], indent=2)
    else:
        for damage in damaged:
            show.write(f"{damage.id} {damage.name}: {damage.problem}")
    if damaged:
        raise PolytaskError(f"{library}: {len(damaged)} damaged; import a good copy, or forget them")
    if not json:
        show.write(f"{len(kept.list()) + len(kept.list(removed=True))} adapters, all as they were saved")


def _open(location: Path) -> Library:
    from polytask.library import Library

    return Library(location, create=False)


def _json(entry: Entry) -> dict[str, Any]:
    """An entry with the names that `adapt --json` uses."""
    row = asdict(entry)
    row["adapter"] = row.pop("id")
    row["base"] = row.pop("backbone")
    row["interval"] = [row.pop("low"), row.pop("high")]
    row["trainable_params"] = row.pop("trained_parameters")
    return row


def _entries(entries: tuple[Entry, ...], json: bool) -> None:
    if json:
        show.write_json([_json(entry) for entry in entries], indent=2)
        return
    right = ("trained", "size")
    table = show.table("adapter", "id", "task", "method", "backbone", "score [95 %]", *right, right=right)
    for e in entries:
        score = f"{e.metric} {show.score(e.score, e.low, e.high)}"
        table.add_row(
            f"{e.name}@{e.version}",
            e.id,
            e.kind,
            e.method,
            e.backbone,
            score,
            f"{e.trained_parameters:,}",
            show.size(e.bytes),
        )
    show.write(table if entries else "nothing found")


def _done(json: bool, line: str, **said: Any) -> None:
    if json:
        show.write_json(said)
    else:
        show.write(line)
