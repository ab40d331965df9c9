"""A page for each method and selector, and the tables of all.

They come from the code: from docstrings and dataclass fields, and from what a method does when it is tried on a tiny
model. Only the paragraphs that say when to use which are written by hand, in `when.md`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from markup import cited, linked, prose, table
from transformers import AutoConfig, AutoModel

from polytask.adapters import Adapter, Card, export_peft
from polytask.backbones import Backbone, Batch, load
from polytask.composition.low_rank import as_lora
from polytask.errors import PolytaskError, UsageError
from polytask.methods import Method, build, methods
from polytask.methods.lifting import Active, Plan
from polytask.methods.selectors import Selector, selectors
from polytask.tasks import TaskCard
from polytask.training.settings import LEARNING_RATES, Settings

WHEN = Path(__file__).parent / "when.md"
NEEDED: dict[str, dict[str, Any]] = {  # what a method has no default for
    "peft": {"type": "VERA"},
    "reprogram": {"alphabet": "ACDEFGHIKLMNPQRSTVWY"},
}
DECODERS = {"bitune"}  # what is for these alone
FOR = {"snip": "bottleneck"}  # what a selector is for, where that is neither `full` nor a method that names it
PLACES = {"weights": "On weights", "activations": "On activations", "tokens": "Virtual tokens", "logits": "On logits"}
INHERITED = {
    "sites": "where it acts: patterns of site names",
    "dropout": "on what a site reads, while it is trained; without effect where the equation has no x",
}
TASK = "src/polytask/demo/tickets"


@dataclass(frozen=True)
class Words:
    """What is written by hand about a method or selector: when to use it, and the config that is it in PEFT."""

    when: str
    peft: str


@cache
def words() -> dict[str, Words]:
    """By name, from the sections of `when.md`."""
    found = {}
    for section in re.split(r"^## ", WHEN.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name, _, text = section.partition("\n")
        text, _, peft = text.partition("\nIn PEFT: ")
        found[name.strip()] = Words(text.strip(), peft.strip())
    return found


def names() -> list[str]:
    """Of all pages."""
    found = [*methods(), *selectors()]
    if twice := {name for name in found if found.count(name) > 1}:
        raise ValueError(f"a method and a selector share a page: {', '.join(twice)}")
    return found


# -- what is seen by trying --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """`starts`: with its tensors as training begins the model is bit by bit the backbone. `peft`: PEFT's format has a
    place for it. `lora`: a LoRA computes the same (yes), the part of it on weights (partly), or nothing of it (no)."""

    starts: bool
    peft: bool
    lora: str


@cache
def tiny(family: str) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = AutoModel.from_config(AutoConfig.for_model(family, vocab_size=32, **sizes))
    return Backbone(model.eval(), None, "tiny", precision="fp32", device="cpu")


@cache
def tried(name: str) -> Tried:
    backbone, m = tiny("llama" if name in DECODERS else "bert"), build(name, NEEDED.get(name))
    start = m.start(backbone, 0)
    batch = Batch(torch.arange(1, 7)[None], torch.ones(1, 6, dtype=torch.bool))
    with torch.no_grad():
        starts = torch.equal(Plan(backbone, [Active.of(m, start)]).hidden(batch), backbone.hidden(batch))
    draw = torch.Generator().manual_seed(0)
    moved = {n: t + 0.1 * torch.randn(t.shape, generator=draw) if m.trains(n) else t for n, t in start.items()}
    card = Card(name=name, task=TaskCard(name=name, kind="classification"))
    adapter = Adapter(name, m.hyperparameters(), moved, backbone.card(), card)

    def works(what: Callable[[], object]) -> bool:
        try:
            what()
        except PolytaskError:
            return False
        return True

    with tempfile.TemporaryDirectory() as folder:
        peft = works(lambda: export_peft(adapter, Path(folder) / "peft", backbone.sites))
    whole = works(lambda: as_lora(backbone, adapter, 8))
    part = works(lambda: as_lora(backbone, adapter, 8, drop=True))
    return Tried(starts, peft, "yes" if whole else "partly" if part else "no")


@cache
def embedded(name: str) -> Backbone:
    return load(name, precision="fp32", device="cpu")


def trained(name: str, on: str) -> str:
    """How many numbers of a method are trained, and their share of an embedded model's."""
    backbone, m = embedded(on), build(name, NEEDED.get(name))
    try:
        tensors = m.start(backbone, 0, writing=backbone.kind != "encoder")
    except UsageError:
        return "not on this one"
    n = sum(t.numel() for at, t in tensors.items() if m.trains(at))
    percent = 100 * n / backbone.card().parameters
    return f"{n:,} ({percent:.2g} %)" if 0 < percent < 99.5 else f"{n:,} (100 %)" if n else "none"


