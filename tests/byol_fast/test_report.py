"""The report: complete, self-contained, escaped, honest, and whole whatever is missing."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_fast import report
from byol_fast.report.charts import Level, Series, count, line_chart, scatter, ticks
from byol_fast.report.data import load, pca
from byol_fast.report.html import picture, stacked_bar
from tests.byol_fast import fake_run

VOID = {"meta", "link", "img", "br", "hr", "input"}
FILES = ("metrics.jsonl", "config.yaml", "summary.json", "views.npz", "embedding.npz")


class Page(HTMLParser):
    """Elements of a page with their attributes, its text, and a check that tags are balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words).replace("\xa0", " "))

    def all(self, tag: str, class_: str = "") -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and set(class_.split()) <= set(_classes(a))]


def _classes(attributes: dict[str, str]) -> list[str]:
    return attributes.get("class", "").split()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = fake_run.make(tmp_path_factory.mktemp("runs") / "my <run> & co")
    return Page(report.write(run))


def test_the_verdict_gives_the_figures_in_words(page: Page):
    text = page.text
    rows = fake_run.log_rows()
    first, last = (next(r["loss"] for r in o if "loss" in r) for o in (rows, rows[::-1]))
    assert f"The loss fell from {first:.4g} to {last:.4g} in 1,200 steps." in text
    assert "kNN accuracy is 76.2 %, against 41.2 % for the untrained network and 46.8 %" in text
    assert re.search(r"It ran at 51\d images/s", text)
    assert "The network learned: its features beat both baselines" in text
    assert "There was no sign of collapse." in text


def test_every_section_is_there(page: Page):
    for title in (
        "Has it learned?",
        "Learning curves",
        "What the network sees",
        "Map of the embeddings",
        "Where the time goes",
        "Alarms and events",
        "Configuration",
    ):
        assert title in page.text
    charts = [a["aria-label"] for a in page.all("svg")]
    assert len(charts) == 12
    assert any(c.startswith("Loss. Loss from 3.9") for c in charts)
    assert any("raw pixels: 46.8 %; untrained: 41.2 %" in c for c in charts)
    assert any("healthy 1/√256: 0.0625" in c for c in charts)
    assert "Waiting for the loader (read, decode, crop) 9.4 s 6.5 %" in page.text
    assert "optim" in page.text and "base_lr 0.4" in page.text and "resumed on 2 ranks" in page.text


def test_accessible(page: Page):
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.all("svg"))
    headers = page.all("th")
    assert headers and all(a.get("scope") in ("row", "col") for a in headers)
    assert len(page.all("caption")) == len(page.all("table")) > 3
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a["aria-labelledby"] for a in page.all("section")]
    assert set(named) <= set(ids)


def test_light_dark_and_narrow_screens(page: Page):
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "prefers-color-scheme:dark" in style and "max-width:600px" in style
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    used = set(re.findall(r"var\((--[\w-]+)\)", style))
    defined = set(re.findall(r"(--[\w-]+):", style))
    assert used - {"--c"} <= defined
    classes = {c for _, a in page.elements for c in _classes(a)}
    unknown = {c for c in classes if f".{c}" not in style}
    assert unknown <= {"plain"}


def test_nothing_is_asked_of_the_network(page: Page):
    assert not page.all("script") and not page.all("iframe") and not page.all("object")
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has a handler"
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert value.startswith("data:"), f"<{tag} {name}={value[:60]}>"
    assert "@import" not in page.source and "url(" not in page.source
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", page.source)
    policy = next(a for a in page.all("meta") if a.get("http-equiv"))["content"]
    assert policy.startswith("default-src 'none'")


def test_everything_given_is_escaped(page: Page):
    assert "my <run> & co" in page.text
    assert "tench & <b>fish</b>" in page.text and 'parachute "red"' in page.text
    assert "/data/imagenette/<train>" in page.text
    assert not page.all("run") and not page.all("b") and not page.all("train")


