"""How a training example looks as text: the wordings of `polytask.tasks.templates`, byte for byte.

A model can be asked only in words that it has seen, so prompt, demonstrations, labels and answer are written by
polytask's own `render`; what is drawn here is what it is given.

| surface | form | instruction, labels, demonstrations |
| --- | --- | --- |
| superni | SuperNI | 0 to 2 demonstrations, labels listed half of the time |
| plain | Plain | the same, demonstrations half of the time |
| chat | Chat, through the tokenizer's chat template | as plain |
| shots | Plain | 3 to 6 demonstrations and nothing else; all there is for a task without instruction |
| fields | Fields, below | as plain |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import polytask.tasks.templates as polytask
from bases.tokenizer import ASSISTANT, EOT, USER
from polytask.tasks import Example, Label, Task
from polytask.tasks.kinds import label_names
from polytask.tasks.templates import Chat, Plain, Prompt, SuperNI, Template

# How often each surface is drawn. Most weight goes to the one that the model is judged on.
SURFACES = {"superni": 0.40, "plain": 0.30, "chat": 0.12, "shots": 0.10, "fields": 0.08}
MANY, FEW = 20, 10  # of more than MANY labels, a prompt lists about FEW


@dataclass(frozen=True)
class Fields(Template):
    """A wording that polytask does not have, so that a user's own is less foreign: Task: … Text: … Answer: …"""

    def write(self, task: Task, example: Example, shown: Sequence[Example]) -> Prompt:
        said = [f"Text: {self.input(task, e)}\nAnswer: {self.answer(task, e)}\n\n" for e in shown]
        return Prompt(
            f"Task: {self.about(task)}\n\n{''.join(said)}Text: {self.input(task, example)}\nAnswer:", None, lead=" "
        )


FORMS: dict[str, type[Template]] = {"superni": SuperNI, "plain": Plain, "chat": Chat, "fields": Fields}


@dataclass(frozen=True)
class Source:
    """A task to train on: its train split is made into documents, and it has no other.

    `instructions` are alternatives; none where the task is only ever shown.
    """

    name: str  # group/task
    task: Task
    instructions: tuple[str, ...]

    @classmethod
    def of(cls, name: str, task: Task, train: Sequence[Example], instructions: Sequence[str] = ()) -> Source:
        """`instructions`: where the task has more than its own. Its labels become those that `train` shows."""
        known = {label.name: label for label in task.labels}
        labels = tuple(known.get(name, Label(name)) for name in label_names(train, task.kind))
        task = replace(task, train=tuple(train), validation=(), test=(), labels=labels)
        return cls(name, task, tuple(instructions or filter(None, [task.instruction])))

    @cached_property
    def card(self) -> Task:
        """The task without its examples, of which each prompt has its own few."""
        return replace(self.task, train=(), spans=self.task.bio)


def ask(
    source: Source, example: Example, pool: Sequence[Example], random: Random, *, held: bool = False
) -> tuple[Task, Template]:
    """The task as one prompt tells it, with the labels and demonstrations to show, and the form to write it in.

    `pool`: examples of the same task that may be shown. A `held` example is asked as superni, with two demonstrations.
    """
    card = source.card
    near = random.sample(pool, min(len(pool), 6))
    others = {e.text: e for e in (*near, *card.demonstrations) if e.text != example.text}
    short = [e for e in near if others.get(e.text) is e and _size(e) < 300]
    weights = dict(SURFACES)
    if len(short) < 3 or len(example.text) > 600:
        del weights["shots"]
    surface = "superni" if held else random.choices(list(weights), list(weights.values()))[0]
    if surface == "shots" or not source.instructions:
        shown = short[: random.randint(3, 6)]
        return replace(card, instruction="", demonstrations=tuple(shown)), Plain(labels=False)

    count = 2 if held else random.randint(0, 2) if surface == "superni" else random.choice((0, 0, 1, 2))
    candidates = [e for e in others.values() if _size(e) < 1000]
    listed = not held and random.random() < 0.5
    shown = random.sample(candidates, min(len(candidates), count))
    task = replace(
        card,
        instruction=random.choice(source.instructions),
        labels=_listed(card, (example, *shown), random) if listed else card.labels,
        demonstrations=tuple(shown),
    )
    return task, FORMS[surface](labels=listed)


def render(
    source: Source, example: Example, pool: Sequence[Example], random: Random, *, held: bool = False
) -> tuple[str, str]:
    """Prompt and answer of one example, drawn by `ask`."""
    task, form = ask(source, example, pool, random, held=held)
    prompt = polytask.render(task, example, form, demonstrations=len(task.demonstrations))
    return (chat(prompt.messages), str(prompt.answer)) if isinstance(form, Chat) else (prompt.text, prompt.target)


def chat(messages: Sequence[Mapping[str, str]]) -> str:
    """What the tokenizer's chat template makes of `messages` and a generation prompt."""
    ends = {"system": "\n\n", "user": "\n", "assistant": EOT}
    text = before = ""
    for turn in messages:
        role = turn["role"]
        # A system turn and the user turn after it are one.
        mark = "" if (before, role) == ("system", "user") else f"{ASSISTANT if role == 'assistant' else USER}\n"
        text += mark + turn["content"] + ends[role]
        before = role
    return f"{text}{ASSISTANT}\n"


def _listed(task: Task, examples: Sequence[Example], random: Random) -> tuple[Label, ...]:
    """The labels in a new order; of many, those of `examples` among some others."""
    labels = random.sample(task.labels, len(task.labels))
    if len(labels) > MANY:
        right = label_names(examples, task.kind)
        others = random.sample(labels, max(1, FEW - len(right)))
        some = {label.name for label in others}.union(right)
        labels = [label for label in labels if label.name in some]
    return tuple(labels)


def _size(example: Example) -> int:
    """Characters, about: the tags of a tagging task are short."""
    output = example.output
    return len(example.text) + len(str(output[0] if output and isinstance(output, tuple) else output))


OPPOSITE = Task(
    "opposite",
    "generation",
    instruction="Write the opposite of the word.",
    demonstrations=(Example("1", "hot", "cold"), Example("2", "early", "late")),
)
WISH = Task("wish", "generation", instruction="Say in one word what this person wants to do.")
# What the finished model is asked to write, for its card.
SAMPLES = (
    polytask.render(OPPOSITE, Example("3", "small"), "superni", demonstrations=2).text,
    polytask.render(WISH, Example("1", "I would like a table for two at eight"), "superni").text,
    "It was a dark and stormy night, and",
)
