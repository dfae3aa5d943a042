"""Charts of the report: inline SVG from numbers, coloured by the page's style sheet.

Every function returns an `<svg>` with a text for screen readers (or "" where there is nothing to
draw), skips what is not finite and escapes what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from byol_fast.report.html import COLOURS, tag

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 14, 36
BUCKETS = 300  # a longer series is drawn by the lowest and highest value of each bucket
DOTS = 40  # a series this short shows its points, with their values on hover

Format = Callable[[float], str]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One line: `x` ascending, `y` may hold NaN, which breaks the line."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    label: str
    y: float


def count(value: float) -> str:
    """1500 as 1.5k; small values with the digits they need."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A share of 1 for an axis."""
    return f"{100 * value:.4g} %"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    marks: Sequence[float] = (),
    y_format: Format = count,
    floor: float | None = None,
) -> str:
    """Lines over steps with dashed `levels` and alarms at the steps of `marks`.

    `floor` is a value the axis must reach down to.
    """
    series = [s for s in series if np.isfinite(np.asarray(s.y, float)).any()]
    if not series:
        return ""
    xs = np.concatenate([np.asarray(s.x, float) for s in series])
    ys = np.concatenate([np.asarray(s.y, float) for s in series] + [[v.y for v in levels]])
    x_range = float(xs.min()), float(xs.max())
    y_range = _padded(ys[np.isfinite(ys)], floor)
    to_x = _scale(*x_range, LEFT, WIDTH - RIGHT)
    to_y = _scale(*y_range, HEIGHT - BOTTOM, TOP)
    body = _axes(to_x, to_y, x_range, y_range, y_format)
    for mark in marks:
        if x_range[0] <= mark <= x_range[1]:
            line = tag("line", x1=to_x(mark), x2=to_x(mark), y1=TOP, y2=HEIGHT - BOTTOM)
            body += tag("g", f"<title>alarm at step {mark:,.0f}</title>{line}", class_="mark")
    body += "".join(_line(s, to_x, to_y, y_format) for s in series)
    body += _levels(levels, to_y)
    told = [f"{s.label} {_course(s, y_format)}" for s in series]
    told += [f"{v.label}: {y_format(v.y)}" for v in levels]
    return _svg(f"{title}. {'; '.join(told)}.", WIDTH, HEIGHT, body)


def _padded(values: Floats, floor: float | None) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    # no negative axis for what cannot be negative
    padded = max(0.0, low - pad) if low >= 0 else low - pad
    return (padded if floor is None else min(padded, floor)), high + pad


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low
    return lambda v: start + (end - start) * ((v - low) / span if span else 0.5)


def _axes(
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    y_format: Format,
) -> str:
    end, base = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in ticks(*y_range, 4):
        y = to_y(value)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=end, y1=y, y2=y))
        parts.append(_text(y_format(value), LEFT - 7, y + 4, "end"))
    parts.append(tag("line", class_="axis", x1=LEFT, x2=end, y1=base, y2=base))
    for value in ticks(*x_range, 5):
        if value == round(value):  # there is no half step
            parts.append(_text(count(value), to_x(value), base + 15, "middle"))
    parts.append(_text("step", (LEFT + end) / 2, HEIGHT - 4, "middle", "name"))
    return "".join(parts)


def _text(text: str, x: float, y: float, anchor: str, class_: str = "tick") -> str:
    return tag("text", escape(text), class_=class_, x=x, y=y, text_anchor=anchor)


