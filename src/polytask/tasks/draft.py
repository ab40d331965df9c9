"""What a reader found, and how a task is made of it: one place for every rule that holds for all sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from polytask.errors import PolytaskError, UsageError
from polytask.tasks.kinds import check_bio, guess_kind, label_names, missing, to_example, to_input
from polytask.tasks.scorers import default_metric, metric_name
from polytask.tasks.splits import leaks, make_splits
from polytask.tasks.tables import Row, listed, near
from polytask.tasks.task import KINDS, SPLITS, Example, Kind, Label, Task, is_bio

SHORT = 4  # words of an answer that can be expected word for word


@dataclass
class Draft:
    """The rows and the description that a source gave, before they are checked."""

    name: str
    source: str
    splits: dict[str, list[Row]]
    kind: Kind | None = None
    instruction: str = ""
    labels: tuple[Label, ...] = ()
    metric: str = ""
    language: str = ""
    licence: str = ""
    demonstrations: list[Row] = field(default_factory=list)
    negatives: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: bool = False  # the format gives every output as a text, even a number
    foreign: bool = False  # another project wrote it: a metric unknown here is noted and not an error


def assemble(
    draft: Draft,
    *,
    kind: Kind | None = None,
    name: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    unlabelled: bool = False,
) -> Task:
    """The task of `draft`, every row checked; `kind`, `name` and `metric` go before what the draft says. `unlabelled`:
    rows of train without an output are kept, after those that have one."""
    notes = list(draft.notes)
    without = [row for row in draft.splits.get("train", ()) if unlabelled and missing(row.output)]
    if without:
        answered = [row for row in draft.splits["train"] if not missing(row.output)]
        draft = replace(draft, splits={**draft.splits, "train": answered})
    rows = [row for split in SPLITS for row in draft.splits.get(split, ())]
    if kind is not None and kind not in KINDS:
        raise UsageError(f"no kind {kind!r}{near(kind, KINDS)}; one of {', '.join(KINDS)}")
    kind = kind or _kind(draft, rows, notes)
    if kind == "retrieval":
        raise UsageError(f"{draft.source}: retrieval tasks (a corpus and queries) are not read as rows of examples")

    given = {split: _examples(part, kind, notes) for split, part in draft.splits.items() if part}
    demonstrations = [
        to_example(row, kind, row.id or f"demonstration-{n}") for n, row in enumerate(draft.demonstrations, 1)
    ]
    negatives = _negatives(draft.negatives, kind, notes)
    everything = [example for part in given.values() for example in part]
    if kind == "tagging":
        check_bio(zip(rows, (e for split in SPLITS for e in given.get(split, ())), strict=True))
    labels = _labels(draft, kind, given, rows)
    splits, made = make_splits(given, kind, seed=seed)
    if not splits["train"]:
        made.append("no training examples: this task can only be evaluated")
    notes += [*made, *leaks(splits), *_label_notes(splits, kind)]
    return Task(
        name=name or draft.name,
        kind=kind,
        train=(*splits["train"], *(to_input(row, kind, row.id or f"unlabelled-{n}") for n, row in enumerate(without))),
        validation=splits["validation"],
        test=splits["test"],
        instruction=draft.instruction.strip(),
        labels=labels,
        metric=_metric(draft, kind, metric, everything, notes),
        language=draft.language,
        licence=draft.licence,
        source=draft.source,
        demonstrations=tuple(demonstrations),
        negatives=negatives,
        notes=tuple(notes),
    )


def _kind(draft: Draft, rows: Sequence[Row], notes: list[str]) -> Kind:
    if draft.kind is None:
        kind, why = guess_kind(rows, texts=draft.texts)
        if draft.labels and kind == "generation":
            kind, why = "classification", "labels are listed"
        notes.append(f"kind guessed: {kind}, since {why}")
        return kind
    if draft.kind == "classification" and any(isinstance(r.output, list | tuple) and len(r.output) != 1 for r in rows):
        notes.append("read as multilabel: some rows have several labels")
        return "multilabel"
    return draft.kind


def _examples(rows: Sequence[Row], kind: Kind, notes: list[str]) -> tuple[Example, ...]:
    seen: dict[str, Row] = {}
    examples = []
    stem = rows[0].file.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
    for n, row in enumerate(rows, 1):
        id = row.id or f"{stem}-{n}"
        if id in seen:
            raise PolytaskError(
                f"{row.where}: id {id!r} also stands in {seen[id].unit} {seen[id].number}; give each row its own id"
            )
        seen[id] = row
        examples.append(to_example(row, kind, id))
    return tuple(examples)


def _negatives(rows: Sequence[Row], kind: Kind, notes: list[str]) -> tuple[Example, ...]:
    """Wrong outputs need not have the form of right ones; those that have none at all are noted."""
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            examples.append(to_example(row, kind, row.id or f"negative-{number}"))
        except PolytaskError:
            continue
    if len(examples) < len(rows):
        notes.append(f"not kept: {len(rows) - len(examples)} negative examples, which are no {kind} examples")
    return tuple(examples)


def _labels(draft: Draft, kind: Kind, given: dict[str, tuple[Example, ...]], rows: Sequence[Row]) -> tuple[Label, ...]:
    """The labels that the draft lists, or else those of train; a label in the data that is not listed is an error."""
    everything = [example for split in SPLITS for example in given.get(split, ())]
    train = label_names(given.get("train") or everything, kind)
    if kind == "classification" and given.get("train") and len(train) == 1:
        raise PolytaskError(
            f"{draft.source}: every row of train has the label {train[0]!r}; classification needs two or more"
        )
    listed_labels = draft.labels
    if kind == "tagging" and is_bio(tag for e in everything if isinstance(e.output, tuple) for tag in e.output):
        spans: dict[str, Label] = {}
        for label in draft.labels:
            if label.name != "O":
                span = label.name[2:] if label.name.startswith(("B-", "I-")) else label.name
                spans.setdefault(span, Label(span, label.description))
        listed_labels = tuple(spans.values())
    elif kind not in ("classification", "multilabel", "tagging"):
        return ()
    names = [label.name for label in listed_labels]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise PolytaskError(f"{draft.source}: label {twice[0]!r} is listed twice; list each once")
    if not names:
        return tuple(Label(name) for name in train)
    known = set(names)
    if not known.issuperset(label_names(everything, kind)):
        for row, example in zip(rows, everything, strict=True):
            for name in label_names([example], kind):
                if name not in known:
                    raise PolytaskError(
                        f"{row.where}: label {name!r} is not among the {len(names)} listed labels{near(name, names)}"
                    )
    return listed_labels


def _label_notes(splits: dict[str, tuple[Example, ...]], kind: Kind) -> list[str]:
    if kind not in ("classification", "multilabel", "tagging") or not splits["train"]:
        return []
    notes = []
    counts = Counter(name for e in splits["train"] for name in label_names([e], kind))
    once = sorted(name for name, count in counts.items() if count == 1)
    if once:
        what = "label has" if len(once) == 1 else "labels have"
        notes.append(f"{len(once)} {what} a single training example: {listed(once, 5)}")
    for split in ("validation", "test"):
        unseen = [[name for name in label_names([e], kind) if name not in counts] for e in splits[split]]
        names = sorted({name for row in unseen for name in row})
        if names:
            notes.append(
                f"{sum(map(bool, unseen))} of {len(unseen)} rows of {split} have labels that train never shows "
                f"({listed(names, 5)}): a trained model gets them wrong"
            )
    return notes


def _metric(draft: Draft, kind: Kind, asked: str | None, examples: Sequence[Example], notes: list[str]) -> str:
    if asked:
        return metric_name(asked, kind)
    usual = default_metric(kind)
    if kind == "tagging" and not is_bio(tag for e in examples if isinstance(e.output, tuple) for tag in e.output):
        usual = "token_accuracy"
    if kind == "generation":
        texts = [str(e.output[0] if isinstance(e.output, tuple) else e.output) for e in examples if e.output]
        # Nobody writes a sentence word for word as the reference has it.
        usual = "rouge_l" if texts and median(len(text.split()) for text in texts) > SHORT else usual
    if not draft.metric:
        return usual
    try:
        return metric_name(draft.metric, kind)
    except UsageError as error:
        if not draft.foreign:
            raise PolytaskError(f"{draft.source}: {error}") from None
        notes.append(f"metric {draft.metric!r} is not known here; {usual} is used")
        return usual
