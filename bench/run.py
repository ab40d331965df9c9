"""All benches, each in a process of its own, and one table of what they found against the targets.

python -m bench.run [--quick] [names ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from bench.measure import RESULTS, Row, row_of, show

BENCHES: dict[str, tuple[str, ...]] = {
    "start": ("bench.start",),
    "load": ("bench.load",),
    "infer": ("bench.infer",),
    "train": ("bench.train",),
    "together": ("bench.together",),
    "memory": ("bench.memory",),
    "packing": ("bench.packing",),
    "decode": ("bench.decode",),
    "methods": ("bench.methods",),
    "compose": ("bench.compose",),
    "route": ("bench.route",),
    "quantised": ("bench.quantised",),
    "train_scores": ("bench.train", "--scores"),
    "together_scores": ("bench.together", "--scores"),
}
QUICK: dict[str, tuple[str, ...]] = {
    "start": ("--rounds", "3"),
    "load": ("--rounds", "3", "--count", "100", "--peers", "8"),
    "infer": ("--rounds", "3"),
    "train": ("--rounds", "3", "--examples", "128"),
    "together": ("--rounds", "3", "--examples", "64"),
    "memory": ("--examples", "1000", "--epochs", "1"),
    "packing": ("--rounds", "3", "--examples", "96"),
    "decode": ("--rounds", "3"),
    "methods": ("--rounds", "3", "--examples", "64"),
    "compose": ("--rounds", "3"),
    "route": ("--rounds", "3"),
    "quantised": ("--rounds", "3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="bench", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few rounds and few examples, without the scores")
    o = parser.parse_args()
    names = o.names or list(QUICK if o.quick else BENCHES)
    if unknown := sorted(set(names) - set(BENCHES)):
        parser.error(f"no bench {unknown[0]}; there are {', '.join(BENCHES)}")
    rows: list[Row] = []
    failed = []
    for name in names:
        print(f"== {name}", file=sys.stderr, flush=True)
        module, *options = BENCHES[name]
        done = subprocess.run(
            [sys.executable, "-m", module, *options, *(QUICK.get(name, ()) if o.quick else ())],
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            failed.append(name)
            continue
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        rows += [row_of(fields) for fields in found["rows"]]
    show(rows)
    for name in failed:
        print(f"bench {name} failed", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
