"""A library as one HTML file that needs nothing else: its adapters placed by how alike they are, who needs and helped
whom, where inputs went, and the same in tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template

import polytask
from polytask.evaluation.charts import COLOURS, LINE, marker, names
from polytask.evaluation.library_map import NEEDS, Link, Map, Picture
from polytask.evaluation.shell import shell
from polytask.library import Entry

TEMPLATE = Path(__file__).with_suffix(".html")
WIDTH, HEIGHT = 720.0, 480.0  # px of a map
NAMED = 40  # adapters up to which a map has their names, and above which their numbers in the table
APART = 14.0  # px between points
LISTED = 1000  # inputs in the table, at most; JSON has all
LONG = 300  # letters of an input that are shown
TITLES = {"tasks": "Alike by what their tasks read", "changes": "Alike by what they change"}


def page(found: Picture) -> str:
    """The whole page, for light and dark screens."""
    name = Path(found.location).resolve().name
    backbones = dict.fromkeys(entry.backbone for entry in found.entries)
    kinds = sorted({entry.kind for entry in found.entries})
    lead = "The library is empty: add an adapter with polytask adapt."
    if found.entries:
        lead = f"For tasks of {_and(kinds)}, on {_and([*backbones])}."
    body = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{name}: {_few(len(found.entries), 'adapter')}"),
        lead=escape(lead),
        maps=_maps(found, several=len({entry.fingerprint for entry in found.entries}) > 1),
        adapters=_adapters(found) if found.entries else "",
        helped=_helped(found),
        routing=_routing(found),
        reading=escape(_reading(found)),
    )
    return shell(f"{name}: {_few(len(found.entries), 'adapter')}", body, polytask.__version__)


def _maps(found: Picture, *, several: bool) -> str:
    parts = []
    for fingerprint in dict.fromkeys(entry.fingerprint for entry in found.entries):
        own = [entry for entry in found.entries if entry.fingerprint == fingerprint]
        backbone = own[0].backbone
        maps = [one for one in found.maps if any(entry.id in one.places for entry in own)]
        if several:
            parts.append(f"<h2>On {escape(backbone)}</h2>")
        if not any(one.by == "tasks" for one in maps):
            lone = len(own) == 1
            why = "one adapter has no other to be placed by" if lone else "fewer than two of these have a profile"
            parts.append(f'<p class="soft">No map by tasks: {why}.</p>')
        for one in maps:
            title = TITLES[one.by]
            drawn = _drawn(found, one, own, f"{title}, on {backbone}. The tables below say the same in words.")
            tag = "h3" if several else "h2"
            parts.append(
                f'<{tag}>{title}</{tag}><figure class="map">{_scroll(title, drawn)}'
                f"<figcaption>{escape(_caption(found, one, own))}</figcaption></figure>"
            )
    return "\n".join(parts)


def _drawn(found: Picture, one: Map, own: Sequence[Entry], title: str) -> str:
    """Adapters as points, links as arrows, routed inputs as rings; below a rule those of this backbone that the map has
    no place for and that are linked to others."""
    number = {entry.id: i for i, entry in enumerate(found.entries)}
    called = _called(found)
    label = {id: called[id] if len(one.places) <= NAMED else str(number[id] + 1) for id in number}
    linked = {id for link in found.links for id in (link.first, link.then)}
    apart = [entry.id for entry in own if entry.id in linked and entry.id not in one.places]
    at = _scaled(one)
    bottom = HEIGHT
    if apart and one.by == "tasks":
        x, y = 24.0, HEIGHT + 26
        for id in apart:
            wide = 26 + 6.6 * len(label[id])
            if x > 24 and x + wide > WIDTH:
                x, y = 24.0, y + 2 * LINE
            at[id] = (x, y)
            x += wide
        bottom = y + 20
    marks = []
    if bottom > HEIGHT:
        marks.append(f'<path class="apart" d="M12 {HEIGHT}H{WIDTH - 12}"/>')
    for link in found.links:
        if link.first in at and link.then in at:
            marks.append(_arrow(at[link.first], at[link.then], link.how, _told(link, called)))
    if one.inputs and found.routing:
        to = _scale(one)
        for place, given in zip(one.inputs, found.routing.inputs, strict=True):
            (x, y), best = to(*place), next(iter(given.weights), None)
            colour = f" c{number[best] % COLOURS}" if best in number else ""
            note = f"{_shortened(given.text)}: {called.get(best or '', 'nobody')}"
            ring = f'cx="{x:.1f}" cy="{y:.1f}" r="3"'
            marks.append(f'<circle class="input{colour}" {ring}><title>{escape(note)}</title></circle>')
    for id, (x, y) in at.items():
        marks.append(marker(number[id], x, y, called[id]))
    inside = (8.0, 8.0, WIDTH - 8, HEIGHT - 8)
    marks += names([(label[id], x, y) for id, (x, y) in at.items() if y <= HEIGHT], inside)
    for id, (x, y) in at.items():
        if y > HEIGHT:
            marks.append(f'<text class="name" x="{x + 10:.1f}" y="{y + 4:.1f}">{escape(label[id])}</text>')
    return f'<svg viewBox="0 0 {WIDTH:g} {bottom:g}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'


def _scale(one: Map) -> Callable[[float, float], tuple[float, float]]:
    """From the plane to pixels, both axes alike."""
    points = [*one.places.values(), *one.inputs]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    side = 56.0
    each = min((WIDTH - 2 * side) / max(right - left, 1e-9), (HEIGHT - 2 * side) / max(high - low, 1e-9))
    middle = ((left + right) / 2, (low + high) / 2)
    return lambda x, y: (WIDTH / 2 + (x - middle[0]) * each, HEIGHT / 2 - (y - middle[1]) * each)


def _scaled(one: Map) -> dict[str, tuple[float, float]]:
    """The places in pixels; what would cover another, such as an adapter that has its profile, moves to its side."""
    to = _scale(one)
    found: dict[str, tuple[float, float]] = {}
    turns = [(0.0, 0.0)] + [(r * math.cos(a), r * math.sin(a)) for r in (18, 36, 54) for a in range(7)]
    for id, place in one.places.items():
        x, y = to(*place)
        found[id] = max(
            ((x + dx, y + dy) for dx, dy in turns),
            key=lambda spot: min([APART, *(math.dist(spot, other) for other in found.values())]),
        )
    return found


def _arrow(first: tuple[float, float], then: tuple[float, float], how: str, note: str) -> str:
    """A bent line to `then`; dashed where `then` runs without `first`."""
    (x0, y0), (x1, y1) = first, then
    bent = 0.12
    mx, my = (x0 + x1) / 2 - bent * (y1 - y0), (y0 + y1) / 2 + bent * (x1 - x0)
    angle = math.atan2(y1 - my, x1 - mx)
    begun = math.atan2(my - y0, mx - x0)
    x0, y0 = x0 + 8 * math.cos(begun), y0 + 8 * math.sin(begun)
    x1, y1 = x1 - 9 * math.cos(angle), y1 - 9 * math.sin(angle)
    head = f'transform="translate({x1:.1f} {y1:.1f}) rotate({math.degrees(angle):.0f})"'
    kind = "link" if how in NEEDS else "link once"
    return (
        f'<path class="{kind}" d="M{x0:.1f} {y0:.1f}Q{mx:.1f} {my:.1f} {x1:.1f} {y1:.1f}">'
        f'<title>{escape(note)}</title></path><path class="head" {head} d="M0 0l-8 -4v8z"/>'
    )


def _caption(found: Picture, one: Map, own: Sequence[Entry]) -> str:
    if one.by == "tasks":
        said = "Near: the gists of the tasks' training inputs point the same way."
    else:
        said = "Near: the two LoRAs change the weights in the same directions."
    said += f" The plane keeps {one.shown:.0%} of the squared distances."
    if any(link.first in one.places or link.then in one.places for link in found.links):
        said += (
            " An arrow goes to the adapter that needs the other one; dashed, that began with it or was made from it."
        )
    if one.inputs and found.routing:
        said += f" Rings are {_few(len(one.inputs), 'input')}, in the colour of who took them; grey, nobody did."
    if missing := len(own) - len(one.places):
        what = "a profile of their task" if one.by == "tasks" else "a LoRA's change"
        said += f" Not placed: {_few(missing, 'adapter')} without {what}"
        said += "; those that others are linked to stand below the line." if one.by == "tasks" else "."
    if len(one.places) > NAMED:
        said += " Numbers are those of the table."
    return said


def _adapters(found: Picture) -> str:
    called = _called(found)
    taken = found.routing.taken() if found.routing else {}
    by = [title for title in TITLES if any(one.by == title for one in found.maps)]
    several = len({entry.fingerprint for entry in found.entries}) > 1
    heads = ["", "adapter", "task", "method", *(["backbone"] if several else []), "score", "frozen features"]
    heads += [f"nearest by {one}" for one in by] + ["needs", *(["inputs taken"] if found.routing else [])]
    rows = []
    for i, entry in enumerate(found.entries):
        near = [
            ", ".join(f"{called[id]} {c:.2f}" for m in found.maps if m.by == one for id, c in m.nearest(entry.id))
            for one in by
        ]
        score = "not measured" if entry.score is None else f"{entry.metric} {entry.score:.3f}"
        key = f'<svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">{marker(i, 0, 0)}</svg>'
        cells = [
            escape(f"{entry.task}, {entry.kind}"),
            escape(entry.method),
            *([escape(entry.backbone)] if several else []),
            score,
            f"{found.gains[entry.id][2]:.3f}" if entry.id in found.gains else "",
            *map(escape, near),
            escape(", ".join(f"{link.how} {called[link.first]}" for link in found.needed(entry.id))),
            *([f"{taken.get(entry.id, 0.0):.3g}"] if found.routing else []),
        ]
        named = f'<th scope="row">{key}{escape(called[entry.id])} <code>{entry.id[:8]}</code></th>'
        rows.append(f'<tr><td class="number">{i + 1}</td>{named}{_cells(cells)}</tr>')
    return "<h2>Adapters</h2>" + _table("All adapters, by name", heads, rows)


def _helped(found: Picture) -> str:
    """Who was made of, stands on or grew from whom, and what reuse tried."""
    called = _called(found)
    rows = []
    for link in found.links:
        gain = found.gains.get(link.then)
        measured = "" if gain is None else f"{gain[0]} {gain[1]:.3f}, frozen features {gain[2]:.3f}"
        rows.append([called[link.first], called[link.then], f"{called[link.then]} {link.how} it", measured])
    for way in found.tried:
        how = "reuse took it" if way.taken else "reuse tried it"
        rows.append([way.way, called[way.then], how, f"log-likelihood {way.score:.3f} an example"])
    if not rows:
        return ""
    heads = ["adapter or way", "helped", "how", "measured"]
    return "<h2>Who helped whom</h2>" + _table(
        "What each adapter came from, and what was tried for it",
        heads,
        [f"<tr>{_cells(map(escape, r))}</tr>" for r in rows],
    )


def _routing(found: Picture) -> str:
    routing = found.routing
    if routing is None:
        return ""
    called = _called(found)
    taken = routing.taken()
    nobody = sum(not one.weights for one in routing.inputs)
    counted = [f"{called[id]} took {n:.3g}" for id, n in taken.items()] + ([f"nobody took {nobody}"] if nobody else [])
    rows = []
    for i, one in enumerate(routing.inputs[:LISTED], 1):
        whole = sum(map(abs, one.weights.values()))
        who = ", ".join(f"{called[id]} {w / whole:.2f}" for id, w in one.weights.items())
        if len(one.weights) == 1:
            who = called[next(iter(one.weights))]
        text = f'<td class="text">{escape(_shortened(one.text))}</td>'
        rows.append(
            f'<tr><td class="number">{i}</td>{text}<td>{escape(who or "nobody")}</td>'
            f'<td class="number">{one.sure:.2f}</td></tr>'
        )
    caption = f"Which adapter {routing.router} gave each input, and how sure it is"
    if len(routing.inputs) > LISTED:
        caption += f"; the first {LISTED:,} of {len(routing.inputs):,} (--json has all)"
    lead = f"{_few(len(routing.inputs), 'input')}, routed by {routing.router}: {', '.join(counted)}."
    return f"<h2>Where inputs went</h2><p>{escape(lead)}</p>" + _table(caption, ["", "input", "adapter", "sure"], rows)


def _reading(found: Picture) -> str:
    said = (
        "Score: of the test split (or validation), as the adapter's card has it; frozen features: the same of a head "
        "on the backbone alone. Nearest: the cosine of two tasks' mean gists; of what two LoRAs change, over all "
        "the weights they change. Distances in the plane are those between vectors of length 1, by classical scaling; "
        "points that would cover each other are moved apart."
    )
    if found.tried:
        said += (
            " Reuse: the mean log-likelihood that a way gives to the right answers of the new task's examples, each "
            "held out; of the ways it tried, its note keeps the one that was taken and the best of the others."
        )
    return said


def _called(found: Picture) -> dict[str, str]:
    """What an adapter is called: by its name, with its version where there are several."""
    count: dict[str, int] = {}
    for entry in found.entries:
        count[entry.name] = count.get(entry.name, 0) + 1
    return {e.id: e.name if count[e.name] == 1 else f"{e.name}@{e.version}" for e in found.entries}


def _told(link: Link, called: dict[str, str]) -> str:
    return f"{called[link.then]} {link.how} {called[link.first]}"


def _table(caption: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in heads)
    body = "\n".join(rows)
    return _scroll(
        caption,
        f'<table class="words"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table>",
    )


def _scroll(title: str, content: str) -> str:
    """What may be wider than the screen; the keyboard reaches and moves it too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{content}</div>'


def _cells(contents: Sequence[str] | map[str]) -> str:
    return "".join(f"<td>{content}</td>" for content in contents)


def _shortened(text: str) -> str:
    return text if len(text) <= LONG else text[: LONG - 1] + "…"


def _few(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
