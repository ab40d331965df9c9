"""A comparison as one HTML file that needs nothing else: a table, learning curves, and what a score costs."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from polytask.evaluation.charts import Curve, Point, curves, marker, scatter
from polytask.evaluation.comparison import Comparison, Row
from polytask.evaluation.shell import shell

TEMPLATE = Path(__file__).with_name("compare_page.html")
WIDE = 12  # methods from which on each chart has the page's whole width


def page(found: Comparison) -> str:
    """The whole page, for light and dark screens."""
    metric, whole = found.metric, found.backbone.parameters
    several = any(row.seeds > 1 for row in found.rows)
    tried = len(found.factors) > 1
    fitted = [row.method for row in found.rows if not found.kept(row.method)[0].history]
    lines = [
        Curve(
            row.method,
            [
                [(point["epoch"], point["score"]) for point in trial.history]
                or [(0.0, trial.scores.get("validation", trial.scores[found.split]).value)]
                for trial in found.kept(row.method)
            ],
        )
        for row in found.rows
    ]
    curves_caption = "Validation score after each epoch; a line ends where training stopped early or ran out of epochs."
    if several:
        curves_caption += " One line for each seed."
    if fitted:
        curves_caption += f" Dotted level: {', '.join(fitted)} is fitted once and has no epochs."
    kind = found.task.kind + (" of pairs" if found.task.pair else "")
    sizes = ", ".join(f"{n:,} {split}" for split, n in found.task.sizes.items())
    threads = sorted({trial.threads for trial in found.trials})
    rates = [f"{row.method} {row.lr:.3g}" for row in found.rows if row.method not in fitted]
    facts = {
        "Task": f"{found.task.name}: {kind}" + (f", {len(found.task.labels)} labels" if found.task.labels else ""),
        "Source": found.task.source,
        "Examples": sizes,
        "Metric": f"{metric} on the {found.split} split",
        "Backbone": f"{found.backbone.name} ({found.backbone.family}), {whole:,} parameters, frozen, "
        f"{found.precision}, weights {found.backbone.fingerprint[:12]}…",
        "Settings": ", ".join(f"{name} = {value}" for name, value in found.settings.items()),
        "Budget": _budget(found),
        "Learning rates": ", ".join(rates) or "none",
        "Hyperparameters": "; ".join(
            f"{row.method}: "
            + (", ".join(f"{k} = {_said(v)}" for k, v in found.kept(row.method)[0].hyperparameters.items()) or "none")
            for row in found.rows
        ),
        "Seeds": f"{max(row.seeds for row in found.rows)}",
        "Trainings": f"by {_few(found.jobs, 'process', 'processes')}, each with "
        + " or ".join(_few(n, "thread", "threads") for n in threads),
        "Left out": "; ".join(f"{name}: {reason}" for name, reason in found.left_out.items()),
        "Failed": "; ".join(f"{f.method} at {f.lr:.3g}, seed {f.seed}: {f.reason}" for f in found.failures),
        "Made": f"{found.date} by polytask {found.version}",
    }
    first = max(found.rows, key=lambda row: row.score)
    score_axis = f"{metric} ({found.split})"
    text = {
        "title": f"{found.task.name}: {len(found.rows)} methods compared",
        "lead": f"{kind}, {sizes} examples, on {found.backbone.name} with {whole:,} frozen parameters. "
        + _budget(found),
        "reading": _reading(found, several),
        "curves_caption": curves_caption,
        "parameters_caption": f"{metric} against trained parameters, head included; bars are 95 % intervals.",
        "seconds_caption": f"{metric} against seconds of training; bars are 95 % intervals.",
        "columns": "one" if len(found.rows) >= WIDE else "two",
    }
    heads = ["method", "front", f"{metric} ({found.split})", "95 % interval", "trained", "% of backbone", "seconds"]
    heads += ["latency", "memory", "size", *(["rate"] if tried else [])]
    size = (960, max(460, 20 * len(found.rows))) if len(found.rows) >= WIDE else (520, 400)
    body = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        {name: escape(value) for name, value in text.items()},
        heads=_cells("th", [escape(head) for head in heads]),
        rows="\n".join(_row(found, i, row, tried, row is first) for i, row in enumerate(found.rows)),
        tries=_tries(found) if tried else "",
        curves=curves("Learning curves", "epoch", f"{metric} (validation)", lines),
        parameters=scatter(
            "Score against trained parameters",
            "trained parameters (log scale)",
            score_axis,
            _points(found, "parameters"),
            *size,
        ),
        seconds=scatter("Score against seconds", "seconds (log scale)", score_axis, _points(found, "seconds"), *size),
        facts="\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v),
    )
    return shell(text["title"], body, found.version)


def _budget(found: Comparison) -> str:
    seeds = max(row.seeds for row in found.rows)
    if len(found.factors) == 1:
        return f"Each method was trained {_few(seeds, 'time', 'times')} at its default learning rate."
    times = ", ".join(f"{factor:.3g}" for factor in sorted(found.factors))
    said = f"Each method was trained at {len(found.factors)} learning rates, its default times {times}, and the one of "
    said += "the best validation score was kept"
    return said + (f", and trained with {seeds - 1} more seeds." if seeds > 1 else ".")


def _reading(found: Comparison, several: bool) -> str:
    said = f"95 % intervals by bootstrap over the {found.task.sizes.get(found.split, 0):,} {found.split} examples."
    if several:
        said += " With several seeds, scores and interval ends are means over them, and ± is their standard deviation."
    said += (
        " Methods share the examples, so overlapping intervals do not show that two are equally good."
        " Seconds are of training, with the fit on frozen features that all methods start from."
    )
    latency = next((t.latency for t in found.trials if t.latency is not None), None)
    if latency is not None:
        said += (
            f" Latency: how many times as long a forward pass of {latency.rows} of the task's inputs takes with the "
            "adapter as with the backbone alone, the median of pairs of passes in turns, after all training."
        )
    return said + (
        " Memory: the most that trained tensors, their gradients and the optimiser's state took at once; activations "
        "come on top. Size: the saved adapter on disk. Front: no other method is at least as good in score, trained "
        "parameters, seconds and latency, as they stand here, and better in one."
    )


def _row(found: Comparison, i: int, row: Row, tried: bool, first: bool) -> str:
    spread = "" if row.spread is None else f" ± {row.spread:.3f}"
    trial = found.kept(row.method)[0]
    cells = [
        f'<svg class="key" viewBox="-7 -7 14 14">{marker(i, 0, 0)}</svg>{escape(row.method)}',
        "●" if row.front else "",
        f"{row.score:.3f}{spread}",
        f"{row.low:.3f} to {row.high:.3f}",
        f"{row.trained_parameters:,}",
        f"{100 * row.trained_parameters / found.backbone.parameters:.2g} %",
        f"{row.seconds:.1f}",
        "" if row.latency is None else f"{row.latency:.2f}",
        "" if row.memory is None else f"{row.memory / 1e6:.2f} MB",
        f"{row.bytes / 1e6:.2f} MB",
        *(["" if not trial.history else f"{row.lr:.3g}"] if tried else []),
    ]
    opened = '<tr class="best">' if first else "<tr>"
    return opened + _cells("td", cells) + "</tr>"


def _tries(found: Comparison) -> str:
    """A table of the validation score of each method at each learning rate; the kept one stands out."""
    factors = sorted(found.factors)
    heads = ["method", *(f"× {factor:.3g}" for factor in factors)]
    rows = []
    for row in found.rows:
        mine = {t.lr: f"{t.validation:.3f} at {t.lr:.3g}" for t in found.tries(row.method)}
        mine[row.lr] = f"<b>{mine[row.lr]}</b>"
        mine |= {f.lr: f"failed at {f.lr:.3g}" for f in found.failures if f.method == row.method and f.seed == 0}
        told = [mine[lr] for lr in sorted(mine)]
        if len(told) == 1:  # fitted, and has no rate
            told = [f"<b>{found.tries(row.method)[0].validation:.3f}</b>" if f == 1 else "" for f in factors]
        rows.append(f"<tr>{_cells('td', [escape(row.method), *told])}</tr>")
    return (
        f"<h2>Tries</h2><p>{escape(f'{found.metric} on validation, by learning rate over the default one.')}</p>"
        f'<div class="scroll"><table><thead><tr>{_cells("th", heads)}</tr></thead><tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def _cells(tag: str, contents: list[str]) -> str:
    return "".join(f"<{tag}>{content}</{tag}>" for content in contents)


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


def _few(n: int, one: str, more: str) -> str:
    return f"{n} {one if n == 1 else more}"


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
