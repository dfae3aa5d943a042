"""How the index and the epoch plan grow: seconds and memory from 10^4 rows to ImageNet's 1,281,167.

`python benchmarks/scale.py [--rows 10000 …] [--repeats 3] [--json FILE]`

Every figure comes from a fresh process on one core. An index in the real file format, beside a
folder with 1,000 class folders, is opened as training opens it (`FolderStore.open`: folder times
compared, columns read). Then the plan of one epoch is made: its order, and windows and colours of
every row, in chunks. Memory is the growth of the process's peak over what its imports took. Image
files are not made: opening an index touches folders only. The least of the repeats is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGENET = 1_281_167
CHUNK = 8192  # rows planned at a time, two steps of 4096
_REPOSITORY = Path(__file__).resolve().parent.parent


def make(root: Path, rows: int, classes: int = 1000) -> dict[str, Any]:
    """A folder of empty class folders, and the index it would have with `rows` images."""
    import numpy as np

    from pipelines.indexbuild import root_listing
    from pipelines.indexfile import Index, Strings, locations, save

    names = [b"n%08d" % (1_440_764 + 11 * i) for i in range(classes)]
    for name in names:
        (root / name.decode()).mkdir(parents=True)
    mtimes = [os.stat(os.path.join(root, os.fsdecode(n))).st_mtime_ns for n in (b"", *names)]
    first = np.concatenate([[0], np.linspace(0, rows, classes + 1).astype(np.int64)])
    folders = np.repeat(np.arange(classes), np.diff(first[1:])).tolist()
    random = np.random.default_rng(0)
    index = Index(
        root=root,
        verified=True,
        fingerprint="0" * 64,
        scanned_at=time.time_ns() + 10**10,  # as if listed long after the folders were made
        listing=root_listing(os.fsencode(root)),
        ignored=0,
        classes=tuple(n.decode() for n in names),
        notes=(),
        bad=(),
        dirs=Strings.of([b"", *names]),
        dir_mtimes=np.array(mtimes, dtype=np.int64),
        dir_labels=np.arange(-1, classes, dtype=np.int32),
        first=first,
        names=Strings.of([b"%b_%d.JPEG" % (names[f], i) for i, f in enumerate(folders)]),
        sizes=random.integers(200, 700, (rows, 2), dtype=np.int32),
        stats=random.integers(50_000, 200_000, (rows, 2), dtype=np.int64),
    )
    path = locations(root)[0]
    save(index, path)
    return {"rows": rows, "file_mb": path.stat().st_size / 1e6}


def load(root: Path) -> dict[str, Any]:
    """Opens the store of `root`."""
    from pipelines.stores.folder import FolderStore

    with _Measured() as measured:
        store = FolderStore.open(root, progress=False)
    assert store.labels[-1] == len(store.classes) - 1
    return {"rows": len(store), **measured.result}


def plan(root: Path, semantics: str) -> dict[str, Any]:
    """Makes every row of one epoch's plan of the images in `root`."""
    from pipelines.plan import EpochPlan
    from pipelines.spec import AugmentSpec
    from pipelines.stores.folder import FolderStore

    sizes = FolderStore.open(root, progress=False).sizes
    spec = AugmentSpec(semantics="torchvision" if semantics == "torchvision" else "deepmind")
    checksum = 0
    with _Measured() as measured:
        epoch = EpochPlan(spec, 0, 0, sizes)
        order = epoch.order
        for start in range(0, len(order), CHUNK):
            ids = order[start : start + CHUNK]
            checksum += int(epoch.windows(ids)[-1, 0, 2]) + len(epoch.colours(ids))
    assert checksum > len(sizes)
    return {"rows": len(sizes), **measured.result}


class _Measured:
    """Wall and processor seconds, and the growth of the peak of resident memory, in a `with`."""

    def __enter__(self) -> _Measured:
        self._rss = _status("VmRSS")
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        seconds, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        grown = max(0, _status("VmHWM") - self._rss) / 1e6
        self.result = {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": grown}


def _status(field: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def _child(*arguments: str) -> dict[str, Any]:
    path = os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        [sys.executable, __file__, "--child", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=True,
        stdout=subprocess.PIPE,
    )
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def _run_child(arguments: list[str]) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    match arguments:
        case ["make", root, rows]:
            result = make(Path(root), int(rows))
        case ["load", root]:
            result = load(Path(root))
        case ["plan", root, semantics]:
            result = plan(Path(root), semantics)
        case _:
            raise SystemExit(f"unknown child {arguments}")
    print(json.dumps(result))


def measure(rows: list[int], repeats: int) -> list[dict[str, Any]]:
    """One entry a number of rows: the file's size, and the best of `repeats` of each stage."""
    results = []
    for n in rows:
        with tempfile.TemporaryDirectory() as folder:
            root = str(Path(folder) / "images")
            entry: dict[str, Any] = _child("make", root, str(n))
            stages = {
                "load": ("load", root),
                "plan_deepmind": ("plan", root, "deepmind"),
                "plan_torchvision": ("plan", root, "torchvision"),
            }
            for stage, arguments in stages.items():
                runs = [_child(*arguments) for _ in range(repeats)]
                assert {run["rows"] for run in runs} == {n}
                entry[stage] = {
                    key: min(run[key] for run in runs)
                    for key in ("seconds", "cpu_seconds", "peak_mb")
                }
            results.append(entry)
            print(_row(entry), flush=True)
    return results


def _row(entry: dict[str, Any]) -> str:
    stages = [entry[s] for s in ("load", "plan_deepmind", "plan_torchvision")]
    cells = [f"{s['seconds']:.3f} | {s['cpu_seconds']:.3f} | {s['peak_mb']:.1f}" for s in stages]
    return f"| {entry['rows']:,} | {entry['file_mb']:.1f} | {' | '.join(cells)} |"


def main() -> None:
    """Prints a Markdown table; seconds, processor seconds and MB of each stage."""
    parser = argparse.ArgumentParser(description="Growth of index and plan with the data set.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, IMAGENET])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _run_child(args.child)
    print(
        "| rows | file MB | load s | cpu s | MB | plan (deepmind) s | cpu s | MB "
        "| plan (torchvision) s | cpu s | MB |\n|" + "---:|" * 11
    )
    results = measure(args.rows, args.repeats)
    if args.json:
        machine = {"python": platform.python_version(), "machine": platform.platform()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
