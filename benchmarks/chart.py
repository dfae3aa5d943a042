"""A bar chart of a loader result as one SVG file, for light and dark pages.

`python benchmarks/chart.py RESULT.json OUT.svg`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, BAR, STEP, LABELS, SCALE = 1080, 16, 27, 330, 280  # pixels
RIVALS = ("pil crops", "ffcv two specs", "lightly transform", "dali as solo-learn")
TITLES = {
    "crops": "Decode and cut two crops",
    "views": "The whole of both views: crop, colours, normalise",
}
STYLE = """
  svg { font: 13px system-ui, sans-serif; --page: #ffffff; --text: #1c2330; --soft: #667085;
        --ours: #1d6fd1; --peer: #b3bccb; --line: #e3e7ee; }
  @media (prefers-color-scheme: dark) {
    svg { --page: #10151d; --text: #e8ecf3; --soft: #97a3b6; --ours: #4f9cf5; --peer: #4c586b;
          --line: #2a3342; } }
  .page { fill: var(--page); } text { fill: var(--text); } .soft { fill: var(--soft); }
  .ours { fill: var(--ours); } .peer { fill: var(--peer); } .line { stroke: var(--line); }
  .spread { stroke: var(--text); stroke-width: 1.5; } .title { font-size: 18px; font-weight: 600; }
  .group { font-weight: 600; } .end { text-anchor: end; } .small { font-size: 11.5px; }
"""


def draw(result: dict[str, Any]) -> str:
    """The rows of `result` as bars, fastest first, one group a kind of work.

    On a CPU the figure is per core, on a GPU on the clock. Synthetic pixels are left out.
    """
    on_cpu = result["device"] == "cpu"
    unit = "images_per_core_second" if on_cpu else "images_per_second"
    shown = {n: row for n, row in result["rows"].items() if row["kind"] != "synthetic crops"}
    groups = {work: _sorted(shown, work, unit) for work in TITLES}
    top = max((row[unit][2] for row in shown.values()), default=1.0)
    ratios = _ratios(result["ratios"], "core" if on_cpu else "clock")
    parts = _head(result, "images per second and core" if on_cpu else "images per second")
    y = 118
    for work, rows in groups.items():
        if not rows:
            continue
        parts.append(_text(24, y, TITLES[work], "group"))
        y += 16
        parts.append(f'<line class="line" x1="24" y1="{y}" x2="{WIDTH - 24}" y2="{y}"/>')
        y += 12
        for name, row in rows:
            parts += _bar(y, name, row, row[unit], SCALE / top, ratios.get(name, ""))
            y += STEP
        y += 26
    parts += _foot(result, y)
    height = y + 50
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Images per second of data loaders">\n<style>{STYLE}</style>\n'
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _sorted(rows: dict[str, Any], work: str, unit: str) -> list[tuple[str, Any]]:
    some = [(name, row) for name, row in rows.items() if row["work"] == work]
    return sorted(some, key=lambda item: -item[1][unit][1])


def _ratios(ratios: dict[str, Any], unit: str) -> dict[str, str]:
    """`2.4× pil crops · 6.9× lightly transform` for each of our rows that has rivals."""
    found: dict[str, list[str]] = {}
    for ratio in ratios.values():
        ours, (theirs, _, _) = ratio["of"][0], ratio["of"][1].partition(",")
        if theirs in RIVALS:
            found.setdefault(ours, []).append(f"{ratio[unit][1]:.1f}× {theirs}")
    return {ours: " · ".join(some) for ours, some in found.items()}


def _head(result: dict[str, Any], unit: str) -> list[str]:
    machine = result["cpu"] if result["device"] == "cpu" else f"{result['device']}, {result['cpu']}"
    data = Path(result["data"]).name
    below = f"{data}, {result['image_size']} px, batch {result['batch_size']}; {machine}"
    return [
        _text(24, 36, f"Loading pairs of views: {unit}", "title"),
        _text(24, 58, below, "soft"),
        '<rect class="ours" x="24" y="72" width="12" height="12" rx="2"/>',
        _text(42, 83, "byol_fast"),
        '<rect class="peer" x="124" y="72" width="12" height="12" rx="2"/>',
        _text(142, 83, "others, in the same run on the same files"),
    ]


def _bar(
    y: int, name: str, row: dict[str, Any], rate: list[float], scale: float, ratio: str
) -> list[str]:
    low, middle, high = rate
    x, side, middle_y = LABELS + 12, "peer" if row["peer"] else "ours", y + BAR / 2
    after = x + max(middle, high) * scale + 8
    value = f"{middle:,.0f}"
    parts = [
        _text(LABELS, y + 12, name, "end"),
        f'<rect class="{side}" x="{x}" y="{y}" width="{middle * scale:.1f}" height="{BAR}" '
        'rx="2"/>',
        f'<line class="spread" x1="{x + low * scale:.1f}" y1="{middle_y}" '
        f'x2="{x + high * scale:.1f}" y2="{middle_y}"/>',
        _text(after, y + 12, value),
    ]
    if ratio:
        parts.append(_text(after + 9 * len(value) + 6, y + 12, ratio, "soft small"))
    return parts


def _foot(result: dict[str, Any], y: int) -> list[str]:
    turns = sorted({row["n"] for row in result["rows"].values()})
    n = " to ".join(map(str, turns if len(turns) == 1 else [turns[0], turns[-1]]))
    lines = [
        f"Median of {n} turns each, line: p20 to p80. One image is one sample, both views. "
        f"Commit {result['commit']}, torch {result['versions']['torch']}.",
        "Crops beside a whole transform: the CPU work that is left when the GPU does the colours.",
    ]
    return [_text(24, y + 18 * i, line, "soft small") for i, line in enumerate(lines)]


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text{chosen} x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit((__doc__ or "").strip())
    Path(sys.argv[2]).write_text(draw(json.loads(Path(sys.argv[1]).read_text())))
