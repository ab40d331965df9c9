"""Tasks as text: a prompt and an answer from an example, and an output from what a model wrote.

`render` and `parse` are inverse: what a template writes as an answer, `parse` reads back as the output. A template says
how instruction, labels, demonstrations and input stand together; how an output is written depends on its kind only:

| kind | answer |
| --- | --- |
| classification | the label: `card_arrival` |
| multilabel | `joy; anger`, or `none` |
| tagging, BIO | the spans in order, `city: San Jose; timeRange: next week`, or `none` |
| tagging, plain | one tag for each token, `PRON VERB DET` |
| regression, similarity | the number: `4.5` |
| choice | the option's text, or with `letters` its letter: `B` |
| generation | the text; the first one where several are accepted |

In a list, `\\;` is a semicolon that belongs to a label or a token. Where the words of a span also stand earlier in the
text, after the span before, ` #2` says that the second time is meant.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from polytask.errors import PolytaskError, UsageError
from polytask.tasks.structured import escape, pair, parts, unescape
from polytask.tasks.task import Example, Output, Task
from polytask.tasks.text_scorers import numbers

_NONE = "none"


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` asks, `answer` is what to write (None where the example has no output).

    `lead` stands between the two: a space belongs to the answer's first token, since that is how tokenizers cut.
    """

    text: str
    answer: str | None
    lead: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def target(self) -> str:
        """What a model is trained to write after `text`."""
        return self.lead + (self.answer or "")

    @property
    def messages(self) -> list[dict[str, str]]:
        """For `tokenizer.apply_chat_template(..., add_generation_prompt=True)`; a template without turns is one."""
        return [{"role": role, "content": said} for role, said in self.turns or (("user", self.text),)]


@dataclass(frozen=True)
class Template:
    """How a prompt is put together: a subclass says it in `write`.

    `labels`: list the task's labels with their descriptions. `letters`: a choice is answered by its option's letter.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stop: ClassVar[tuple[str, ...]] = ()
    """What a model writes when it goes on to a next example: stop strings for decoding."""

    labels: bool = True
    letters: bool = False

    def write(self, task: Task, example: Example, shown: Sequence[Example]) -> Prompt:
        """The prompt for `example` after the demonstrations `shown`; its answer is filled in by `render`."""
        raise NotImplementedError(type(self).__name__)

    def input(self, task: Task, example: Example) -> str:
        """The input: tokens with spaces between them, a pair as "Text 1: …" and "Text 2: …", options as "(A) …"."""
        text = example.text if example.pair is None else f"Text 1: {_joined(example.input)}\nText 2: {example.pair}"
        if task.kind != "choice":
            return text.strip()
        options = (f"({_letter(n)}) {option}" for n, option in enumerate(_options(example)))
        return "\n".join([text.strip(), "Options:", *options])

    def answer(self, task: Task, example: Example) -> str:
        """The output as text; see the table above."""
        output = example.output
        if output is None:
            raise PolytaskError(f"example {example.id!r} has no output to write as an answer")
        if task.kind in ("regression", "similarity"):
            number = float(output)  # type: ignore[arg-type]
            return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
        if task.kind == "tagging":
            tags = tuple(output) if isinstance(output, tuple) else (str(output),)
            return _spans_text(_tokens(example), tags) if task.bio else " ".join(map(_tag_text, tags))
        if task.kind == "multilabel":
            labels = output if isinstance(output, tuple) else (str(output),)
            return "; ".join(map(escape, labels)) or _nothing(task)
        if task.kind == "choice" and self.letters:
            return _letter(_options(example).index(str(output)))
        text = output[0] if isinstance(output, tuple) else str(output)
        return text.strip() if task.kind == "generation" else text

    def about(self, task: Task) -> str:
        """The instruction, and where asked for the labels: a line "Labels:" and "- name: description" for each."""
        lines = [f"- {label.name}" + (f": {label.description}" if label.description else "") for label in task.labels]
        how = {"multilabel": f' (as many as fit, "; " between them, or "{_nothing(task)}")'}.get(task.kind, "")
        if task.kind == "tagging":
            spans = f' (write "label: words" for each span in order, "; " between them, or "{_NONE}")'
            how = spans if task.bio else " (one for each word, in order)"
        listed = "\n".join([f"Labels{how}:", *lines]) if self.labels and lines else ""
        return "\n\n".join(filter(None, [task.instruction.strip(), listed]))


TEMPLATES: dict[str, type[Template]] = {}


def template(name: str, *, paper: str = "", stop: tuple[str, ...] = ()) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make a frozen dataclass of the class and enter it under `name`."""

    def enter(cls: type[Any]) -> type[Any]:
        cls.name, cls.paper, cls.stop = name, paper, stop
        cls = dataclass(frozen=True)(cls)
        TEMPLATES[name] = cls
        return cls

    return enter


