"""`polytask methods`: every way that there is to adapt, route and merge."""

from __future__ import annotations

from polytask.cli import options, show


def methods(json: options.Json = False) -> None:
    """List every method, router and merging rule: where it acts, its equation, and its paper.

    For example:
      polytask methods
      polytask methods --json
    Use one:
      polytask adapt tickets.csv --method bottleneck --set reduction=8

    A method acts on weights, activations, tokens or logits; a selector chooses
    what of a method is trained, as in full@lottery; a router gives weights to
    adapters for each task, input, token or layer.
    """
    from polytask.composition.catalogue import catalogue
    from polytask.methods import methods as known
    from polytask.methods.selectors import selectors

    rows = [
        {"name": name, "kind": "method", "place": m.place, "equation": m.equation, "paper": m.paper}
        for name, m in known().items()
    ]
    rows += [
        {"name": f"@{name}", "kind": "selector", "place": "any", "equation": s.equation, "paper": s.paper}
        for name, s in selectors().items()
    ]
    rows += [
        {"name": part.name, "kind": part.kind, "place": part.place, "equation": part.equation, "paper": part.paper}
        for part in catalogue()
    ]
    if json:
        show.write_json(rows, indent=2)
        return
    columns = ("name", "kind", "place", "equation", "paper")
    table = show.table(*columns)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    show.write(table)
