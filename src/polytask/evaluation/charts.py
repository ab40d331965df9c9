"""Small charts as plain SVG: lines with labels at their ends, and points with intervals.

Colours are CSS classes (`c0` to `c6`, defined by the page), so that one drawing fits light and dark. Beyond seven
series the dash and the marker tell them apart, up to 42 of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 7
DASHES = ("", "7 4", "2 3", "9 3 2 3", "14 4", "5 2 1 2")
MARKERS = (  # disc, square, triangle, diamond, triangle upside down, cross
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "M-4.5 -4.5h9v9h-9z",
    "M0 -6l5.5 10h-11z",
    "M0 -6.5l6 6.5l-6 6.5l-6 -6.5z",
    "M0 6l5.5 -10h-11z",
    "M-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
)
LETTER = 6.6  # width of a letter of a label, px, generously
LINE = 15  # height of a label, px
FEW = 12  # points whose labels find room near them

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Curve:
    """`runs` are lines of the same look, each a list of (x, y). One of a single point is drawn as a level."""

    name: str
    runs: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Point:
    name: str
    x: float
    y: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, both drawn; `log` in powers of ten."""

    label: str
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        if not self.log:
            step = _step(self.high - self.low)
            first = math.ceil(self.low / step - 1e-9)
            values = [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
            places = max(0, -math.floor(math.log10(step) + 1e-9))
            return [(v, f"{v:.{places}f}") for v in values]
        bottom, top = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            values = [f * 10.0**n for n in range(bottom, top + 1) for f in factors]
            inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(inside) >= 3:
                break
        return [(v, short(v)) for v in inside]


def axis(label: str, values: Sequence[float], *, log: bool = False, margin: float = 0.06) -> Axis:
    """An axis that holds the values with some room on both sides."""
    low, high = min(values), max(values)
    if log:
        low, high = max(low, 1e-9), max(high, 1e-9)
        span = max(math.log10(high / low), 0.5)
        return Axis(label, low / 10 ** (span * margin * 2), high * 10 ** (span * margin * 2), True)
    span = high - low or max(abs(high), 1.0) * 0.1
    return Axis(label, low - span * margin, high + span * margin)


def short(value: float) -> str:
    """1,500,000 as 1.5M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def curves(title: str, x: str, y: str, lines: Sequence[Curve], width: int = 960) -> str:
    """Lines over a shared linear x that starts at 0, each named at its right end."""
    points = [point for curve in lines for run in curve.runs for point in run]
    height = max(380, LINE * len(lines) + 110)
    right = 24 + LETTER * max((len(curve.name) for curve in lines), default=0)
    longest = max([1.0, *(px for px, _ in points)])
    frame = _Frame(width, height, Axis(x, 0.0, longest), axis(y, [py for _, py in points] or [0, 1]), right=right)
    marks, ends = [], []
    for i, curve in enumerate(lines):
        dash = DASHES[i // COLOURS % len(DASHES)]
        for run in curve.runs:
            level = len(run) == 1
            drawn = [(0.0, run[0][1]), (longest, run[0][1])] if level else run
            path = "M" + "L".join(f"{frame.x(px):.1f} {frame.y(py):.1f}" for px, py in drawn)
            style = ' stroke-dasharray="2 4"' if level else f' stroke-dasharray="{dash}"' if dash else ""
            marks.append(
                f'<path class="line c{i % COLOURS}" d="{path}"{style}><title>{escape(curve.name)}</title></path>'
            )
            for px, py in () if level else run:
                spot = f'cx="{frame.x(px):.1f}" cy="{frame.y(py):.1f}" r="2.6"'
                note = escape(f"{curve.name}, {x} {px:g}: {py:.3f}")
                marks.append(f'<circle class="dot c{i % COLOURS}" {spot}><title>{note}</title></circle>')
        if curve.runs:
            last = max((run[-1] for run in curve.runs), key=lambda point: point[0])
            at = longest if len(curve.runs[0]) == 1 else last[0]
            ends.append((i, curve.name, frame.x(at), frame.y(sum(run[-1][1] for run in curve.runs) / len(curve.runs))))
    places = _apart([y for _, _, _, y in ends], frame.top, frame.bottom)
    edge = frame.right + 8
    for (i, name, at, level_y), place in zip(ends, places, strict=True):
        leader = f"M{at:.1f} {level_y:.1f}L{frame.right:.1f} {level_y:.1f}L{edge:.1f} {place:.1f}"
        marks.append(f'<path class="leader c{i % COLOURS}" d="{leader}"/>')
        marks.append(marker(i, edge, place, scale=0.75))
        marks.append(f'<text class="name" x="{edge + 7:.1f}" y="{place + 4:.1f}">{escape(name)}</text>')
    return frame.svg(title, marks)


def scatter(title: str, x: str, y: str, points: Sequence[Point], width: int = 520, height: int = 400) -> str:
    """Points with vertical interval bars over a logarithmic x, each with its name beside it."""
    ys = [value for p in points for value in (p.low, p.high)]
    frame = _Frame(width, height, axis(x, [p.x for p in points], log=True, margin=0.08), axis(y, ys), right=24)
    marks: list[str] = []
    bars = [(frame.x(p.x) - 3, frame.y(p.high), frame.x(p.x) + 3, frame.y(p.low)) for p in points]
    for i, p in enumerate(points):
        px, py, colour = frame.x(p.x), frame.y(p.y), f"c{i % COLOURS}"
        low, high = frame.y(p.low), frame.y(p.high)
        bar = f"M{px:.1f} {low:.1f}V{high:.1f}M{px - 5:.1f} {low:.1f}h10M{px - 5:.1f} {high:.1f}h10"
        note = f"{p.name}: {p.y:.3f} [{p.low:.3f}, {p.high:.3f}], {p.note}"
        marks.append(f'<path class="bar {colour}" d="{bar}"/>')
        marks.append(marker(i, px, py, note))
    spots = [(p.name, frame.x(p.x), frame.y(p.y)) for p in points]
    marks += names(spots, (frame.left, frame.top, width - 2, frame.bottom), bars)
    return frame.svg(title, marks)


def names(points: Sequence[tuple[str, float, float]], inside: Box, others: Sequence[Box] = ()) -> list[str]:
    """The names of points (name, x, y), each where it covers least: of other names and points, then of `others`."""
    marks = []
    taken = [(x - 7, y - 7, x + 7, y + 7) for _, x, y in points]
    for name, x, y in points:
        wide = LETTER * len(name)
        spots = [
            (x + dx if dx > 0 else x + dx - wide, y + sign * 16 * step)
            for step in range(5 if len(points) < FEW else 14)
            for sign in (1, -1)
            for dx in (11, -11)
        ]
        boxes = [(left, middle - LINE / 2, left + wide, middle + LINE / 2) for left, middle in spots]
        best = min(boxes, key=lambda box: _cost(box, taken, others, inside, (x, y)))
        taken.append(best)
        left, middle = best[0], (best[1] + best[3]) / 2
        if abs(middle - y) > LINE:
            near = left if left > x else best[2]
            marks.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{near:.1f} {middle:.1f}"/>')
        marks.append(f'<text class="name" x="{left:.1f}" y="{middle + 4:.1f}">{escape(name)}</text>')
    return marks


class _Frame:
    """Axes, grid and the way from values to pixels."""

    def __init__(self, width: int, height: int, x: Axis, y: Axis, *, right: float) -> None:
        self.width, self.height, self.axes = width, height, (x, y)
        self.left, self.top, self.right, self.bottom = 64.0, 16.0, width - right, height - 52.0

    def x(self, value: float) -> float:
        return self.left + self.axes[0].share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.axes[1].share(value) * (self.bottom - self.top)

    def svg(self, title: str, marks: Sequence[str]) -> str:
        x, y = self.axes
        parts = []
        for value, text in y.ticks():
            at = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left} {at:.1f}H{self.right:.1f}"/>')
            parts.append(f'<text class="tick" x="{self.left - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        for value, text in x.ticks():
            at = self.x(value)
            parts.append(f'<path class="grid" d="M{at:.1f} {self.top}V{self.bottom}"/>')
            parts.append(f'<text class="tick" x="{at:.1f}" y="{self.bottom + 18}" text-anchor="middle">{text}</text>')
        parts.append(f'<path class="frame" d="M{self.left} {self.top}V{self.bottom}H{self.right:.1f}"/>')
        middle, centre = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        below = self.height - 10
        parts.append(f'<text class="axis" x="{middle:.1f}" y="{below}" text-anchor="middle">{escape(x.label)}</text>')
        turned = f'transform="translate(16 {centre:.1f}) rotate(-90)" text-anchor="middle"'
        parts.append(f'<text class="axis" {turned}>{escape(y.label)}</text>')
        box = f'viewBox="0 0 {self.width} {self.height}"'
        return f'<svg {box} role="img" aria-label="{escape(title)}">{"".join(parts)}{"".join(marks)}</svg>'


def _step(span: float) -> float:
    """A round step that gives about six ticks."""
    rough = span / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _apart(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """The places moved as little as lets labels stand a line apart, between top and bottom: least squares, by pooling
    neighbours that are too near (isotonic regression of what is left when i lines are taken from the ith place)."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    pools: list[tuple[float, int]] = []  # mean and size
    for i, at in enumerate(order):
        mean, size = places[at] - LINE * i, 1
        while pools and pools[-1][0] > mean:
            before, n = pools.pop()
            mean, size = (mean * size + before * n) / (size + n), size + n
        pools.append((mean, size))
    found = [0.0] * len(places)
    means = [mean for mean, size in pools for _ in range(size)]
    last = max(top, bottom - LINE * (len(places) - 1))
    for i, (at, mean) in enumerate(zip(order, means, strict=True)):
        found[at] = min(max(mean, top), last) + LINE * i
    return found


def _cost(box: Box, taken: Sequence[Box], bars: Sequence[Box], inside: Box, to: tuple[float, float]) -> float:
    """How bad a place for a label is: over others worst, outside next, over a bar, far away least."""

    def over(other: Box) -> float:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        high = min(box[3], other[3]) - max(box[1], other[1])
        return wide * high if wide > 0 and high > 0 else 0.0

    outside = max(0.0, inside[0] - box[0]) + max(0.0, box[2] - inside[2])
    outside += max(0.0, inside[1] - box[1]) + max(0.0, box[3] - inside[3])
    distance = abs((box[1] + box[3]) / 2 - to[1])
    return 100 * sum(map(over, taken)) + 50 * outside + 10 * sum(map(over, bars)) + distance


def marker(i: int, x: float, y: float, note: str = "", *, scale: float = 1.0) -> str:
    """Series number i's shape around a point."""
    shape = MARKERS[i // COLOURS % len(MARKERS)]
    place = f'transform="translate({x:.1f} {y:.1f}) scale({scale:g})"'
    title = f"<title>{escape(note)}</title>" if note else ""
    return f'<path class="dot c{i % COLOURS}" {place} d="{shape}">{title}</path>'
