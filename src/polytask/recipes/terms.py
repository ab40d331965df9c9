"""Terms that may be said for a label: SciPrompt's verbalizer, for a language model that writes.

    r_cw = cos(e_c, e_w)                                       how well term w goes with label c
    W_c = {w : c = argmax_k r_kw, r_cw ≥ r₀, w begins with a token of the vocabulary's likelier half}
    score_c = Σ_{w ∈ W_c} r_cw log p(w | x) / Σ_{w ∈ W_c} r_cw

You, Han, Zhu, Ludäscher, Diesner 2024, arXiv 2410.01946: label-related terms are retrieved, those that an earlier class
took and those that do not fit are dropped, and each counts by its correlation. The likelier half is by the mean log p
of tokens where an answer begins, over training inputs. `polytask.inference.answers` works out the scores.

The paper's terms come from a web service, its correlations from encoders trained on scientific inference, and its p is
that of a mask's word, divided by its mean over the training texts. Here terms are the words of the training texts, or a
list of your own; e is the embedded encoder's mean embedding, a label's that of its name and its description together; a
term goes to the label it fits best, not to the first; the label's own name is always among its terms, with r = 1, so
that no label is left without one; p is that of the term written after the prompt, and may be divided by its p without
the input (`pmi`). A mask predicts all tokens of a word at once, and the paper drops a word for any unlikely one; a
prompt predicts the first alone. r₀ and the number of terms are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import HeadCard, TermCard
from polytask.backbones import Backbone, load, text
from polytask.backbones.loading import EMBEDDED
from polytask.errors import PolytaskError, UsageError
from polytask.methods import passes
from polytask.methods.lifting import Plan
from polytask.methods.passes import Seat
from polytask.tasks import Example, Task

FITS = 0.35  # r₀
TERMS = 8  # for a label, at most, beside its name
WORDS = 4000  # of the training texts, those in most examples
READ = 64  # training inputs over which p is averaged


def find(base: Backbone, task: Task, head: HeadCard, terms: Sequence[str] | None = None) -> HeadCard:
    """The text card `head` with terms for each label, from a list or from the words of the training texts.

    Raises UsageError for a task that has no labels to find terms for, PolytaskError where it has no training texts.
    """
    if task.kind != "classification" or head.text is None:
        raise UsageError(f"task {task.name}: terms stand for the labels of a classification, and this is {task.kind}")
    if not task.train:
        raise PolytaskError(f"task {task.name}: no training examples")
    names = [label.name for label in task.labels]
    taken = {name.casefold() for name in names}
    given = words(task.train) if terms is None else terms
    candidates = [w for w in dict.fromkeys(given) if w.casefold() not in taken]
    encoder = load(EMBEDDED, device=base.device, precision="fp32")  # the same weights wherever they are worked out
    described = [text.described(label) for label in task.labels]
    names_e, described_e, e_w = (F.normalize(passes.embed(encoder, t), dim=-1) for t in (names, described, candidates))
    e_c = F.normalize(names_e + described_e, dim=-1)
    best, owner = (e_c @ e_w.T).max(0) if candidates else (torch.empty(0), torch.empty(0))
    likely = likely_starts(base, head, task.train[:READ])
    found: list[tuple[TermCard, ...]] = []
    for c, name in enumerate(names):
        own = [TermCard(term=name, weight=1.0)]
        for i in best.argsort(descending=True, stable=True).tolist():
            if owner[i] != c or best[i] < FITS or len(own) > TERMS:
                continue
            [said] = text.encode(base, head, [text.ask(head, replace(task.train[0], output=candidates[i]))])
            if said.target and likely[said.target[0]]:
                own.append(TermCard(term=candidates[i], weight=round(float(best[i]), 4)))
        found.append(tuple(own))
    return head.model_copy(update={"text": head.text.model_copy(update={"terms": tuple(found)})})


def words(examples: Sequence[Example]) -> list[str]:
    """The words of the examples' texts that stand in more than one of them, the most frequent first."""
    counts = Counter(word for e in examples for word in set(re.findall(r"[^\W\d_]{3,}", e.text.lower())))
    return [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count > 1][:WORDS]


@torch.no_grad()
def likely_starts(base: Backbone, head: HeadCard, examples: Sequence[Example]) -> Tensor:
    """Which tokens are in the vocabulary's likelier half [V] where the examples' answers begin, by the mean log p."""
    asked = text.encode(base, head, [text.ask(head, replace(e, output=None)) for e in examples])
    units = passes.answered(base, [replace(one, target=[0]) for one in asked])
    plan, seat, total = Plan(base, []), Seat(head, {}), torch.zeros(())
    for pack in passes.schedule([seat], units, [0] * len(units), packable=base.packable):
        for _, _, z in passes.forward(plan, [seat], [units[i] for i in pack], [0] * len(pack)):
            total = total + z.log_softmax(-1).sum(0).cpu()
    likely = torch.ones(len(total), dtype=torch.bool)
    likely[total.argsort()[: len(total) // 2]] = False
    return likely
