"""The sections of the report, each from the data it needs or a sentence on what is missing."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from byol_fast.report.charts import Level, Series, count, line_chart, percent, scatter
from byol_fast.report.data import (
    BAD_IMAGES,
    KNN_DATA,
    KNN_RAW,
    KNN_TRAINED,
    KNN_UNTRAINED,
    QUARANTINED,
    THROUGHPUT,
    THROUGHPUT_PARTS,
    Embedding,
    RunData,
    flatten,
)
from byol_fast.report.html import (
    COLOURS,
    Bar,
    bars,
    legend,
    missing,
    para,
    picture,
    section,
    stacked_bar,
    table,
    tag,
)
from byol_fast.report.verdict import collapse, diverged
from byol_fast.watching import metrics
from byol_fast.watching.alarms import healthy_std
from byol_fast.watching.metrics import METRICS, short

TABLE_ROWS = 24  # log points in the table of numbers
BAD_ROWS = 50  # names shown of images that could not be decoded
PART_COLOURS = {"decode_wait": 1, "copy": 6, "augment": 2, "step": 0}


def curves(data: RunData) -> str:
    baselines = [
        Level(label, value)
        for label, value in (
            ("raw pixels", data.number(KNN_RAW)),
            ("untrained", data.number(KNN_UNTRAINED)),
        )
        if value is not None
    ]
    dim = data.embedding_dim
    healthy = [Level(f"healthy 1/√{dim}", healthy_std(dim))]
    cards = [
        _card(data, metrics.LOSS),
        _card(data, metrics.KNN_ACCURACY, metrics.PROBE_ACCURACY, levels=baselines),
        _card(data, metrics.EMBEDDING_STD, levels=healthy, floor=0.0, marked=True),
        _card(data, metrics.RANKME, floor=0.0, marked=True),
        _card(data, metrics.ALIGNMENT, floor=0.0),
        _card(data, metrics.UNIFORMITY),
        _card(data, metrics.GRAD_NORM, floor=0.0),
        _card(data, metrics.LEARNING_RATE, floor=0.0),
        _card(data, metrics.TARGET_DECAY),
    ]
    drawn = "".join(cards)
    if not drawn:
        body = missing("Nothing has been logged: metrics.jsonl is missing or empty.")
    else:
        body = tag("div", drawn, class_="charts") + _numbers(data)
    return section(
        "curves",
        "Learning curves",
        body,
        "Every quantity against the number of updates. Dotted red lines mark alarms.",
    )


def _card(
    data: RunData,
    *names: str,
    levels: list[Level] | None = None,
    floor: float | None = None,
    marked: bool = False,
) -> str:
    """A chart with its title, what it means and its newest value; "" where nothing was logged."""
    series = [Series(METRICS[n].label, *data.log.series(n), i) for i, n in enumerate(names)]
    series = [s for s in series if s.x]
    main = METRICS[names[0]]
    text = percent if main.kind == "share" else count
    marks = [float(e.step) for e in data.alarms] if marked or names[0] == metrics.LOSS else []
    chart = line_chart(
        main.label, series, levels=levels or [], marks=marks, y_format=text, floor=floor
    )
    if not chart:
        return ""
    title = main.label if len(names) == 1 else "kNN and linear probe"
    newest = tag("span", escape(short(series[0].y[-1], main.kind)), class_="now")
    row = tag("div", tag("h3", escape(title)) + newest, class_="row")
    names_shown = legend([(f"b{s.colour}", s.label) for s in series]) if len(series) > 1 else ""
    caption = tag("figcaption", row + para(main.help))
    return tag("figure", caption + chart + names_shown, class_="card")


def _numbers(data: RunData) -> str:
    """Some log points as a table, for those who read rather than look."""
    rows = [r for r in data.log.rows if metrics.LOSS in r]
    names = [n for n in METRICS if any(n in r for r in rows)]
    if not rows or not names:
        return ""
    picked = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), TABLE_ROWS)).astype(int))
    lines = [
        [f"{rows[i]['step']:,}"]
        + [short(rows[i][n], METRICS[n].kind) if n in rows[i] else "–" for n in names]
        for i in picked.tolist()
    ]
    head = ["Step", *(METRICS[n].label for n in names)]
    shown = table("Log points", head, lines, numbers=range(len(head)))
    summary = tag("summary", f"Numbers of {len(lines)} of {len(rows):,} log points")
    return tag("details", summary + tag("div", shown, class_="card"))


def views(data: RunData) -> str:
    lead = (
        "The first images of the run, each cut and coloured twice: view 1 on the left, view 2 on "
        "the right. The network learns to predict one view's embedding from the other's."
    )
    if data.views is None:
        return section("views", "What the network sees", missing("No view pairs were saved."), lead)
    first, second = data.views
    items = ""
    for i in range(min(len(first), 16)):
        left = picture(first[i], f"Image {i + 1}, view 1")
        right = picture(second[i], f"Image {i + 1}, view 2")
        items += tag("li", left + right, class_="card")
    small = " small" if first.shape[1] < 96 else ""
    return section("views", "What the network sees", tag("ul", items, class_=f"pairs{small}"), lead)


def knn(data: RunData) -> str:
    known = [
        Bar(label, value, colour, note)
        for label, name, colour, note in (
            ("Raw pixels", KNN_RAW, 9, "Neighbours by the colours themselves, no network."),
            ("Untrained network", KNN_UNTRAINED, 5, "The same network before the first update."),
            ("Trained network", KNN_TRAINED, 0, "After BYOL, which saw no label."),
        )
        if (value := data.number(name)) is not None
    ]
    where = str(data.summary.get(KNN_DATA, ""))
    lead = (
        "Share of images whose class is found by a vote of their nearest neighbours. Training has "
        "to beat both baselines." + (f" Measured on {where}." if where else "")
    )
    if not known:
        text = "kNN accuracy was not measured: it needs images in class folders."
        return section("knn", "Has it learned?", missing(text), lead)
    chart = bars("kNN accuracy", known, lambda v: short(v, "share"), 1.0)
    return section("knn", "Has it learned?", tag("div", chart, class_="card"), lead)


def embedding_map(embedding: Embedding | None) -> str:
    lead = "Features of labelled images, projected on the two directions of largest variance (PCA)."
    title = "Map of the embeddings"
    if embedding is None:
        return section("map", title, missing("No embeddings were saved."), lead)
    labels = embedding.labels
    values, sizes = np.unique(labels[labels >= 0], return_counts=True)
    most = np.sort(values[np.argsort(-sizes, kind="stable")[:COLOURS]])
    groups = np.full(len(labels), -1, dtype=np.int64)
    for i, value in enumerate(most.tolist()):
        groups[labels == value] = i
    names = [
        embedding.classes[v] if v < len(embedding.classes) else f"class {v}" for v in most.tolist()
    ]
    if embedding.explained is None:
        axes = ("component 1", "component 2")
    else:
        first, second = (f"{100 * v:.0f} % of the variance" for v in embedding.explained)
        axes = (f"component 1 ({first})", f"component 2 ({second})")
    chart = scatter("Embeddings", embedding.xy, groups, names, axes)
    shown = [(f"b{i % COLOURS}", name) for i, name in enumerate(names)]
    if (groups < 0).any():
        shown.append(("b-other", f"{len(values) - len(names)} more classes" if names else "images"))
    return section("map", title, tag("div", chart + legend(shown), class_="card map"), lead)


def throughput(data: RunData) -> str:
    title, lead = "Where the time goes", "Share of training time by what it was spent on."
    measured = data.summary.get(THROUGHPUT)
    split: dict[str, float] = {}
    if isinstance(measured, dict):
        for name in THROUGHPUT_PARTS:
            value = measured.get(name)
            if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
                split[name] = float(value)
    parts = [Bar(THROUGHPUT_PARTS[n], v, PART_COLOURS[n]) for n, v in split.items()]
    total = sum(p.value for p in parts)
    body = ""
    if total > 0:
        rows = [[p.label, f"{p.value:,.1f} s", f"{100 * p.value / total:.1f} %"] for p in parts]
        body = tag(
            "div",
            stacked_bar("Time", parts)
            + legend([(f"b{p.colour}", p.label) for p in parts])
            + table("Time by part", ["Part", "Time", "Share"], rows, numbers=(1, 2)),
            class_="card",
        )
    else:
        body = missing("The split of the time was not recorded.")
    waiting = data.usual(metrics.DATA_WAIT_SHARE)
    if waiting is not None and waiting > 0.2:
        body += para(
            f"Training stood waiting for images {short(waiting, 'share')} of the time: the loader "
            "is the bottleneck. More --input.threads, a faster disk, or smaller stored images help "
            "more than a faster device.",
            "hint",
        )
    cards = _card(data, metrics.IMAGES_PER_SECOND, floor=0.0) + _card(
        data, metrics.DATA_WAIT_SHARE, floor=0.0
    )
    if cards:
        body += tag("div", cards, class_="charts after")
    return section("time", title, body, lead)


def events(data: RunData) -> str:
    body = "".join(
        tag("div", tag("strong", f"Step {e.step:,}") + escape(e.text), class_="alarm", role="note")
        for e in data.alarms
    )
    if not body and data.log.rows and not diverged(data):
        match collapse(data):
            case "no":
                body = para("No alarm was raised: the embeddings did not collapse.", "calm")
            case "partial":
                body = para("No alarm was raised, but the embeddings use few directions.", "hint")
            case "not watched":
                body = para("No alarm was raised.", "calm")
    others = [e for e in data.log.events if e not in data.alarms]
    if others:
        rows = [[f"{e.step:,}", e.kind, e.text] for e in others]
        body += tag("div", table("Events", ["Step", "Kind", "What happened"], rows), class_="card")
    body += _bad_images(data)
    for note in data.notes:
        body += missing(note)
    if not body:
        body = missing("Nothing has been logged.")
    return section("events", "Alarms and events", body)


def _bad_images(data: RunData) -> str:
    """How many images were left out, and which could not be decoded while training."""
    body = ""
    if left_out := data.number(QUARANTINED):
        words = f"{left_out:,.0f} broken images were found beforehand and left out of training."
        body += para(words, "hint")
    failed = data.summary.get(BAD_IMAGES)
    if isinstance(failed, dict) and failed:
        rows = [[str(name), str(reason)] for name, reason in list(failed.items())[:BAD_ROWS]]
        title = f"{len(failed):,} images could not be decoded and were shown as grey"
        body += tag("div", table(title, ["Image", "Reason"], rows), class_="card")
    return body


def configuration(data: RunData) -> str:
    sections = flatten(data.config)
    if not sections:
        body = missing("config.yaml is missing.")
    else:
        cards = "".join(
            tag("div", table(name, ["Name", "Value"], rows), class_="card")
            for name, rows in sections
        )
        body = tag("div", cards, class_="config")
    return section("configuration", "Configuration", body)
