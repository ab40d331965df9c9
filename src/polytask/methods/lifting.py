"""The runtime of the algebra: equations written for one row, run over batches whose rows use different adapters.

A batch of R rows and K adapters comes with weights w [R, K]. At every site the value becomes

    y_i ← y_i + Σ_k w_ik · Δ(p_k, x_i, y_i)

where Δ is the method's equation and p_k adapter k's tensors at that site. A row with a single weight of one gets what
that adapter alone gives. Nothing is done at a site where no adapter of the batch has tensors, and the backbone's own
weights are never written to.

Three ways to compute the sum, all tested equal:
* one adapter for all rows: the equation is called once, rows flattened into tokens;
* several: tensors are gathered per (row, adapter, weight) triple and the equation is lifted by `torch.func.vmap`, or
  called once per adapter on its own rows where the tensors are large;
* a method's own `mix`, a hand-tuned path (LoRA, (IA)³).

Methods with `swaps` change weights instead: rows with equal weights on such adapters share a pass with θ + Σ w Δθ. So
do rows whose adapters act where a module also runs on something that all rows share (`Backbone.rowless`). Rows of an
`opaque` adapter have a pass of their own inside of it, and no weight but one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.backbones import Backbone, Batch, Site
from polytask.backbones.frame import unembed
from polytask.errors import PolytaskError, UsageError
from polytask.methods.composed import Bound, Composed, Seen, Source
from polytask.methods.method import AFTER, Method, Params
from polytask.methods.union import Union

GATHER_LIMIT = 1 << 16  # numbers per adapter and site above which tensors are not copied per row


@dataclass(frozen=True, eq=False)
class Active:
    """A method and an adapter's tensors, ready to run: `at` maps a site's name to its parameters. `sources` are the
    adapters that a composed method is made of. What is `still` is not trained, whatever else of a plan is."""

    method: Method
    at: Mapping[str, Params]
    sources: tuple[Active, ...] = ()
    still: bool = False

    @classmethod
    def of(
        cls, method: Method, tensors: Mapping[str, Tensor], sources: Sequence[Active] = (), *, still: bool = False
    ) -> Active:
        """From tensors named `<site>/<parameter>`; those of the head and the task's profile are left out, and those
        under `shared` are every site's."""
        at: dict[str, Params] = {}
        for name, tensor in tensors.items():
            site, _, parameter = name.rpartition("/")
            if site not in ("head", "task"):
                at.setdefault(site, {})[parameter] = tensor
        shared = at.pop("shared", {})
        places = dict.fromkeys([*at, *(site for source in sources for site in source.at)])
        return cls(method, {site: shared | at.get(site, {}) for site in places}, tuple(sources), still)

    @cached_property
    def parts(self) -> tuple[Active, ...]:
        """What a union is made of, each a term of its own; any other adapter itself."""
        if not isinstance(self.method, Union):
            return (self,)
        own = self.method.apart({f"{site}/{name}": t for site, p in self.at.items() for name, t in p.items()})
        together = self.method.together
        return tuple(Active.of(one, own[name], still=self.still) for name, one in together.items())

    def equation(self, site: str, seen: Seen | None, *, training: bool = False) -> tuple[Method, Params]:
        """The method and tensors at one site; a composed one's with those of its sources, and what the site reads of
        its value."""
        training = training and not self.still
        if not isinstance(self.method, Composed):
            return self.method, self.at[site]
        found = {n: s.equation(site, seen, training=training) for n, s in enumerate(self.sources) if site in s.at}
        own = replace(self.method, over=(), sites=())  # so that those of the same equation share a call
        live = {n: training and not self.sources[n].still for n in found}
        inner = tuple(Source(n, method, live[n]) for n, (method, _) in found.items())
        params = Bound.joined(self.at[site], {n: p for n, (_, p) in found.items()})
        return Bound(outer=own, sources=inner, seen=seen), params

    def inside(self, backbone: Backbone, *, training: bool = False) -> contextlib.AbstractContextManager[None]:
        """What an opaque method does to the backbone in the passes within."""
        if isinstance(self.method, Composed):
            return self.method.around(backbone, self.at, [(source.method, source.at) for source in self.sources])
        return self.method.inside(backbone, self.at, training=training and not self.still)

    def on(self, device: torch.device) -> Active:
        at = {site: {name: t.to(device) for name, t in p.items()} for site, p in self.at.items()}
        return replace(self, at=at, sources=tuple(source.on(device) for source in self.sources))


