"""The report in a real browser: pictures load, nothing is complained of, nothing overflows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from byol_fast import report
from tests.byol_fast import fake_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}")

# Put into a copy of the report: it tells the page around it how the report was laid out.
PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
 images: document.images.length,
 broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
 width: innerWidth, scroll: document.documentElement.scrollWidth,
 height: document.documentElement.scrollHeight,
 columns: getComputedStyle(document.querySelector(".pairs")).gridTemplateColumns.split(" ").length,
 dark: matchMedia("(prefers-color-scheme: dark)").matches,
 page: getComputedStyle(document.body).backgroundColor,
 flat: [...document.querySelectorAll("svg")].filter(s => s.clientHeight < 80).length,
}), "*"))</script>"""


def browse(page: Path, *options: str) -> tuple[str, str]:
    """The document after loading `page`, and what the browser wrote about it."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--disable-gpu",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever asks for a host shows as an error
        f"--user-data-dir={page.parent / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=4000",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),  # it refuses to run as root otherwise
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, done.stderr


def probe(run: Path, width: int, *options: str) -> dict:
    """Measures of the report in `run` shown `width` pixels wide."""
    source = report.write(run).read_text(encoding="utf-8")
    loose = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    (run / "probe.html").write_text(loose.replace("</head>", PROBE + "</head>"), encoding="utf-8")
    (run / "frame.html").write_text(
        f'<body><iframe src="probe.html" width="{width}" height="900"></iframe><script>'
        "addEventListener('message', e => {document.title = e.data})</script></body>"
    )
    document, _ = browse(run / "frame.html", *options)
    title = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert title, document[:500]
    return dict(json.loads(unescape(title[1])))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.make(tmp_path_factory.mktemp("browser") / "run", size=32)


def test_the_report_opens_without_a_word_on_the_console(run: Path):
    document, said = browse(report.write(run))
    assert "The network learned" in document and document.count("<img") == 32
    assert "CONSOLE" not in said, said


def test_the_console_would_tell(run: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    source = report.write(run).read_text(encoding="utf-8")
    page.write_text(source.replace("<main>", '<main><img src="https://example.invalid/x.png">'))
    assert "CONSOLE" in browse(page)[1]


@pytest.mark.parametrize(("width", "columns"), [(360, 2), (768, 2), (1280, 4)])
def test_pictures_load_and_nothing_overflows(width: int, columns: int, run: Path):
    seen = probe(run, width)
    assert (seen["images"], seen["broken"], seen["flat"]) == (32, 0, 0)
    assert seen["scroll"] <= seen["width"] <= width
    assert seen["columns"] == columns and seen["height"] > 2000


def test_dark_where_the_reader_prefers_it(run: Path):
    light, dark = probe(run, 800), probe(run, 800, "--force-dark-mode")
    if not dark["dark"]:
        pytest.skip("this browser cannot be told to prefer dark")
    assert light["page"] != dark["page"]