def _line(
    series: Series, to_x: Callable[[float], float], to_y: Callable[[float], float], y_format: Format
) -> str:
    x, y = _thinned(np.asarray(series.x, float), np.asarray(series.y, float))
    path, pen_down = [], False
    for px, py in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(py):
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{to_x(px):.1f} {to_y(py):.1f}")
        pen_down = True
    colour = f"c{series.colour % COLOURS}"
    drawn = tag("path", class_=f"line {colour}", d="".join(path))
    if len(series.x) > DOTS:
        return drawn
    for px, py in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(py):
            hover = (
                f"<title>{escape(series.label)} at step {px:,.0f}: {escape(y_format(py))}</title>"
            )
            drawn += tag("circle", hover, class_=f"dot {colour}", cx=to_x(px), cy=to_y(py), r=2.6)
    return drawn


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest point of each bucket, in order: spikes stay, 100,000 points do not."""
    if len(x) <= 2 * BUCKETS:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), BUCKETS):
        finite = part[np.isfinite(y[part])]
        if len(finite):
            keep |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])}
        if len(finite) < len(part):
            keep.add(int(part[~np.isfinite(y[part])][0]))
    order = sorted(keep)
    return x[order], y[order]


def _levels(levels: Sequence[Level], to_y: Callable[[float], float]) -> str:
    parts, last = [], math.inf
    for level in sorted(levels, key=lambda v: v.y):  # from the bottom, labels pushed up
        y = to_y(level.y)
        last = min(y - 5, last - 13)
        parts.append(tag("line", class_="level", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(_text(level.label, WIDTH - RIGHT, max(last, 10.0), "end", "level-name"))
    return "".join(parts)


def _course(series: Series, y_format: Format) -> str:
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    (x0, y0), (x1, y1) = points[0], points[-1]
    return f"from {y_format(y0)} at step {x0:,.0f} to {y_format(y1)} at step {x1:,.0f}"


def scatter(
    title: str,
    xy: Floats,  # [n, 2]
    groups: npt.NDArray[np.int64],  # [n] index into `names`; others are drawn in grey first
    names: Sequence[str],
    axes: tuple[str, str],
) -> str:
    """Points coloured by group, each group's name at its median."""
    if len(xy) == 0:
        return ""
    width, height, edge = 560, 460, 30
    low, high = xy.min(axis=0), xy.max(axis=0)
    to_x = _scale(float(low[0]), float(high[0]), edge, width - edge)
    to_y = _scale(float(low[1]), float(high[1]), height - edge - 12, edge - 12)
    body = tag("rect", class_="frame", x=14, y=0.5, width=width - 15, height=height - 20, rx=6)
    known = (groups >= 0) & (groups < len(names))
    body += _dots(xy[~known], to_x, to_y, "other")
    for i in range(len(names)):
        body += _dots(xy[groups == i], to_x, to_y, f"c{i % COLOURS}")
    taken: list[tuple[float, float, float]] = []
    for i, name in enumerate(names):
        mine = xy[groups == i]
        if len(mine):
            x, y = np.median(mine, axis=0)
            at = _free(to_x(float(x)), to_y(float(y)) + 4, 4.2 * len(name), taken)
            body += _text(name, at[0], at[1], "middle", "group")
    body += _text(axes[0], width / 2, height - 5, "middle", "name")
    turned = f"translate(9 {(height - 20) / 2:g}) rotate(-90)"
    body += tag("text", escape(axes[1]), class_="name", text_anchor="middle", transform=turned)
    told = f"{title}: {len(xy):,} points" + (f" in {len(names)} classes" if names else "")
    return _svg(told, width, height, body)


def _free(
    x: float, y: float, half: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float]:
    """Where a label `half` wide to each side does not cover those in `taken`: at y or below it."""
    while any(abs(x - ox) < half + oh and abs(y - oy) < 15 for ox, oy, oh in taken):
        y += 3
    taken.append((x, y, half))
    return x, y


def _dots(
    xy: Floats, to_x: Callable[[float], float], to_y: Callable[[float], float], colour: str
) -> str:
    """All points of one colour as one path of zero-length round strokes: a tenth of the bytes."""
    if len(xy) == 0:
        return ""
    path = "".join(f"M{to_x(x):.1f} {to_y(y):.1f}h0" for x, y in xy.tolist())
    return tag("path", class_=f"dots {colour}", d=path)


def _svg(told: str, width: float, height: float, body: str) -> str:
    return tag("svg", body, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=told)
