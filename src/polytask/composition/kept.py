"""An expression that is kept as an adapter: it has the ids of what it is made of, and a head, and no other tensors."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import polytask
from polytask.adapters import Adapter, Card, Lineage
from polytask.adapters.expression import Ensemble, Expression, Parallel, Pipeline, read
from polytask.errors import PolytaskError, UsageError
from polytask.methods.composed import Composed
from polytask.methods.method import COMPOSED, method
from polytask.tasks import TaskCard


@method(
    "expression",
    place="activations",
    equation="what the expression over `over` says",
    paper="none: a composition, written down",
)
class Kept(Composed):
    """expression: over ids, as `polytask.adapters.expression` writes it."""

    learned = False
    expression: str = ""


def expression_of(adapter: Adapter) -> Expression | None:
    """What a kept expression says, None for any other adapter."""
    kind = COMPOSED.get(adapter.method)
    if kind is None or not issubclass(kind, Kept):
        return None
    try:
        return read(str(adapter.hyperparameters["expression"]))
    except (KeyError, UsageError) as error:
        raise PolytaskError(f"adapter {adapter.name} ({adapter.id}): an expression that cannot be read") from error


def keep(expression: Expression, get: Callable[[str], Adapter], head: Adapter | None, name: str) -> Adapter:
    """The expression as an adapter, which `polytask.Library` keeps like any other.

    `get` gives adapters by name or id, `head` is the one whose head and task it gets (None where parts answer by their
    own). Raises PolytaskError where parts belong to different backbones.
    """
    parts = {one.id: one for one in map(get, expression.names())}
    first = next(iter(parts.values()))
    for one in parts.values():
        if one.backbone.fingerprint != first.backbone.fingerprint:
            raise PolytaskError(
                f"{first.name} belongs to {first.backbone.name} and {one.name} to other weights "
                f"({one.backbone.name}); adapters of one backbone go together"
            )
    said = expression.named(lambda ref: get(ref).id)
    tensors = {n: t for n, t in head.tensors.items() if n.startswith(("head/", "task/"))} if head else {}
    licences = {one.card.licence for one in parts.values()}
    card = Card(
        name=name,
        task=head.card.task if head else TaskCard(name=name, kind=first.card.task.kind, source=str(expression)),
        lineage=Lineage(parents=tuple(parts), made_by=f"polytask {polytask.__version__}"),
        licence="" if "" in licences else " AND ".join(sorted(licences)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe={"recipe": "compose", "expression": str(expression)},
        notes=(f"{expression}",),
    )
    over = {"expression": str(said), "over": list(parts)}
    return Adapter(Kept.name, over, tensors, first.backbone, card, head.head if head else None)


def answers(expression: Expression) -> bool:
    """Whether it is of answers: it has no head of its own."""
    return isinstance(expression, Parallel | Ensemble | Pipeline)