@template("plain", stop=("\n\n",))
class Plain(Template):
    """Instruction, labels, demonstrations and the input, an empty line between them:

        <instruction>

        Labels:
        - <name>: <description>

        Input: <demonstration>
        Output: <its answer>

        Input: <input>
        Output:

    The answer follows after one space.
    """

    def write(self, task: Task, example: Example, shown: Sequence[Example]) -> Prompt:
        said = [f"Input: {self.input(task, e)}\nOutput: {self.answer(task, e)}" for e in shown]
        asked = f"Input: {self.input(task, example)}\nOutput:"
        return Prompt("\n\n".join(filter(None, [self.about(task), *said, asked])), None, lead=" ")


@template(
    "superni",
    paper="Wang et al. 2022, arXiv 2204.07705",
    stop=("\n\n", "Positive Example", "Now complete the following example"),
)
class SuperNI(Template):
    """The encoding of Tk-Instruct, as its collator writes it, with the spaces before Positive, Output and Explanation:

        Definition: <instruction>.

         Positive Example 1 -
        Input: <input>.
         Output: <answer>.
         Explanation: <explanation>.

        Now complete the following example -
        Input: <input>.
        Output:

    The answer follows after one space. The collator's text ends in that space; here it is the `lead`, since byte-level
    tokenizers have it in the answer's first token.

    Each piece gets a full stop unless it ends in ASCII punctuation; the answer to learn gets none. The demonstrations
    are the positive examples; `negatives` of the task's wrong ones follow as "Negative Example". `explanations` are
    shown where an example has one. The paper's main model saw the definition and two positive examples, and no list of
    labels.
    """

    labels: bool = False
    negatives: int = 0
    explanations: bool = False

    def write(self, task: Task, example: Example, shown: Sequence[Example]) -> Prompt:
        about = self.about(task)
        pieces = [_stopped(f"Definition: {about}") + "\n\n"] if about else []
        for word, examples in (("Positive", shown), ("Negative", task.negatives[: self.negatives])):
            for number, e in enumerate(examples, 1):
                lines = [f" {word} Example {number} -", _stopped(f"Input: {self.input(task, e)}")]
                lines.append(_stopped(f" Output: {self.answer(task, e)}"))
                why = str(e.extra.get("explanation") or "").strip()
                if self.explanations and why:
                    lines.append(_stopped(f" Explanation: {why}"))
                pieces.append("\n".join(lines) + "\n\n")
        asked = _stopped(f"Input: {self.input(task, example)}")
        return Prompt("".join(pieces) + f"Now complete the following example -\n{asked}\nOutput:", None, lead=" ")


@template("chat")
class Chat(Template):
    """Turns for a model's own chat template, which its tokenizer applies to `Prompt.messages`:

        system: <instruction and labels>      (with system=False, the first lines of the first user turn)
        user: <demonstration>
        assistant: <its answer>
        user: <input>

    `Prompt.text` is what is said, with an empty line between the turns, for models without a chat template.
    """

    system: bool = True

    def write(self, task: Task, example: Example, shown: Sequence[Example]) -> Prompt:
        turns = []
        for e in shown:
            turns += [("user", self.input(task, e)), ("assistant", self.answer(task, e))]
        turns.append(("user", self.input(task, example)))
        about = self.about(task)
        if about and self.system:
            turns.insert(0, ("system", about))
        elif about:
            turns[0] = ("user", f"{about}\n\n{turns[0][1]}")
        return Prompt("\n\n".join(said for _, said in turns), None, lead="\n\n", turns=tuple(turns))


