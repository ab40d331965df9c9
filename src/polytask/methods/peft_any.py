"""Any other method of Hugging Face's PEFT library, as it is: trained, kept and served, but not mixed.

    module ← PEFT's own layer around it, for every module that the type's config targets

PEFT puts its layers into a model. Here they are made once, on a skeleton of the model that shares its weights, and
stand in the backbone only while a pass of their adapter runs; before and after it every module is its own, and rows of
other adapters never meet them. A start that would change the frozen weights themselves, as PiSSA's does in PEFT, would
change them for everyone, and is refused.

`type` is a name of `peft.PeftType`; all other hyperparameters are those of its config, and missing ones are PEFT's
defaults. Tensors are stored under `:<module path>/<PEFT's name>`, those that PEFT keeps and does not train (VeRA's
projections) with `kept.` before the name. What no hidden state depends on (an encoder-decoder's decoder where a head
reads the encoder) is left out, as in `full`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from polytask.backbones import Backbone, Batch
from polytask.backbones.families import match
from polytask.backbones.quantised import whole
from polytask.errors import PolytaskError, UsageError
from polytask.methods.method import Method, Params, method

ADAPTER = "default"  # PEFT's name for an adapter within its layers; its files leave it out
KEPT = "kept."

_TOKENS = "it learns virtual tokens and puts in no layers; polytask has methods of its own for that"
REFUSED = {
    "PROMPT_TUNING": _TOKENS,
    "MULTITASK_PROMPT_TUNING": _TOKENS,
    "P_TUNING": _TOKENS,
    "PREFIX_TUNING": _TOKENS,
    "CPT": _TOKENS,
    "CARTRIDGE": _TOKENS,
    "ADAPTION_PROMPT": _TOKENS,
    "ADALORA": "its ranks are chosen by calls in every step of training, which the loop here does not make",
    "OSF": "it projects gradients by hooks on PEFT's own parameters, which are not those that are trained here",
    "POLY": "it needs the number of a task with every row",
    "XLORA": "it mixes LoRAs that were trained before; mix or route adapters instead",
    "SHADOW": "it trains a second model beside the backbone",
}
MORE = {
    "use_asa": "calls in every step of training",
    "alora_invocation_tokens": "the places of its tokens with every row",
    "layer_replication": "more blocks than the backbone has",
}

# Fields of PEFT's configs that say where an adapter comes from, and not what it computes.
_ABOUT = ("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type")


@method(
    "peft",
    place="weights",
    equation="module ← PEFT's layer around it",
    paper="PEFT: Mangrulkar et al. 2022, github.com/huggingface/peft",
)
class Peft(Method):
    """type: a name of peft.PeftType, such as VERA. sites: the linear maps to target; if not given, target_modules or
    what PEFT takes for this kind of model. config: all other hyperparameters, each of which is given by PEFT's name."""

    opaque = True

    type: str = ""
    sites: tuple[str, ...] = ()
    config: str = "{}"

    @classmethod
    def of(cls, hyperparameters: Mapping[str, Any]) -> Self:
        given = {name: _read(value) for name, value in hyperparameters.items()}
        kind, sites = str(given.pop("type", "")).upper(), given.pop("sites", ())
        known = sorted({str(each.value) for each in _peft().mapping.PEFT_TYPE_TO_TUNER_MAPPING} - set(REFUSED))
        if kind in REFUSED:
            raise UsageError(f"peft has {kind}, but {REFUSED[kind]}; the types that work are {', '.join(known)}")
        if kind not in known:
            raise UsageError(f"peft needs a type, as in --set type=VERA, and got {kind!r}; one of {', '.join(known)}")
        if more := next((name for name in MORE if given.get(name)), ""):
            raise UsageError(f"peft {kind}: {more} needs {MORE[more]}, which polytask does not give; leave it out")
        said = _config(kind, given).to_dict()
        if said.get("bias", "none") != "none":
            raise UsageError(f"peft {kind}: bias = {said['bias']} would train the backbone's biases; see bitfit")
        if sites and said["target_modules"]:
            raise UsageError(f"peft {kind}: sites and target_modules both say where; give one of them")
        plain = {n: _plain(v) for n, v in said.items() if n not in _ABOUT and (v is not None or n in given)}
        return super().of({"type": kind, "sites": sites, "config": json.dumps(plain, sort_keys=True)})

    def hyperparameters(self) -> dict[str, Any]:
        return {"type": self.type, "sites": list(self.sites), **json.loads(self.config)}

    def peft_config(self, backbone: Backbone) -> Any:
        """PEFT's own config of it on a backbone."""
        values = json.loads(self.config)
        if self.sites:
            chosen = [backbone.sites[name] for name in match(backbone.sites, self.sites)]
            wrong = [site.name for site in chosen if site.point != "output"]
            if wrong:
                raise UsageError(f"peft: {wrong[0]} is not the output of a linear map, where PEFT's layers stand")
            paths = {id(module): path for path, module in backbone.base.named_modules()}
            modules = (backbone.model.get_submodule(site.path) for site in chosen)
            values["target_modules"] = [*dict.fromkeys(paths[id(module)] for module in modules)]
        return _config(self.type, values)

    def only(self, tensors: Mapping[str, Tensor]) -> Self:
        raise UsageError("a selector chooses among a method's tensors, and those of peft cannot be told apart")

    def trains(self, name: str) -> bool:
        return not name.rpartition("/")[2].startswith(KEPT)

    def start(self, backbone: Backbone, seed: int, *, writing: bool = False) -> dict[str, Tensor]:
        _layers(self, backbone)  # which shows that the backbone's weights stay as they are
        drawn = _Layers(self, backbone, seed).tensors
        first = {n: t.detach().float() if t.is_floating_point() else t.detach() for n, t in drawn.items()}
        probes = {n: t.clone().requires_grad_() for n, t in first.items() if t.is_floating_point()}
        at: dict[str, Params] = {}
        for name, t in (first | probes).items():
            site, _, parameter = name.rpartition("/")
            at.setdefault(site, {})[parameter] = t
        ids = torch.zeros((1, 2), dtype=torch.long, device=backbone.device)
        written = ids if writing and backbone.kind == "encoder-decoder" else None
        with torch.enable_grad(), self.inside(backbone, at):
            try:
                out = backbone.hidden(Batch(ids, torch.ones_like(ids, dtype=torch.bool), written=written))
            except Exception as error:  # whatever a layer of PEFT's raises
                raise UsageError(f"peft {self.type} does not run in {backbone.name}: {_line(error)}") from error
        felt: tuple[Tensor | None, ...] = (None,) * len(probes)
        if out.requires_grad:
            felt = torch.autograd.grad(out, list(probes.values()), torch.ones_like(out), allow_unused=True)
        unread = {name for name, slope in zip(probes, felt, strict=True) if slope is None}
        found = {name: t for name, t in first.items() if name not in unread}
        if not any(self.trains(name) for name in found):
            raise UsageError(f"peft {self.type} changes nothing that {backbone.name} reads here; name other sites")
        return found

    @contextlib.contextmanager
    def inside(self, backbone: Backbone, at: Mapping[str, Params], *, training: bool = False) -> Iterator[None]:
        layers = _layers(self, backbone)
        with layers.holding({f"{site}/{n}": t for site, p in at.items() for n, t in p.items()}, training):
            for parent, name, layer, _ in layers.seats:
                parent._modules[name] = layer
            try:
                yield
            finally:
                for parent, name, _, own in layers.seats:
                    parent._modules[name] = own


