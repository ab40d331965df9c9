"""Tasks put to a language model: prompts and answers as token ids, and how an answer is read.

A head with a `text` card has no tensors. The answer is written by the model's own language-model head, and what is
trained is the loss of the answer's tokens alone: −Σ_t log p(a_t | prompt, a_<t).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from polytask.adapters import HeadCard, TextCard
from polytask.backbones.backbone import Backbone
from polytask.errors import UsageError
from polytask.tasks import Example, Label, LabelCard, Task
from polytask.tasks.task import Output
from polytask.tasks.templates import Prompt, Template, parse, render, templates

Decide = Literal["auto", "write", "likelihood"]
Objective = Literal["likelihood", "tfew"]

MOST = 24  # labels, where wrong ones are trained too: each is a sequence, and all of one example's share a pass
FRONT = 0.75  # of a prompt that is too long: the share that is kept of its beginning, where the instruction stands


@dataclass(frozen=True)
class Asked:
    """A prompt as token ids, and the answer's ids with the token that ends it (None where there is no answer). `lead`
    is what the answer's tokens begin with before its first letter."""

    ids: list[int]
    target: list[int] | None
    lead: str = ""


def design(
    task: Task,
    template: str | Template = "plain",
    *,
    decide: Decide = "auto",
    limit: int = 512,
    objective: Objective = "likelihood",
) -> HeadCard:
    """The card by which a task is answered in text.

    `decide`: `write` the answer, or `likelihood`: the most probable of the labels or options; `auto` writes, but for
    choice. `objective`: train the `likelihood` of right answers, or with `tfew` the unlikelihood of wrong options too,
    and compare options per token. Raises UsageError for an unknown template, and where there is nothing to choose from
    or too much.
    """
    if task.kind == "retrieval":
        raise UsageError(f"task {task.name}: a retrieval task is not answered in text")
    if isinstance(template, str):
        if template not in templates():
            raise UsageError(f"no template {template!r}; the templates are {', '.join(templates())}")
        template = templates()[template]()
    if decide == "auto":
        decide = "likelihood" if task.kind == "choice" else "write"
    if decide == "likelihood" and task.kind not in ("classification", "choice"):
        raise UsageError(f"task {task.name}: the answers of a {task.kind} task cannot be listed, so they are written")
    if objective == "tfew" and decide != "likelihood":
        raise UsageError(f"task {task.name}: the objective tfew is for answers by likelihood, and these are written")
    if objective == "tfew" and len(task.labels) > MOST:
        raise UsageError(
            f"task {task.name}: the objective tfew takes at most {MOST} labels, and there are {len(task.labels)}; "
            "train the right ones alone: method ia3, decided by likelihood"
        )
    card = TextCard(
        template=template.name,
        options={f.name: getattr(template, f.name) for f in fields(template)},
        instruction=task.instruction,
        labels=tuple(LabelCard(name=label.name, description=label.description) for label in task.labels),
        spans=task.bio,
        decide=decide,
        normalise="length" if objective == "tfew" else "raw",
        objective="tfew" if objective == "tfew" else None,
        stop=template.stop if decide == "write" else (),
        limit=limit,
    )
    return HeadCard(kind=task.kind, targets=task.targets, pair="joint" if task.pair else "none", text=card)


