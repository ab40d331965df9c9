"""How an example looks as text: a prompt that ends where the model is to go on, and the answer.

| surface | looks like | why |
| --- | --- | --- |
| definition | Definition: … Positive Example 1 - … Input: … Output: | Wang et al. 2022, arXiv 2204.07705 |
| plain | instruction, empty line, input, empty line | what people write |
| fields | Task: … Text: … Answer: | another wording of the same |
| chat | <|user|> … <|assistant|> | the tokenizer's chat template |
| shots | Input: … Output: … three to six times, no instruction | the task must be read from examples |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

EOT, PAD, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"

Pair = tuple[str, str]  # input, output

# How often each surface is drawn. Most weight goes to the one that the model is judged on.
SURFACES = {"definition": 0.45, "plain": 0.15, "fields": 0.15, "chat": 0.15, "shots": 0.10}


@dataclass(frozen=True, slots=True)
class Example:
    """One training example; `instructions` are alternatives, `demonstrations` stand with the task's definition."""

    source: str  # group/task
    instructions: tuple[str, ...]
    input: str
    output: str
    labels: tuple[str, ...] = ()
    demonstrations: tuple[Pair, ...] = ()


def definition(instruction: str, shown: Sequence[Pair], text: str) -> str:
    """The encoding of Tk-Instruct; the answer follows after a space."""
    parts = [f"Definition: {instruction}\n\n"]
    parts += [f"Positive Example {n} -\nInput: {x}\nOutput: {y}\n\n" for n, (x, y) in enumerate(shown, 1)]
    parts += ["Now complete the following example -\n"] if shown else []
    return "".join([*parts, f"Input: {text}\nOutput:"])


def chat(instruction: str, text: str) -> str:
    """What the tokenizer's chat template makes of one user turn and a generation prompt."""
    return f"{USER}\n{instruction}\n\n{text}\n{ASSISTANT}\n"


def shots(pairs: Sequence[Pair], text: str) -> str:
    """Input and output pairs and nothing else."""
    return "".join(f"Input: {x}\nOutput: {y}\n\n" for x, y in pairs) + f"Input: {text}\nOutput:"


def with_labels(instruction: str, labels: Sequence[str], gold: str, random: Random) -> str:
    """The instruction, now and then with the label list: all of a short one, ten of a long one with the gold one."""
    if not labels or random.random() < 0.5:
        return instruction
    shown = list(labels)
    if len(shown) > 20:
        keep = set(random.sample(shown, 9))
        shown = [label for label in shown if label in keep or label == gold or label in gold.split(", ")]
    random.shuffle(shown)
    return f"{instruction} Choose from: {', '.join(shown)}."


def render(example: Example, pool: Sequence[Pair], random: Random) -> tuple[str, str]:
    """Prompt and answer of one example on a surface drawn by `random`; `pool`: pairs of the same task for shots."""
    x, y = example.input, example.output
    short = [p for p in random.sample(pool, min(len(pool), 6)) if p[0] != x and len(p[0]) + len(p[1]) < 300]
    weights = dict(SURFACES)
    if len(short) < 3 or len(x) > 600:
        del weights["shots"]
    elif not example.instructions[0]:
        weights = {"shots": 1.0}
    surface = random.choices(list(weights), list(weights.values()))[0]
    if surface == "shots":
        return shots(short[: random.randint(3, 6)], x), f" {y}"
    instruction = with_labels(random.choice(example.instructions), example.labels, y, random)
    if surface == "definition":
        shown = [d for d in example.demonstrations if len(d[0]) + len(d[1]) < 1000]
        shown = random.sample(shown, min(len(shown), random.randint(0, 2)))
        return definition(instruction, shown, x), f" {y}"
    if surface == "plain":
        return f"{instruction}\n\n{x}\n\n", y
    if surface == "fields":
        return f"Task: {instruction}\nText: {x}\nAnswer:", f" {y}"
    return chat(instruction, x), y


def inputs_in(prompt: str) -> list[str]:
    """Every text in a rendered prompt that may be an input, shown examples included: what an audit has to look at.

    It reads the surfaces from their marks alone, so that it does not depend on how the prompt was made.
    """
    found = []
    for begin, end in (("Input: ", "\nOutput:"), ("Text: ", "\nAnswer:")):
        parts = prompt.split(begin)[1:]
        found += [begin.join(parts[n:]).split(end)[0] for n in range(len(parts))]
    if not prompt.endswith(("\nOutput:", "\nAnswer:")):
        rest = prompt.removesuffix(f"\n{ASSISTANT}\n").removesuffix("\n\n").split("\n\n")[1:]
        found += ["\n\n".join(rest[n:]) for n in range(len(rest))]
    return found