# -- tables ------------------------------------------------------------------------------------------------------------


def method_table() -> str:
    rows = []
    for name, m in methods().items():
        found = tried(name)
        rows.append(
            [
                f"[`{name}`](methods/{name}.md)",
                m.place,
                f"`{m.equation}`",
                cited(m.paper),
                "yes" if found.starts else "no",
                trained(name, "minilm"),
                trained(name, "polytask-base"),
                "no" if m.opaque else "yes",
                "yes" if found.peft else "no",
                found.lora,
            ]
        )
    header = ["name", "place", "equation", "paper", "starts at the backbone", "trained on minilm", "on polytask-base"]
    return table([*header, "mixes", "to PEFT", "as a LoRA"], rows)


def selector_table() -> str:
    rows = [[f"[`{n}`](methods/{n}.md)", f"`{s.equation}`", cited(s.paper)] for n, s in selectors().items()]
    return table(["name", "what it trains", "paper"], rows)


def fields(of: type[Method] | type[Selector]) -> tuple[str, list[list[str]]]:
    """What the class docstring says before the first `name: meaning`, and name, type, default and meaning of each."""
    text = " ".join((of.__doc__ or "").split())
    known = [f.name for f in dataclasses.fields(of)]  # type: ignore[arg-type]
    one = "|".join(known)
    parts = re.split(rf"(?:^|(?<=[.;] ))((?:(?:{one}), )*(?:{one})): ", text)
    meanings = {n: m.strip(" .") for said, m in zip(parts[1::2], parts[2::2], strict=True) for n in said.split(", ")}
    rows = []
    for f in dataclasses.fields(of):  # type: ignore[arg-type]
        meaning = meanings.get(f.name, INHERITED.get(f.name, ""))
        if f.name not in meanings and f.default == ():
            continue
        kind = f.type if isinstance(f.type, str) else inspect.formatannotation(f.type)
        rows.append([f"`{f.name}`", f"`{kind}`", shown(f.default), prose(meaning)])
    return parts[0], rows


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"`{part}`" for part in value) or "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "none"


# -- pages -------------------------------------------------------------------------------------------------------------


def page(name: str) -> str:
    """The page of a method or a selector, in Markdown."""
    of = methods().get(name) or selectors()[name]
    about = method_facts(name, of) if issubclass(of, Method) else selector_facts(of)
    said = words().get(name)
    lead, rows = fields(of)
    prefix = "" if issubclass(of, Method) else "select."
    rows = [[cell.replace("`", f"`{prefix}", 1), *rest] for cell, *rest in rows]
    parts = [
        f"# {name}",
        f"`{of.equation}`",
        table(["", f"`{name}`"], about),
        *(["## When to use it", linked(cited(said.when), set(names()) - {name})] if said else []),
        "## What it is",
        prose(inspect.getmodule(of).__doc__, set(names()) - {name}),
        "## Hyperparameters",
        *([prose(lead)] if lead else []),
        *([table(["name", "type", "default", "meaning"], rows)] if rows else []),
        "## Try it",
        "From the project's folder, whose demo has a task of support tickets:",
        *commands(name),
    ]
    return "\n\n".join(parts) + "\n"


