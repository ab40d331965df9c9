"""A comparison as one HTML file that needs nothing else: a table, learning curves, and what a score costs."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from polytask.evaluation.charts import Curve, Point, curves, marker, scatter
from polytask.evaluation.comparison import Comparison, Row, Trial

TEMPLATE = Path(__file__).with_name("compare_page.html")


def page(found: Comparison) -> str:
    """The whole page, for light and dark screens."""
    metric, whole = found.metric, found.backbone.parameters
    several = any(row.seeds > 1 for row in found.rows)
    fitted = [t.method for t in found.trials if not t.history]
    lines = [
        Curve(
            row.method,
            [
                [(point["epoch"], point["score"]) for point in trial.history]
                or [(0.0, trial.scores.get("validation", trial.scores[found.split]).value)]
                for trial in found.trials
                if trial.method == row.method
            ],
        )
        for row in found.rows
    ]
    curves_caption = "Validation score after each epoch; a line ends where training stopped early or ran out of epochs."
    if several:
        curves_caption += " One line for each seed."
    if fitted:
        curves_caption += f" Dotted level: {', '.join(dict.fromkeys(fitted))} is fitted once and has no epochs."
    reading = f"95 % intervals by bootstrap over the {found.task.sizes.get(found.split, 0):,} {found.split} examples."
    if several:
        reading += (
            " With several seeds, scores and interval ends are means over them, and ± is their standard deviation."
        )
    reading += (
        " Methods share the examples, so overlapping intervals do not show that two are equally good."
        " Seconds are of training, with the fit on frozen features that all methods start from."
    )
    kind = found.task.kind + (" of pairs" if found.task.pair else "")
    sizes = ", ".join(f"{n:,} {split}" for split, n in found.task.sizes.items())
    facts = {
        "Task": f"{found.task.name}: {kind}" + (f", {len(found.task.labels)} labels" if found.task.labels else ""),
        "Source": found.task.source,
        "Examples": sizes,
        "Metric": f"{metric} on the {found.split} split",
        "Backbone": f"{found.backbone.name} ({found.backbone.family}), {whole:,} parameters, frozen, "
        f"{found.precision}, weights {found.backbone.fingerprint[:12]}…",
        "Settings": ", ".join(f"{name} = {value}" for name, value in found.settings.items()),
        "Learning rates": ", ".join(f"{t.method} {t.lr:g}" for t in _first(found) if t.history) or "none",
        "Hyperparameters": "; ".join(
            f"{t.method}: " + (", ".join(f"{k} = {_said(v)}" for k, v in t.hyperparameters.items()) or "none")
            for t in _first(found)
        ),
        "Seeds": f"{max(row.seeds for row in found.rows)}",
        "Made": f"{found.date} by polytask {found.version}",
    }
    best = max(found.rows, key=lambda row: row.score)
    score_axis = f"{metric} ({found.split})"
    text = {
        "title": f"{found.task.name}: {len(found.rows)} methods compared",
        "version": found.version,
        "lead": f"{kind}, {sizes} examples, on {found.backbone.name} with {whole:,} frozen parameters.",
        "reading": reading,
        "curves_caption": curves_caption,
        "parameters_caption": f"{metric} against trained parameters, head included; bars are 95 % intervals.",
        "seconds_caption": f"{metric} against seconds of training; bars are 95 % intervals.",
    }
    heads = ("method", f"{metric} ({found.split})", "95 % interval", "trained", "% of backbone", "seconds", "size")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        {name: escape(value) for name, value in text.items()},
        heads="".join(f"<th>{escape(head)}</th>" for head in heads),
        rows="\n".join(_row(i, row, whole, row is best) for i, row in enumerate(found.rows)),
        curves=curves("Learning curves", "epoch", f"{metric} (validation)", lines),
        parameters=scatter(
            "Score against trained parameters",
            "trained parameters (log scale)",
            score_axis,
            _points(found, "parameters"),
        ),
        seconds=scatter("Score against seconds", "seconds (log scale)", score_axis, _points(found, "seconds")),
        facts="\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v),
    )


def _row(i: int, row: Row, whole: int, best: bool) -> str:
    spread = "" if row.spread is None else f" ± {row.spread:.3f}"
    cells = (
        f'<svg class="key" viewBox="-7 -7 14 14">{marker(i, 0, 0)}</svg>{escape(row.method)}',
        f"{row.score:.3f}{spread}",
        f"{row.low:.3f} to {row.high:.3f}",
        f"{row.trained_parameters:,}",
        f"{100 * row.trained_parameters / whole:.2g} %",
        f"{row.seconds:.1f}",
        f"{row.bytes / 1e6:.2f} MB",
    )
    opened = '<tr class="best">' if best else "<tr>"
    return opened + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _points(found: Comparison, against: str) -> list[Point]:
    return [
        Point(
            row.method,
            float(row.trained_parameters) if against == "parameters" else row.seconds,
            row.score,
            row.low,
            row.high,
            f"{row.trained_parameters:,} parameters" if against == "parameters" else f"{row.seconds:.1f} s",
        )
        for row in found.rows
    ]


def _first(found: Comparison) -> list[Trial]:
    """One trial of each method, in order."""
    first: dict[str, Trial] = {}
    for trial in found.trials:
        first.setdefault(trial.method, trial)
    return list(first.values())


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