def with_room(head: HeadCard, tokens: int) -> HeadCard:
    """The same head for answers of at most so many tokens, and of at most half the limit."""
    card = _card(head)
    room = min(tokens, card.limit // 2)
    return head.model_copy(update={"text": card.model_copy(update={"max_tokens": room})})


def task_of(head: HeadCard) -> Task:
    """The task as its prompts and answers need it: without examples."""
    card = _card(head)
    labels = tuple(Label(label.name, label.description) for label in card.labels)
    kind: Any = head.kind
    return Task(name="", kind=kind, instruction=card.instruction, labels=labels, spans=card.spans)


def described(label: Label) -> str:
    """A label as a text to embed: its name in words, and what it means."""
    name = " ".join(re.split(r"[_\s-]+", label.name))
    return f"{name}: {label.description}" if label.description else name


def form(head: HeadCard) -> Template:
    """The template with its options."""
    card = _card(head)
    return templates()[card.template](**_known(card.options))


def ask(head: HeadCard, example: Example) -> Prompt:
    """The prompt for an example, and its answer where it has one."""
    return render(task_of(head), example, form(head))


def taught(head: HeadCard, example: Example) -> Prompt:
    """The prompt for an example to learn from, with its answer.

    Where several terms may be said for its label, one is drawn by their weights, always the same one for the same
    example. So the loss is in expectation what the label is later scored by, −Σ_w r_w log p(w | x) / Σ_w r_w.
    """
    terms = _card(head).terms
    if terms is None or example.output is None:
        return ask(head, example)
    own = terms[head.targets.index(str(example.output))]
    [drawn] = random.Random(example.id).choices([t.term for t in own], [t.weight for t in own])
    return ask(head, replace(example, output=drawn))


def answer(head: HeadCard, written: str, example: Example) -> Output:
    """The output that a written answer says."""
    return parse(task_of(head), written, example, form(head))


def options(head: HeadCard, example: Example) -> tuple[str, ...]:
    """What an answer by likelihood is chosen from: the example's own options, or the task's labels."""
    if head.kind == "choice":
        given = example.extra.get("options")
        if not given:
            raise UsageError(f"example {example.id!r} has no options to choose from; give them with its input")
        return tuple(map(str, given))
    return head.targets


def encode(backbone: Backbone, head: HeadCard, prompts: Sequence[Prompt]) -> list[Asked]:
    """Prompts and answers as token ids, together at most the card's `limit` tokens, the answer at most half of them.

    A prompt that is too long loses its middle; the answer is cut at its end, and then has no end token.
    """
    limit = min(_card(head).limit, backbone.max_length)
    found = []
    for prompt in prompts:
        text, lead, written = _said(backbone, prompt)
        ids = prompt_ids(backbone, text, chat=written)
        if backbone.kind == "encoder-decoder":
            lead = ""  # a decoder of its own begins with the answer
        target = None
        if prompt.answer is not None:
            target = target_ids(backbone, text, lead + prompt.answer, ids, chat=written)[: max(1, limit // 2)]
        taken = len(target) if target is not None else min(_card(head).max_tokens, limit // 2)
        room = limit if backbone.kind == "encoder-decoder" else limit - taken
        found.append(Asked(_shortened(ids, max(1, room)), target, lead))
    return found


_PLAIN: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}


def _said(backbone: Backbone, prompt: Prompt) -> tuple[str, str, bool]:
    """The prompt's text, what stands between it and the answer, and whether it is the tokenizer's chat template that
    wrote it."""
    if prompt.turns and getattr(backbone.tokenizer, "chat_template", None):
        return conversation(backbone, prompt.messages), "", True
    return prompt.text, prompt.lead, False


def conversation(backbone: Backbone, messages: Sequence[Mapping[str, str]]) -> str:
    """Turns (`role`, `content`) as the tokenizer's chat template writes them, up to where the answer begins.

    Raises UsageError where the tokenizer has no chat template.
    """
    if not getattr(backbone.tokenizer, "chat_template", None):
        raise UsageError(f"{backbone.name} has no chat template; give the prompt as one text")
    turns = [dict(turn) for turn in messages]
    said: str = backbone.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return said


def target_ids(backbone: Backbone, text: str, said: str, asked: list[int], *, chat: bool = False) -> list[int]:
    """The tokens of the answer `said` as they stand in the whole text, and the one that ends it; `asked` are the
    prompt's."""
    tokenizer = backbone.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if backbone.kind == "encoder-decoder":
        ids: list[int] = tokenizer(text_target=said.lstrip(), **_PLAIN)["input_ids"]
        return ids if ids[-1:] == end else ids + end
    whole = prompt_ids(backbone, text + said, chat=chat)
    if whole[: len(asked)] == asked and len(whole) > len(asked):
        return whole[len(asked) :] + end
    # A token of the whole text goes over the seam; alone the model would never have been asked that way.
    alone: list[int] = tokenizer(said, add_special_tokens=False, **_PLAIN)["input_ids"]
    return alone + end


def prompt_ids(backbone: Backbone, text: str, *, chat: bool = False) -> list[int]:
    """A prompt's tokens. A `chat` template writes special tokens itself, so the tokenizer adds none; and a decoder goes
    on from its prompt, so an end token that the tokenizer puts there goes."""
    ids: list[int] = backbone.tokenizer(text, add_special_tokens=not chat, **_PLAIN)["input_ids"]
    end = backbone.tokenizer.eos_token_id
    if backbone.kind == "decoder" and not chat and len(ids) > 1 and ids[-1] == end:
        return ids[:-1]
    return ids or [end if end is not None else 0]


def _shortened(ids: list[int], room: int) -> list[int]:
    if len(ids) <= room:
        return ids
    front = int(FRONT * room)
    return ids[:front] + ids[len(ids) - (room - front) :]


def _known(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None}


def _card(head: HeadCard) -> TextCard:
    if head.text is None:
        raise UsageError(f"a {head.kind} head reads hidden states and writes nothing")
    return head.text
