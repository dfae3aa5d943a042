"""Files that list images: "path label" lines (ImageNet's, Places205's) and iNaturalist's JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.scan import Bad, printable
from pipelines.stores import MOST_CLASSES

SUFFIXES = (".txt", ".csv", ".json")
_WANTED = (
    "a line `path label` for each image, or JSON with images, annotations and categories, as "
    "iNaturalist's files have them"
)


@dataclass(kw_only=True)
class Listed:
    """What a list says: one entry an image, in the order of the list."""

    paths: list[bytes] = field(default_factory=list)  # below the root
    labels: list[int] = field(default_factory=list)  # -1 where there is none
    classes: tuple[str, ...] = ()
    bad: list[Bad] = field(default_factory=list)  # lines and entries that name no labelled image


def read_list(path: Path) -> Listed:
    """The images that a file lists.

    `.txt` and `.csv`: a line `path label` each, apart by blanks or, in a `.csv`, by a comma, where
    both may stand in quotes; the label is a number from 0. Empty lines and those that begin with #
    are passed over. `.json`: iNaturalist's `images`, `annotations` and `categories`; classes are
    numbered by category id.

    Raises:
        DataError: it cannot be read, or is none of these.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the path and its rights"
        ) from error
    try:
        listed = _from_json(text) if path.suffix == ".json" else _from_lines(path, text)
    # What JSON may hold anywhere, and names that no file can have, raise nearly all of them.
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise DataError(
            f"{path} is not a list of images ({type(e).__name__}: {e}): it needs {_WANTED}"
        ) from e
    if not listed.paths:
        bad = listed.bad[:1]
        first = "".join(f"; the first: {printable(b.path)} {b.reason}" for b in bad)
        raise DataError(f"{path} lists no images{first}: it needs {_WANTED}")
    return listed


def _from_lines(path: Path, text: str) -> Listed:
    out, comma = Listed(), path.suffix == ".csv"
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip().lstrip("\ufeff")
        if not line or line.startswith("#"):
            continue
        parts = line.rsplit(None, 1)
        before, found, after = line.rpartition(",")
        if comma and found and len(after.split()) == 1:  # `a, b.jpg 3` is apart by blanks
            parts = [_unquoted(part.strip()) for part in (before, after)]
        if len(parts) == 2 and parts[0] and parts[1].isdecimal() and int(parts[1]) < MOST_CLASSES:
            out.paths.append(_below(parts[0]))
            out.labels.append(int(parts[1]))
        else:
            said = line if len(line) <= 60 else line[:59] + "…"
            out.bad.append(Bad(b"line %d" % number, f"is not `path label`: {printable(said)}"))
    out.classes = tuple(map(str, range(max(out.labels, default=-1) + 1)))
    return out


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
            out.bad.append(Bad(_entry(image), f"has category {category}, which is not listed"))
        elif label_of.setdefault(image, number[category]) != number[category]:
            label_of[image] = -2
    for image, name in named:
        label = label_of.pop(image, -1)
        if label == -2:
            out.bad.append(Bad(_below(name), "has several categories, and needs one"))
        elif said and label == -1:
            out.bad.append(Bad(_below(name), "has no annotation"))
        else:
            out.paths.append(_below(name))
            out.labels.append(label)
    out.bad += [Bad(_entry(image), "is annotated, but not among the images") for image in label_of]
    return out


def _unique(name_of: dict[int, str]) -> tuple[str, ...]:
    """The names by category id; with the id in front where a name is not the only one."""
    names = [name_of[category] for category in sorted(name_of)]
    many = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    return tuple(
        f"{category} {name_of[category]}" if name_of[category] in many else name_of[category]
        for category in sorted(name_of)
    )


def _entry(image: Any) -> bytes:
    return f"image {image}".encode()


def _below(name: str) -> bytes:
    return os.fsencode(name.replace("\\", "/"))
