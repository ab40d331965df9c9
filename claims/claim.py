"""What a claim file needs: the paper, what it says, and a measurement that is kept row by row.

A claim's rows are kept in `claims/results/<id>.jsonl`. Rows that are there are not measured again, so a claim that was
interrupted goes on, and `python -m claims --fresh` starts anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Verdict:
    """`measured` says what was found, with numbers; `holds` whether the claim does."""

    measured: str
    holds: bool


class Rows:
    """Measured rows, found by their keys."""

    def __init__(self, id: str) -> None:
        self.path = RESULTS / f"{id}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]

    def get(self, measure: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The row with this key, measured and kept if it is not there yet."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {**key, **measure()}
        self.rows.append(row)
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {row}", flush=True)
        return row


def data() -> Path | None:
    """The folder of real tasks that POLYTASK_DATA names, or None."""
    named = os.environ.get("POLYTASK_DATA")
    return Path(named) / "tasks" if named and (Path(named) / "tasks").is_dir() else None