class _Layers:
    """PEFT's layers around a backbone's own modules.

    `seats`: (parent, name, PEFT's layer, the backbone's own module) of each. `tensors`: what the layers hold, by name.
    With `checked` they are built on a copy of the weights, which is compared with them afterwards.
    """

    def __init__(self, method: Peft, backbone: Backbone, seed: int, *, checked: bool = False) -> None:
        base = backbone.base
        paths = {id(module): path for path, module in base.named_modules()}
        copies: dict[int, Any] = {}
        for t in (*base.parameters(), *base.buffers()):
            data = whole(t.detach())
            data = data.cpu().clone() if checked else data
            copies[id(t)] = nn.Parameter(data, requires_grad=False) if isinstance(t, nn.Parameter) else data
        twin = copy.deepcopy(base, copies)
        pairs = [(twin.get_submodule(path), base.get_submodule(path)) for path in paths.values()]
        own = {id(copied): module for copied, module in pairs}
        config = method.peft_config(backbone)
        with torch.random.fork_rng([backbone.device] if backbone.device.type == "cuda" else []), _quiet():
            torch.manual_seed(seed)
            try:
                peft = _peft().get_peft_model(twin, config, ADAPTER)
            except Exception as error:  # whatever a layer of PEFT's raises
                raise UsageError(f"peft {method.type} on {backbone.name}: {_line(error)}") from error
        for copied, module in pairs if checked else ():
            for name, θ in module.named_parameters(recurse=False):
                now = copied._parameters.get(name)
                if now is None or not torch.equal(now, whole(θ).cpu()):
                    raise UsageError(
                        f"peft {method.type}: its start changes the frozen {paths[id(module)]}.{name}, which all "
                        "adapters share; choose another init"
                    )
        self.seats: list[tuple[nn.Module, str, nn.Module, nn.Module | None]] = [
            (module, name, child, module._modules.get(name))
            for copied, module in pairs
            for name, child in copied._modules.items()
            if child is not None and id(child) not in own
        ]
        mine = {id(m): m for _, _, layer, _ in self.seats for m in layer.modules() if id(m) not in own}
        self._modules = list(mine.values())
        self._homes: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for m in self._modules:
            for name, child in m._modules.items():
                m._modules[name] = own.get(id(child), child)
            for home in (m._parameters, m._buffers):
                for name, held in home.items():
                    if held is not None:
                        self._homes.setdefault(id(held), []).append((home, name))
        found: dict[int, tuple[str, Tensor]] = {}
        for parent, name, layer, _ in self.seats:
            path = f"{paths[id(parent)]}.{name}".removeprefix(".")
            for key, t in layer.state_dict(keep_vars=True).items():
                if id(t) in self._homes and id(t) not in found:
                    said = ".".join(part for part in key.split(".") if part != ADAPTER)
                    found[id(t)] = f":{path}/{'' if t.requires_grad else KEPT}{said}", t
        self.tensors = dict(found.values())
        trained = [p for p in peft.parameters() if p.requires_grad]
        if any(id(p) not in found or p._backward_hooks for p in trained) or None in (own for *_, own in self.seats):
            raise UsageError(f"peft {method.type} needs more than layers in the places of others, and cannot work here")

    @contextlib.contextmanager
    def holding(self, tensors: Mapping[str, Tensor], training: bool) -> Iterator[None]:
        """With these tensors in place of the layers' own."""
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for name, t in tensors.items():
                if name not in self.tensors:
                    raise PolytaskError(f"PEFT's layers have no tensor {name[1:]}; the adapter is of another version")
                own = self.tensors[name]
                fitting = t.to(own.device, own.dtype)
                for home, key in self._homes[id(own)]:
                    before.append((home, key, own))
                    home[key] = fitting
            for m in self._modules:
                m.training = training
            yield
        finally:
            for home, key, own in before:
                home[key] = own


