"""Tar files as WebDataset writes them: which ones are meant, and the samples in one of them."""

from __future__ import annotations

import glob
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from pipelines.errors import BadImage, DataError
from pipelines.listing import OTHER, Links, ending_of, in_service, is_service
from pipelines.notes import Tally
from pipelines.scan import EXTENSIONS, Bad, expanded
from pipelines.stores import MOST_CLASSES
from pipelines.stores.openfile import OpenFile
from pipelines.stores.tarformat import BadTar, Further, Member, members

_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # named, then refused
_IMAGES = tuple(f".{ending}" for ending in EXTENSIONS)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_META = re.compile(rb"__[^/]*__(/|$)")
_MOST_JSON = 1 << 20  # bytes
_NUMBER = re.compile(rb"\d+(?:[._-]\d+)*")
_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(?:\.0*)?")


def is_tar(data: str | Path) -> bool:
    """Whether this names tar files: one, a pattern of them, or a folder without image files."""
    path = expanded(data)
    if os.path.isdir(path):
        return bool(_tars_below(path))
    return path.name.lower().endswith(_ENDINGS)


def _tars_below(folder: Path) -> list[Path]:
    """The tar files below a folder, sorted; none where there is any image file."""
    found, todo, links = list[Path](), [os.fspath(folder)], Links(os.fsencode(folder))
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    name = entry.name.lower()
                    if name.startswith("."):
                        continue
                    if entry.is_dir():
                        below = os.fsencode(os.path.relpath(entry.path, folder))
                        if is_service(os.path.basename(below)):
                            continue
                        if entry.is_symlink() and links.follow(below, None, True) is None:
                            continue
                        todo.append(entry.path)
                    elif name.endswith(_IMAGES):
                        return []
                    elif name.endswith(_ENDINGS):
                        found.append(Path(entry.path))
        except OSError:
            continue  # the folder store says what is wrong
    return sorted(found)


def shard_paths(data: str | Path) -> list[Path]:
    """The tar files behind `data`, sorted; those below a folder at any depth.

    Raises:
        DataError: there is none, or one that a pattern names is missing.
    """
    return without_links(all_paths(data))[0]


def all_paths(data: str | Path) -> list[Path]:
    """`shard_paths` with those that are links to others."""
    path = expanded(data)
    if os.path.isdir(path):
        return _tars_below(path)
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


def without_links(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The tar files, each once, and the links to those."""
    links = [path for path in paths if path.is_symlink()]
    seen = set[str]()
    if links:
        own = set(paths).difference(links)
        seen = {os.path.realpath(path) for path in own}
    doubled = []
    for path in links:
        real = os.path.realpath(path)
        if real in seen:
            doubled.append(path)
        seen.add(real)
    return [path for path in paths if path not in doubled], doubled


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
    found: Tally = field(default_factory=Tally)  # what is not taken, or in doubt


def read_shard(path: Path) -> Samples:
    """Walks a shard's headers and reads its labels.

    As in WebDataset, neighbouring files that agree up to the first dot of their name are one
    sample. Its image is the first file with an image's ending; where it has several that differ by
    a number (`clip.0001.jpg`), each is a sample of its own. The label is the whole number in
    `.cls`, else `cls` or `label` in `.json`. Hidden files, `__meta__` ones and those in folders of
    a NAS or operating system are left out.

    Raises:
        DataError: it cannot be read, or is no sound tar file.
    """
    out, further = Samples(), list[Further]()
    try:
        file = OpenFile(path)
        for _, sample in groupby(_named(file, out, further), key=lambda found: found[0]):
            _enter(out, file, [(ending, member) for _, ending, member in sample])
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the path and its rights"
        ) from error
    except (BadTar, BadImage) as error:
        raise DataError(f"{path} {error}") from error
    for place in further:
        out.found.add("waste" if place.waste else "further", f"from byte {place.offset:,} on")
    if len(out.names) > len(set(out.names)):
        for name, count in Counter(out.names).items():
            for _ in range(count - 1):
                out.found.add("repeated", name)
    return out


def _named(
    file: OpenFile, out: Samples, further: list[Further]
) -> Iterator[tuple[bytes, str, Member]]:
    """(key, ending, member) of what has both; the ending in lower case, after its last dot."""
    for member in members(file, further):
        folder, _, name = member.name.rpartition(b"/")
        stem, _, ending = name.partition(b".")
        if not member.kind:
            continue
        last = ending.lower().rpartition(b".")[2].decode("ascii", "replace")
        if folder and in_service(member.name):
            out.ignored += 1
            out.found.add("service", member.name)
        elif not (stem and ending) or _META.match(member.name):
            hidden = ending and not stem and last in EXTENSIONS
            _leave_out(out, member.name, "hidden images" if hidden else "")
        else:
            yield folder + b"/" + stem, last, member


def _leave_out(out: Samples, name: bytes, kind: str = "") -> None:
    out.ignored += 1
    out.found.add(kind or OTHER + ending_of(os.path.basename(name)), name)


def _enter(out: Samples, file: OpenFile, sample: list[tuple[str, Member]]) -> None:
    images = [member for ending, member in sample if ending in EXTENSIONS]
    if not images:
        for _, member in sample:
            _leave_out(out, member.name)
    elif len(images) == 1:
        _enter_row(out, file, images[0], dict(reversed(sample)))
    elif all(_NUMBER.fullmatch(_middle(image)) for image in images):
        fields: dict[bytes, dict[str, Member]] = {}
        for ending, member in reversed(sample):
            fields.setdefault(_middle(member), {})[ending] = member
        for image in images:
            out.found.add("numbered", image.name)
            own = fields.get(_middle(image), {})
            _enter_row(out, file, image, {**fields.get(b"", {}), **own})
    else:
        for image in images[1:]:
            out.found.add("further images", image.name)
        _enter_row(out, file, images[0], dict(reversed(sample)))


def _middle(member: Member) -> bytes:
    """What is between the first dot of a name and its ending."""
    return member.name.rpartition(b"/")[2].partition(b".")[2].rpartition(b".")[0]


def _enter_row(out: Samples, file: OpenFile, image: Member, fields: dict[str, Member]) -> None:
    if image.kind != "file":
        out.bad.append(Bad(image.name, f"a {image.kind} in the tar, without data of its own"))
        return
    label = _label(file, fields)
    if not -1 <= label < MOST_CLASSES:
        out.found.add("odd labels", image.name)
        label = -1
    out.names.append(image.name)
    out.offsets.append(image.offset)
    out.lengths.append(image.length)
    out.labels.append(label)


def _label(file: OpenFile, sample: dict[str, Member]) -> int:
    """The class number; -1 where there is none, and -2 where it is no number."""
    try:
        if member := sample.get("cls"):
            return _class_number(file.read(member.offset, min(member.length, 20)).decode())
        if (member := sample.get("json")) and member.length <= _MOST_JSON:
            entries = json.loads(file.read(member.offset, member.length))
            label = entries.get("cls")
            return _class_number(entries.get("label") if label is None else label)
    except (BadImage, DataError):  # ValueErrors too, but not the label's
        raise
    except (ValueError, AttributeError, RecursionError):
        return -2
    return -1


def _class_number(label: object) -> int:
    """A whole number, as such, as text or as a float; -1 where there is none, -2 for all else."""
    if label is None:
        return -1
    if isinstance(label, str):
        number = _WHOLE.fullmatch(label.strip())
        return int(number[1]) if number else -2
    if isinstance(label, float):
        return int(label) if label.is_integer() else -2
    return label if type(label) is int else -2
