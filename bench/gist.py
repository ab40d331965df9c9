"""Which states of the backbone alone tell tasks apart: those of the middle, of the end, or both (`passes.gist`).

    POLYTASK_DATA=... python -m bench.gist [--base polytask-base]

Of each of TASKS, EXAMPLES training inputs make its mean, and TEST test inputs go to the nearest mean: whole, or cut to
their first 10 or 5 words. Shares are of inputs that go to their own task, and of those that would go to nobody, since
they lie further from the nearest task than 2 deviations of its own inputs. Below these, the classifier of `dlp-lora` on
the end, on the middle, and on the middle with pieces of the inputs learnt too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import polytask as pt
from polytask.composition.routing.dlp import Classifier, pieces
from polytask.composition.routing.nearest_task import NearestTask, Profile
from polytask.methods import passes

TASKS = (
    *("banking77_intent", "blimp_pairs", "btc_ner", "cr_polarity", "csabstruct", "ewt_upos"),
    *("goemotions", "hate_offensive", "scicite", "sgd_intent", "skillspan_skill", "snips_slots"),
)
EXAMPLES, TEST, LIMIT = 200, 60, 64
CUTS = (None, 10, 5)  # words

Embed = Callable[[Sequence[str]], Tensor]


def cut(texts: Sequence[str], words: int | None) -> list[str]:
    return [" ".join(text.split()[:words]) for text in texts] if words else [*texts]


def nearest(embed: Embed, train: Sequence[Sequence[str]], test: Sequence[Sequence[str]]) -> list[tuple[float, float]]:
    """For each cut: the share of inputs that go to their own task, and to nobody, in percent."""
    profiles = [Profile.of(embed(texts)) for texts in train]
    found = []
    for words in CUTS:
        own = nobody = 0.0
        for t, texts in enumerate(test):
            e = embed(cut(texts, words))
            own += sum(one.index == t for one in NearestTask(profiles, threshold=torch.inf).route(e)) / len(texts)
            nobody += sum(one.index is None for one in NearestTask(profiles).route(e)) / len(texts)
        found.append((100 * own / len(test), 100 * nobody / len(test)))
    return found


def classified(
    embed: Embed, train: Sequence[Sequence[str]], test: Sequence[Sequence[str]], *, short: bool
) -> list[float]:
    """For each cut: the share of inputs that a classifier gives to their own task, in percent."""
    known = [(f"{t:03}", "") for t in range(len(train))]
    also = [embed(pieces(texts)) for texts in train] if short else []
    made = Classifier.train(known, [embed(texts) for texts in train], also)
    right = [
        [float((made.logits(embed(cut(texts, words))).argmax(-1) == t).float().mean()) for t, texts in enumerate(test)]
        for words in CUTS
    ]
    return [100 * sum(row) / len(row) for row in right]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="minilm")
    base = pt.load(parser.parse_args().base)
    data = Path(os.environ["POLYTASK_DATA"])
    tasks = [pt.Task.read(data / "tasks" / name) for name in TASKS]
    train = [[e.text for e in task.train[:EXAMPLES]] for task in tasks]
    test = [[e.text for e in (task.test or task.validation)[:TEST]] for task in tasks]
    half = len(base.blocks) // 2
    ways: dict[str, Embed] = {
        "end": lambda texts: F.normalize(passes.embed(base, texts, LIMIT), dim=-1),
        "middle": lambda texts: F.normalize(passes.embed(base, texts, LIMIT, half), dim=-1),
        "gist": lambda texts: passes.gist(base, texts, LIMIT),
    }
    print(f"{len(TASKS)} tasks, {base.name}; whole inputs, their first 10 words, 5 words")
    for name, embed in ways.items():
        shares = nearest(embed, train, test)
        print(f"nearest by the {name}: " + ", ".join(f"{own:.1f} % (nobody {none:.1f} %)" for own, none in shares))
    for name, short in (("end", False), ("middle", False), ("middle", True)):
        right = classified(ways[name], train, test, short=short)
        said = f"classifier on the {name}{', pieces learnt too' if short else ''}"
        print(f"{said}: " + ", ".join(f"{share:.1f} %" for share in right))


if __name__ == "__main__":
    main()
