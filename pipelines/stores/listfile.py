"""Files that list images: "path label" lines (ImageNet's, Places205's) and iNaturalist's JSON."""

from __future__ import annotations

import codecs
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.listing import in_service
from pipelines.notes import Tally
from pipelines.scan import EXTENSIONS, Bad, printable
from pipelines.stores import MOST_CLASSES

SUFFIXES = (".txt", ".csv", ".json")
_IMAGES = tuple(f".{ending}" for ending in EXTENSIONS)
_LABEL = re.compile(r"(-1|[0-9]{1,18})(?:\.0*)?")  # tables with gaps in them hold floats
_WANTED = (
    "a line `path label` or `path` for each image, or JSON with images, annotations and "
    "categories, as iNaturalist's files have them"
)


@dataclass(kw_only=True)
class Listed:
    """What a list says: one entry an image, in the order of the list."""

    paths: list[bytes] = field(default_factory=list)  # below the root
    labels: list[int] = field(default_factory=list)  # -1 where there is none
    classes: tuple[str, ...] = ()
    bad: list[Bad] = field(default_factory=list)  # lines and entries that name no image
    found: Tally = field(default_factory=Tally)  # what is not taken, or in doubt

    def enter(self, where: bytes, name: str, label: int) -> None:
        """One more image; a name that no file can have is bad, as `where` it is listed."""
        try:
            path = os.fsencode(name.replace("\\", "/"))
            reason = "has a NUL in its name" if b"\0" in path else ""
        except UnicodeEncodeError:
            reason = "has a name that no file can have"
        if reason:
            self.bad.append(Bad(where, f"{reason}: {_short(name)}"))
            return
        self.paths.append(path)
        self.labels.append(label)

    def notes(self) -> list[str]:
        """What is left out or in doubt."""
        seen, found, labelled = set[bytes](), self.found, any(n >= 0 for n in self.labels)
        for path, label in zip(self.paths, self.labels, strict=True):
            if labelled and label < 0:
                found.add("unlabelled", path)
            if path in seen:
                found.add("repeated", path)
            seen.add(path)
            if b"/" in path and in_service(path):
                found.add("service", path)
        return [
            *found.note("header", "left out: the first line, as its header"),
            *found.note("comments", "left out: # line(s) that begin with #"),
            *found.note("unlabelled", "unlabelled: # of the listed images"),
            *found.note("several", "# image(s) with several categories, which count as none"),
            *found.note("unknown", "left out: # annotation(s) of a category that is not listed"),
            *found.note("strange", "left out: # annotation(s) of images that are not listed"),
            *found.note("repeated", "in doubt: # image(s) listed before, each taken again"),
            *found.note(
                "service",
                "in doubt: # image(s) in hidden or service folders, taken as listed",
            ),
        ]


def read_list(path: Path) -> Listed:
    """The images that a file lists.

    `.txt` and `.csv`: a line `path label` or `path` each, apart by blanks or, in a `.csv`, by a
    comma, where both may stand in quotes; labels are numbers from 0, -1 for none, or names of
    classes, if all are. A line without a label has to end like an image. Empty lines and those that
    begin with # are passed over, as is a `.csv`'s header. `.json`: iNaturalist's `images`,
    `annotations` and `categories`; classes are numbered by category id.

    Raises:
        DataError: it cannot be read, or is none of these.
    """
    try:
        text = _text(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the path and its rights"
        ) from error
    try:
        listed = _from_json(text) if path.suffix == ".json" else _from_lines(path, text)
    # What JSON may hold anywhere raises nearly all of them.
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise DataError(
            f"{path} is not a list of images ({type(e).__name__}: {e}): it needs {_WANTED}"
        ) from e
    if not listed.paths:
        bad = listed.bad[:1]
        first = "".join(f"; the first: {printable(b.path)} {b.reason}" for b in bad)
        raise DataError(f"{path} lists no images{first}: it needs {_WANTED}")
    return listed


