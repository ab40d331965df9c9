"""What a method is: an equation at some sites, written for one row, and nothing that holds state."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from polytask.backbones import Backbone, Site
from polytask.backbones.families import match
from polytask.backbones.heads import FIXED
from polytask.errors import UsageError

Place = Literal["weights", "activations", "tokens", "logits"]
Params = dict[str, Tensor]
AFTER = 1 << 30  # where tokens of an answer stand in their prompt


class Method:
    """One published way to adapt a frozen backbone.

    A subclass is a frozen dataclass of hyperparameters in a file of its own, with `sites` among them, and two
    functions: `init` makes one site's tensors, `delta` is the equation for one row. The runtime changes a site's value
    to y + Δ, lifts `delta` over batches whose rows use different adapters, and scales Δ in weighted mixtures.

    `precise` methods get their tensors in fp32 even where the backbone computes in bf16. Methods with `reads_weights`
    are shown the frozen map's own weight W [width, reads] and bias b [width] (0 where it has none) as `frozen`, in
    `init` and in `ready`. Methods that change whole weights set `swaps`, override `start` with tensors named
    `:<module path>/<parameter>` and need no equation. Methods that change the model itself set `opaque`, and override
    `start` and `inside`. Tensors named `shared/<parameter>` are every site's. A method that asks for virtual tokens
    with `slots` gets as x [T] what stands where: virtual token j as j, token t of the text as −1 − t.
    """

    name: ClassVar[str] = ""
    place: ClassVar[Place] = "activations"
    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    swaps: ClassVar[bool] = False
    opaque: ClassVar[bool] = False
    positional: ClassVar[bool] = False
    """Whether `delta` gets among its tensors where each token stands: `at` [T] int64, its number in its text, and
    `left` [T], how many of the text come after it. A prompt's tokens count, not those of the answer, which have `at`
    of AFTER and −1 left; padding has −1 of both."""
    beside: ClassVar[bool] = False
    """Whether it reads the second text of a pair, so that the head reads the first alone: see `Batch.beside`."""
    composed: ClassVar[bool] = False
    """Whether its terms are other adapters' changes: see `composed`."""
    elsewhere: ClassVar[bool] = False
    """Whether training starts so far from the backbone that a score of the backbone alone, or with a head fitted on its
    features, is not the start's."""
    precise: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False
    fixed: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are kept with the others and not trained."""
    common: ClassVar[frozenset[str]] = frozenset()
    """Parameters that jobs of one training share, where their methods are equal."""

    sites: tuple[str, ...] = ()
    dropout: float = 0.0

    mix: ClassVar[Callable[..., Tensor] | None] = None
    """A hand-tuned path beside the generic one: mix(self, group, x, y, columns) -> y + Σ w Δ; see `lifting`."""
    low_rank: ClassVar[Callable[..., tuple[Tensor, Tensor, Tensor | None] | None] | None] = None
    """low_rank(self, group, columns): Σ w Δ as three tensors, where it is B (m ∘ A x); see `lifting.Change`."""

    rows: ClassVar[tuple[str, ...]] = ()
    """The tensors that `down` reads, of a method that is Δ = down(p, x, y) U + c. Adapters whose rows are joined are
    one wide `down`, so it may read no hyperparameter; see `composed.Wide`."""

    @property
    def slots(self) -> int:
        """How many virtual tokens stand before each sequence."""
        return 0

    def frozen(self, backbone: Backbone, site: Site) -> Params:
        """What `init` and `ready` see of the backbone at a site."""
        return backbone.linear(site) if self.reads_weights else {}

    def init(self, site: Site, generator: torch.Generator, frozen: Params) -> Params:
        """One site's tensors before training, fp32, drawn from `generator`; `frozen` has W and b if they are read."""
        raise NotImplementedError(type(self).__name__)

    def ready(self, p: Params, frozen: Params) -> Params:
        """What `delta` gets in place of a site's tensors: whatever follows from them alone, worked out once."""
        return p

    def sampled(self, p: Params) -> Params:
        """What stands for a site's tensors in one pass of training, before `ready`, where that is drawn by chance: from
        torch's own generator, which the loop seeds and checkpoints."""
        return p

    def annealed(self, share: float) -> Self:
        """The method as it is when this share of training is done, from 0 to 1, where it changes on the way."""
        return self

    def delta(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        """Δ [T, width] for one row, from this site's tensors `p`, what the site reads x [T, reads], its value y."""
        raise NotImplementedError(type(self).__name__)

    def down(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        """h [T, m], of a method with `rows`."""
        raise NotImplementedError(type(self).__name__)

    def up(self, p: Params) -> tuple[Tensor, Tensor | None]:
        """U [m, width] and c [width], if any, of a method with `rows`."""
        raise NotImplementedError(type(self).__name__)

    def inside(
        self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Have the backbone be what an opaque method makes of it, with an adapter's tensors, in the passes within."""
        raise NotImplementedError(type(self).__name__)

    def before_words(self) -> Method | None:
        """By what equation, over its tensors at `embed`, it changes the last hidden states that an output embedding
        reads which is the input's: of a method that changes what an embedding means."""
        return None

    def penalty(self, p: Params) -> Tensor | None:
        """What training adds to the loss for one site's tensors."""
        return None

    def trains(self, name: str) -> bool:
        """Whether the tensor `<site>/<parameter>` is trained."""
        site, _, parameter = name.rpartition("/")
        return parameter not in (FIXED if site == "head" else self.fixed)

    def whose(self, name: str) -> str:
        """The method that the tensor `<site>/<parameter>` belongs to."""
        return self.name

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        """All tensors before training, named `<site>/<parameter>`; `writing` is for an answer in text.

        Raises UsageError where one of the method's site patterns matches nothing in this backbone.
        """
        if self.slots >= backbone.max_length:
            raise UsageError(
                f"{self.name}: {self.slots} virtual tokens leave no room for a text in the {backbone.max_length} that "
                f"{backbone.name} reads; give fewer"
            )
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        sites = backbone.reader_sites if self.slots else backbone.sites_for(writing=writing)
        for name in match(sites, self.sites):
            if name == "head":  # its tensors' names would be those of the task's head
                raise UsageError(f"{self.name} cannot act at the site 'head': name the last block's output, '-1'")
            frozen = self.frozen(backbone, sites[name])
            for parameter, tensor in self.init(sites[name], generator, frozen).items():
                tensors[f"{name}/{parameter}"] = tensor
        return tensors

    def shown(self, own: Mapping[str, Tensor], inputs: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        """What `start` made, where some of it follows from the training inputs: `inputs()` has their mean-pooled last
        states [N, d] by the backbone alone, fp32."""
        return own

    def joins(self, other: Method, mine: Params, its: Params) -> bool:
        """Whether another adapter's tensors at a site can be stacked with this one's and share a call."""
        return self == other and all(mine[name].shape == its[name].shape for name in mine)

    selector: ClassVar[str] = ""
    """The selector that goes with it where none is named."""

    def only(self, tensors: Mapping[str, Tensor]) -> Self:
        """The method that has tensors at the same sites as these and at no others."""
        sites = dict.fromkeys(site for name in tensors if (site := name.rpartition("/")[0]) not in ("head", "shared"))
        return dataclasses.replace(self, sites=tuple(sites))  # type: ignore[type-var]

    def expects(self, made: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> Mapping[str, torch.Size]:
        """The shapes that an adapter's tensors must have, by name, where `start` makes `made` and it has `given`."""
        return made

    def hyperparameters(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields}

    @classmethod
    def of(cls, hyperparameters: Mapping[str, Any]) -> Self:
        """The method with these hyperparameters; a name it does not have, or a value of the wrong type, is refused."""
        return cls(**values(cls, cls.name, hyperparameters))


def values(cls: type[Any], owner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as the types of a dataclass's defaults. Raises UsageError where it has no such field or the value
    is of another type."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in fields:
            raise UsageError(f"{owner} has no hyperparameter {name!r}; it has {', '.join(fields)}")
        default = getattr(cls, name)
        several = isinstance(default, tuple)
        kind = type((*default, "")[0] if several else default)
        try:
            if several:
                found[name] = tuple(kind(part) for part in (value.split(",") if isinstance(value, str) else value))
            else:
                found[name] = _boolean(owner, name, value) if kind is bool else kind(value)
        except (TypeError, ValueError):
            raise UsageError(f"{owner}.{name} = {value!r}: a {kind.__name__} is needed") from None
        if kind is int and not several and found[name] < (least := int(default > 0)):
            raise UsageError(f"{owner}.{name} = {value}: at least {least} is needed")
    return found


def _boolean(method: str, name: str, value: Any) -> bool:
    said = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if said is None:
        raise UsageError(f"{method}.{name} = {value!r}: true or false is needed")
    return said


METHODS: dict[str, type[Method]] = {}
COMPOSED: dict[str, type[Method]] = {}
"""Those over other adapters, which `polytask.composition` enters."""


def method(name: str, *, place: Place, equation: str, paper: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make a frozen dataclass of the class and enter it under `name`."""

    def enter(cls: type[Any]) -> type[Any]:
        cls.name, cls.place, cls.equation, cls.paper = name, place, equation, paper
        cls = dataclasses.dataclass(frozen=True)(cls)
        (COMPOSED if cls.composed else METHODS)[name] = cls
        return cls

    return enter


def methods() -> dict[str, type[Method]]:
    """Every method by name: each module of this folder enters its own."""
    import polytask.methods as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(sorted(METHODS.items()))


def build(name: str, hyperparameters: Mapping[str, Any] | None = None) -> Method:
    """The method of that name, or several as `a+b`; UsageError where there is none."""
    if name in COMPOSED:
        return COMPOSED[name].of(hyperparameters or {})
    if "+" in name:
        from polytask.methods.union import Union

        return Union.named(name, hyperparameters or {})
    if name not in METHODS and name not in methods():
        raise UsageError(f"no method {name!r}; the methods are {', '.join(methods())}")
    return METHODS[name].of(hyperparameters or {})
