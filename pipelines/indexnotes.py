"""What is odd about a listed folder, in notes: what is left out, doubled, or no class at all."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.errors import DataError
from pipelines.listing import OTHER, Listing
from pipelines.notes import note
from pipelines.scan import EXTENSIONS, open_regular, printable

TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_ARCHIVES = {".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".rar", ".7z"}
_UNREAD = {  # endings of images that `pipelines.decode` does not read
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".jxr", ".wdp"),
    *(".jls", ".mpo", ".jps", ".apng", ".svg", ".psd", ".xcf", ".tga", ".exr", ".hdr", ".pfm"),
    *(".ico", ".pcx", ".sgi", ".rgb", ".ras", ".dds", ".eps", ".dng", ".cr2", ".cr3", ".nef"),
    *(".arw", ".orf", ".rw2", ".raf", ".raw", ".srw", ".pef", ".dcm", ".nii", ".fits", ".svs"),
}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_MOST_LOOKS = 20  # endings of which one file is opened
_BESIDE = r"(?:ilsvrc|imagenet|data|set|images?|imgs?|splits?)*"
_SPLIT = re.compile(
    rf"{_BESIDE}(?:(?P<train>train(?:ing|val)?)|(?P<test>test(?:ing)?)"
    rf"|(?P<val>val(?:id(?:ation)?)?|dev|eval(?:uation)?|holdout)){_BESIDE}[ab]?"
)
_DOUBTFUL = re.compile(
    rb"(?:^|/)(?:(?P<previews>[._-]?(?:thumb|thumbnail|preview|derivative)s?)"
    rb"|(?P<masks>(?:ground_?truth|gt_?)?_?(?:mask|annotation|label)s?|segmentation\w*|ground_?truth))"
    rb"(?:/|$)",
    re.IGNORECASE,
)
_NUMBERS = re.compile(rb"\d+")


def listing_notes(root: Path, listed: Listing, *, shards: bool = False) -> list[str]:
    """Notes on what was left out of a listing, and on what was taken in doubt.

    Args:
        shards: the tar files are the data.
    """
    found = listed.found
    doubtful: dict[bytes, str] = {}
    for folder, count in zip(listed.dirs, np.diff(listed.first).tolist(), strict=True):
        if count and (name := _DOUBTFUL.search(folder)):
            doubtful[folder[: name.end()].rstrip(b"/")] = str(name.lastgroup)
    for folder, kind in doubtful.items():
        found.add(kind, folder)
    return [
        *found.note("service folders", "left out: # folder(s) that a NAS or the system keeps"),
        *found.note("hidden folders", "left out: # hidden folder(s)"),
        *found.note("hidden images", "left out: # hidden file(s) that end like images"),
        *found.note("dead links", "left out: # link(s) that lead nowhere"),
        *found.note("doubled folders", "left out: # link(s) to folders that are listed already"),
        *found.note(
            "doubled files",
            "left out: # link(s) to images that are listed already",
            "copy what is to count twice",
        ),
        *found.note(
            "hard links", "in doubt: # hard link(s) to other images here, each taken as an image"
        ),
        *found.note(
            "previews",
            "in doubt: # folder(s) named like previews, whose images are taken",
            "move them away if they repeat others in small",
        ),
        *found.note(
            "masks",
            "in doubt: # folder(s) named like masks or labels, whose images are taken",
            "name the folder beside them that holds the photographs",
        ),
        *_other_files(root, listed, shards),
    ]


def _other_files(root: Path, listed: Listing, shards: bool) -> Iterator[str]:
    """Files that are not taken: those that are images after all first."""
    others = {
        kind.removeprefix(OTHER): count
        for kind, count in listed.found.counts.most_common()
        if kind.startswith(OTHER) and not (shards and kind == f"{OTHER}.tar")
    }
    looks = [each for each in others if each not in _UNREAD | _ARCHIVES][:_MOST_LOOKS]
    hidden = {each for each in looks if _is_image(root, listed.found.names[OTHER + each][0])}
    groups = {
        "left out: # file(s) of image formats that are not read": (
            _UNREAD & others.keys(),
            "convert them to JPEG or PNG",
        ),
        "left out: # file(s) that hold images under another ending": (
            hidden,
            f"rename them to one of {', '.join(EXTENSIONS)}",
        ),
        "left out: # archive(s)": (
            _ARCHIVES & others.keys(),
            "give tar shards by their own names or folder, unpack others",
        ),
    }
    rest = others.keys() - set().union(*(kinds for kinds, _ in groups.values()))
    groups["left out: # other file(s)"] = (rest, "")
    for what, (kinds, hint) in groups.items():
        if counts := {kind: others[kind] for kind in others if kind in kinds}:
            yield _by_ending(what, counts, listed, hint)


def _by_ending(what: str, counts: Mapping[str, int], listed: Listing, hint: str) -> str:
    """`left out: 180 files … (.heic 90, .jxl 90: a/1.heic, …)`."""
    endings = [f"{kind} {count:,}" for kind, count in list(counts.items())[:4]]
    names = [listed.found.names[OTHER + kind][0] for kind in list(counts)[:3]]
    more = ", …" if len(counts) > 4 else ""
    return note(sum(counts.values()), f"{what}, {', '.join(endings)}{more}", names, hint)


def _is_image(root: Path, below: str) -> bool:
    """Whether a file begins as an image does; False where it cannot be read."""
    try:
        with open(os.path.join(root, below), "rb", opener=open_regular) as file:
            start = file.read(16)
    except (OSError, ValueError):
        return False
    return start.startswith(_MAGIC) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def split_of(name: str) -> str | None:
    """`train`, `val` or `test` where a folder or shard is named after a part of a data set."""
    found = _SPLIT.fullmatch(re.sub(r"[\W_\d]+", "", name.lower()))
    return found and found.lastgroup


def split_notes(root: Path, dirs: Sequence[bytes], counts: Sequence[int]) -> list[str]:
    """A note where images lie in folders such as `train` and `val` beside each other.

    Args:
        root: the folder; or tar files.
        counts: images directly in each of `dirs`.
    """
    beside: dict[bytes, Counter[bytes]] = {}  # parent -> images of each split-like folder in it
    for folder, count in zip(dirs, counts, strict=True):
        parts = folder.split(b"/")
        for depth, part in enumerate(parts if count else ()):
            if split_of(os.fsdecode(part)):
                beside.setdefault(b"/".join(parts[:depth]), Counter())[part] += count
    mixed = {
        parent: named
        for parent, named in beside.items()
        if len({split_of(os.fsdecode(name)) for name in named}) > 1
    }
    if not mixed:
        return []
    parent, named = next(iter(mixed.items()))
    total = sum(mixed.values(), Counter[bytes]())
    each = ", ".join(f"{printable(name)} {count:,}" for name, count in sorted(total.items()))
    inside = not os.path.isdir(root)
    if not (parent or inside):
        each += "; they count as classes"
    first = min(named, key=lambda name: (split_of(os.fsdecode(name)) != "train", name))
    one = shlex.quote(os.path.join(str(root), os.fsdecode(parent), os.fsdecode(first)))
    where = "" if not parent else f" in {printable(parent)}"
    if len(mixed) > 1:
        where += f" and {len(mixed) - 1:,} more folders"
    return [
        f"in doubt: the folders{where} are splits of a data set, and all are taken (images: "
        f"{each}), so validation and test images are trained on: "
        + (
            "pack one of them by itself"
            if inside
            else f"name one of them, such as {printable(one)}"
        )
    ]


def refuse_mixed(root: Path, listed: Listing) -> None:
    """Refuses a folder whose images may be beside the point, as its tar files may be the data.

    They are not where they lie beside what was unpacked of them, where they are small beside the
    images, or where images lie in class folders and the tar files are no numbered ones.

    Raises:
        DataError: with both ways to go on.
    """
    tars, names = listed.tars, listed.names
    if not (tars and names):
        return
    folders = set(listed.dirs)
    unpacked = [
        tar[:-4] in folders or os.path.basename(tar[:-4]) == os.path.basename(os.path.dirname(tar))
        for tar in tars
    ]
    images = np.diff(listed.first).tolist()
    full = {d.split(b"/")[0] for d, count in zip(listed.dirs, images, strict=True) if count}
    numbered = max(Counter(_NUMBERS.sub(b"#", tar) for tar in tars).values()) > 1
    if all(unpacked) or (len(full - {b""}) > 1 and not numbered):
        return
    sizes = [os.path.getsize(os.path.join(os.fsencode(root), tar)) for tar in tars]
    if 2 * sum(sizes) < sum(listed.stats[::2]):
        return
    where = os.path.join(str(root), os.fsdecode(os.path.dirname(tars[0])), "*.tar")
    what = note(len(tars), "# tar file(s)", tars)
    raise DataError(
        f"{root} holds {what} and {note(len(names), '# image(s)')} beside them, and only one kind "
        f"can be read: give the shards as {printable(shlex.quote(where))}, or move the tar files "
        "away, or give a list of the images (.txt, a path on each line)"
    )