Terms = tuple[tuple[float, Active], ...]
"""What a row asks for: adapters with weights."""


def planned(who: Sequence[Terms]) -> tuple[list[Active], Tensor]:
    """Every adapter that someone asks for, once, and the weights [n, K] that each gives them."""
    order = [*dict.fromkeys(active for terms in who for _, active in terms)]
    number = {active: k for k, active in enumerate(order)}
    weights = torch.zeros(len(who), len(order))
    for row, terms in enumerate(who):
        for weight, active in terms:
            weights[row, number[active]] += weight
    return order, weights


class Plan:
    """What K adapters do at which sites, worked out once and used for many batches.

    Tensors are cast to the backbone's dtype and joined across adapters when a site is first met; with gradients this
    is done anew in each pass.
    """

    def __init__(self, backbone: Backbone, adapters: Sequence[Active], *, training: bool = False) -> None:
        self.backbone = backbone
        self.adapters = tuple(a.on(backbone.device) if a.method.swaps or a.method.opaque else a for a in adapters)
        self.training = training
        self.swapping = [k for k, a in enumerate(self.adapters) if a.method.swaps]
        rowless = backbone.rowless
        self.opaque = [k for k, a in enumerate(self.adapters) if a.method.opaque]
        alone = {*self.swapping, *self.opaque}
        self.apart = [k for k, a in enumerate(self.adapters) if k in alone or not rowless.isdisjoint(a.at)]
        self.positional = any(a.method.opaque and a.method.positional for a in self.adapters)
        self.slots = torch.tensor([a.method.slots for a in self.adapters], device=backbone.device)
        self.groups: dict[str, list[Group]] = {}
        self.before_words: list[Group] = []
        for k, adapter in enumerate(self.adapters):
            if k in alone:
                continue
            for site in adapter.at:
                if site not in backbone.sites:
                    raise PolytaskError(
                        f"{backbone.name} has no site {site!r}, where a {adapter.method.name} has tensors"
                    )
                live = training and not adapter.still
                method, params = adapter.equation(site, _seen(backbone, site), training=live)
                self._place(self.groups.setdefault(site, []), k, method, params, site, live=live)
                self.positional = self.positional or method.positional
                if backbone.tied and site in ("embed", "dec.embed") and (inward := method.before_words()):
                    self._place(self.before_words, k, inward, params, site, live=live)

    def _place(self, groups: list[Group], k: int, method: Method, params: Params, site: str, *, live: bool) -> None:
        """Have adapter k act with those of the groups that it can share a call with."""
        for group in groups:
            if group.training == live and group.takes(method, params):
                group.add(k, method, params)
                return
        groups.append(Group(k, method, params, self.backbone, site, training=live))

    def hidden(self, batch: Batch, weights: Tensor | None = None, *, causal: bool | str = True) -> Tensor:
        """Last hidden states [R, T, d]. `weights` [R, K] fp32; None gives every row the first adapter, if any.

        Rows whose weights are all zero get the backbone's own states.
        """
        R = batch.ids.shape[0]
        if self.training:
            self._fresh()
        if not self.adapters:
            return self.backbone.hidden(batch, causal=causal)
        if weights is None:
            weights = torch.zeros(R, len(self.adapters), device=batch.ids.device)
            weights[:, 0] = 1.0
        groups = self.together(weights)
        if len(groups) == 1:
            return self._pass(batch, weights, causal)
        out: Tensor | None = None
        for index in groups:
            states = self._pass(batch.rows(index), weights[index], causal)
            if out is None:
                out = states.new_zeros(R, *states.shape[1:])
            out = out.index_copy(0, index, states)
        assert out is not None
        return out

    def logits(self, batch: Batch, weights: Tensor, at: Tensor) -> Tensor:
        """Next-token logits [N, vocabulary] at the places `at` [N, 2] (row, column) of a batch, fp32.

        The language-model head is read where weights are changed too: it may be the embeddings.
        """
        if self.training:
            self._fresh()
        groups = self.together(weights)
        if len(groups) == 1:
            with self.acting(weights) as acting:
                hidden = self._states(acting, batch, weights)[at[:, 0], at[:, 1]]
                acting.mix = Mix(weights[at[:, 0]])
                return self.unembed(acting, hidden)
        parts, places = [], []
        for index in groups:
            place = torch.full((len(weights),), -1, device=at.device)
            place[index] = torch.arange(len(index), device=at.device)
            mine = (place[at[:, 0]] >= 0).nonzero()[:, 0]
            with self.acting(weights[index]) as acting:
                hidden = self._states(acting, batch.rows(index), weights[index])
                acting.mix = Mix(weights[at[mine, 0]])
                parts.append(self.unembed(acting, hidden[place[at[mine, 0]], at[mine, 1]]))
            places.append(mine)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def unembed(self, acting: Acting, hidden: Tensor) -> Tensor:
        """Next-token logits [N, vocabulary], fp32, of last hidden states [N, d], a row each that acts."""
        if self.before_words and acting.changes is not None:
            site = self.backbone.sites["head"]
            hidden = Change(self, site, self.before_words, acting)(hidden[:, None], hidden[:, None])[:, 0]
        return unembed(self.backbone, hidden)

    def room(self, weights: Tensor | None) -> int:
        """How many virtual tokens a row with these weights [K] has before its text."""
        return int((self.slots * (weights != 0)).amax()) if weights is not None and len(self.slots) else 0

    def _fresh(self) -> None:
        """Forget what was worked out from tensors, because they have changed."""
        for group in itertools.chain(*self.groups.values(), self.before_words):
            group.fresh()

    def together(self, weights: Tensor) -> list[Tensor]:
        """Which rows of weights [R, K] may share a pass, as lists of rows: those that agree on the adapters that
        change whole weights or act on what all rows share."""
        self.allow(weights)
        if not self.apart:
            return [torch.arange(len(weights), device=weights.device)]
        kinds, which = torch.unique(weights[:, self.apart], dim=0, return_inverse=True)
        return [(which == i).nonzero()[:, 0] for i in range(len(kinds))]

    def allow(self, weights: Tensor) -> None:
        """Raise UsageError where a row of weights [R, K] has an opaque adapter and anything else."""
        for k in self.opaque:
            rows = weights[weights[:, k] != 0]
            if bool((rows[:, k] != 1).any()) or bool((rows.count_nonzero(dim=1) > 1).any()):
                raise UsageError(
                    f"an adapter by {self.adapters[k].method.name} cannot be mixed: ask for it alone, with weight 1"
                )

    @contextlib.contextmanager
    def acting(self, weights: Tensor) -> Iterator[Acting]:
        """Have the adapters act in any passes of the backbone, on rows with these weights [R, K], which `together` puts
        in one list; set `mix` of what it gives where the next pass has other rows."""
        acting = Acting(Mix(weights))
        if not self.adapters:
            yield acting
            return
        for k in self.opaque:
            if weights[0, k]:
                acting.changes = None
                with self.adapters[k].inside(self.backbone, training=self.training):
                    yield acting
                return
        with self.backbone.weights_changed(self._differences(weights[0])), self._hooked(acting):
            yield acting

    def _differences(self, weights: Tensor) -> dict[tuple[str, str], Tensor]:
        """Σ w Δθ by (module path, parameter name), for one row's weights [K]."""
        total: dict[tuple[str, str], Tensor] = {}
        for k in self.swapping:
            weight = weights[k]
            if weight == 0:
                continue
            for site, params in self.adapters[k].at.items():
                for name, difference in params.items():
                    key = (site.removeprefix(":"), name)
                    scaled = difference if weight == 1 else weight * difference
                    total[key] = total[key] + scaled if key in total else scaled
        return total

    def _pass(self, batch: Batch, weights: Tensor, causal: bool | str) -> Tensor:
        with self.acting(weights) as acting:
            return self._states(acting, batch, weights, causal)

    def _states(self, acting: Acting, batch: Batch, weights: Tensor, causal: bool | str = True) -> Tensor:
        """Last hidden states of the batch's own tokens, in a pass with the virtual tokens that its rows' adapters
        have."""
        wide, where = self.widen(acting, batch, weights)
        hidden = self.backbone.hidden(wide, causal=causal)
        acting.read()
        if where is None or batch.written is not None:
            return hidden
        return hidden.gather(1, where[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def widen(self, acting: Acting, batch: Batch, weights: Tensor) -> tuple[Batch, Tensor | None]:
        """The batch with room for virtual tokens before its sequences, and its old columns' new places [R, T]. Where no
        row has any, all stays as it is. Methods of the tokens place act, and those that are positional at a prompt's
        tokens, until `acting.read` says that it has been read."""
        n = (self.slots * (weights != 0)).amax(1) if len(self.slots) else torch.zeros(1)
        acting.standing = batch.standing if self.positional else None
        if not bool(n.any()):
            return batch, None
        wide, where, acting.places = self.backbone.widened(batch, n)
        if acting.standing is not None:
            row, column = batch.mask.nonzero(as_tuple=True)
            moved = [torch.full_like(acting.places, -1) for _ in acting.standing]
            for new, old in zip(moved, acting.standing, strict=True):
                new[row, where[row, column]] = old[row, column]
            acting.standing = (moved[0], moved[1])
        return wide, where

    @contextlib.contextmanager
    def _hooked(self, acting: Acting) -> Iterator[None]:
        handles = []
        changes = acting.changes = {}
        try:
            for name, site in self.backbone.sites.items():  # their order, so that the adapters' does not matter
                groups = self.groups.get(name)
                if not groups:
                    continue
                changes[name] = Change(self, site, groups, acting)
                handles += attached(self.backbone, name, changes[name])
            yield
        finally:
            for handle in handles:
                handle.remove()


class Change:
    """What the adapters of a plan do at one site in the pass that runs."""

    def __init__(self, plan: Plan, site: Site, groups: list[Group], acting: Acting) -> None:
        self.site, self.groups, self.acting = site, groups, acting
        self.rowless = plan.backbone.rowless

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """y + Σ w Δ for x [R, T, reads] and y [R, T, width]."""
        mix = self.acting.mix
        if len(y) != len(mix.weights):
            if self.site.name not in self.rowless:
                raise PolytaskError(
                    f"site {self.site.name}: its module ran on {list(y.shape)} in a pass of {len(mix.weights)} rows, "
                    f"so rows cannot have adapters of their own there"
                )
            mix = mix.shared
        if len(self.groups) == 1:
            return self._mixed(self.groups[0], x, y, mix)
        # Each Δ is computed from the same y, so that the order of the adapters does not matter. What stands in the
        # places of virtual tokens is put there when all others have acted: it is no value that they were made for.
        for placing in (False, True):
            groups = [group for group in self.groups if bool(group.methods[0].slots) == placing]
            y = y + sum(self._mixed(group, x, y, mix) - y for group in groups) if groups else y
        return y

    @property
    def rows(self) -> Mix:
        """The weights of the pass that runs."""
        return self.acting.mix

    def low_rank(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A [ρ, reads], B [width, ρ] and m [R, 1, ρ] (None for ones) with Σ w Δ = B (m ∘ A x), where a method that says
        so acts here alone; in passes without gradients."""
        if len(self.groups) > 1 or (low_rank := self.groups[0].methods[0].low_rank) is None:
            return None
        return low_rank(self.groups[0], self.acting.mix.of(self.groups[0].columns))

    def _mixed(self, group: Group, x: Tensor, y: Tensor, mix: Mix) -> Tensor:
        columns = mix.of(group.columns)
        if not len(columns.rows):
            return y
        method = group.methods[0]
        if method.slots:
            places = self.acting.places
            if places is None or places.shape != y.shape[:2]:  # DeBERTa's relative positions: see `Backbone.rowless`
                return y
            x = places
        elif group.training and method.dropout:
            x = F.dropout(x, method.dropout)
        if method.mix:
            return method.mix(group, x, y, columns)
        return lifted(group, x, y, columns, self._standing(y) if method.positional else {})

    def _standing(self, y: Tensor) -> Params:
        """`at` and `left` of each token [R, T]: see `Method.positional`."""
        standing = self.acting.standing
        if standing is None or standing[0].shape != y.shape[:2]:  # a token that is written
            none = torch.full(y.shape[:2], -1, device=y.device)
            return {"at": torch.full_like(none, AFTER), "left": none}
        return {"at": standing[0], "left": standing[1]}


class Group:
    """Adapters that act at one site by one equation: their columns of w, methods and tensors."""

    def __init__(
        self, column: int, method: Method, params: Params, backbone: Backbone, site: str, *, training: bool = False
    ) -> None:
        self.columns = [column]
        self.methods = [method]
        self._params = [params]
        self._backbone = backbone
        self.training = training
        self._frozen = method.frozen(backbone, backbone.sites[site])
        self.joined: dict[str, Any] = {}  # what a method's own `mix` keeps from pass to pass

    def takes(self, method: Method, params: Params) -> bool:
        return self.methods[0].joins(method, self._params[0], params)

    def add(self, column: int, method: Method, params: Params) -> None:
        self.columns.append(column)
        self.methods.append(method)
        self._params.append(params)

    @cached_property
    def params(self) -> list[Params]:
        """What each adapter's equation gets, on the backbone's device, in its dtype (fp32 for a `precise` method)."""
        device, dtype = self._backbone.device, self._backbone.dtype
        if self.methods[0].precise:
            dtype = torch.float32
        moved = [{name: t.to(device) for name, t in p.items()} for p in self._params]
        if self.training:
            moved = [m.sampled(p) for m, p in zip(self.methods, moved, strict=True)]
        ready = [m.ready(p, self._frozen) for m, p in zip(self.methods, moved, strict=True)]
        return [{name: t.to(dtype) for name, t in p.items()} for p in ready]

    def fresh(self) -> None:
        """Forget what was worked out from the tensors, because they have changed."""
        self.__dict__.pop("params", None)
        self.joined.clear()


@dataclass
class Acting:
    """The mix of the pass that runs, and what happens at each site, for passes that do not run modules; None where only
    the modules know."""

    mix: Mix
    places: Tensor | None = None
    """What stands where [R, T] in a pass with virtual tokens; see `Backbone.widened`."""
    standing: tuple[Tensor, Tensor] | None = None
    """Where each token stands in its prompt, for methods that are positional; see `Batch.standing`."""
    changes: dict[str, Change] | None = field(default_factory=dict)

    def read(self) -> None:
        """A batch has been read: what comes now are tokens of answers."""
        self.places = self.standing = None


class Mix:
    """The weights of one batch, with what each group needs of them worked out once per pass."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._of: dict[tuple[int, ...], Columns] = {}

    @cached_property
    def shared(self) -> Mix:
        """The weights of what all rows share, which are those of any row: see `Plan.apart`."""
        return Mix(self.weights[:1])

    def of(self, columns: Sequence[int]) -> Columns:
        key = tuple(columns)
        if key not in self._of:
            self._of[key] = Columns(self.weights if len(key) == self.weights.shape[1] else self.weights[:, list(key)])
        return self._of[key]


class Columns:
    """w [R, G] of one group: `rows`, `which`, `scale` are the (row, adapter, weight) triples with a weight."""

    def __init__(self, w: Tensor) -> None:
        self.w = w
        self.rows, self.which = w.nonzero(as_tuple=True)
        self.scale = w[self.rows, self.which]
        self.plain = bool((self.scale == 1).all())
        R = w.shape[0]
        self.whole = len(self.rows) == R and bool((self.rows == torch.arange(R, device=w.device)).all())
        self.used = torch.unique(self.which).tolist()
        self._kept: dict[Hashable, Tensor] = {}

    def kept(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What a method works out from the weights alone, once for all sites and, where rows write, all steps."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def lifted(group: Group, x: Tensor, y: Tensor, c: Columns, each: Mapping[str, Tensor] | None = None) -> Tensor:
    """y + Σ w Δ for one group: the generic path, for any method. x [R, T, reads], y [R, T, width]; `each` has what the
    method gets of each token [R, T]."""
    each = each or {}
    method = group.methods[0]
    params = group.params
    if c.whole and len(c.used) == 1:
        p = params[c.used[0]] | {name: t.flatten() for name, t in each.items()}
        Δ = method.delta(p, x.flatten(0, 1), y.flatten(0, 1)).reshape(y.shape)
        return y + (Δ if c.plain else Δ * c.scale[:, None, None].to(Δ.dtype))
    if sum(t.numel() for t in params[0].values()) > GATHER_LIMIT:
        out = y
        for g in c.used:
            mine = c.which == g
            rows = c.rows[mine]
            p = params[g] | {name: t[rows].flatten() for name, t in each.items()}
            Δ = method.delta(p, x[rows].flatten(0, 1), y[rows].flatten(0, 1)).reshape(-1, *y.shape[1:])
            out = out.index_add(0, rows, Δ * c.scale[mine][:, None, None].to(Δ.dtype))
        return out
    gathered = {name: torch.stack([p[name] for p in params])[c.which] for name in params[0]}
    gathered |= {name: t[c.rows] for name, t in each.items()}
    seen_x, seen_y = (x, y) if c.whole else (x[c.rows], y[c.rows])
    Δ = torch.func.vmap(method.delta, randomness="different")(gathered, seen_x, seen_y)
    if not c.plain:
        Δ = Δ * c.scale[:, None, None].to(Δ.dtype)
    return y + Δ if c.whole else y.index_add(0, c.rows, Δ)


def attached(backbone: Backbone, name: str, change: Callable[[Tensor, Tensor], Tensor]) -> list[Any]:
    """Have a site's value become change(x, y) in every pass, until the handles that this gives are removed."""
    site = backbone.sites[name]
    module = backbone.model.get_submodule(site.path)
    if site.point == "across":
        return _across(backbone.model.get_submodule(site.source), module, change)
    if site.point in ("output", "stream"):
        return [module.register_forward_hook(_after(site, change))]
    return [module.register_forward_pre_hook(_before(site, change, module))]


def _seen(backbone: Backbone, name: str) -> Seen | None:
    """What a site reads of its own value: see `_after` and `_before`."""
    site = backbone.sites[name]
    if site.point in ("output", "across"):
        return None
    return Seen(backbone.model.get_submodule(site.path) if site.point == "sum" else None)


def _after(site: Site, change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        y = out[0] if isinstance(out, tuple) else out
        x = args[0] if site.point == "output" and args else y
        part = site.part
        new = change(x, y) if part is None else part.put(y, change(x, part.take(y)))
        return (new, *out[1:]) if isinstance(out, tuple) else new

    return hook


def _across(source: nn.Module, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> list[Any]:
    read: list[Tensor] = []

    def begin(_module: nn.Module, args: tuple[Any, ...]) -> None:
        read[:] = args[:1]

    def end(_module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor:
        return change(read.pop(), y)

    return [source.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def _before(site: Site, change: Callable[[Tensor, Tensor], Tensor], module: nn.Module) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        y = args[0]
        x = type(module).forward(module, y) if site.point == "sum" else y
        return (change(x, y), *args[1:])

    return hook
