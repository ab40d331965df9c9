"""How every bench here measures.

Variants run in turns (A B C A B C ...), so that what slows the machine slows all of them. A sample during which other
processes took more than `QUIET` of a core is taken again; a figure is the median over rounds of the ratio within a
round, with its quartiles. On a machine that is never quiet, `--clock cpu --threads 1` compares CPU seconds instead,
which others disturb little; those ratios are for development. All samples, clean or not, go to
`bench/results/<bench>.json` with the machine's facts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
QUIET = 0.10  # cores that other processes may use while a sample is taken
THREADS = 2
CLOCKS = ("wall", "cpu")


class Window:
    """The part of a round that counts: wall time, and how many cores other processes used meanwhile."""

    seconds = 0.0
    cpu = 0.0
    others = 0.0
    _began = 0.0

    def start(self) -> None:
        self._all, self._own = _busy(), _own()
        self._began = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu = _own() - self._own
        self.others = max(0.0, (_busy() - self._all - self.cpu) / self.seconds)

    def __enter__(self) -> Window:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _own() -> float:
    """CPU seconds of this process and of its children that have ended."""
    t = os.times()
    return time.process_time() + t.children_user + t.children_system


def _busy() -> float:
    """CPU seconds that all processes of the machine have used; this process's own where the system does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, irq, softirq = map(int, file.readline().split()[1:8])
    except OSError:
        return _own()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """One turn of one variant: seconds for `work` units (examples, passes, loads)."""

    round: int
    variant: str
    seconds: float
    work: float
    others: float
    cpu: float
    clock: str = "wall"

    @property
    def clean(self) -> bool:
        return self.clock == "cpu" or self.others <= QUIET

    @property
    def cost(self) -> float:
        """Seconds a unit of work."""
        return (self.cpu if self.clock == "cpu" else self.seconds) / self.work


Turn = Callable[[Window], float]
"""Does the work of one sample, counts what matters in the window, and returns how many units that was."""


@dataclass(frozen=True)
class Quartiles:
    median: float
    low: float
    high: float
    n: int
    clean: int

    @classmethod
    def of(cls, values: Sequence[float], clean: int) -> Quartiles:
        if len(values) < 2:
            return cls(values[0], values[0], values[0], len(values), clean)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values), clean)


@dataclass
class Samples:
    """All turns. Rounds in which both variants were clean count; where fewer than three are, all rounds do."""

    taken: list[Sample] = field(default_factory=list)

    def _best(self) -> dict[tuple[int, str], Sample]:
        """Each variant's sample of each round: the quietest of its tries."""
        best: dict[tuple[int, str], Sample] = {}
        for sample in self.taken:
            at = (sample.round, sample.variant)
            if at not in best or sample.others < best[at].others:
                best[at] = sample
        return best

    def cost(self, variant: str) -> Quartiles:
        """Seconds a unit of work."""
        found = [sample for (_, name), sample in self._best().items() if name == variant]
        clean = [sample for sample in found if sample.clean]
        return Quartiles.of([s.cost for s in (clean if len(clean) >= 3 else found)], len(clean))

    def ratio(self, variant: str, to: str) -> Quartiles:
        """How many times as long a unit takes `variant` as `to`, within rounds."""
        best = self._best()
        pairs = [(s, best[i, to]) for (i, name), s in best.items() if name == variant and (i, to) in best]
        clean = [pair for pair in pairs if pair[0].clean and pair[1].clean]
        return Quartiles.of([a.cost / b.cost for a, b in (clean if len(clean) >= 3 else pairs)], len(clean))


