"""What is odd about tar shards, in notes: see `pipelines.notes`."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.errors import DataError
from pipelines.indexnotes import TARS, listing_notes, split_notes, split_of
from pipelines.listing import OTHER, walk
from pipelines.notes import Tally, note
from pipelines.progress import Progress
from pipelines.scan import printable
from pipelines.stores.tarshards import Samples, all_paths, without_links

_NESTED = {OTHER + ending for ending in TARS}


def tally_of(found: Sequence[Samples], shards: Sequence[str]) -> Tally:
    """What all shards have that is not taken or in doubt, by names that begin with the shard's."""
    out = Tally()
    for shard, samples in zip(shards, found, strict=True):
        out.merge(samples.found, os.fsencode(shard) + b"/")
    return out


def shard_notes(
    data: str | Path, shards: Sequence[str], found: Sequence[Samples], tally: Tally
) -> list[str]:
    """Notes on what is in the shards, and on shards of several splits in one folder."""
    nested, others = (
        {
            kind: n
            for kind, n in tally.counts.items()
            if kind.startswith(OTHER) and (kind in _NESTED) == is_tar
        }
        for is_tar in (True, False)
    )
    notes = [
        *tally.note(
            "further", "in doubt: # further tar(s) behind an end mark, whose images are taken"
        ),
        *tally.note("waste", "left out: what lies behind the end mark of # shard(s) and is no tar"),
        *tally.note("repeated", "in doubt: # image(s) with the name of another in the same shard"),
        *tally.note(
            "numbered",
            "in doubt: # image(s) that agree up to the first dot and then have a number",
            "each is taken; WebDataset would make them one sample",
        ),
        *tally.note(
            "further images",
            "left out: # image(s) of samples that have several",
            "names that agree up to the first dot are one sample, whose first image is taken; "
            "rename what is to be a sample of its own",
        ),
        *tally.note("odd labels", "unlabelled: # label(s) are no class numbers and count as none"),
        *tally.note(
            "service", "left out: # member(s) in hidden folders, or in a NAS's or system's"
        ),
        *tally.note("hidden images", "left out: # hidden member(s) that end like images"),
    ]
    for kinds, what in (
        (nested, "left out: # tar file(s) inside the shards"),
        (others, "left out: # member(s) of no sample with an image"),
    ):
        if kinds:
            endings = [f"{k.removeprefix(OTHER)} {n:,}" for k, n in Counter(kinds).most_common(4)]
            names = [name for kind in kinds for name in tally.names[kind]]
            notes.append(note(sum(kinds.values()), f"{what}, {', '.join(endings)}", names))
    notes += _odd_shards(data, shards, found)
    if "{" not in Path(data).name:  # else they were named one by one
        notes += _split_notes(data, shards)
    return [*notes, *_folder_notes(Path(data), found)]


def _odd_shards(data: str | Path, shards: Sequence[str], found: Sequence[Samples]) -> Iterator[str]:
    """Links to other shards, shards without images, and those with what another has."""
    doubled = without_links(all_paths(data))[1]
    if doubled:
        names = [path.name for path in doubled]
        yield note(len(doubled), "left out: # link(s) to shards that are listed already", names)
    empty = [s for s, each in zip(shards, found, strict=True) if not (each.names or each.bad)]
    if empty:
        yield note(len(empty), "left out: # shard(s) without images", empty)
    seen, again = set[tuple[int, int]](), list[str]()
    for shard, each in zip(shards, found, strict=True):
        content = hash(tuple(each.names)), hash(each.lengths.tobytes())
        if each.names and content in seen:
            again.append(shard)
        seen.add(content)
    if again:
        what = "in doubt: # shard(s) with the names and sizes of another's images, all taken"
        yield note(len(again), what, again)


def _folder_notes(data: Path, found: Sequence[Samples]) -> list[str]:
    """Notes on folders inside the shards, as `tar -cf train.tar train` makes them."""
    folders = Counter[bytes]()
    for samples in found:
        folders.update(os.path.dirname(name).removeprefix(b"./") for name in samples.names)
    names = sorted(folders)
    notes = split_notes(data / "*", names, [folders[name] for name in names])
    labelled = any(label >= 0 for samples in found for label in samples.labels)
    if len(names) > 1 and not labelled:
        what = "unlabelled: # folder(s) inside the shards, which are no classes there"
        hint = "unpack the shards, or add a .cls to each image"
        notes.append(note(len(names), what, names, hint))
    return notes


def _split_notes(data: str | Path, shards: Sequence[str]) -> list[str]:
    splits: dict[str, list[str]] = {}
    for shard in shards:
        words = re.split(r"[\W_\d]+", shard.rpartition(".")[0])
        for split in {split for word in words if (split := split_of(word))}:
            splits.setdefault(split, []).append(shard)
    if len(splits) < 2:
        return []
    each = ", ".join(f"{split} {len(some):,}" for split, some in sorted(splits.items()))
    one = splits[min(splits, key=lambda split: split != "train")][0]
    folder = data if os.path.isdir(data) else os.path.dirname(data)
    pattern = shlex.quote(os.path.join(folder, re.sub(r"\d+", "*", one)))
    return [
        f"in doubt: the shards are splits of a data set, and all are taken ({each} shards), so "
        f"validation and test images are trained on: name one of them, such as {pattern}"
    ]


def beside_notes(root: Path) -> list[str]:
    """Notes on what lies beside the shards of a folder."""
    if not os.path.isdir(root):
        return []
    try:
        with Progress("listing", None, enabled=False) as bar:
            return listing_notes(root, walk(os.fsencode(root), bar), shards=True)
    except OSError:
        return []  # the shards could be read, and this is not worth more


def refuse_nested(data: str, tally: Tally) -> None:
    """Refuses a tar of tars, such as ImageNet's training images come as.

    Raises:
        DataError: with the commands that unpack it.
    """
    count = sum(tally.counts[kind] for kind in _NESTED)
    if not count:
        return
    names = [name for kind in sorted(_NESTED) for name in tally.names.get(kind, ())]
    tar = shlex.quote(data if data.lower().endswith(TARS) else f"{data}/{names[0].split('/')[0]}")
    raise DataError(
        f"{printable(data)} holds no images of its own but {note(count, '# tar file(s)', names)}, "
        f"which are not looked into: unpack it (mkdir DIR && tar -xf {printable(tar)} -C DIR) and "
        "give DIR; for classes, unpack each of those into a folder of its own as well (for t in "
        'DIR/*.tar; do mkdir "${t%.tar}" && tar -xf "$t" -C "${t%.tar}" && rm "$t"; done)'
    )
