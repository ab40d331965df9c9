"""Whole checkpoints merged: eight fine-tuned copies of a Llama-like model of 99 M parameters and their base, random
numbers, by mergekit's file and in mergekit's place.

Both sides read the same YAML and the same folders, and write a checkpoint: by `merge_checkpoints`, and by mergekit's
own `run_merge` (without its model card). Files are in bf16, sums in fp32 and rounded once, on both sides. What comes
out is compared number by number; by `dare_ties`, whose masks are drawn, the sum of magnitudes is. By `ties`, some bf16
numbers differ: many differences have one magnitude, and of those at the threshold mergekit keeps the ones that an
unstable sort puts first, which depends on the processor; polytask keeps the first. Then each side merges in a process
of its own: the most memory that a merge had beyond what was there before it, of its own and with the files that it
maps. `--layers` and `--words` make the model smaller.

mergekit stands in a folder of its own, since the rest of what it asks for is here: `pip install --no-deps --target
FOLDER mergekit immutables`, then `--peer FOLDER`. Without it, polytask's side is measured alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from bench.measure import Row, Samples, Turn, Window, keep, options, turns

MODELS = 8
WIDTH, INNER = 768, 2048
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.3},
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.2},
}
SIDES = ("polytask", "mergekit")


def checkpoints(folder: Path, dtype: torch.dtype, layers: int, words: int) -> int:
    """`base` and `m0` ... `m7`, each the base and a little noise; how many numbers one has."""
    block = {f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"}
    block |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (words, WIDTH), "lm_head": (words, WIDTH)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
        shapes |= {f"model.layers.{i}.{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
    shapes["model.norm"] = (WIDTH,)
    draw = torch.Generator().manual_seed(0)
    base = {f"{n}.weight": 0.02 * torch.randn(shape, generator=draw) for n, shape in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": WIDTH // 64,
        "num_key_value_heads": WIDTH // 64,
        "vocab_size": words,
        "tie_word_embeddings": False,
    }
    for name in ("base", *(f"m{k}" for k in range(MODELS))):
        (folder / name).mkdir(parents=True)
        own = {
            n: (t if name == "base" else t + 0.002 * torch.randn(t.shape, generator=draw)).to(dtype)
            for n, t in base.items()
        }
        save_file(own, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(t.numel() for t in base.values())


def recipe(folder: Path, method: str, dtype: str) -> Path:
    """The file that both sides read."""
    said: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {
                "model": str(folder / f"m{k}"),
                "parameters": {"weight": 0.5 + 0.1 * k} | {n: v for n, v in METHODS[method].items() if n == "density"},
            }
            for k in range(MODELS)
        ],
        "dtype": "float32",
        "out_dtype": dtype,
    }
    if method != "linear":
        said["base_model"] = str(folder / "base")
        whole = {n: v for n, v in METHODS[method].items() if n != "density"}
        said |= {"parameters": whole} if whole else {}
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(said), encoding="utf-8")
    return path


def merged(side: str, config: Path, out: Path) -> None:
    if side == "polytask":
        from polytask.composition.mergekit import merge_checkpoints, read_mergekit

        merge_checkpoints(read_mergekit(config), out)
        return
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    how = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(config.read_text(encoding="utf-8"))), str(out), how)


def turn_of(side: str, config: Path, out: Path) -> Turn:
    def turn(window: Window) -> float:
        shutil.rmtree(out, ignore_errors=True)
        with window:
            merged(side, config, out)
        return 1.0

    return turn


def apart(a: Path, b: Path) -> dict[str, float]:
    """How far two merged checkpoints are from each other: the largest difference over the largest number, the share of
    numbers that differ by more than a thousandth of that, and the ratio of the sums of magnitudes."""
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    most = max(float(t.abs().max()) for t in one.values())
    off = {n: (one[n].float() - other[n].float()).abs() / most for n in one}
    many = sum(int((t > 1e-3).sum()) for t in off.values()) / sum(t.numel() for t in off.values())
    sums = [sum(float(t.float().abs().sum()) for t in side.values()) for side in (one, other)]
    largest = max(float(t.max()) for t in off.values())
    return {"largest difference": largest, "share that differs": many, "magnitudes": sums[0] / sums[1]}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The most MiB that this process has beyond what it had at first: of its own, and with the files that it maps."""

    def now() -> dict[str, float]:
        with open("/proc/self/status", encoding="ascii") as file:
            said = dict(line.split(":", 1) for line in file)
        return {"own": int(said["RssAnon"].split()[0]) / 1024, "all": int(said["VmRSS"].split()[0]) / 1024}

    first, found, over = now(), {"own": 0.0, "all": 0.0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for name, value in now().items():
                found[name] = max(found[name], value - first[name])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def memory_of(side: str, folder: Path, methods: str, peer: str, threads: int) -> dict[str, dict[str, float]]:
    """By method, in MiB."""
    command = [sys.executable, "-m", "bench.merge", "--alone", side, str(folder), methods, str(threads)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), peer]))}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone(side: str, folder: Path, methods: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if side == "mergekit":
        import mergekit.merge  # noqa: F401
    else:
        import polytask.composition.mergekit  # noqa: F401
    seen = {}
    for method in methods.split(","):
        with watched() as seen[method]:
            merged(side, folder / f"{method}.yml", folder / f"{side} {method} alone")
        shutil.rmtree(folder / f"{side} {method} alone")
    print(json.dumps(seen))


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        side, folder, methods, threads = sys.argv[2:]
        alone(side, Path(folder), methods, int(threads))
        return
    o = options(
        __doc__ or "",
        rounds=3,
        limit=900.0,
        peer="",
        dtype="bfloat16",
        methods=",".join(METHODS),
        layers=7,
        words=32000,
    )
    if o.peer:
        sys.path.append(o.peer)
    sides = SIDES if o.peer else SIDES[:1]
    if not o.peer:
        print("no --peer FOLDER with mergekit: polytask alone", file=sys.stderr)
    rows: list[Row] = []
    samples: dict[str, Samples] = {}
    more: dict[str, Any] = {"same": {}, "memory": {}, "dtype": o.dtype, "models": MODELS}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        more["parameters"] = checkpoints(folder, getattr(torch, o.dtype), o.layers, o.words)
        for method in o.methods.split(","):
            config = recipe(folder, method, o.dtype)
            variants = {side: turn_of(side, config, folder / f"{side} {method}") for side in sides}
            samples[method] = turns(variants, rounds=o.rounds, limit=o.limit / len(METHODS), tries=1, clock=o.clock)
            if o.peer:
                more["same"][method] = apart(*(folder / f"{side} {method}" for side in sides))
                ratio = samples[method].ratio("mergekit", "polytask")
                rows.append(Row.of("merge", f"{method}: mergekit's time to polytask's", ratio, target=1.0))
            else:
                rows.append(Row.of("merge", method, samples[method].cost("polytask"), "s"))
            for side in sides:
                shutil.rmtree(folder / f"{side} {method}")
            print(f"{method} done", file=sys.stderr, flush=True)
        more["memory"] = {side: memory_of(side, folder, o.methods, o.peer, o.threads) for side in sides}
    for side, by_method in more["memory"].items():
        for method, found in by_method.items():
            own, note = found["own"], f"{found['all']:.0f} MiB with mapped files"
            rows.append(Row("merge", f"{method}: memory of {side}", own, own, own, "MiB", note=note))
    keep("merge", rows, samples, more)


if __name__ == "__main__":
    main()
