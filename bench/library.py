"""A library of 26 adapters by one command: `polytask library build` over folders and files of real tasks, on MiniLM.

Sixteen of the tasks have a folder (intents, topics, opinions, words that are tagged, pairs of texts), ten stand in
files of one suite (whose sport, which park, how many letters). At most 300 training examples each are drawn; validation
and test splits are whole. Eight adapters are trained over one frozen pass. If it is stopped, the same command goes on
and trains nothing twice: then the time is that of what was missing.

POLYTASK_DATA=folder python -m bench.library
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.measure import Row, Window, keep, options

FOLDERS = (
    *("banking77_intent", "blimp_pairs", "btc_ner", "clinc150_intent", "cr_polarity", "csabstruct", "ewt_upos"),
    *("goemotions", "hate_offensive", "scicite", "sgd_intent", "sgdx_paraphrase", "sib200_en_topic"),
    *("sib200_multi_topic", "skillspan_skill", "snips_slots"),
)
FILES = (
    *("person-instrument", "person-occupation", "person-sport", "product-company", "national_parks", "park-country"),
    *("landmark-country", "word_length", "lowercase_first_letter", "lowercase_last_letter"),
)


def sources(data: Path) -> list[Path]:
    """The tasks that there are: a folder each, and files of a suite."""
    suite = {path.stem: path for path in sorted((data / "tasks" / "function_vectors").rglob("*.json"))}
    return [data / "tasks" / name for name in FOLDERS] + [suite.get(name, Path(f"{name}.json")) for name in FILES]


def main() -> None:
    o = options(__doc__ or "", library="skills", examples=300, epochs=6, together=8)
    if "POLYTASK_DATA" not in os.environ:
        sys.exit("set POLYTASK_DATA to the folder with tasks/")
    tasks = sources(Path(os.environ["POLYTASK_DATA"]))
    command = [sys.executable, "-m", "polytask", "library", "build", *map(str, tasks), "--base", "minilm"]
    command += ["--library", o.library, "--examples", str(o.examples), "--epochs", str(o.epochs)]
    command += ["--together", str(o.together), "--json"]
    threads = {"OMP_NUM_THREADS": str(o.threads)}
    with Window() as window:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, **threads})
    said = json.loads(done.stdout)
    for source, why in said["failed"].items():
        print(f"left out: {source}: {why}", file=sys.stderr)
    n = max(1, len(said["made"]))
    cpu, wall = window.cpu / n, window.seconds / n
    rows = [
        Row("library", "adapters made", len(said["made"]), len(said["made"]), len(said["made"]), ""),
        Row("library", "CPU seconds an adapter", cpu, cpu, cpu, "s", note=f"{window.cpu:.0f} s in all"),
        Row("library", "seconds an adapter", wall, wall, wall, "s", note=f"{window.others:.2f} cores were others'"),
    ]
    shown = ("name", "kind", "metric", "score", "interval", "trainable_params")
    made = [{name: entry[name] for name in shown} for entry in said["made"]]
    keep("library", rows, {}, {"examples": o.examples, "epochs": o.epochs, "adapters": made, "failed": said["failed"]})


if __name__ == "__main__":
    main()
