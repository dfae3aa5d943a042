"""The one table the commands print: what was measured, and beside it what was published."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from byol_fast.evaluate.published import USUAL, Published


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement."""

    protocol: str
    figures: dict[str, float]  # by the metric's name, shares of 1, the most important one first
    images_per_second: float | None = None
    published: Published | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a result file."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Row:
        """The inverse of `as_dict`."""
        figure = values["published"]
        return Row(**{**values, "published": Published(**figure) if figure else None})


def render(rows: list[Row], *, weights: str, data: str) -> str:
    """The rows of one network on one data set as a table."""
    return render_all([(row, weights, data) for row in rows])


def render_all(lines: list[tuple[Row, str, str]]) -> str:
    """A table of `(row, weights, data)`, with a foot that says what the published figures are of.

    A metric has a column if any row has it.
    """
    metrics = list(dict.fromkeys(name for row, _, _ in lines for name in row.figures))
    head = ("protocol", "weights", "data", *(f"{m} %" for m in metrics), "images/s", "published *")
    body = [
        (
            row.protocol,
            _tail(weights),
            _tail(data),
            *(percent(row.figures[m]) if m in row.figures else "–" for m in metrics),
            "–" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
            "–" if row.published is None else _published(row.published),
        )
        for row, weights, data in lines
    ]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    text = [_line(head, widths), _line(tuple("─" * w for w in widths), widths)]
    text += [_line(line, widths) for line in body]
    networks = dict.fromkeys(row.published.network for row, _, _ in lines if row.published)
    text += [
        f"* BYOL with a {network} for the epochs given, on the data named (ImageNet-1k unless "
        "said): a yardstick for that data alone"
        for network in networks
    ]
    return "\n".join(text)


def percent(share: float) -> str:
    """`0.7123` as `71.23`."""
    return f"{100 * share:.2f}"


def _published(figure: Published) -> str:
    on = "" if figure.on == "ImageNet-1k" else f" on {figure.on}"
    other = "" if figure.network == USUAL else f"{figure.network.partition(' ')[0]}, "
    return f"{figure.metric} {figure.value:g}{on} ({figure.by}, {other}{figure.epochs} epochs)"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _tail(path: str, parts: int = 3) -> str:
    """The last parts of a path; a table has no room for more, and the result file has it all."""
    pieces = path.replace("\\", "/").rstrip("/").split("/")
    return "/".join(pieces[-parts:])
