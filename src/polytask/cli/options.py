"""Options that several commands share, so that a name means the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polytask.errors import UsageError

if TYPE_CHECKING:
    from polytask.recipes.reading import Reading
    from polytask.tasks import Task
    from polytask.training import Settings

LIBRARY = Path("skills")

TaskSource = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="A CSV, TSV, JSONL, JSON or Parquet file, a folder with task.yaml or with train.csv, test.csv, ..., a "
        "Super-NaturalInstructions file, or hf:NAME for a dataset of the Hugging Face hub.",
        show_default=False,
    ),
]
Library = Annotated[Path, typer.Option("--library", "-l", metavar="DIR", help="The library: a folder of adapters.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        "-b",
        metavar="NAME",
        help="minilm or polytask-base (embedded), a model folder, or a Hugging Face model id. If not given, minilm, or "
        "polytask-base where the answer is text.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="TYPE",
        help="fp32, bf16, or auto: bf16 where the processor computes in it; int8, nf4: weights in 8 or 4 bits.",
    ),
]

_DATA = "Reading the task"
Input = Annotated[
    str | None,
    typer.Option("--input", "-i", metavar="COLUMN", help="The column with the text.", rich_help_panel=_DATA),
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="COLUMN", help="The column with the answer.", rich_help_panel=_DATA),
]
Pair = Annotated[
    str | None,
    typer.Option("--pair", metavar="COLUMN", help="The column with the second text of a pair.", rich_help_panel=_DATA),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="classification, multilabel, tagging, regression, similarity, generation or choice. Guessed where it is "
        "clear.",
        rich_help_panel=_DATA,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option("--metric", metavar="NAME", help="accuracy, macro_f1, span_f1, spearman, ...", rich_help_panel=_DATA),
]

_TRAINING = "Training"
Epochs = Annotated[
    int | None,
    typer.Option("--epochs", metavar="N", help="Passes over the data, at most.", rich_help_panel=_TRAINING),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch", metavar="N", help="Examples a step.", rich_help_panel=_TRAINING),
]
Balanced = Annotated[bool, typer.Option("--balanced", help="Weigh classes by their rarity.", rich_help_panel=_TRAINING)]
Pool = Annotated[
    str | None,
    typer.Option(
        "--pool",
        metavar="POOL",
        help="mean, first, last or attention: how tokens become one vector; masks: label embeddings at mask tokens "
        "(PERFECT); labels: the labels' descriptions attend to the text (CrossTune). If not given, last for causal "
        "models and mean for others.",
        rich_help_panel=_TRAINING,
    ),
]
Masks = Annotated[
    int | None,
    typer.Option("--masks", metavar="N", help="How many mask tokens --pool masks reads.", rich_help_panel=_TRAINING),
]
PairMode = Annotated[
    str,
    typer.Option(
        "--pair-mode",
        metavar="MODE",
        help="separate or joint: encode the texts of a pair apart, or as one.",
        rich_help_panel=_TRAINING,
    ),
]
Bidirectional = Annotated[
    bool, typer.Option("--bidirectional", help="Drop a decoder's causal mask.", rich_help_panel=_TRAINING)
]
OpenBlocks = Annotated[
    str | None,
    typer.Option(
        "--open-blocks",
        metavar="PATTERN",
        help="Drop a decoder's causal mask in some of its blocks only: 0011, a digit for each of equal groups of "
        "blocks from the bottom, 1 where it is dropped.",
        rich_help_panel=_TRAINING,
    ),
]
InText = Annotated[
    bool | None,
    typer.Option(
        "--text/--head",
        help="Answer in text, or by a head over hidden states. If not given, in text where the kind has no head.",
        rich_help_panel=_TRAINING,
    ),
]
Decide = Annotated[
    str,
    typer.Option(
        "--decide",
        metavar="HOW",
        help="Of an answer in text: write it; take the label or option of most likelihood; or terms, where several "
        "stand for each label. auto writes, but chooses from options.",
        rich_help_panel=_TRAINING,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="tfew, for a few examples with options to choose from: (IA)^3 with losses over right and wrong options, "
        "1000 steps, the option of most likelihood per token. Options that are given count more.",
        rich_help_panel=_TRAINING,
    ),
]
Terms = Annotated[
    Path | None,
    typer.Option(
        "--terms",
        metavar="FILE",
        help="What --decide terms chooses from, one term a line; the words of the training texts if not given.",
        rich_help_panel=_TRAINING,
    ),
]
TemplateName = Annotated[
    str,
    typer.Option(
        "--template", metavar="NAME", help="How prompts are worded: plain, superni or chat.", rich_help_panel=_TRAINING
    ),
]


def read_task(
    source: str,
    *,
    input: str | None = None,
    output: str | None = None,
    pair: str | None = None,
    kind: str | None = None,
    name: str | None = None,
    metric: str | None = None,
    unlabelled: bool = False,
) -> Task:
    """The task of `source`, with the kind checked, which on a command line is any text."""
    from polytask.tasks import Task
    from polytask.tasks.tables import near
    from polytask.tasks.task import KINDS

    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind {kind}: one of {', '.join(KINDS)}{near(kind, KINDS)}")
    given: dict[str, Any] = {"input": input, "output": output, "pair": pair, "kind": kind, "name": name}
    return Task.read(source, **given, metric=metric, unlabelled=unlabelled)


def reading(
    text: bool | None,
    template: str,
    pool: str | None,
    pair_mode: str,
    bidirectional: bool,
    *,
    open_blocks: str | None = None,
    masks: int | None = None,
    decide: str = "auto",
    terms: Path | None = None,
    objective: str = "likelihood",
) -> Reading:
    """How answers are read."""
    from polytask.recipes.reading import Reading

    if bidirectional and open_blocks is not None:
        raise UsageError("--bidirectional opens all blocks, --open-blocks some of them: give one of the two")
    in_text: Any = "auto" if text is None else "yes" if text else "no"
    if masks is not None and pool != "masks":
        raise UsageError(f"--masks {masks} goes with --pool masks")
    if decide not in ("auto", "write", "likelihood", "terms"):
        raise UsageError(f"--decide {decide}: one of auto, write, likelihood, terms")
    if terms is not None and decide != "terms":
        raise UsageError(f"--terms {terms} goes with --decide terms")
    causal = not bidirectional if open_blocks is None else open_blocks
    more: dict[str, Any] = {"objective": objective} | ({} if masks is None else {"masks": masks})
    if terms is not None:
        try:
            listed = (line.strip() for line in terms.read_text(encoding="utf-8").splitlines())
            more["terms"] = tuple(filter(None, listed))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--terms {terms}: no list of terms can be read there ({error})") from None
    return Reading(in_text, pool, pair_mode, causal=causal, template=template, decide=decide, **more)  # type: ignore[arg-type]


def base_for(base: str | None, task: Task, reading: Reading) -> str:
    """The backbone that was asked for, or the embedded one that can answer the task."""
    return base or ("polytask-base" if reading.writes(task) else "minilm")


def check(task: Task, methods: Mapping[str, Mapping[str, Any]], reading: Reading) -> None:
    """Tell what is wrong with methods (and their hyperparameters), pooling, template or the kind before a model is
    loaded."""
    from polytask.backbones import heads
    from polytask.methods.selectors import build

    for method, hyperparameters in methods.items():
        build(method, hyperparameters)
    if reading.writes(task):
        reading.worded(task)
        return
    if reading.decide != "auto":
        raise UsageError(f"--decide {reading.decide} is for answers in text; add --text")
    if task.kind not in heads.KINDS:
        why = next((f" ({note})" for note in task.notes if note.startswith("kind guessed")), "")
        raise UsageError(
            f"task {task.name} is of kind {task.kind}{why}, which has no labels to learn; if it is "
            f"{', '.join(heads.KINDS[:-1])} or {heads.KINDS[-1]}, say so with --kind"
        )
    heads.design(task, pool=reading.pool or "mean", pair=reading.pair, causal=reading.causal, masks=reading.masks)


def settings(**given: Any) -> Settings:
    """Training settings; what is None keeps its default."""
    from polytask.training import Settings

    return Settings(**{name: value for name, value in given.items() if value is not None})


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """`["r=16", "alpha=32"]` as a dictionary."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"{option} {value!r}: write it as NAME=VALUE, such as {option} r=16")
        found[name.strip()] = content.strip()
    return found