def turns(variants: Mapping[str, Turn], *, rounds: int, limit: float, tries: int = 3, clock: str = "wall") -> Samples:
    """Run the variants in turns until `rounds` rounds are done or `limit` seconds are over.

    The first turn of each is a warm-up and is not kept. A sample that others disturbed is taken again up to `tries`
    times; the order turns by one place each round.
    """
    samples = Samples()
    for turn in variants.values():
        turn(Window())
    names = list(variants)
    ends = time.perf_counter() + limit
    for i in range(rounds):
        at = i % len(names)
        for name in names[at:] + names[:at]:
            for _ in range(tries):
                window = Window()
                work = variants[name](window)
                samples.taken.append(Sample(i, name, window.seconds, work, window.others, window.cpu, clock))
                if samples.taken[-1].clean or time.perf_counter() > ends:
                    break
        if time.perf_counter() > ends:
            break
    return samples


@dataclass(frozen=True)
class Row:
    """One line of the table. `value` is a ratio or an amount in `unit`; `better` says on which side of the target it
    should be."""

    bench: str
    what: str
    value: float
    low: float
    high: float
    unit: str = "x"
    target: float | None = None
    better: Literal["more", "less"] = "more"
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "more" else self.value <= self.target

    @classmethod
    def of(
        cls,
        bench: str,
        what: str,
        q: Quartiles,
        unit: str = "x",
        *,
        scale: float = 1.0,
        target: float | None = None,
        better: Literal["more", "less"] = "more",
        note: str = "",
    ) -> Row:
        said = f"{q.clean}/{q.n} clean" if q.clean < q.n or q.n < 3 else f"{q.n} rounds"
        note = f"{said}; {note}" if note else said
        return cls(bench, what, scale * q.median, scale * q.low, scale * q.high, unit, target, better, note)


def keep(
    bench: str, rows: Sequence[Row], samples: Mapping[str, Samples], more: Mapping[str, Any] | None = None
) -> None:
    """Write `bench/results/<bench>.json` and print the table."""
    write(bench, rows, samples, more)
    show(rows)


def write(
    bench: str, rows: Sequence[Row], samples: Mapping[str, Samples], more: Mapping[str, Any] | None = None
) -> None:
    """Write `bench/results/<bench>.json`."""
    RESULTS.mkdir(exist_ok=True)
    raw = {name: [{k: _short(v) for k, v in asdict(s).items()} for s in found.taken] for name, found in samples.items()}
    made = {"bench": bench, "facts": facts(), "rows": [row_json(r) for r in rows], **(more or {}), "samples": raw}
    text = json.dumps(made, indent=1, ensure_ascii=False)
    (RESULTS / f"{bench}.json").write_text(text + "\n", encoding="utf-8")


def read(bench: str) -> list[Row]:
    """The rows that `write` left; none where it has not been."""
    path = RESULTS / f"{bench}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return [row_of(row) for row in rows]


def row_json(row: Row) -> dict[str, Any]:
    return {k: _short(v) for k, v in asdict(row).items()} | {"reached": row.reached}


def row_of(fields: Mapping[str, Any]) -> Row:
    return Row(**{k: v for k, v in fields.items() if k != "reached"})


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def show(rows: Sequence[Row]) -> None:
    """Print rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("bench", "what", "measured", "quartiles", "target", "", "samples"):
        table.add_column(name, justify="right" if name in ("measured", "target") else "left", overflow="fold")
    for r in rows:
        sign = "≥" if r.better == "more" else "≤"
        target = "" if r.target is None else f"{sign} {r.target:g} {r.unit}"
        verdict = {None: "", True: "[green]reached[/]", False: "[red]not reached[/]"}[r.reached]
        table.add_row(
            r.bench, r.what, f"{r.value:.3g} {r.unit}", f"{r.low:.3g} – {r.high:.3g}", target, verdict, r.note
        )
    Console(width=None if os.isatty(1) else 160).print(table)


def facts() -> dict[str, Any]:
    """What the machine is, and how busy."""
    import torch

    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = {f for f in value.split() if f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")}
                break
    except OSError:
        pass
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "has": sorted(flags),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "polytask")},
    }


def options(description: str, **defaults: Any) -> argparse.Namespace:
    """`--threads`, `--clock` and one option for each default; sets the threads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, value in defaults.items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    found = parser.parse_args()
    import torch

    torch.set_num_threads(found.threads)
    return found
