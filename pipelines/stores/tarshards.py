"""Tar files as WebDataset writes them: which ones are meant, and the samples in one of them."""

from __future__ import annotations

import glob
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from pipelines.errors import BadImage, DataError
from pipelines.scan import EXTENSIONS, Bad, expanded
from pipelines.stores import MOST_CLASSES
from pipelines.stores.openfile import OpenFile
from pipelines.stores.tarformat import BadTar, Member, members

_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # named, then refused
_IMAGES = tuple(f".{ending}" for ending in EXTENSIONS)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_META = re.compile(rb"__[^/]*__(/|$)")
_MOST_JSON = 1 << 20  # bytes


def is_tar(data: str | Path) -> bool:
    """Whether this names tar files: one, a pattern of them, or a folder of nothing else."""
    path = expanded(data)
    if os.path.isdir(path):
        return _holds_tars(path)
    return path.name.lower().endswith(_ENDINGS)


def _holds_tars(folder: Path) -> bool:
    found = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith("."):
                    continue
                if name.endswith(_IMAGES) or entry.is_dir():
                    return False  # a folder of images, whatever else is in it
                found = found or name.endswith(_ENDINGS)
    except OSError:
        return False  # the folder store says what is wrong
    return found


def shard_paths(data: str | Path) -> list[Path]:
    """The tar files behind `data`, sorted.

    Raises:
        DataError: there is none, or one that a pattern names is missing.
    """
    path = expanded(data)
    if os.path.isdir(path):
        visible = (p for p in path.iterdir() if not p.name.startswith("."))
        return sorted(p for p in visible if p.name.lower().endswith(_ENDINGS))
    if os.path.exists(path):
        return [path]
    paths: set[str] = set()
    for name in _expand(str(path)):
        found = [name] if os.path.exists(name) else glob.glob(name)
        if not found:
            raise DataError(
                f"{name} does not exist: check the path"
                + (f" and the pattern {data}" if name != str(path) else "")
            )
        paths.update(found)
    return [Path(p) for p in sorted(paths)]


def _expand(pattern: str) -> Iterator[str]:
    """`a-{00..12}.tar` and `{train,val}.tar` as the names they stand for."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    choices = braces[1].split(",")
    if numbers := _RANGE.fullmatch(braces[1]):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    for choice in choices:
        yield from _expand(f"{before}{choice}{after}")


@dataclass
class Samples:
    """The samples of one shard in their order: a row for each that has an image."""

    names: list[bytes] = field(default_factory=list)  # of the images, within the shard
    offsets: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    bad: list[Bad] = field(default_factory=list)
    ignored: int = 0  # members that play no part
    extra_images: int = 0  # samples with more than one image
    odd_labels: int = 0  # samples whose label is no class number


def read_shard(path: Path) -> Samples:
    """Walks a shard's headers and reads its labels.

    As in WebDataset, neighbouring files that agree up to the first dot of their name are one
    sample. Its image is the first file with an image's ending; its label the whole number in
    `.cls`, else `cls` or `label` in `.json`. Hidden files and `__meta__` ones are left out.

    Raises:
        DataError: it cannot be read, or is no sound tar file.
    """
    out = Samples()
    try:
        file = OpenFile(path)
        for _, sample in groupby(_named(file, out), key=lambda found: found[0]):
            _enter(out, file, [(ending, member) for _, ending, member in sample])
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the path and its rights"
        ) from error
    except (BadTar, BadImage) as error:
        raise DataError(f"{path} {error}") from error
    return out


def _named(file: OpenFile, out: Samples) -> Iterator[tuple[bytes, str, Member]]:
    """(key, ending, member) of what has both; the ending in lower case, after its last dot."""
    for member in members(file):
        folder, _, name = member.name.rpartition(b"/")
        stem, _, ending = name.partition(b".")
        if not (member.kind and stem and ending) or _META.match(member.name):
            out.ignored += bool(member.kind)
            continue
        last = ending.lower().rpartition(b".")[2].decode("ascii", "replace")
        yield folder + b"/" + stem, last, member


def _enter(out: Samples, file: OpenFile, sample: list[tuple[str, Member]]) -> None:
    images = [member for ending, member in sample if ending in EXTENSIONS]
    if not images:
        out.ignored += len(sample)
        return
    out.extra_images += len(images) > 1
    image = images[0]
    if image.kind != "file":
        out.bad.append(Bad(image.name, f"a {image.kind} in the tar, without data of its own"))
        return
    label = _label(file, dict(reversed(sample)))
    if not -1 <= label < MOST_CLASSES:
        out.odd_labels, label = out.odd_labels + 1, -1
    out.names.append(image.name)
    out.offsets.append(image.offset)
    out.lengths.append(image.length)
    out.labels.append(label)


def _label(file: OpenFile, sample: dict[str, Member]) -> int:
    """The class number; -1 where there is none, and -2 where it is no number."""
    try:
        if member := sample.get("cls"):
            return int(file.read(member.offset, min(member.length, 20)))
        if (member := sample.get("json")) and member.length <= _MOST_JSON:
            entries = json.loads(file.read(member.offset, member.length))
            label = entries.get("cls", entries.get("label", -1))
            return label if type(label) is int else -1
    except (BadImage, DataError):  # ValueErrors too, but not the label's
        raise
    except (ValueError, AttributeError, RecursionError):
        return -2
    return -1
