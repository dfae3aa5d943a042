"""A bar chart of fps.py's rates beside the target, as one SVG file for light and dark pages."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from benchmarks.chart import STYLE

_WIDTH, _LABELS, _SCALE, _BAR, _STEP = 860, 130, 520, 18, 34  # pixels


def draw(result: dict[str, Any]) -> str:
    """A bar a mode with its spread, and a line where the target is."""
    rows = {n: r for n, r in result["modes"].items() if "images_per_second_per_gpu" in r}
    target = result["target_fps"]
    top = max([target, *(row["images_per_second_per_gpu"][2] for row in rows.values())])
    scale, x = _SCALE / top, _LABELS + 12
    height = 120 + _STEP * len(rows) + 40
    title = f"BYOL on {result['device']}: images per second per GPU"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{STYLE}</style>',
        f'<rect class="page" width="{_WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="24" y="36">{escape(title)}</text>',
        f'<text class="soft" x="24" y="58">commit {result["commit"]}, torch '
        f"{result['versions']['torch']}, {result['ranks']} rank(s)</text>",
    ]
    y = 96
    line = x + target * scale
    for name, row in rows.items():
        low, middle, high = row["images_per_second_per_gpu"]
        parts += [
            f'<text class="end" x="{_LABELS}" y="{y + 14}">{escape(name)}</text>',
            f'<rect class="ours" x="{x}" y="{y}" width="{middle * scale:.1f}" height="{_BAR}"/>',
            f'<line class="spread" x1="{x + low * scale:.1f}" x2="{x + high * scale:.1f}" '
            f'y1="{y + _BAR / 2}" y2="{y + _BAR / 2}"/>',
            f'<text x="{x + max(middle, high) * scale + 8:.0f}" y="{y + 14}">{middle:,.0f}</text>',
        ]
        y += _STEP
    parts += [
        f'<line class="spread" stroke-dasharray="4 4" x1="{line:.1f}" x2="{line:.1f}" y1="84" '
        f'y2="{y}"/>',
        f'<text class="soft small" x="{line + 5:.0f}" y="82">target {target:,.0f}</text>',
        f'<text class="soft small" x="24" y="{y + 28}">Bars: median; line: p20 to p80. One image '
        "is two views, in linear-eval one.</text>",
        "</svg>\n",
    ]
    return "\n".join(parts)
