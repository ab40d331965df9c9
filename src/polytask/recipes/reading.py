"""How a task's answers are found: by a head over hidden states, or in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, heads, perfect, text
from polytask.errors import UsageError
from polytask.recipes import terms
from polytask.tasks import Example, Task

LIMIT = 512  # tokens of a prompt and its answer
LONGER = 1.5  # an answer may be so many times as long as the longest one to learn


@dataclass(frozen=True)
class Reading:
    """in_text: `yes`, `no`, or `auto`: where the task's kind has no head.

    Of a head: pool: how tokens become one vector (None: the last token's for causal models, the mean for others);
    `masks`: label embeddings at so many mask tokens (`polytask.backbones.perfect`); `labels`: the labels' descriptions
    attend to the input (`polytask.backbones.crosstune`). pair: texts of a pair `separate` or `joint`. causal: False
    drops a decoder's causal mask; a text drops it in some blocks, "0011" in the upper half (`Backbone.opened`).
    Of a text: template: how prompts are worded. decide: `write`, take the option of most `likelihood`, `terms`, where
    several stand for each label (`polytask.recipes.terms`), or `auto`. terms: what they are chosen from; the words of
    the training texts, if None. objective: train the `likelihood` of right answers, or as `tfew` does
    (`polytask.training.tfew`) the unlikelihood of wrong options too.
    """

    in_text: Literal["auto", "yes", "no"] = "auto"
    pool: str | None = None
    pair: str = "separate"
    causal: bool | str = True
    template: str = "plain"
    decide: Literal["auto", "write", "likelihood", "terms"] = "auto"
    masks: int = perfect.MASKS
    terms: tuple[str, ...] | None = None
    objective: Literal["likelihood", "tfew"] = "likelihood"

    def writes(self, task: Task) -> bool:
        """Whether the answer is in text."""
        return self.in_text == "yes" or (self.in_text == "auto" and task.kind in ("generation", "choice"))

    def worded(self, task: Task, limit: int = LIMIT) -> HeadCard:
        """The card of an answer in text, without terms. Raises UsageError for a task that cannot be answered so."""
        if self.decide == "terms" and self.objective == "tfew":
            raise UsageError(f"task {task.name}: the objective tfew trains the labels' own names, not terms for them")
        decide = "likelihood" if self.decide == "terms" else self.decide
        return text.design(task, self.template, decide=decide, limit=limit, objective=self.objective)

    def design(self, base: Backbone, task: Task, limit: int | None = None) -> HeadCard:
        """The head card. Raises UsageError for a task or backbone that cannot be answered this way."""
        if not self.writes(task):
            if self.objective == "tfew":
                raise UsageError(f"task {task.name}: the objective tfew is for answers in text, not for a head")
            pool = self.pool or ("last" if base.kind == "decoder" else "mean")
            if isinstance(self.causal, str):
                _check_blocks(base, self.causal)
            if pool == "masks" and getattr(base.tokenizer, "mask_token_id", None) is None:
                raise UsageError(f"pool masks: {base.name} has no mask token; name an encoder such as minilm")
            return heads.design(task, pool=pool, pair=self.pair, causal=self.causal, masks=self.masks)
        if not base.writes:
            raise UsageError(
                f"task {task.name} is answered in text, and {base.name} cannot write; name a decoder or an "
                "encoder-decoder with --base"
            )
        card = self.worded(task, limit or LIMIT)
        if self.decide == "terms":
            card = terms.find(base, task, card, self.terms)
        longest = _longest(base, card, task.train)
        return text.with_room(card, max(8, round(LONGER * longest)))


def _check_blocks(base: Backbone, causal: str) -> None:
    """Raise UsageError where a backbone has no causal mask to drop, or fewer blocks than groups."""
    if base.kind != "decoder":
        raise UsageError(f"open blocks {causal}: {base.name} is no decoder and has no causal mask to drop")
    if len(causal) > len(base.blocks):
        raise UsageError(
            f"open blocks {causal}: {len(causal)} groups, and {base.name} has {len(base.blocks)} blocks; give fewer"
        )


def _longest(base: Backbone, card: HeadCard, examples: Sequence[Example]) -> int:
    """Tokens of the longest answer."""
    answers = {p.target for e in examples if e.output is not None and (p := text.ask(card, e)).answer is not None}
    return max((len(ids) for ids in base.tokenizer([*answers])["input_ids"]), default=0) if answers else 256
