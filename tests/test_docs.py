"""What the pages say is so."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import click
import pytest
import tiny
import torch
from typer.main import get_command

import polytask
from polytask import recipes
from polytask.backbones import load
from polytask.cli import app
from polytask.methods import build, methods, selectors
from polytask.methods.lifting import Active, Plan
from polytask.methods.method import METHODS
from polytask.tasks import Task
from polytask.training import Settings

ROOT = Path(__file__).parents[1]
CHOOSERS = selectors.selectors()
NAMES = (*methods(), *CHOOSERS)


def blocks(page: str, language: str) -> list[str]:
    return fenced((ROOT / page).read_text(encoding="utf-8"), language)


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def pages() -> Any:
    """The module that makes the pages of the methods."""
    return imported("pages")


def imported(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Links(HTMLParser):
    """What a page links to, and which anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.to: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.to += [link for link in (found.get("href"), found.get("src")) if link]
        self.anchors |= {anchor for anchor in (found.get("id"), found.get("name")) if anchor}


# -- the site ----------------------------------------------------------------------------------------------------------


def test_every_table_of_the_site_is_made(site: Path) -> None:
    made = "".join(page.read_text(encoding="utf-8") for page in site.glob("**/*.html"))
    assert "<!-- make:" not in made


def test_every_method_and_selector_has_a_page_and_a_row(site: Path) -> None:
    assert {path.stem for path in (site / "methods").glob("*.html")} == set(NAMES)
    links = Links(site / "methods.html").to
    for name in NAMES:
        assert links.count(f"methods/{name}.html") >= 2, name  # in the menu and in its table


def test_every_link_within_the_site_resolves(site: Path) -> None:
    # A server shows 404.html for addresses at any depth, so its links begin at the site's root.
    found = {path: Links(path) for path in site.glob("**/*.html") if path.name != "404.html"}
    for path, page in found.items():
        for link in page.to:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            to = to / "index.html" if to.is_dir() else to
            assert to.exists(), f"{path.relative_to(site)}: {link}"
            if parts.fragment and to in found:
                assert unquote(parts.fragment) in found[to].anchors, f"{path.relative_to(site)}: {link}"


# -- the pages of the methods ------------------------------------------------------------------------------------------


def test_every_method_and_selector_says_when_to_use_it(pages: Any) -> None:
    said = {name for name, words in pages.words().items() if words.when}
    assert not (missing := sorted(set(NAMES) - said)), f"docs/when.md: no section for {', '.join(missing)}"
    assert not (strange := sorted(said - set(NAMES))), f"docs/when.md: no method or selector {', '.join(strange)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_what_the_code_says(pages: Any, name: str) -> None:
    of, text = methods().get(name) or CHOOSERS[name], pages.page(name)
    assert f"`{of.equation}`" in text
    papers = set(re.findall(r"\d{4}\.\d{5}", of.paper))
    assert papers <= set(re.findall(r"\(https://arxiv\.org/abs/([\d.]+)\)", text))
    assert papers or "https://github.com" in text
    _, rows = pages.fields(of)
    assert all(meaning for *_, meaning in rows), rows
    assert fenced(text, "console")
    assert len(fenced(text, "python")) == 1


def test_fields_are_read_from_the_docstring(pages: Any) -> None:
    _, rows = pages.fields(methods()["kasa"])
    assert ["`gamma`", "`float`", "`0.001`", "of the penalties"] in rows
    _, rows = pages.fields(methods()["elastic"])
    assert ["`nested`", "`tuple[int, ...]`", "`24`, `16`", "the smaller ones"] in rows


def test_a_docstring_keeps_its_words_and_its_columns() -> None:
    """Indented equations stand as they are; in the rest nothing is markup but names of pages and papers."""
    said = """A: b_c and *d* [x].

        y ← y + b_c *      x [d]

    Li 2021, arXiv
    2101.00190; as in `lora`, and not `<b_c>`.
    """
    made = imported("markup").prose(said, {"lora"})
    assert made == (
        "A: b\\_c and \\*d\\* \\[x\\].\n\n```text\ny ← y + b_c *      x [d]\n```\n\n"
        "Li 2021, [arXiv 2101.00190](https://arxiv.org/abs/2101.00190); as in [`lora`](lora.md), and not `<b_c>`."
    )


