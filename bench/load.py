"""Loading an adapter from a library into an engine: the 1st and the 1,000th, against PEFT's `load_adapter`.

Polytask reads, checks (SHA-256, shapes, fingerprint) and makes ready: `Library.get` and `Engine.add`. PEFT loads the
same LoRA into a model that already has 0 and 63 others.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from bench.measure import Row, Samples, Window, keep, options, turns
from polytask.adapters import Adapter, Card, HeadCard
from polytask.backbones import heads, load
from polytask.backbones.loading import embedded_folder
from polytask.inference import Engine
from polytask.library import Library
from polytask.methods import build
from polytask.tasks import TaskCard

BATCH = 20  # loads in one turn, so that a turn is long enough to be judged


def main() -> None:
    o = options(__doc__ or "", rounds=11, limit=120.0, count=1000, peers=64)
    base = load("minilm")
    method = build("lora")
    task = TaskCard(name="made", kind="classification", metric="accuracy")
    head = HeadCard(kind="classification", targets=tuple("abcdefgh"))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)

    def made(i: int) -> Adapter:
        own = {n: t + 0.01 for n, t in method.start(base, i).items()}
        own |= {f"head/{n}": t for n, t in heads.start(head, base.hidden_size, i).items()}
        own["task/mean"] = torch.randn(2 * base.hidden_size, generator=torch.Generator().manual_seed(i))
        own["task/spread"] = torch.tensor([0.5, 0.1])
        return Adapter("lora", method.hyperparameters(), own, base.card(), Card(name=f"made-{i}", task=task), head)

    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder) / "library")
        for i in range(o.count):
            library.add(made(i))
        names = [entry.id for entry in library.list()]
        few, full = Engine(base), Engine(base)
        for name in names:
            full.add(library.get(name))

        def loads(engine: Engine, already: int) -> object:
            def turn(window: Window) -> float:
                for name in names[already : already + BATCH]:
                    engine.drop(name)
                with window:
                    for name in names[already : already + BATCH]:
                        engine.add(library.get(name))
                        if engine is few:
                            engine.drop(name)
                return BATCH

            return turn

        saved = Path(folder) / "peft"
        get_peft_model(AutoModel.from_pretrained(embedded_folder()), config).save_pretrained(saved)

        def peft_with(others: int) -> object:
            model = PeftModel.from_pretrained(AutoModel.from_pretrained(embedded_folder()), saved)
            for i in range(1, others):
                model.load_adapter(saved, f"a{i}")

            def turn(window: Window) -> float:
                with window:
                    for i in range(4):
                        model.load_adapter(saved, f"new{i}")
                for i in range(4):
                    model.delete_adapter(f"new{i}")
                return 4

            return turn

        variants = {
            "1st": loads(few, 0),
            "last": loads(full, o.count - BATCH),
            "peft 1st": peft_with(1),
            "peft last": peft_with(o.peers),
        }
        found: Samples = turns(variants, rounds=o.rounds, limit=o.limit, clock=o.clock)  # type: ignore[arg-type]
    said = {"1st": "1st", "last": f"{o.count}th", "peft 1st": "PEFT, 2nd", "peft last": f"PEFT, {o.peers + 1}th"}
    rows = [
        Row.of("load", said[v], found.cost(v), "ms", scale=1e3, better="less", target=None if "peft" in v else 3.0)
        for v in said
    ]
    ratio = Row.of("load", f"{o.count}th to 1st", found.ratio("last", "1st"), target=1.2, better="less")
    peer = Row.of("load", f"PEFT {o.peers + 1}th to 2nd", found.ratio("peft last", "peft 1st"))
    keep("load", [*rows, ratio, dataclasses.replace(peer, better="less")], {"all": found})


if __name__ == "__main__":
    main()