def method_facts(name: str, m: type[Method]) -> list[list[str]]:
    found, said = tried(name), words().get(name)
    default = build(name, NEEDED.get(name))
    facts = [["acts on", m.place], ["paper", cited(m.paper)]]
    if name in NEEDED:
        facts.append(["the rest is for", f"`{assignments(NEEDED[name])}`"])
    if default.sites:
        facts.append(["sites", f"{shown(default.sites)} ([what they are](../concepts.md#sites))"])
    starts = "at the backbone, bit by bit" if found.starts else "elsewhere than the backbone"
    facts.append(["training starts", starts])
    if name != "head":
        own = "" if name in LEARNING_RATES else ", which is every method's where no other was found"
        facts.append(["learning rate", f"{Settings().rate(name):g}{own}; less for wide models"])
    count = ", ".join(f"{trained(name, on)} on {on}" for on in ("minilm", "polytask-base"))
    if m.selector:
        count += f", of which the selector [`{m.selector}`]({m.selector}.md) chooses some"
    facts.append(["trained", f"{count}; without the task's head"])
    mixes = "not with other adapters: its rows have passes of their own" if m.opaque else "in any batch and mixture"
    facts.append(["runs", mixes])
    if said and said.peft:
        facts.append(["the same in PEFT", said.peft])
    facts.append(["exports to PEFT", "yes" if found.peft else "no"])
    lora = {"yes": "yes", "partly": "what it does to the weights of linear maps, with `--drop`", "no": "no"}
    facts.append(["exports as a LoRA", lora[found.lora]])
    return facts


def selector_facts(s: type[Selector]) -> list[list[str]]:
    goes = example(s.name)[0].partition("@")[0]
    return [
        ["chooses", "which numbers of a method are trained"],
        ["paper", cited(s.paper)],
        ["example", f"[`{goes}`]({goes}.md)`@{s.name}`"],
        ["gives", "an adapter of that method, which can do whatever the method's adapters can"],
    ]


def example(name: str) -> tuple[str, dict[str, Any]]:
    """What a method or selector is tried with: `full@lottery`, and one hyperparameter at its default."""
    of = methods().get(name) or selectors()[name]
    prefix, method = ("", name) if issubclass(of, Method) else ("select.", "")
    if prefix:
        own = next((n for n, m in methods().items() if m.selector == name), FOR.get(name, "full"))
        method = f"{own}@{name}"
    if name in NEEDED:
        return method, dict(NEEDED[name])
    single = [f for f in dataclasses.fields(of) if f.name not in INHERITED and f.default and f.default != ("*",)]  # type: ignore[arg-type]
    return method, {prefix + f.name: f.default for f in single[:1] if not isinstance(f.default, tuple)}


def assignments(hyperparameters: Mapping[str, Any]) -> str:
    return " ".join(f"--set {shlex.quote(f'{n}={v}')}" for n, v in hyperparameters.items())


def commands(name: str) -> list[str]:
    method, hyper = example(name)
    base = "polytask-base" if name in DECODERS else "minilm"
    told = f"--base {base}" if name in DECODERS else ""
    adapt = " ".join(filter(None, [f"$ polytask adapt {TASK} --method {method}", told, assignments(hyper)]))
    given = f", hyperparameters={hyper!r}".replace("'", '"') if hyper else ""
    code = [
        "import polytask as pt",
        "",
        f'base, task = pt.load("{base}"), pt.Task.read("{TASK}")',
        f'skill = pt.adapt(base, task, "{method}"{given})',
        'print(skill.card.scores["test"].value)',
    ]
    found = tried(name) if name in methods() else None
    export = f"$ polytask library export tickets tickets-{name} --format"
    lines = [adapt]
    if found and found.peft:
        lines.append(f"{export} peft")
    elif found and found.lora != "no":
        lines.append(f"{export} lora --rank 8{' --drop' if found.lora == 'partly' else ''}")
    return ["```console\n" + "\n".join(lines) + "\n```", "```python\n" + "\n".join(code) + "\n```"]


def navigation() -> list[dict[str, Any]]:
    """The pages by place, as mkdocs wants them."""
    found: list[dict[str, Any]] = []
    for place, title in PLACES.items():
        found.append({title: [{n: f"methods/{n}.md"} for n, m in methods().items() if m.place == place]})
    return [*found, {"Selectors": [{n: f"methods/{n}.md"} for n in selectors()]}]
