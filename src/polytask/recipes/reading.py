"""How a task's answers are found: by a head over hidden states, or in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, heads, text
from polytask.errors import UsageError
from polytask.tasks import Example, Task

LIMIT = 512  # tokens of a prompt and its answer
LONGER = 1.5  # an answer may be so many times as long as the longest one to learn


@dataclass(frozen=True)
class Reading:
    """in_text: `yes`, `no`, or `auto`: where the task's kind has no head.

    Of a head: pool: how tokens become one vector (None: the last token's for causal models, the mean for others). pair:
    texts of a pair `separate` or `joint`. causal: False drops a decoder's causal mask.
    Of a text: template: how prompts are worded. decide: `write`, take the option of most `likelihood`, or `auto`.
    """

    in_text: Literal["auto", "yes", "no"] = "auto"
    pool: str | None = None
    pair: str = "separate"
    causal: bool = True
    template: str = "plain"
    decide: text.Decide = "auto"

    def writes(self, task: Task) -> bool:
        """Whether the answer is in text."""
        return self.in_text == "yes" or (self.in_text == "auto" and task.kind in ("generation", "choice"))

    def design(self, base: Backbone, task: Task, limit: int | None = None) -> HeadCard:
        """The head card. Raises UsageError for a task or backbone that cannot be answered this way."""
        if not self.writes(task):
            pool = self.pool or ("last" if base.kind == "decoder" else "mean")
            return heads.design(task, pool=pool, pair=self.pair, causal=self.causal)
        if not base.writes:
            raise UsageError(
                f"task {task.name} is answered in text, and {base.name} cannot write; name a decoder or an "
                "encoder-decoder with --base"
            )
        card = text.design(task, self.template, decide=self.decide, limit=limit or LIMIT)
        longest = _longest(base, card, task.train)
        return text.with_room(card, max(8, round(LONGER * longest)))


def _longest(base: Backbone, card: HeadCard, examples: Sequence[Example]) -> int:
    """Tokens of the longest answer."""
    answers = {p.target for e in examples if e.output is not None and (p := text.ask(card, e)).answer is not None}
    return max((len(ids) for ids in base.tokenizer([*answers])["input_ids"]), default=0) if answers else 256
