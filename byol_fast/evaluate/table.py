"""The one table the command prints: what was measured, and beside it what was published."""

from __future__ import annotations

from dataclasses import dataclass

from byol_fast.evaluate.protocols import Published

_HEAD = ("protocol", "weights", "data", "top-1 %", "top-5 %", "images/s", "published *")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; accuracies are shares of 1."""

    protocol: str
    top1: float
    top5: float | None = None
    images_per_second: float
    published: Published | None = None


def render(rows: list[Row], *, weights: str, data: str) -> str:
    """The table as text, with a foot that says what the published figures are of."""
    body = [
        (
            row.protocol,
            _tail(weights),
            _tail(data),
            percent(row.top1),
            "–" if row.top5 is None else percent(row.top5),
            f"{row.images_per_second:,.0f}",
            "–" if row.published is None else _published(row.published),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (_HEAD, *body)) for column in range(len(_HEAD))]
    lines = [_line(_HEAD, widths), _line(tuple("─" * w for w in widths), widths)]
    lines += [_line(line, widths) for line in body]
    if any(row.published for row in rows):
        lines.append(
            "* top-1 of BYOL with a ResNet-50 on ImageNet-1k, pretrained for the epochs given: a "
            "yardstick for that data alone"
        )
    return "\n".join(lines)


def percent(share: float) -> str:
    """`0.7123` as `71.23`."""
    return f"{100 * share:.2f}"


def _published(figure: Published) -> str:
    return f"{figure.top1:g} ({figure.by}, {figure.epochs} epochs)"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _tail(path: str, parts: int = 3) -> str:
    """The last parts of a path; a table has no room for more, and the result file has it all."""
    pieces = path.replace("\\", "/").rstrip("/").split("/")
    return "/".join(pieces[-parts:])