def test_what_is_said_of_a_method_was_tried(pages: Any) -> None:
    """By what is known of a few: KaSA leaves out singular values, prompts are seen, (IA)³ scales inner activations."""
    found = {name: pages.tried(name) for name in ("lora", "kasa", "prompt", "ia3", "full", "bitfit", "bottleneck")}
    assert {name for name, tried in found.items() if not tried.starts} == {"kasa", "prompt"}
    assert found["lora"].peft
    assert found["ia3"].peft
    assert not found["bottleneck"].peft
    said = {name: tried.lora for name, tried in found.items()}
    assert said == dict.fromkeys(found, "no") | {"lora": "yes", "kasa": "yes", "full": "partly"}


def test_trained_numbers_are_those_of_the_equations(pages: Any) -> None:
    d, blocks = 384, 6  # MiniLM
    assert pages.trained("lora", "minilm").startswith(f"{blocks * 2 * 8 * (d + d):,} ")
    assert pages.trained("kasa", "minilm").startswith(f"{blocks * 2 * (8 * (d + d) + 8):,} ")  # without U and V
    assert pages.trained("ia3", "minilm").startswith(f"{blocks * (2 * d + 4 * d):,} ")
    assert pages.trained("head", "minilm") == "none"
    share = 100 * blocks * 2 * 8 * (d + d) / load("minilm").card().parameters
    assert pages.trained("lora", "minilm").endswith(f"({share:.2g} %)")


