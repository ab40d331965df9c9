"""The rooms of the house: imports go down only, wherever in a file they stand."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import polytask

SOURCE = Path(polytask.__file__).parent

# From the ground up. A room may import from the floors below it and from itself, not from its own floor's other rooms.
FLOORS = (
    ("errors",),
    ("tasks",),
    ("adapters",),
    ("backbones", "library"),
    ("methods",),
    ("composition",),
    ("inference", "training"),
    ("evaluation",),
    ("recipes", "skills"),
    ("cli",),
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of each import of polytask in a file; `from polytask import x` counts as x where x is a room."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "polytask" and rest.partition(".")[0] in HEIGHT:
                yield node.lineno, rest.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return  # the front door: names of all rooms, imported when they are asked for
    assert room in HEIGHT, f"{room} has no floor: give it one in FLOORS, and in CONTRIBUTING.md"
    for line, other in rooms_imported(path):
        assert other == room or HEIGHT[other] < HEIGHT[room], f"{path.name}:{line}: {room} may not import {other}"


def test_every_floor_is_told_to_contributors() -> None:
    """CONTRIBUTING.md's table names every room there is."""
    told = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [room for room in {room_of(path) for path in FILES} & set(HEIGHT) if f"{room}" not in told]
    assert not missing


def test_an_import_that_goes_up_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "low.py"
    path.write_text("import torch\ndef f():\n    from polytask import recipes\n    import polytask.cli.main\n")
    assert list(rooms_imported(path)) == [(3, "recipes"), (4, "cli")]
    path.write_text("from polytask.inference.engine import Engine\nfrom polytask import __version__\n")
    assert set(rooms_imported(path)) == {(1, "inference")}


def test_import_polytask_is_light() -> None:
    """`import polytask` and its names cost nothing heavy until one is used."""
    code = (
        "import sys, polytask; dir(polytask); heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'sklearn'};"
        "print(sorted(heavy & set(sys.modules))); polytask.UsageError; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_every_name_that_polytask_offers_is_there() -> None:
    for name in polytask.__all__:
        assert getattr(polytask, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = polytask.nothing


ROOT = SOURCE.parents[1]
OUTSIDE = [path for folder in ("bench", "claims", "docs") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_stands_outside_finds_what_it_takes_from_the_house(path: Path):
    """Benches are run by hand: each name that a file imports from polytask is there."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module or node.level:
            continue
        if node.module.split(".")[0] == "polytask":
            home = importlib.import_module(node.module)
            for name in node.names:
                there = hasattr(home, name.name) or (
                    hasattr(home, "__path__") and importlib.util.find_spec(f"{node.module}.{name.name}")
                )
                assert there, f"{path.name}:{node.lineno}: {node.module} has no {name.name}"
