"""How long starting takes: `polytask --help`, `import polytask` and, to compare, `import peft`, in fresh processes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from bench.measure import Row, Turn, Window, keep, options, turns

COMMANDS = {
    "polytask --help": ("-m", "polytask", "--help"),
    "import polytask": ("-c", "import polytask"),
    "import peft": ("-c", "import peft"),
    "pass": ("-c", "pass"),
}
TARGETS = {"polytask --help": 0.5, "import polytask": 0.3}


def started(arguments: tuple[str, ...]) -> Turn:
    def turn(window: Window) -> float:
        with window:
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return 1.0

    return turn


def main() -> None:
    o = options(__doc__ or "", rounds=11, limit=120.0)
    there = importlib.util.find_spec("polytask.__main__") is not None
    if not there:
        print("polytask has no command line: `polytask --help` is left out", file=sys.stderr)
    variants = {name: started(given) for name, given in COMMANDS.items() if there or name != "polytask --help"}
    found = turns(variants, rounds=o.rounds, limit=o.limit, clock=o.clock)
    rows = [
        Row.of("start", name, found.cost(name), "s", target=TARGETS.get(name), better="less",
               note=f"{found.ratio(name, 'pass').median:.1f} x `pass`")
        for name in variants
    ]  # fmt: skip
    keep("start", rows, {"all": found})


if __name__ == "__main__":
    main()
