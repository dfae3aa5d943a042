"""Whether a `.beton` file is what was written: its sha256, and every image decoded strictly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from pipelines.decode import verify
from pipelines.errors import BadImage
from pipelines.ordered import in_order
from pipelines.progress import Progress
from pipelines.stores.beton import BetonStore
from pipelines.stores.sidecar import read_sidecar, sha256_of, sidecar_path

_ROWS = 32  # in one task


def check_beton(path: Path, *, workers: int, progress: bool = True) -> dict[str, Any]:
    """What is found; `sound` is the verdict.

    The sha256 is compared where the sidecar is there. Pixels stored as such have no other check.

    Raises:
        DataError: the tables are unusable; see `pipelines.stores.betonfile.load`.
    """
    store = BetonStore.open(path)
    known = read_sidecar(store.file)
    hashing = Progress("hashing", store.file.size >> 20, unit="MB", enabled=progress)
    with open(path, "rb") as file, hashing as bar:
        sha256 = sha256_of(file, bar)
    with Progress("decoding", len(store), enabled=progress) as bar:
        bad = list(_bad_rows(store, workers, bar))
    if known is not None:
        agrees = "yes" if known["sha256"] == sha256 else "no"
    else:
        agrees = "no" if sidecar_path(path).exists() else "no sidecar"
    return {
        "file": str(path),
        "samples": len(store),
        "bytes": store.file.size,
        "sha256": sha256,
        "sha256_agrees": agrees,
        "bad": [{"name": name, "reason": reason} for name, reason in bad],
        "sound": agrees != "no" and not bad,
    }


def _bad_rows(store: BetonStore, workers: int, bar: Progress) -> Iterator[tuple[str, str]]:
    tasks = [range(i, min(i + _ROWS, len(store))) for i in range(0, len(store), _ROWS)]

    def faults(rows: range) -> list[str]:
        return [_fault(store, row) for row in rows]

    with closing(in_order(faults, tasks, workers=workers, ahead=4 * workers)) as results:
        for rows, reasons in zip(tasks, results, strict=True):
            for row, reason in zip(rows, reasons, strict=True):
                if reason:
                    yield store.name(row), reason
            bar.advance(len(rows))


def _fault(store: BetonStore, row: int) -> str:
    """What is wrong with an image, "" if nothing is."""
    try:
        data = store.read(row)
        if isinstance(data, bytes):
            height, width = verify(data)
            if [height, width] != store.sizes[row].tolist():
                return f"it has {height} x {width} pixels, the file states {store.sizes[row]}"
    except BadImage as error:
        return str(error)
    return ""


def check_text(report: dict[str, Any]) -> str:
    """The findings for people."""
    sha = {
        "yes": "sha256 agrees with the sidecar",
        "no": "sha256 DIFFERS from the sidecar",
        "no sidecar": "no sidecar to compare the sha256 with",
    }[report["sha256_agrees"]]
    lines = [
        f"{report['file']}: {report['samples']:,} images, {report['bytes']:,} bytes; {sha}",
        f"images that cannot be decoded: {len(report['bad'])}",
        *(f"  {bad['name']}: {bad['reason']}" for bad in report["bad"]),
    ]
    return "\n".join(lines)
