"""The report of a run: one self-contained HTML file that can be mailed, archived and printed.

It asks nothing of the network (its own policy forbids that to the browser), needs no script, and is
made from whatever files the run folder holds; a section whose file is missing says so.
"""

from __future__ import annotations

import os
import time
from html import escape
from pathlib import Path

from byol_fast._version import __version__
from byol_fast.report import sections as sections
from byol_fast.report.data import RunData, load
from byol_fast.report.html import para, tag
from byol_fast.report.style import STYLE
from byol_fast.report.verdict import tiles, verdict

# The browser may show inlined pictures and styles, and load nothing whatever.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(run: Path | str) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the report cannot be written; an older one is left as it was.
    """
    run = Path(run)
    page = render(load(run))
    path = run / "report.html"
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        # A class or file whose name is not UTF-8 is shown with question marks.
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render(data: RunData) -> str:
    """The whole page."""
    title = f"{data.name} · BYOL pretraining report"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    parts = (
        sections.knn(data),
        sections.curves(data),
        sections.views(data),
        sections.embedding_map(data.embedding),
        sections.throughput(data),
        sections.events(data),
        sections.configuration(data),
    )
    main = tag("main", verdict(data) + tiles(data) + "".join(parts))
    written = time.strftime("%Y-%m-%d %H:%M")
    foot = tag("footer", para(f"Written by byol_fast {__version__} on {written}."))
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>'
        f"<body>{_header(data)}{main}{foot}</body></html>\n"
    )


def _header(data: RunData) -> str:
    state = str(data.status.get("state", ""))
    badge = tag("span", escape(state), class_="state") if state else ""
    config = data.config
    facts = [str(config[k]) for k in ("backbone", "recipe", "data") if config.get(k)]
    if config.get("image_size"):
        facts.insert(1, f"{config['image_size']} px")
    if config.get("epochs"):
        facts.append(f"{config['epochs']} epochs")
    if config.get("batch_size"):
        facts.append(f"batch {config['batch_size']}")
    return tag(
        "header",
        para("BYOL pretraining report", "eyebrow")
        + tag("h1", escape(data.name) + badge)
        + para(" · ".join(facts), "facts"),
    )
