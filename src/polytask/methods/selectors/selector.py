"""What a selector is: a choice, made from a task's training data, of which numbers a method trains.

`full@lottery` is the method `full` with the selector `lottery`. What is kept is an adapter of the method, with zeros
where nothing was chosen, so that whatever can be done with the method's adapters can be done with it.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from polytask.backbones import Backbone, Batch
from polytask.errors import UsageError
from polytask.methods.method import Method, Params, methods, values
from polytask.methods.method import build as build_method


class Look(Protocol):
    """A job before it is trained, as a selector may look at it. `tensors` are the method's and the head's, which was
    fitted to frozen features; names are `<site>/<parameter>`, the head's site is `head`."""

    backbone: Backbone
    method: Method
    tensors: Params
    writing: bool
    """Whether answers are in text."""
    seed: int

    def gradients(self, method: Method, tensors: Params, rows: int, passes: int) -> Iterator[Params]:
        """The gradients of the mean loss over a lot of `rows` training examples, for each of `passes` lots (0: for as
        many as there are), drawn without replacement."""

    def outputs(self, method: Method, tensors: Params, rows: int, passes: int, times: int) -> Iterator[list[Tensor]]:
        """The logits [N, C] of the same lots in each of `times` passes over them, with gradients towards the tensors;
        what training draws by chance is drawn anew in each."""

    def read(self, rows: int, passes: int) -> Iterator[Batch]:
        """The same lots as batches that the backbone alone has just read, without gradients: for hooks that take down
        what its modules put out."""

    def trained(self, method: Method, tensors: Params, epochs: float = 1.0, penalty: Penalty | None = None) -> Params:
        """The tensors after training on the job's data for that share of its epochs, at its rate; the last ones, not
        the best."""

    def score(self, method: Method, tensors: Params) -> float:
        """The validation score."""


Penalty = Callable[[Params], Tensor]


@dataclass(frozen=True)
class Choice:
    """What is trained: a method with its tensors, and for each tensor that is not trained whole, which `share` of every
    step its numbers take: 0 for those that stay. With `done` nothing is trained any more but the head."""

    method: Method
    tensors: Params
    shares: Params = field(default_factory=dict)
    done: bool = False


class Selector:
    """One published way of choosing what is trained; a frozen dataclass of hyperparameters in a file of its own."""

    name: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for part, share in (("share", getattr(self, "share", 1.0)), ("sparsity", 1 - getattr(self, "sparsity", 0.0))):
            if not 0 < share <= 1:
                raise UsageError(
                    f"{self.name}.{part} = {getattr(self, part):g} leaves nothing to train, or is no share"
                )

    def choose(self, look: Look) -> Choice:
        """What of the job is trained. Raises UsageError for a method that it cannot choose from."""
        raise NotImplementedError(type(self).__name__)

    def hyperparameters(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def of(cls, hyperparameters: Mapping[str, Any]) -> Self:
        """The selector with these hyperparameters; an unknown name or a value of the wrong type is refused."""
        return cls(**values(cls, cls.name, hyperparameters))


SELECTORS: dict[str, type[Selector]] = {}


def selector(name: str, *, equation: str, paper: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make a frozen dataclass of the class and enter it under `name`."""

    def enter(cls: type[Any]) -> type[Any]:
        cls.name, cls.equation, cls.paper = name, equation, paper
        cls = dataclasses.dataclass(frozen=True)(cls)
        SELECTORS[name] = cls
        return cls

    return enter


def block_of(backbone: Backbone, place: str) -> str:
    """The block, `3` or `enc.3`, that a site or a module `:path` is in; empty outside blocks."""
    if place.startswith(":"):
        return backbone.places.get(place[1:], ("", ""))[0]
    parts = place.split(".")
    block = ".".join(parts[: 2 if parts[0] in ("enc", "dec") else 1])
    return block if block.rpartition(".")[2].isdigit() else ""


def selectors() -> dict[str, type[Selector]]:
    """Every selector by name: each module of this folder enters its own."""
    import polytask.methods.selectors as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(sorted(SELECTORS.items()))


def named(method: str) -> tuple[str, str]:
    """`full@lottery` as method and selector; the selector of a method that always has one; or none."""
    name, _, chooser = method.partition("@")
    if not chooser and "@" not in method:
        known = methods().get(name)
        chooser = known.selector if known else ""
    elif chooser not in selectors():
        raise UsageError(f"no selector {chooser!r}; the selectors are {', '.join(selectors())}")
    return name, chooser


def build(method: str, hyperparameters: Mapping[str, Any] | None = None) -> tuple[Method, Selector | None]:
    """A method by name, and its selector where `method@selector` names one. Hyperparameters of the selector are those
    that begin with `select.`, such as `select.share`."""
    name, chooser = named(method)
    own, its = {}, {}
    for key, value in (hyperparameters or {}).items():
        if key.startswith("select."):
            its[key.removeprefix("select.")] = value
        else:
            own[key] = value
    if its and not chooser:
        raise UsageError(f"select.{next(iter(its))} is a selector's: name one, as in {name}@lottery")
    return build_method(name, own), selectors()[chooser].of(its) if chooser else None