def _text(content: bytes) -> str:
    """Decoded: UTF-16 where it says so, as Windows' shell writes it, else UTF-8 or any bytes."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8", "surrogateescape")


def _from_lines(path: Path, text: str) -> Listed:
    out, comma, found = Listed(), path.suffix == ".csv", list[tuple[int, str, str]]()
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        line = line.strip().lstrip("\ufeff")
        parts = line and _parts(line.lstrip("#"), comma)
        if line.startswith("#"):
            if parts:
                out.found.add("comments", _short(line))
        elif parts:
            found.append((number, *parts))
        elif line:
            out.bad.append(Bad(b"line %d" % number, f"is not `path label`: {_short(line)}"))
    if found and comma and out.bad[:1] and out.bad[0].path == b"line 1":
        out.found.add("header", out.bad.pop(0).reason.partition(": ")[2])
    said = [label for _, _, label in found if label]
    names = sorted(set(said)) if said and not any(map(_LABEL.fullmatch, said)) else []
    number_of = {name: i for i, name in enumerate(names)}
    for number, name, label in found:
        where, which = b"line %d" % number, number_of.get(label, -1)
        if label and not names:
            whole = _LABEL.fullmatch(label)
            which = int(whole[1]) if whole else MOST_CLASSES
        if which >= MOST_CLASSES:
            out.bad.append(Bad(where, f"is not `path label`: {_short(f'{name} {label}')}"))
            continue
        out.enter(where, name, which)
    count = max(out.labels, default=-1) + 1
    out.classes = tuple(names) or tuple(map(str, range(count)))
    return out


def _parts(line: str, comma: bool) -> tuple[str, str] | None:
    """Path and label of a line; an empty label where there is none, None where it is no such line.

    Without a number the path has to end like an image, as otherwise any line would do.
    """
    before, found, after = line.rpartition(",")
    first = _unquoted(before.strip())
    # `a, b.jpg 3` is apart by blanks, `a.jpg,golden retriever` is not
    if comma and found and (len(after.split()) <= 1 or first.lower().endswith(_IMAGES)):
        name, label = first, _unquoted(after.strip())
    else:
        pieces = line.rsplit(None, 1)
        name, label = (pieces[0], pieces[1]) if len(pieces) == 2 else ("", line)
    if name and _LABEL.fullmatch(label):
        return name, label
    if label.strip('"').lower().endswith(_IMAGES):  # a path, with a blank or comma in it
        return (_unquoted(line) if comma else line), ""
    return (name, label) if name.lower().endswith(_IMAGES) else None


def _short(line: str) -> str:
    return printable(line if len(line) <= 60 else line[:59] + "…")


def _unquoted(field: str) -> str:
    """A field of a `.csv`, which may stand in quotes."""
    if len(field) >= 2 and field[0] == field[-1] == '"':
        return field[1:-1].replace('""', '"')
    return field


def _from_json(text: str) -> Listed:
    content: Any = json.loads(text)
    images, categories = content["images"], content.get("categories", [])
    notes = content.get("annotations", [])
    name_of = {int(c["id"]): str(c.get("name", c["id"])) for c in categories}
    named = [(image["id"], str(image["file_name"])) for image in images]
    said = [(note["image_id"], int(note["category_id"])) for note in notes]
    number = {category: i for i, category in enumerate(sorted(name_of))}
    out, label_of = Listed(classes=_unique(name_of)), dict[Any, int]()
    for image, category in said:
        if category not in number:
            out.found.add("unknown", f"image {image}: {category}")
        elif label_of.setdefault(image, number[category]) != number[category]:
            label_of[image] = -2
    for image, name in named:
        label = label_of.pop(image, -1)
        if label == -2:
            out.found.add("several", name)
        out.enter(f"image {image}".encode(), name, max(label, -1))
    for image in label_of:
        out.found.add("strange", f"image {image}")
    return out


def _unique(name_of: dict[int, str]) -> tuple[str, ...]:
    """The names by category id; with the id in front where a name is not the only one."""
    names = [name_of[category] for category in sorted(name_of)]
    many = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    return tuple(
        f"{category} {name_of[category]}" if name_of[category] in many else name_of[category]
        for category in sorted(name_of)
    )
