"""The picture of a library: what is alike, who needs and helped whom, where inputs went, and the same in words."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run
from made import BACKBONE, adapter
from test_cli_compare import Balanced

from polytask.adapters import Adapter, Lineage, ScoreCard
from polytask.adapters.expression import Name
from polytask.composition.differences import Weighed
from polytask.evaluation.library_map import Input, Link, Picture, Routing, Tried, changes, plane
from polytask.evaluation.library_page import LISTED, page
from polytask.library import Library
from polytask.methods import build
from polytask.methods.lifting import Active
from polytask.recipes import reuse

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def made(name: str, angle: float | None = 0.0, seed: int = 0, **more: object) -> Adapter:
    """A LoRA whose task's mean embedding points that way (degrees), or that has none."""
    one = adapter(name, seed=seed, **more)  # type: ignore[arg-type]
    if angle is None:
        return one
    mean = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0.0, 0.0])
    profile = {"task/mean": mean, "task/spread": torch.tensor([0.9, 0.05])}
    return replace(one, tensors={**one.tensors, **profile})


def family(folder: Path) -> tuple[Library, dict[str, str]]:
    """A library with one of each link: `up` stands on `base`, `pair` is made of `base` and `up`, `grown` began with
    `base`, `sum` was merged from `base` and `grown`."""
    kept = Library(folder)
    scores = {
        split: ScoreCard(metric="accuracy", value=value, low=value, high=value, n=9)
        for split, value in (("test", 0.875), ("baseline", 0.75))
    }
    base = made("base", 0, 0)
    up = replace(made("up", 10, 1, scores=scores, lineage=Lineage(parents=(base.id,))), above=(base.id,))
    over = {"expression": "stack(base, up)", "over": [base.id, up.id]}
    pair = made("pair", None, 2, method="expression", tensors={}, hyperparameters=over)
    pair = replace(pair, card=pair.card.model_copy(update={"lineage": Lineage(parents=(base.id, up.id))}))
    grown = made("grown", 90, 3, lineage=Lineage(parents=(base.id,)), recipe={"recipe": "adapt"})
    merged = made("sum", 45, 4, lineage=Lineage(parents=(base.id, grown.id)), recipe={"recipe": "merge"})
    return kept, {one.name: kept.add(one) for one in (base, up, pair, grown, merged)}


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    part = text[text.index(f">{heading}</h2>") :]
    part = part[: part.index("</table>")]
    found = re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)
    return [[re.sub("<.*?>", "", c).strip() for c in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", r)] for r in found]


def test_three_directions_make_a_triangle_and_an_input_stands_where_it_points() -> None:
    """Unit vectors 120 degrees apart: cosines −1/2, sides √3, all of it in a plane. An input that points as the first
    one does stands where that stands; one between the first two, at 60 degrees, opposite to the third."""
    C = torch.full((3, 3), -0.5, dtype=torch.float64).fill_diagonal_(1.0)
    e = torch.tensor([[1.0, -0.5, -0.5], [0.5, 0.5, -1.0]], dtype=torch.float64)
    X, shown, places = plane(C, e)
    assert shown == pytest.approx(1.0)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert math.dist(X[a].tolist(), X[b].tolist()) == pytest.approx(math.sqrt(3))
    assert places[0].tolist() == pytest.approx(X[0].tolist())
    assert places[1].tolist() == pytest.approx((-X[2]).tolist())


def test_a_plane_says_what_it_leaves_out() -> None:
    """Four vectors at right angles lie in three dimensions, alike in all: a plane keeps two thirds."""
    _, shown, _ = plane(torch.eye(4, dtype=torch.float64))
    assert shown == pytest.approx(2 / 3)
    assert plane(torch.ones(2, 2, dtype=torch.float64))[0].tolist() == [[0, 0], [0, 0]]


def test_cosines_of_what_loras_change_by_hand() -> None:
    """ΔW of a: [[2, 0], [0, 0]] at q. Of b, rank 2 at scale 3: [[3, 3], [0, 0]] at q, so cos = 6 / (2·√18) = 1/√2 if
    that were all; with 4 at v besides, 6 / (2·√34). c is b's negative at q alone. d, untrained, has no direction."""

    def lora(name: str, alpha: float, at: dict[str, tuple[list[list[float]], list[list[float]]]]) -> Weighed:
        tensors = {f"0.attn.{s}/{n}": torch.tensor(t) for s, AB in at.items() for n, t in zip("AB", AB, strict=True)}
        r = len(next(iter(at.values()))[0])
        given = {"r": r, "alpha": alpha, "sites": [f"0.attn.{s}" for s in at]}
        one = adapter(name, tensors=tensors, hyperparameters=given)
        return Weighed(one, Active.of(build("lora", given), tensors), 1.0)

    square = ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]])
    a = lora("a", 1.0, {"q": ([[1.0, 0.0]], [[2.0], [0.0]])})
    b = lora("b", 6.0, {"q": square, "v": ([[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [4 / 3, 0.0]])})
    c = lora("c", 1.0, {"q": ([[1.0, 1.0]], [[-1.0], [0.0]])})
    d = lora("d", 1.0, {"q": ([[1.0, 1.0]], [[0.0], [0.0]])})
    ids, C = changes([a, b, c, d])
    assert ids == [a.adapter.id, b.adapter.id, c.adapter.id]
    ab, ac, bc = 6 / (2 * math.sqrt(34)), -1 / math.sqrt(2), -6 / math.sqrt(2 * 34)
    assert C.flatten().tolist() == pytest.approx([1, ab, ac, ab, 1, bc, ac, bc, 1])


def test_every_link_is_an_arrow_and_a_row(tmp_path: Path) -> None:
    kept, id = family(tmp_path / "skills")
    found = Picture.of(kept)
    assert set(found.links) == {
        Link(id["base"], id["up"], "stands on"),
        Link(id["base"], id["pair"], "is made of"),
        Link(id["up"], id["pair"], "is made of"),
        Link(id["base"], id["grown"], "began with"),
        Link(id["base"], id["sum"], "was merged from"),
        Link(id["grown"], id["sum"], "was merged from"),
    }
    text = page(found)
    parsed = Balanced(text)
    assert parsed.links == []
    assert not re.search(r"https?://|@import|url\(|<script|NaN", text)
    assert "prefers-color-scheme: dark" in text
    first, second = re.findall(r'<svg viewBox="0 0.*?</svg>', text, re.DOTALL)
    arrows = re.findall(r'class="(link[^"]*)".*?<title>(.*?)</title>', first)
    assert sorted(arrows) == sorted(
        [
            ("link", "up stands on base"),
            ("link", "pair is made of base"),
            ("link", "pair is made of up"),
            ("link once", "grown began with base"),
            ("link once", "sum was merged from base"),
            ("link once", "sum was merged from grown"),
        ]
    )
    assert ">pair</text>" in first  # has no profile, and stands below the line
    assert ">pair</text>" not in second
    helped = rows(text, "Who helped whom")
    measured = "accuracy 0.875, frozen features 0.750"
    assert ["base", "up", "up stands on it", measured] in helped
    assert ["grown", "sum", "sum was merged from it", ""] in helped
    assert len(helped) == 1 + 6
    table = {row[1].split()[0]: row for row in rows(text, "Adapters")[1:]}
    assert table["up"][3:6] == ["lora", "accuracy 0.875", "0.750"]
    cosines = [
        f"{name} {math.cos(math.radians(angle)):.2f}" for name, angle in (("base", 10), ("sum", 35), ("grown", 80))
    ]
    assert table["up"][6] == ", ".join(cosines)
    assert table["pair"][6] == ""
    assert table["pair"][-1] == "is made of base, is made of up"
    for cell in ('scope="col"', 'scope="row"', "<caption>", 'role="img"', 'tabindex="0" role="region"'):
        assert cell in text


def test_points_at_one_place_are_seen_apart(tmp_path: Path) -> None:
    kept = Library(tmp_path / "skills")
    for n, name in enumerate("abcd"):
        kept.add(made(name, 0.0 if n < 3 else 120.0, n))
    first = re.findall(r'<svg viewBox="0 0.*?</svg>', page(Picture.of(kept)), re.DOTALL)[0]
    places = [
        (float(x), float(y)) for x, y in re.findall(r'<path class="dot.*?translate\(([-\d.]+) ([-\d.]+)\)', first)
    ]
    assert len(places) == 4
    assert min(math.dist(a, b) for i, a in enumerate(places) for b in places[:i]) > 13


def test_what_reuse_tried_is_read_from_its_note(tmp_path: Path) -> None:
    kept = Library(tmp_path / "skills")
    ways = [
        reuse.Way(name, Name("x"), "head", torch.tensor([score]), 0.0)
        for name, score in (("features", -0.9), ("on a, or 2.5", -0.25), ("on a, or 2.5 + b", -0.5), ("lora", -0.75))
    ]
    said = ", ".join(map(reuse._said, reuse._shown(ways, ways[1])))
    note = f"reuse took {ways[1].name!r} of 4 ways: {said}"
    new = kept.add(made("new", notes=("columns guessed: input 'a' 1.000", note)))
    found = Picture.of(kept)
    assert found.tried == (
        Tried(new, "on a, or 2.5", -0.25, True),
        Tried(new, "on a, or 2.5 + b", -0.5, False),
        Tried(new, "lora", -0.75, False),
        Tried(new, "features", -0.9, False),
    )
    helped = rows(page(found), "Who helped whom")
    assert helped[1] == ["on a, or 2.5", "new", "reuse took it", "log-likelihood -0.250 an example"]
    assert helped[2][2] == "reuse tried it"


def test_inputs_are_rings_rows_and_counts(tmp_path: Path) -> None:
    kept = Library(tmp_path / "skills")
    a, b = kept.add(made("a", 0, 0)), kept.add(made("b", 90, 1))
    inputs = (
        Input("to <a>", {a: 1.0}, 0.9),
        Input("to both", {b: 3.0, a: 1.0}, 0.6),
        Input("to none", {}, 0.1),
        *(Input("more", {b: 1.0}, 0.5) for _ in range(LISTED)),
    )
    e = torch.nn.functional.one_hot(torch.arange(len(inputs)) % 4, 4).float()
    found = Picture.of(kept, Routing("nearest-task", BACKBONE.fingerprint, inputs, e))
    text = page(found)
    Balanced(text)
    rings = re.findall(r'<circle class="(input[^"]*)".*?<title>(.*?)</title>', text)
    assert rings[:3] == [("input c0", "to &lt;a&gt;: a"), ("input c1", "to both: b"), ("input", "to none: nobody")]
    table = rows(text, "Where inputs went")
    assert table[1:4] == [
        ["1", "to &lt;a&gt;", "a", "0.90"],
        ["2", "to both", "b 0.75, a 0.25", "0.60"],
        ["3", "to none", "nobody", "0.10"],
    ]
    assert len(table) == 1 + LISTED
    assert "the first 1,000 of 1,003 (--json has all)" in text
    assert "1,003 inputs, routed by nearest-task: b took 1e+03, a took 1.25, nobody took 1." in text
    assert found.json()["routing"]["taken"] == {b: LISTED + 0.75, a: 1.25}
    assert len(found.json()["routing"]["inputs"]) == len(inputs)


def test_a_library_of_none_of_one_and_without_profiles(tmp_path: Path) -> None:
    kept = Library(tmp_path / "skills")
    text = page(Picture.of(kept))
    Balanced(text)
    assert "skills: 0 adapters" in text
    assert "The library is empty: add an adapter with polytask adapt." in text
    assert "<table" not in text
    kept.add(made("only", None))
    text = page(Picture.of(kept))
    Balanced(text)
    assert "No map by tasks: one adapter has no other to be placed by." in text
    assert len(rows(text, "Adapters")) == 2
    kept.add(made("other", None, 1))
    assert "No map by tasks: fewer than two of these have a profile." in page(Picture.of(kept))


def test_backbones_have_maps_of_their_own_and_versions_are_told_apart(tmp_path: Path) -> None:
    kept = Library(tmp_path / "skills")
    other = BACKBONE.model_copy(update={"name": "other", "fingerprint": "0" * 64})
    for seed, (name, backbone) in enumerate((("a", BACKBONE), ("a", BACKBONE), ("b", other), ("c", other))):
        kept.add(made(name, 30.0 * seed, seed, backbone=backbone))
    found = Picture.of(kept)
    assert [(one.backbone, one.by, len(one.places)) for one in found.maps] == [
        ("tiny", "tasks", 2),
        ("other", "tasks", 2),
    ]
    text = page(found)
    Balanced(text)
    assert text.index("<h2>On tiny</h2>") < text.index(">a@2</text>") < text.index("<h2>On other</h2>")
    assert text.index("<h2>On other</h2>") < text.index(">c</text>")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_routes_inputs_and_writes_the_page(tmp_path: Path) -> None:
    from polytask.backbones import load
    from polytask.composition.routing.nearest_task import Profile
    from polytask.methods import passes

    base = load("minilm")
    kept = Library(tmp_path / "skills")
    texts = {
        "fruit": ["I bought an apple", "where is the pear", "the plum was sweet", "a ripe melon"],
        "tools": ["I bought a hammer", "where is the saw", "the drill broke", "a rusty wrench"],
    }
    hyper = {"r": 1, "alpha": 1.0, "sites": ["0.attn.q"]}
    for n, (name, own) in enumerate(texts.items()):
        lora = {"0.attn.q/A": torch.randn(1, 384), "0.attn.q/B": torch.full((384, 1), 1.0 + n)}
        profile = Profile.of(passes.gist(base, own)).tensors()
        kept.add(adapter(name, tensors=lora | profile, hyperparameters=hyper, backbone=base.card()))
    table = tmp_path / "new.csv"
    table.write_text("text,id\na sweet pear,1\nthe hammer broke,2\n", encoding="utf-8")
    out = tmp_path / "page.html"
    common = ["library", "picture", "-l", tmp_path / "skills", "--out", out]
    done = run(*common, "--inputs", table, "--set", "threshold=99", "--json")
    assert done.status == 0, done.err
    assert done.json["page"] == str(out)
    names = {one["adapter"]: one["name"] for one in done.json["adapters"]}
    went = {one["input"]: [names[id] for id in one["adapters"]] for one in done.json["routing"]["inputs"]}
    assert went == {"a sweet pear": ["fruit"], "the hammer broke": ["tools"]}
    assert out.read_text(encoding="utf-8").count('<circle class="input') == 2
    lines = tmp_path / "new.txt"
    lines.write_text("a sweet pear\n\nthe saw\tthe drill\n", encoding="utf-8")
    done = run(*common, "--inputs", lines, "--json", "--router", "lora-retriever")
    assert [one["input"] for one in done.json["routing"]["inputs"]] == ["a sweet pear", "the saw  ⇄  the drill"]
    assert done.json["routing"]["inputs"][1]["adapters"] == {}  # a pair, and no adapter compares two texts
    done = run(*common, "--inputs", table, "--json", "--router", "centroid")  # which reads last states alone
    assert done.status == 0, done.err
    assert [one["input"] for one in done.json["routing"]["inputs"]] == ["a sweet pear", "the hammer broke"]


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    Library(tmp_path / "skills")
    common = ["library", "picture", "-l", tmp_path / "skills", "--out", tmp_path / "page.html"]
    done = run(*common)
    assert done.status == 0, done.err
    assert "0 adapters" in done.out
    assert "name a file of inputs" in run(*common, "--router", "nearest-task").error
    (tmp_path / "new.txt").write_text("a\n")
    assert "is empty" in run(*common, "--inputs", tmp_path / "new.txt").error
    (tmp_path / "none.txt").write_text("\n")
    assert "is empty" in run(*common, "--inputs", tmp_path / "none.txt").error
    (tmp_path / "odd.csv").write_text("one,two,three\na,b,c\n")
    assert "which column is the input?" in run(*common, "--inputs", tmp_path / "odd.csv").error
    (tmp_path / "odd.jsonl").write_text('{"input": "a"}\n{"input": 3}\n')
    assert "line 2: input is no text" in run(*common, "--inputs", tmp_path / "odd.jsonl").error
    assert (
        "cannot be written"
        in run("library", "picture", "-l", tmp_path / "skills", "--out", tmp_path / "no" / "a.html").error
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_on_a_phone(tmp_path: Path, dark: bool) -> None:
    """The page is as wide as the screen (tables and maps move inside theirs), and light or dark as the screen is."""
    kept, _ = family(tmp_path / "skills")
    told = (
        "<script>const page = document.documentElement; document.title = JSON.stringify("
        "[page.scrollWidth, page.clientWidth, "
        "getComputedStyle(document.body).backgroundColor, "
        'document.querySelector(".map .scroll").scrollWidth])</script></body>'
    )
    path = tmp_path / "page.html"
    path.write_text(page(Picture.of(kept)).replace("</body>", told), encoding="utf-8")
    assert CHROMIUM is not None
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,900", *scheme]
    home = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *options, home, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    wide, screen, colour, inside = json.loads(title[1])
    assert wide == screen
    assert inside >= 560  # letters of a map stay legible
    assert colour == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
