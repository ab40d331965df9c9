"""Peak memory (largest resident set) of adapting MiniLM with LoRA to 5,000 short texts, in fresh processes.

Polytask runs `adapt` from reading the task to the measured adapter; PEFT + Trainer runs a few steps in fp32 and with
bf16 autocast, where its peak is reached soon.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

from bench.measure import THREADS, Row, facts, keep, options

TARGET = 1.5  # GiB


def peak() -> float:
    """GiB; ru_maxrss is in KiB on Linux and in bytes on macOS."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(found) / (1 << 30 if sys.platform == "darwin" else 1 << 20)


def ours(examples: int, epochs: int) -> None:
    import polytask as pt
    from bench import data

    task = data.part(data.task("banking77_intent"), examples, held=True, test=1000)
    pt.adapt(pt.load("minilm"), task, "lora", settings=pt.Settings(epochs=epochs))


def theirs(examples: int, bf16: bool) -> None:
    from bench import data, peer

    task = data.part(data.task("banking77_intent"), examples)
    labels = [task.targets.index(str(e.output)) for e in task.train]
    rows = peer.rows([e.text for e in task.train], labels, pad_to=None)
    steps = min(len(rows), 40 * 32)
    peer.trainer(peer.lora_model(len(task.targets)), rows[:steps], bf16=bf16).train()


def main() -> None:
    parts = ("polytask", "imports", "peft fp32", "peft bf16")
    if len(sys.argv) > 2 and sys.argv[1] == "--part":
        parser = argparse.ArgumentParser()
        for name, kind in (("part", str), ("examples", int), ("epochs", int), ("threads", int)):
            parser.add_argument(f"--{name}", type=kind)
        o = parser.parse_args()
        import torch

        torch.set_num_threads(o.threads)
        if o.part == "imports":
            import transformers  # noqa: F401

            import polytask.recipes  # noqa: F401
        elif o.part == "polytask":
            ours(o.examples, o.epochs)
        else:
            theirs(o.examples, "bf16" in o.part)
        print(f"peak {peak():.4f}")
        return
    o = options(__doc__ or "", examples=5000, epochs=2, repeat=1)
    runs: dict[str, list[float]] = {}
    for _ in range(o.repeat):
        for part in parts:
            given = ["--part", part, "--examples", o.examples, "--epochs", o.epochs, "--threads", o.threads or THREADS]
            command = [sys.executable, "-m", "bench.memory", *map(str, given)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
            runs.setdefault(part, []).append(float(done.stdout.split()[-1]))
    rows = []
    for part, found in runs.items():
        middle = sorted(found)[len(found) // 2]
        target = TARGET if part == "polytask" else None
        rows.append(Row("memory", part, middle, min(found), max(found), "GiB", target, "less", f"{len(found)} runs"))
    keep("memory", rows, {}, {"runs": runs, "examples": o.examples, "epochs": o.epochs, "cores": facts()["cores"]})


if __name__ == "__main__":
    main()