def templates() -> dict[str, type[Template]]:
    """Every template by name."""
    return dict(sorted(TEMPLATES.items()))


def render(
    task: Task, example: Example, template: str | Template = "plain", *, demonstrations: int = 0, seed: int = 0
) -> Prompt:
    """The prompt for `example`, after as many demonstrations as asked for or as there are.

    Demonstrations are the task's own, in order, then train in an order drawn from `seed`, the same for every example,
    so that prompts share their beginning. An example is never shown to itself, nor one with the same input.
    """
    if task.kind == "retrieval":
        raise UsageError(f"task {task.name!r}: retrieval tasks have no text form")
    form = _form(template)
    prompt = form.write(task, example, _shown(task, example, demonstrations, seed))
    answer = None if example.output is None else form.answer(task, example)
    return Prompt(prompt.text, answer, prompt.lead, prompt.turns)


def parse(task: Task, text: str, example: Example | None = None, template: str | Template = "plain") -> Output:
    """The output that `text` says; where it says none, the text itself, so that it counts as wrong.

    A label or option is the one that is equal to the text; else equal without case, outer punctuation and the
    difference between space, hyphen and underscore; else the longest one that the text begins with ("positive, since
    …"); else the only one that begins with the text. A number is the first one. Tagging needs the example for its
    tokens, and choice for its options: the tags are as many as the tokens, "" where the text has too few, and a span
    whose words are not in the text is left out.
    """
    form = _form(template)
    if task.kind in ("regression", "similarity"):
        found = numbers(text)
        return float(found[0]) if found else text.strip()
    if task.kind in ("tagging", "choice") and example is None:
        raise UsageError(f"a {task.kind} answer is read with its example: give parse(task, text, example)")
    names = [label.name for label in task.labels]
    if task.kind == "classification":
        return _nearest(text, names) or text.strip()
    if task.kind == "multilabel":
        if not text.strip() or _plain(text) == _nothing(task):
            return ()
        said = [unescape(part) for part in parts(text)]
        return tuple(dict.fromkeys(_nearest(part, names) or part for part in said))
    if task.kind == "tagging" and example is not None:
        if task.bio:
            return _read_spans(text, _tokens(example), names)
        tags = [_nearest(tag, names) or tag for tag in map(_read_tag, re.findall(r"(?:\\.|[^\s\\])+", text, re.S))]
        missing = len(example.input) - len(tags)
        return (*tags[: len(example.input)], *("" for _ in range(missing)))
    if task.kind == "choice" and example is not None:
        options = _options(example)
        by = [_lettered, _nearest] if form.letters else [_nearest, _lettered]
        return by[0](text, options) or by[1](text, options) or text.strip()
    return text.strip()


def _form(template: str | Template) -> Template:
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise UsageError(f"no template {template!r}; the templates are {', '.join(templates())}")
    return TEMPLATES[template]()


# -- demonstrations ----------------------------------------------------------------------------------------------------


def _shown(task: Task, example: Example, count: int, seed: int) -> list[Example]:
    found: list[Example] = []
    seen = {example.text}
    for candidate in _candidates(task, seed):
        if len(found) == count:
            break
        if candidate.output is not None and candidate.id != example.id and candidate.text not in seen:
            seen.add(candidate.text)
            found.append(candidate)
    return found


def _candidates(task: Task, seed: int) -> Iterator[Example]:
    yield from task.demonstrations
    for n in _order(len(task.train), seed):
        yield task.train[n]


@lru_cache(maxsize=16)
def _order(n: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(n), n))


# -- labels and options ------------------------------------------------------------------------------------------------


def _nearest(text: str, names: Sequence[str]) -> str | None:
    for same in (text, text.strip()):
        if same in names:
            return same
    said = _plain(text)
    plain = [(_plain(name), name) for name in names]
    for short, name in plain:
        if short and short == said:
            return name
    begun = [(len(short), name) for short, name in plain if short and re.match(re.escape(short) + r"(?!\w)", said)]
    if begun:
        return max(begun, key=lambda found: found[0])[1]
    cut = [name for short, name in plain if said and short.startswith(said)]
    return cut[0] if len(cut) == 1 else None


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).strip(" \"'`.,:;!*()").casefold()