_BUILT: WeakKeyDictionary[Backbone, dict[Peft, _Layers]] = WeakKeyDictionary()


def _layers(method: Peft, backbone: Backbone) -> _Layers:
    """The layers for a backbone, always with the same random numbers in what their files leave out."""
    known = _BUILT.setdefault(backbone, {})
    if method not in known:
        _Layers(method, backbone, 0, checked=True)
        known[method] = _Layers(method, backbone, 0)
    return known[method]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError("the method peft needs the library of that name: pip install peft") from None
    return peft


def _config(kind: str, values: Mapping[str, Any]) -> Any:
    """PEFT's config. Raises UsageError for a name or a value that it does not know."""
    peft = _peft()
    fields = [f.name for f in dataclasses.fields(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind])]
    unknown = [name for name in values if name not in fields]
    if unknown:
        names = ", ".join(name for name in fields if name not in _ABOUT)
        raise UsageError(f"peft {kind} has no hyperparameter {unknown[0]!r}; it has {names}")
    try:
        with _quiet():
            return peft.get_peft_config({"peft_type": kind, **values})
    except (TypeError, ValueError) as error:
        raise UsageError(f"peft {kind}: {_line(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(value: Any) -> Any:
    """A value as it was meant where a command line gave a text: JSON, or names with commas between them."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    except ValueError:
        return value.split(",") if "," in value else value


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [*map(_plain, value)] if isinstance(value, list | tuple) else getattr(value, "value", value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
