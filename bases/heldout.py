"""How well a model knows documents that it was not trained on, by source.

    python -m bases.heldout --run bases/runs/base

Text: perplexity per token and bits per byte (which does not depend on the tokenizer). Tasks: the same over the answers,
and how many answers are right to the last token when each token is the likeliest one after the right ones before it:
greedy decoding would give exactly these. The documents are of training splits, kept apart; no test split is used.
Tasks are asked as polytask's superni template writes them, after two demonstrations and without a list of labels; a
task without instruction is shown three to six examples in the plain one (`templates.ask`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from bases.data import TEXTS
from bases.packing import ANSWER, TEXT, Cache, collate, rows_of
from bases.train import arithmetic, has_bf16, last, mask_of


@dataclass
class Score:
    """Sums over the held-out documents of one source."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    right: int = 0  # answers
    answers: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / max(1, self.tokens))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.bytes)


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, cache: Cache, tokenizer: Any, *, length: int, rows: int = 8, tokens: int = 100_000
) -> dict[str, Score]:
    """The score of each source, of at most about `tokens` tokens of it, in rows of `length`."""
    model.eval()
    device = next(model.parameters()).device
    precision = "bf16" if has_bf16(device) else "fp32"
    scores: dict[str, Score] = {}
    for number, name in enumerate(cache.names):
        here = np.flatnonzero((cache.documents["source"] == number) & (cache.documents["held"] == 1))
        if len(here):
            plan = rows_of(cache, here, length)
            last_row = min(len(plan), max(1, tokens // length))
            score = Score()
            for begin in range(0, last_row, rows):
                batch = collate(cache, plan, range(begin, min(begin + rows, last_row)), length, tokenizer.pad_token_id)
                batch = batch.to(device)
                with arithmetic(precision, device):
                    logits = model(
                        input_ids=batch.tokens,
                        position_ids=batch.position,
                        attention_mask=mask_of(batch.document, "sdpa"),
                        use_cache=False,
                    ).logits.float()
                asked = batch.part == (TEXT if name in TEXTS else ANSWER)
                nats = F.cross_entropy(logits[asked], batch.target[asked], reduction="sum")
                score.nats += float(nats)
                score.tokens += int(asked.sum())
                ids = batch.target[asked]
                score.bytes += len(tokenizer.decode(ids[ids != tokenizer.eos_token_id]).encode())
                if name not in TEXTS:
                    wrong = batch.document[asked][logits[asked].argmax(-1) != ids]
                    score.answers += len(batch.document[asked].unique())
                    score.right += len(batch.document[asked].unique()) - len(wrong.unique())
            scores[name] = score
    return scores


def grouped(scores: dict[str, Score]) -> dict[str, Score]:
    """The sums over each group of sources."""
    groups: dict[str, Score] = {}
    for name, score in scores.items():
        group = name.split("/")[0]
        groups[group] = groups.get(group, Score()) + score
    return groups


def lines(scores: dict[str, Score]) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield "| source | tokens | perplexity | bits per byte | answers right |"
    yield "| --- | --- | --- | --- | --- |"
    for name, s in scores.items():
        right = f"{s.right / s.answers:.0%} of {s.answers}" if s.answers else ""
        yield f"| {name} | {s.tokens:,} | {s.perplexity:.2f} | {s.bits_per_byte:.3f} | {right} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("bases/runs/base"))
    parser.add_argument("--cache", type=Path, default=Path("bases/cache"))
    parser.add_argument("--tokens", type=int, default=100_000, help="of each source, at most")
    args = parser.parse_args()

    from bases.finish import load_checkpoint

    folder = last(args.run)
    if folder is None:
        parser.error(f"no checkpoint in {args.run}")
    tokenizer = AutoTokenizer.from_pretrained(args.cache / "tokenizer")
    model, about = load_checkpoint(folder, tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    length = about["settings"]["length"]
    scores = measure(model, Cache.open(args.cache), tokenizer, length=length, tokens=args.tokens)
    print(json.dumps({"step": about["state"]["step"], "tokens": about["state"]["tokens"]}))
    print("\n".join(lines(grouped(scores) | {k: v for k, v in scores.items() if k.startswith("tasks/")})))


if __name__ == "__main__":
    main()