def test_configuration_and_events_are_escaped(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("{'<u>a': {'<u>b': '<u>c', d: [1, <u>e]}, f: null}")
    event = {"step": 1, "event": "<u>", "text": "<u>g"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    page = Page(report.write(tmp_path))
    assert not page.all("u") and page.source.count("&lt;u&gt;") >= 6
    assert "<u>b <u>c" in page.text and "d 1, <u>e" in page.text and "f –" in page.text


def test_view_pairs_are_the_pixels_that_were_saved(page: Page):
    images = page.all("img")
    assert len(images) == 32
    assert [a["alt"] for a in images[:3]] == [
        "Image 1, view 1",
        "Image 1, view 2",
        "Image 2, view 1",
    ]
    views = fake_run.views()
    for i, view in ((0, 0), (1, 1), (31, 1)):
        data = base64.b64decode(images[i]["src"].split(",", 1)[1])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), views[view, i // 2])


def test_large_pictures_are_made_smaller():
    pixels = np.zeros((224, 112, 3), np.uint8)
    assert 'width="64" height="128"' in picture(pixels, "a", most=128)


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_costs_its_section_only(missing: str, tmp_path: Path):
    run = fake_run.make(tmp_path / "run", size=8)
    (run / missing).unlink()
    page = Page(report.write(run))
    assert len(page.all("p", "missing")) >= 1
    assert len(page.all("section")) == 8


@pytest.mark.parametrize("name", (*FILES, "status.json"))
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\xff\xfe{[", b"[1, 2]"])
def test_a_broken_file_is_survived(name: str, content: bytes, tmp_path: Path):
    run = fake_run.make(tmp_path / "run", size=8)
    (run / name).write_bytes(content)
    page = Page(report.write(run))
    assert len(page.all("section")) == 8
    if name.endswith(".npz"):
        assert f"{name} could not be read" in page.text


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path):
    page = Page(report.write(tmp_path))
    assert "Nothing has been logged yet" in page.text
    assert len(page.all("p", "missing")) == 7
    assert "nan" not in page.text.lower()


def test_no_folder_is_a_clear_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        report.write(tmp_path / "none")


def test_an_npz_with_objects_is_not_unpickled(tmp_path: Path):
    np.savez(tmp_path / "views.npz", views=np.array([{"a": 1}], dtype=object))
    assert "views.npz could not be read" in Page(report.write(tmp_path)).text


def test_an_older_report_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = report.write(tmp_path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write(tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


# --- what the verdict says


def verdict_of(tmp_path: Path, rows: list[dict], **summary: float) -> str:
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return Page(report.write(tmp_path)).text


def test_a_collapse_is_said_first(tmp_path: Path):
    page = Page(report.write(fake_run.make(tmp_path / "run", collapse=True)))
    assert "✕ The embeddings collapsed" in page.text
    assert "<i>20 %</i>" in page.text and not page.all("i")
    assert len(page.all("div", "alarm")) == 1
    assert len(page.all("g", "mark")) == 3  # in loss, spread and rank
    assert "No alarm was raised" not in page.text


def test_a_diverged_run_is_not_called_healthy(tmp_path: Path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}]
    text = verdict_of(tmp_path, rows, knn_trained=0.9, knn_untrained=0.1)
    assert "Training diverged" in text and "The network learned" not in text
    assert "No alarm was raised" not in text


@pytest.mark.parametrize(
    ("trained", "untrained", "raw", "words"),
    [
        (0.5, 0.4, 0.3, "its features beat both baselines"),
        (0.5, 0.4, None, "its features beat the untrained network"),
        (0.5, 0.4, 0.6, "not yet better than raw pixels"),
        (0.4, 0.4, 0.1, "has not improved the features"),
        (None, 0.4, 0.1, "kNN accuracy was not measured"),
    ],
)
def test_the_headline_follows_the_accuracies(
    trained: float | None, untrained: float, raw: float | None, words: str, tmp_path: Path
):
    given = {"knn_trained": trained, "knn_untrained": untrained, "knn_raw_pixels": raw}
    summary = {name: value for name, value in given.items() if value is not None}
    assert words in verdict_of(tmp_path, [{"step": 1, "loss": 1.0}], **summary)


def test_a_short_run_with_a_low_spread_is_not_called_healthy(tmp_path: Path):
    rows = [{"step": i, "loss": 0.1, "embedding_std": 0.1 * fake_run.HEALTHY} for i in range(4)]
    text = verdict_of(tmp_path, rows, knn_untrained=0.2, knn_trained=0.5)
    assert "! The embeddings may be collapsing" in text and "Collapse possible" in text
    assert "no sign of collapse" not in text and "did not collapse" not in text


def test_a_rising_loss_is_said_to_rise(tmp_path: Path):
    text = verdict_of(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 9, "loss": 2.0}])
    assert "The loss rose from 1 to 2 in 9 steps." in text


def test_waiting_for_the_loader_is_named(tmp_path: Path):
    rows = [{"step": i, "loss": 1.0, "time/data_wait_share": 0.6} for i in range(5)]
    text = verdict_of(tmp_path, rows, throughput={"decode_wait": 60, "step": 40})  # type: ignore[arg-type]
    assert "stood waiting for images 60.0 % of the time: the loader is the bottleneck" in text
    assert "Waiting for the loader (read, decode, crop) 60.0 s 60.0 %" in text


def test_broken_images_are_counted_and_named(tmp_path: Path):
    bad = {f"<cat>/{i}.jpg": "truncated" for i in range(60)}
    text = verdict_of(tmp_path, [{"step": 1, "loss": 1.0}], quarantined=12, bad_images=bad)  # type: ignore[arg-type]
    assert "12 broken images were found beforehand" in text
    assert "60 images could not be decoded" in text
    assert "<cat>/49.jpg truncated" in text and "<cat>/50.jpg" not in text


def test_the_speed_summed_up_is_preferred(tmp_path: Path):
    rows = [{"step": i, "loss": 1.0, "time/images_per_second": 700.0} for i in range(3)]
    assert "It ran at 700 images/s" in verdict_of(tmp_path, rows)
    assert "It ran at 640 images/s" in verdict_of(tmp_path, rows, images_per_second=640.0)


# --- drawing


def test_ticks_are_round_and_inside():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.92, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(3.0, 3.0) == [3.0]
    for low, high in ((-3.3, -2.2), (1e-7, 3e-6), (0, 93750), (-1e9, 1e9)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 6 and low <= found[0] and found[-1] <= high
    assert [count(v) for v in (1500, 2e6, 0.00025, 250)] == ["1.5k", "2M", "0.00025", "250"]


def points_of(svg: str) -> list[tuple[str, float, float]]:
    path = re.search(r'class="line c0" d="([^"]*)"', svg)
    assert path
    found = re.findall(r"([ML])([\d.]+) ([\d.]+)", path[1])
    return [(op, float(x), float(y)) for op, x, y in found]


def test_a_line_goes_through_its_points_and_breaks_at_nan():
    svg = line_chart("t", [Series("a", [0, 1, 2, 3, 4], [0, 1, math.nan, 1, 0])], floor=0.0)
    points = points_of(svg)
    assert [p[0] for p in points] == ["M", "L", "M", "L"]
    (_, x0, y0), (_, x1, y1), (_, x3, y3), (_, x4, y4) = points
    assert y0 == y4 > y1 == y3
    assert x1 - x0 == pytest.approx(x4 - x3) == pytest.approx((x4 - x0) / 4, abs=0.1)
    assert "nan" not in svg.lower()


def test_a_long_series_is_thinned_and_keeps_its_spikes():
    y = np.zeros(100_000)
    y[54_321] = 5.0
    svg = line_chart("t", [Series("a", list(range(100_000)), y.tolist())])
    points = points_of(svg)
    assert len(points) < 700
    assert min(p[2] for p in points) < max(p[2] for p in points) - 100
    assert len(svg) < 20_000


def test_levels_are_in_range_and_nothing_is_drawn_from_nothing():
    svg = line_chart("t", [Series("a", [0, 1], [1.0, 2.0])], levels=[Level("far", 9.0)])
    ys = [float(v) for v in re.findall(r'class="level"[^>]*y1="([\d.]+)"', svg)]
    assert len(ys) == 1 and 10 < ys[0] < points_of(svg)[1][2]
    assert line_chart("t", []) == ""
    assert line_chart("t", [Series("a", [0, 1], [math.nan, math.nan])]) == ""
    assert line_chart("t", [Series("a", [5], [2.0])]).startswith("<svg")
    assert (
        stacked_bar("t", []) == ""
        and scatter("t", np.zeros((0, 2)), np.zeros(0), [], ("", "")) == ""
    )


def test_pca_finds_the_directions_of_variance():
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((400, 2)) * [5.0, 2.0]
    basis = np.linalg.qr(rng.standard_normal((16, 2)))[0]
    xy, explained = pca(latent @ basis.T + 0.01 * rng.standard_normal((400, 16)) + 7)
    for i in range(2):
        assert abs(np.corrcoef(xy[:, i], latent[:, i])[0, 1]) > 0.99
    assert explained[0] == pytest.approx(25 / 29, abs=0.03) and sum(explained) > 0.99


def test_pca_agrees_with_a_full_decomposition():
    points = fake_run.features(200, 48)[0].astype(np.float64)
    xy, explained = pca(points)
    centred = points - points.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(xy), np.abs(left[:, :2] * values[:2]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(explained, values[:2] ** 2 / (values**2).sum(), rtol=1e-4)
    np.testing.assert_array_equal(xy, pca(points)[0])


def test_many_classes_colour_the_ten_largest(tmp_path: Path):
    labels = np.repeat(np.arange(30), np.arange(10, 40))
    features = np.random.default_rng(0).standard_normal((len(labels), 8))
    features[0] = np.nan
    np.savez(tmp_path / "embedding.npz", features=features, labels=labels)
    page = Page(report.write(tmp_path))
    assert "20 more classes" in page.text and "class 29" in page.text
    assert "class 19 " not in page.text and len(page.all("path", "dots")) == 11


def test_embeddings_without_labels_or_already_projected(tmp_path: Path):
    points = np.random.default_rng(0).standard_normal((3000, 2))
    np.savez(tmp_path / "embedding.npz", pca=points)
    embedding = load(tmp_path).embedding
    assert embedding is not None and len(embedding.xy) == 2000 and embedding.explained is None
    np.testing.assert_allclose(embedding.xy[0], points[0])
    assert "Embeddings: 2,000 points" in report.write(tmp_path).read_text()


def test_a_run_folder_whose_name_is_not_utf8_has_a_report(tmp_path: Path):
    folder = tmp_path / "run\udcff"  # as Python has the byte 0xff of a name
    folder.mkdir()
    assert "run?" in report.write(folder).read_text(encoding="utf-8")
