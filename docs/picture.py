"""Draw docs/images/demo.svg: `python docs/picture.py` runs the demo again and shows what it prints."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from polytask.cli.show import PIPE_WIDTH as WIDTH

OUT = Path(__file__).parent / "images" / "demo.svg"
# rich's own, without the font that it fetches from elsewhere.
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def run(*command: str) -> tuple[str, str]:
    """What a command prints on standard output, and the last state of what it shows on a terminal beside it."""
    screen, terminal = pty.openpty()
    env = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(screen, 1 << 16):
            shown += part
    except OSError:  # Linux says so when the other end is closed
        pass
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    if process.wait():
        raise SystemExit(shown.decode())
    # A live display rubs out its lines (ESC [ 2 K) and writes them again.
    last = shown.decode().replace("\r", "").split("\x1b[2K")[-1]
    return printed, last.replace("\x1b[?25h", "").replace("\x1b[?25l", "")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        printed, shown = run(str(Path(sys.executable).parent / "polytask"), "demo", "--library", f"{folder}/skills")
        printed = printed.replace(f" --library {folder}/skills", "").replace(f"{folder}/", "")
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        for line in ("$ polytask demo", *shown.rstrip().splitlines(), *printed.rstrip().splitlines()):
            console.print(Text.from_ansi(line.rstrip()), highlight=False)
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(console.export_svg(title="polytask demo", code_format=SVG, unique_id="demo"), encoding="utf-8")


if __name__ == "__main__":
    main()
