"""`python -m claims [ID ...] [--fresh]`: measure what is not measured yet and print one line for each claim."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import claims
from claims.claim import Rows, data


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m claims", description=__doc__)
    parser.add_argument("ids", nargs="*", help="paper ids such as P276; all by default")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    options = parser.parse_args()
    if data() is None:
        print("claims need real tasks: set POLYTASK_DATA to a folder with tasks/", file=sys.stderr)
        return 2
    modules = [m.name for m in pkgutil.iter_modules(claims.__path__) if m.name.startswith("P")]
    wanted = [name for name in modules if not options.ids or name.partition("_")[0] in options.ids]
    for name in wanted:
        module = importlib.import_module(f"claims.{name}")
        rows = Rows(name.partition("_")[0])
        if options.fresh:
            rows.path.unlink(missing_ok=True)
            rows = Rows(name.partition("_")[0])
        verdict = module.measure(rows)
        print(
            f"{name.partition('_')[0]} | {module.PAPER} | {module.CLAIM} | {verdict.measured} | "
            f"{'holds' if verdict.holds else 'does not hold'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
