"""Building blocks of the report's page. All text given to them is escaped here, and only here."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

COLOURS = 10  # classes c0..c9 of the style sheet


@dataclass(frozen=True)
class Bar:
    """One bar of a chart, or one part of a stacked one; `note` says what it is."""

    label: str
    value: float
    colour: int = 0
    note: str = ""


def tag(name: str, content: str = "", **attributes: str | float) -> str:
    """An element; `content` is markup already, attributes are escaped, `class_` means class."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{text}>{content}</{name}>"


def _attribute(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.6g}"


def prose(text: str) -> str:
    """Text escaped, with figures kept on one line with their per cent sign."""
    return escape(text).replace(" %", "&nbsp;%")


def para(text: str, class_: str = "") -> str:
    """A paragraph of plain text."""
    return tag("p", prose(text), class_=class_) if class_ else tag("p", prose(text))


def section(name: str, title: str, body: str, lead: str = "") -> str:
    """A section with a heading, an introducing sentence and an anchor."""
    head = tag("h2", escape(title), id=name) + (para(lead, "lead") if lead else "")
    return tag("section", head + body, aria_labelledby=name)


def missing(text: str) -> str:
    """What a section says in place of what it could not show."""
    return para(text, "missing")


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    class_: str = "",
) -> str:
    """A table whose first column names its rows; columns in `numbers` are set as figures."""

    def cell(i: int, text: str) -> str:
        kind = "number" if i in numbers else ""
        extra = {"class_": kind} if kind else {}
        if i == 0:
            return tag("th", escape(text), scope="row", **extra)
        return tag("td", escape(text), **extra)

    body = "".join(tag("tr", "".join(cell(i, text) for i, text in enumerate(row))) for row in rows)
    top = "".join(
        tag("th", escape(text), scope="col", **({"class_": "number"} if i in numbers else {}))
        for i, text in enumerate(head)
    )
    content = tag("caption", escape(caption)) + tag("thead", tag("tr", top)) + tag("tbody", body)
    inner = tag("table", content, class_=class_) if class_ else tag("table", content)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def bars(title: str, items: Sequence[Bar], text: Callable[[float], str], top: float) -> str:
    """Horizontal bars from 0 to `top`, each with its name, value and note."""
    rows = ""
    for bar in items:
        if not math.isfinite(bar.value):
            continue
        share = min(max(bar.value / top, 0.0), 1.0) if top > 0 else 0.0
        name = tag("span", escape(bar.label), class_="bar-name")
        value = tag("span", escape(text(bar.value)), class_="bar-value")
        style = f"width:{100 * share:.2f}%"
        fill = tag("span", "", class_=f"bar-fill b{bar.colour % COLOURS}", style=style)
        track = tag("span", fill, class_="bar-track")
        note = tag("span", escape(bar.note), class_="bar-note") if bar.note else ""
        rows += tag("li", name + value + track + note)
    return tag("ul", rows, class_="bars", aria_label=title) if rows else ""


def stacked_bar(title: str, parts: Sequence[Bar]) -> str:
    """One bar of 100 %; a part with room for it carries its share."""
    parts = [p for p in parts if math.isfinite(p.value) and p.value > 0]
    total = sum(p.value for p in parts)
    if total <= 0:
        return ""
    inner = ""
    for part in parts:
        share = part.value / total
        words = f"{100 * share:.0f} %" if share > 0.08 else ""
        fill = f"stack-part b{part.colour % COLOURS}"
        hover = f"{part.label}: {100 * share:.1f} %"
        inner += tag("span", words, class_=fill, style=f"flex-grow:{share:.5f}", title=hover)
    told = "; ".join(f"{p.label} {100 * p.value / total:.1f} %" for p in parts)
    return tag("div", inner, class_="stack", role="img", aria_label=f"{title}: {told}")


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Swatches with their names: pairs of a colour class such as b3 and a text."""
    inner = "".join(
        tag("li", tag("span", "", class_=f"swatch {colour}") + escape(text))
        for colour, text in items
    )
    return tag("ul", inner, class_="legend") if inner else ""


def picture(pixels: npt.NDArray[np.uint8], alt: str, most: int = 128) -> str:
    """An `<img>` holding `pixels` [H, W, 3] as PNG, made smaller than `most` pixels a side."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) > most:
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    width, height = image.size
    return (
        f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" '
        f'width="{width}" height="{height}">'
    )
