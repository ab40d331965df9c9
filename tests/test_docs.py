"""What the pages say is so."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from polytask.methods import build, methods
from polytask.methods.lifting import Active, Plan
from polytask.methods.method import METHODS

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "site" / "methods.html").read_text(encoding="utf-8")
    for name in methods():
        assert f'id="{name}"' in made
    assert "make:" not in "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html"))


def test_the_method_in_contributing_works_as_it_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to a file, imported, started, run in a mixed batch, and tested by the test that the page gives."""
    code, test = blocks("CONTRIBUTING.md", "python")[:2]
    (tmp_path / "red.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(METHODS)
    try:
        importlib.import_module("red")
        names: dict[str, object] = {"torch": torch, "build": build}
        exec(test, names)
        names["test_red_by_hand"]()  # type: ignore[operator]

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


def test_the_pages_name_no_command_or_method_that_is_not_there() -> None:
    from typer.main import get_command

    from polytask.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    pages = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for command in re.findall(r"(?:^\$ |\| |`)polytask ([a-z]+)", text, re.MULTILINE):
            assert command in known, f"{page}: polytask {command}"
    for page in ("README.md", "docs/tutorial.md"):
        for listed in re.findall(r"--methods ([a-z0-9_,]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert set(listed.split(",")) <= set(methods()), f"{page}: {listed}"
