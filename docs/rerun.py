"""Run the commands of the pages again and put what they print in: `python docs/rerun.py README.md docs/tutorial.md`.

A block behind a line `<!-- run -->` is run: of a `console` block each line that begins with `$`, and a `python` block
as a whole, whose output is the `text` block behind it. All blocks of a page share one new folder, in which `src` is the
project's. Standard error, which is the progress, is left out. Every command has to succeed, or to fail behind a line
`<!-- run, fails -->`; otherwise the page stays as it is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- run(?:, fails)? -->\n)```(console|python)\n(.*?)```(\n\n```text\n.*?```)?", re.DOTALL)


def run(command: list[str], folder: Path, fails: bool) -> str:
    """What a command prints, without empty lines and spaces at the ends of lines."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if bool(done.returncode) != fails:
        raise SystemExit(f"{command[-1]}: exit status {done.returncode}\n{done.stderr}")
    said = done.stderr if fails else done.stdout
    return "".join(f"{line.rstrip()}\n" for line in said.splitlines() if line.strip())


def page(path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "src").symlink_to(ROOT / "src")

        def again(found: re.Match[str]) -> str:
            mark, language, content, _ = found.groups()
            fails = "fails" in mark
            if language == "python":
                printed = run([sys.executable, "-c", content], folder, fails)
                return f"{mark}```python\n{content}```\n\n```text\n{printed}```"
            parts = []
            for command in re.findall(r"^\$ (.*)$", content, re.MULTILINE):
                print(command, file=sys.stderr, flush=True)
                parts.append(f"$ {command}\n{run(['bash', '-c', command], folder, fails)}")
            return f"{mark}```console\n{''.join(parts)}```"

        path.write_text(BLOCK.sub(again, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page(Path(name))
