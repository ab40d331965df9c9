"""`polytask compose`: keep an expression over adapters as an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from polytask.cli import options, show

if TYPE_CHECKING:
    from polytask.adapters import Adapter


def compose(
    expression: Annotated[
        str,
        typer.Argument(
            metavar="EXPRESSION", help="Over names or ids of one backbone's adapters; quote it.", show_default=False
        ),
    ],
    name: Annotated[str, typer.Option("--name", "-n", metavar="NAME", help="What to call it.", show_default=False)],
    library: options.Library = options.LIBRARY,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", metavar="NAME", help="The backbone, where its own name does not load."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Keep what several adapters do together, under a name, without training.

    For example:
      polytask compose "0.7*tickets + 0.3*questions" --name both
      polytask compose "tickets - 0.5*rude" --name polite
      polytask compose "stack(german, tickets)" --name tickets-de
      polytask compose "ensemble(tickets, 2*tickets-v2)" --name sure
      polytask compose "pipeline(kind, question=faq, else=tickets)" --name desk
      polytask compose "arrow(tickets, questions, rude)" --name any

    Nothing is copied but a router's few vectors: it names the adapters that it is made of, which the
    library then keeps as long as it is there. Any command that takes an
    adapter takes it, and `predict --adapter` takes the expression itself.
    """
    from polytask.adapters.expression import Routed, understood
    from polytask.backbones import load
    from polytask.composition.kept import answers, keep
    from polytask.composition.routing import ROUTERS
    from polytask.inference import Engine
    from polytask.library import Library

    kept = Library(library, create=False)
    said = understood(expression, kept.entry)
    entries = [kept.entry(ref) for ref in said.names()]
    backbone = load(base or entries[0].backbone)
    head: Adapter | None
    if isinstance(said, Routed):
        members = [kept.get(ref) for ref in said.names()]
        head = kept.get(said.head) if said.head else members[0]
        adapter = ROUTERS[said.by](backbone, members, head=head, name=name)
    else:
        engine = Engine(backbone, source=kept)
        engine.check(said)
        head = None if answers(said) else kept.get(engine.reader(said).head)
        adapter = keep(said, kept.get, head, name)
    entry = kept.entry(kept.add(adapter))
    if json:
        show.write_json(
            {
                "adapter": entry.id,
                "name": entry.name,
                "version": entry.version,
                "expression": str(said),
                "parents": list(dict.fromkeys(e.id for e in entries)),
                "head": head.id if head else None,
            }
        )
        return
    show.write(f"{entry.name}@{entry.version} ({entry.id}) is in {library}: {said}")
    show.write(f"it is read by the head of {head.name}" if head else "its parts answer by their own heads")
