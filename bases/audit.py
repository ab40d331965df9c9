"""What must not be learned: finds held-out inputs in training text.

Three nets, from coarse to fine. An input of eight words or more is found as any 13 words in a row of it (or all of it,
where it is shorter) inside any text, case and punctuation aside; this is the contamination test of Brown et al. 2020
(arXiv 2005.14165, appendix C). An input of three words or more is found where a line of a text is it. An input of any
length is found where the input of a training example, or an output of three words or more, is it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from bases.tokenizer import ASSISTANT, USER

LONG, SHORT, LINE = 13, 8, 3  # words

# Scripts that put no spaces between words give one "word" per character.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\w+")
_MARK = re.compile(r"^\s*(?:(?:Input|Output|Text(?: \d)?|Answer|Q|A):\s*)+")
_LINE = re.compile(r"\n|<\|\w+\|>")  # a turn of a chat ends in a special token
# What stands around an input; the one after it may belong to a later input, so that each is looked for by itself.
_AROUND = [
    re.compile(f"{begin}(?=(.*?){end})", re.DOTALL)
    for begin, end in (
        ("Input: ", "\n ?Output:"),
        ("Text: ", "\nAnswer:"),
        (re.escape(f"{USER}\n"), re.escape(f"\n{ASSISTANT}\n")),
    )
]


def words(text: str) -> list[str]:
    """The words of a text, casefolded, without punctuation."""
    return _WORD.findall(text.casefold())


def inputs_in(prompt: str) -> list[str]:
    """Every text in a rendered prompt that may be an input, shown examples included: what an audit has to look at.

    It reads the surfaces from their marks alone, so that it does not depend on how the prompt was made.
    """
    texts = [found[1] for around in _AROUND for found in around.finditer(prompt)]
    # The first turn of a chat begins with instruction and labels, and superni puts full stops.
    turns = [text.split("\n\n") for text in texts if "\n\n" in text]
    texts += ["\n\n".join(parts[n:]) for parts in turns for n in range(1, len(parts))]
    return [*texts, *(text[:-1] for text in texts if text.endswith("."))]


def _grams(text: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(text[start:] for start in range(size)), strict=False)


class HeldOut:
    """The inputs that no training text may hold, by the task that they come from."""

    def __init__(self, inputs: Iterable[tuple[str, str]]) -> None:
        self.raw: dict[str, str] = {}
        self.folded: dict[str, str] = {}
        self.grams: dict[int, str] = {}  # by hash; 64 bits, so a chance hit is out of the question
        self.openings: set[tuple[str, ...]] = (
            set()
        )  # the first SHORT words of each gram: one C-speed look rules out most
        self.sizes: set[int] = set()
        for task, text in inputs:
            self.raw.setdefault(text.strip(), task)
            found = words(text)
            self.folded.setdefault(" ".join(found), task)
            if len(found) >= SHORT:
                size = min(LONG, len(found))
                self.sizes.add(size)
                for gram in _grams(found, size):
                    self.grams.setdefault(hash(gram), task)
                    self.openings.add(gram[:SHORT])
        self.raw.pop("", None)
        self.folded.pop("", None)

    def in_field(self, text: str, *, is_input: bool) -> str | None:
        """The task one of whose held-out inputs `text` is, exactly or but for case and punctuation."""
        found = words(text)
        if not is_input and len(found) < LINE:
            return None
        return self.raw.get(text.strip()) or self.folded.get(" ".join(found))

    def in_document(self, prompt: str, answer: str) -> str | None:
        """The task of a held-out input that a rendered example has anywhere."""
        return (
            next((task for text in inputs_in(prompt) if (task := self.in_field(text, is_input=True))), None)
            or self.in_field(answer, is_input=False)
            or self.in_text(prompt + answer)
            or self.in_lines(prompt + answer)
        )

    def in_text(self, text: str) -> str | None:
        """The task of a held-out input of which `text` has LONG words in a row (all, where it has SHORT to LONG)."""
        found = words(text)
        if self.openings.isdisjoint(_grams(found, SHORT)):
            return None
        grams = (gram for size in self.sizes for gram in _grams(found, size))
        return next((self.grams[hash(gram)] for gram in grams if hash(gram) in self.grams), None)

    def in_lines(self, text: str) -> str | None:
        """The task of a held-out input of LINE words or more that is a line of `text`."""
        return next((task for line in _LINE.split(text) if (task := self._is_line(line))), None)

    def _is_line(self, line: str) -> str | None:
        found = words(_MARK.sub("", line))
        return self.folded.get(" ".join(found)) if len(found) >= LINE else None


def report(held: HeldOut, documents: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How many (prompt, answer) documents hold a held-out input: all counts but `documents` are 0, or there is a leak.

    exact: the input of the example, or of a shown one, is one, character by character; casefolded: but for case and
    punctuation, or the answer is one; 13-gram: LONG words in a row are of one; lines: a line is one.
    """
    counts = {"documents": 0, "exact": 0, "casefolded": 0, "13-gram": 0, "lines": 0}
    for prompt, answer in documents:
        fields = inputs_in(prompt)
        counts["documents"] += 1
        counts["exact"] += any(text.strip() in held.raw for text in fields)
        counts["casefolded"] += any(held.in_field(text, is_input=True) for text in fields)
        counts["casefolded"] += held.in_field(answer, is_input=False) is not None
        counts["13-gram"] += held.in_text(prompt + answer) is not None
        counts["lines"] += held.in_lines(prompt + answer) is not None
    return counts