def _nothing(task: Task) -> str:
    """How no label is written: a word that is no label."""
    taken = {_plain(label.name) for label in task.labels}
    return next(word for word in (_NONE, "nothing", *(f"{_NONE} {n}" for n in range(len(taken)))) if word not in taken)


def _options(example: Example) -> tuple[str, ...]:
    options = example.extra.get("options")
    if not isinstance(options, list | tuple) or not options:
        raise PolytaskError(f"example {example.id!r} has no options; a choice example has a list in extra['options']")
    return tuple(map(str, options))


def _letter(number: int) -> str:
    """A to Z, then AA, AB, …"""
    number, last = divmod(number, 26)
    return (_letter(number - 1) if number else "") + string.ascii_uppercase[last]


def _lettered(text: str, options: Sequence[str]) -> str | None:
    """The option whose letter begins the text: "B", "(b)", "B. Rome"."""
    letters = {_letter(n): option for n, option in enumerate(options)}
    found = re.fullmatch(r"[\W_]*([A-Za-z]{1,3})(?:\s*[).:,\n].*|\s*)", text, re.S)
    return letters.get(found[1].upper()) if found else None


# -- tags --------------------------------------------------------------------------------------------------------------


def _tokens(example: Example) -> tuple[str, ...]:
    return (example.input,) if isinstance(example.input, str) else example.input


def _joined(tokens: str | Sequence[str]) -> str:
    return tokens if isinstance(tokens, str) else " ".join(tokens)


def _tag_text(tag: str) -> str:
    return re.sub(r"[\\\s]", r"\\\g<0>", tag)


def _read_tag(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.S)


def _spans_text(tokens: Sequence[str], tags: Sequence[str]) -> str:
    written, cursor = [], 0
    for name, start, end in _spans(tags):
        words = " ".join(tokens[start:end])
        times = 1 + list(_occurrences(tokens, words, cursor)).index((start, end))
        # Words that end like the mark of a later occurrence get a backslash.
        value = re.sub(r"(?<!\S)#(\d+)$", r"\\#\1", escape(words))
        written.append(f"{escape(name, ':=')}: {value}" + (f" #{times}" if times > 1 else ""))
        cursor = end
    return "; ".join(written) or _NONE


def _spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, start, end) of each span; an I- without its B- opens one, as in conlleval."""
    start = 0
    while start < len(tags):
        end = start + 1
        if tags[start].startswith(("B-", "I-")):
            name = tags[start][2:]
            while end < len(tags) and tags[end] == f"I-{name}":
                end += 1
            yield name, start, end
        start = end


def _occurrences(tokens: Sequence[str], words: str, start: int) -> Iterator[tuple[int, int]]:
    """Where the tokens, joined, are `words` up to white space."""
    wanted = " ".join(words.split())
    for a in range(start, len(tokens)):
        joined = ""
        for b in range(a + 1, len(tokens) + 1):
            joined = " ".join([joined, *tokens[b - 1].split()]).strip()
            if joined == wanted:
                yield a, b
            if len(joined) > len(wanted):
                break


def _read_spans(text: str, tokens: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    tags = ["O"] * len(tokens)
    cursor = 0
    folded = [token.casefold() for token in tokens]
    for part in parts(text):
        name, value = pair(part)
        marked = re.fullmatch(r"(.*\S) #(\d+)", value, re.S)
        words, times = (marked[1], int(marked[2])) if marked else (value, 1)
        words = unescape(words)
        if not name or not words:
            continue
        # In order and as written; else, since models are not exact, wherever the words stand and in any case.
        places = list(_occurrences(tokens, words, cursor))[times - 1 : times]
        ordered = bool(places)
        if not places:
            anywhere = [*_occurrences(tokens, words, 0), *_occurrences(folded, words.casefold(), 0)]
            places = [(a, b) for a, b in anywhere if set(tags[a:b]) == {"O"}][:1]
        for a, b in places:
            label = _nearest(unescape(name), names) or unescape(name)
            tags[a:b] = [f"B-{label}", *[f"I-{label}"] * (b - a - 1)]
            cursor = b if ordered else cursor
    return tuple(tags)


def _stopped(piece: str) -> str:
    return piece if piece[-1] in string.punctuation else piece + "."
