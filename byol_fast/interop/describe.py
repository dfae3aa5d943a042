"""What `inspect` prints, and the sentence that refuses a foreign file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from byol_fast.errors import CheckpointError
from byol_fast.interop import layouts, networks, resnet, stems
from byol_fast.interop.networks import Networks
from byol_fast.networks.stem import described

_SAID = ("backbone", "stem", "hidden_layer", "image_size", "norm", "padding", "network", "steps")


def describe(found: Networks, *, keys: bool = False) -> str:
    """Layout, progress, networks, aliases and whatever is unknown, as text.

    keys: every tensor with its shape as well.
    """
    where = f", under {found.path}" if found.path else ""
    lines = [
        f"file      {found.file} ({found.container}{where})",
        f"layout    {found.layout}: {found.about}",
    ]
    if found.progress:
        progress = ", ".join(f"{key} {value}" for key, value in found.progress.items())
        lines.append(f"progress  {progress}")
    if found.padding != "symmetric":
        lines.append(f"padding   {found.padding}")
    if found.meta:
        said = ", ".join(f"{key} {found.meta[key]}" for key in _SAID if key in found.meta)
        lines.append(f"describes {said}")
    lines += _parts(found, keys)
    for title, names in (
        ("also", found.also),
        ("aliases", found.aliases),
        ("left out", found.left_out),
        ("unknown", found.unknown),
    ):
        if names:
            lines.append(f"{title:<10}{len(names)}: {_listed(names, all_of=keys)}")
    if found.opaque:
        lines.append(f"objects   {', '.join(found.opaque)} (read as data, nothing executed)")
    if _own(found):
        lines.append(f"load      byol_fast.load_backbone({str(found.file)!r})")
    else:
        lines.append(f"import    {command(found.file)}")
    return printable("\n".join(lines))


def printable(text: str) -> str:
    """Text with its control characters visible: names in a file may hold a terminal's commands."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def command(file: Path) -> str:
    """The command that imports a file."""
    name = file.name.partition(".")[0] + "-backbone"  # not the file itself: imports write .pth too
    return f"python -m byol_fast.interop import {shlex.quote(str(file))} {shlex.quote(name)}"


def hint(file: Path) -> str:
    """How to import a file of another project; "" where its layout is not known."""
    try:
        found = networks.read(file)
    except (CheckpointError, ValueError):
        return ""
    if _own(found):
        return ""
    return f"It looks like {found.about}; import it first: {command(file)}"


def _own(found: Networks) -> bool:
    """Whether `load_backbone` takes the file: byol_fast's own, which says what it holds."""
    return found.layout.startswith("byol_fast") and bool(found.meta)


def _parts(found: Networks, keys: bool) -> Iterator[str]:
    for part in layouts.PARTS:
        title = part.replace("_", " ")
        if part in found.problems:
            yield f"{title:<18}not usable: {found.problems[part]}"
        if part not in found.parts:
            continue
        tensors = found.parts[part]
        if part.endswith(layouts.BACKBONE):
            name = resnet.torchvision_name(tensors) or "no torchvision ResNet"
            stem = resnet.stem_of(tensors)
            what = f"{name}, {described(stem, stems.changes(found, stem, {}))}"
        else:
            first, last = tensors["0.weight"].shape, tensors["3.weight"].shape
            bias = ", last layer with a bias" if "3.bias" in tensors else ""
            what = f"{first[1]} → {first[0]} → {last[0]}{bias}"
        numbers = sum(value.numel() for value in tensors.values())
        kinds = "/".join(sorted({str(v.dtype).removeprefix("torch.") for v in tensors.values()}))
        yield f"{title:<18}{what}; {len(tensors)} tensors, {numbers:,} numbers ({kinds})"
        if keys:
            yield from (f"  {key} {[*value.shape]}" for key, value in tensors.items())


def _listed(names: Sequence[str], *, all_of: bool, most: int = 6) -> str:
    short = names if all_of else names[:most]
    return ", ".join(short) + (", … (--keys lists all)" if len(short) < len(names) else "")