def test_scores_that_the_pages_give_are_those_of_the_claim(pages: Any) -> None:
    """Eight tasks and two seeds: each method's mean score, as the claim about adapters and full fine-tuning kept it."""
    lines = (ROOT / "claims/results/P276.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["task"] for row in rows}) == 8
    scores = {name: [row["test"] for row in rows if row["method"] == name] for name in ("lora", "bottleneck", "full")}
    scores["head"] = [row["head"] for row in rows if row["method"] == "lora"]
    assert {len(found) for found in scores.values()} == {16}
    for name in scores:
        text = pages.words()[name].when
        given = re.findall(r"\b([5-9]\d\.\d)\b", re.sub(r"\(arXiv [\d.]+\)", "", text))
        assert f"{100 * mean(scores[name]):.1f}" in given, name
        assert set(given) <= {f"{100 * mean(found):.1f}" for found in scores.values()}, name


def test_counterparts_in_peft_are_there(pages: Any) -> None:
    peft = pytest.importorskip("peft")
    for name, words in pages.words().items():
        for config in re.findall(r"`(.+?)`", words.peft):
            made = eval(config, {**vars(peft)})
            assert isinstance(made, peft.PeftConfig), name


@pytest.mark.parametrize("name", NAMES)
def test_the_python_of_a_page_runs(pages: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On a tiny backbone, a few of the task's rows, and for one epoch."""
    real = load("minilm")
    family = {"esft": "olmoe", "bitune": "llama"}.get(name, "bert")
    small = tiny.backbone(family, tokenizer=real.tokenizer, vocab_size=real.model.config.vocab_size)

    def read(*given: Any) -> Task:
        task = Task.read(*given)
        return replace(task, train=task.train[::8], validation=task.validation[::4], test=task.test[::4])

    def adapt(*given: Any, **more: Any) -> Any:
        return recipes.adapt(*given, settings=Settings(epochs=1, limit=24), **more)

    [code] = fenced(pages.page(name), "python")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(polytask, "load", lambda _: small, raising=False)
    monkeypatch.setattr(polytask, "Task", type("Read", (), {"read": staticmethod(read)}), raising=False)
    monkeypatch.setattr(polytask, "adapt", adapt, raising=False)
    exec(code, {})
    assert 0 <= float(capsys.readouterr().out) <= 1


# -- what a page tells to do ------------------------------------------------------------------------------------------


def test_the_method_in_contributing_works_as_it_stands_there(
    pages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written to a file, imported, started, run in a mixed batch, and tested by the test that the page gives; it has a
    page of its own, without a paragraph."""
    code, test = blocks("CONTRIBUTING.md", "python")[:2]
    (tmp_path / "red.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(METHODS)
    try:
        importlib.import_module("red")
        names: dict[str, object] = {"torch": torch, "build": build}
        exec(test, names)
        names["test_red_by_hand"]()  # type: ignore[operator]
        assert "## When to use it" not in pages.page("red")
        assert "methods/red.md" in pages.method_table()

        backbone, batch, method = tiny.backbone("bert"), tiny.batch(2), build("red")
        tensors = method.start(backbone, 0)
        assert len(tensors) == 3 * 2
        shifted = [Active.of(method, {n: t + shift for n, t in tensors.items()}) for shift in (0.1, -0.2)]
        with torch.no_grad():
            both = Plan(backbone, shifted).hidden(batch, torch.eye(2))
            for i in range(2):
                alone = Plan(backbone, [shifted[i]]).hidden(batch)
                torch.testing.assert_close(both[i][batch.mask[i]], alone[i][batch.mask[i]], rtol=1e-5, atol=1e-5)
    finally:
        sys.modules.pop("red", None)
        METHODS.clear()
        METHODS.update(before)


def commands(text: str) -> list[list[str]]:
    """The arguments of each `$ polytask …` of a text's console blocks, also behind a pipe."""
    shown = [block.replace("\\\n", " ") for block in fenced(text, "console")]
    lines = [line for block in shown for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE)]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        ends = [i for i, word in enumerate(words) if word in ("|", "&&", ";", ">")] + [len(words)]
        begins = [i + 1 for i, word in enumerate(words[:-1]) if word == "polytask" and (i == 0 or i - 1 in ends)]
        found += [words[begin : min(end for end in ends if end >= begin)] for begin in begins]
    return found


def test_commands_are_found() -> None:
    lines = ["$ echo 'a | b' | polytask predict --adapter x", "an answer", "$ cd polytask && polytask demo  # all"]
    text = "```console\n" + "\n".join(lines) + "\n```"
    assert commands(text) == [["predict", "--adapter", "x"], ["demo"]]


def test_every_command_of_the_pages_is_one(pages: Any) -> None:
    """The command line takes it: its name, options and their types, methods and hyperparameters."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    texts |= {f"methods/{name}.md": pages.page(name) for name in NAMES}
    seen = 0
    for where, text in texts.items():
        for words in commands(text):
            command, rest = get_command(app), words
            try:
                while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
                    assert rest[0] in command.commands, f"{where}: polytask {shlex.join(words)}"
                    command, rest = command.commands[rest[0]], rest[1:]
                given = command.make_context("polytask", list(rest)).params
            except click.exceptions.Exit:  # --help, --version
                continue
            except click.ClickException as error:
                pytest.fail(f"{where}: polytask {shlex.join(words)}: {error.format_message()}")
            seen += 1
            named = [given["method"]] if given.get("method") else (given.get("methods") or "").split(",")
            hyper = dict(pair.split("=", 1) for pair in given.get("set_") or ())
            for method in filter(None, named):
                if method not in ("auto", "red"):  # `red` is the method that CONTRIBUTING.md shows how to add
                    selectors.build(method, hyper)
    assert seen > 2 * len(NAMES)


def test_the_pages_name_no_command_or_method_that_is_not_there() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    pages = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for command in re.findall(r"(?:^\$ |\| |`)polytask ([a-z]+)", text, re.MULTILINE):
            assert command in known, f"{page}: polytask {command}"
    for page in ("README.md", "docs/tutorial.md"):
        for listed in re.findall(r"--methods ([a-z0-9_,]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert set(listed.split(",")) <= {*methods(), "all"}, f"{page}: {listed}"
