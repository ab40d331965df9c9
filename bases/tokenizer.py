"""Step 1: train the tokenizer. Byte-level BPE with 8,192 tokens, so any text at all comes back as it was.

    python -m bases.tokenizer --data $POLYTASK_DATA --cache bases/cache

Digits stand alone, so that 1234 and 1235 share three tokens; 8,192 tokens because the embedding of a model of 8 to 25
million parameters should not be most of it (here an eighth to a quarter).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOT, PAD, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"
SIZE = 8192
MOST = {"tasks": 300_000, "superni": 50_000, "induction": 10_000}  # characters of one task, so that none rules
SPECIAL = (EOT, PAD, USER, ASSISTANT)  # ids 0 to 3

# With a generation prompt it gives `templates.chat`.
CHAT = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}{{ '<|assistant|>\\n' + m['content'] + '<|endoftext|>' }}"
    "{%- elif m['role'] == 'system' -%}{{ '<|user|>\\n' + m['content'] + '\\n\\n' }}"
    "{%- else -%}"
    "{{ ('' if loop.previtem is defined and loop.previtem['role'] == 'system' else '<|user|>\\n') }}"
    "{{ m['content'] + '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)


def train(texts: Iterable[str], size: int = SIZE) -> Tokenizer:
    """A byte-level BPE of `size` tokens, special ones and the 256 bytes included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, length: int = 1024) -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers.AutoTokenizer` loads it, with the chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOT,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )
    fast.save_pretrained(folder)
    return fast


def sample(data: Path, characters: int) -> Iterator[tuple[str, str]]:
    """(group, text) from the start of each text source and of each task, about `characters` in all."""
    from bases.data import MIX, TEXTS, read_sources, read_texts
    from polytask.tasks.templates import Plain, render

    left = {group: int(share * characters) for group, (share, _) in MIX.items()}
    for group in TEXTS:
        most = max(2000, left[group] // 180)  # a piece of each novel says more than the whole of a few
        for text in read_texts(data, group):
            piece = text[:most]
            left[group] -= len(piece)
            if left[group] < 0:
                break
            yield group, piece
    for source in read_sources(data):
        group, done = source.name.split("/")[0], 0
        bare = replace(source.card, instruction="", demonstrations=())
        for example in source.task.train:
            if done >= MOST[group] or left[group] <= 0:
                break
            # The instruction and its demonstrations once for each task: more would make whole phrases into tokens.
            first = render(source.task, example, "superni", demonstrations=2) if not done else None
            prompt = first or render(bare, example, Plain(labels=False))
            text = prompt.text + prompt.target
            done += len(text)
            left[group] -= len(text)
            yield group, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("POLYTASK_DATA"), help="default: $POLYTASK_DATA")
    parser.add_argument("--cache", type=Path, default=Path("bases/cache"))
    parser.add_argument("--megabytes", type=float, default=24, help="characters to learn from, in millions")
    args = parser.parse_args()
    if args.data is None:
        parser.error("set POLYTASK_DATA or give --data")

    texts = list(sample(args.data, int(args.megabytes * 1e6)))
    tokenizer = train(text for _, text in texts)
    save(tokenizer, args.cache / "tokenizer")

    print(f"{tokenizer.get_vocab_size()} tokens from {sum(len(t) for _, t in texts) / 1e6:.1f} million characters")
    print("source            bytes per token")
    for group in dict.fromkeys(group for group, _ in texts):
        some = [text for g, text in texts if g == group][:300]
        tokens = sum(len(e) for e in tokenizer.encode_batch_fast(some))
        print(f"{group:<16}  {sum(len(t.encode()) for t in some) / tokens:.2f}")


if __name__ == "__main__":
    main()
