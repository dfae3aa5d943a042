"""The doctor's checks of cores, memory, disks and data."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from byol_fast.doctor import Finding, Wanted
from byol_fast.doctor_packages import torch_facts
from pipelines.cores import usable_cores
from pipelines.ordered import in_order

CORES_A_GPU = 8  # with fewer, decoding on the CPU keeps a data-centre GPU waiting
SHM_A_RANK = 128 << 20  # bytes; Docker's default of 64 MiB is too little for NCCL's buffers
TARGET_FPS = 676  # images/s for each GPU that benchmarks/fps.py compares with
IMAGE_BYTES = 110_000  # of ImageNet's on average
CHECKPOINT_BYTES = 600 << 20  # of a ResNet-50 run, about
SPARE_BYTES = 5 << 30  # two checkpoints, one being written, logs and exports

_READ_SECONDS, _READS, _READ_THREADS = 1.5, 2000, 8
_WRITE_BYTES = 64 << 20


class Piece(NamedTuple):
    """A part of a file that is read at once."""

    path: str
    offset: int
    length: int


def ranks_here(wanted: Wanted) -> int:
    """Processes on this machine: as asked, or as torchrun says, or one for each GPU."""
    told = wanted.ranks or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return told or max(1, len(torch_facts().get("gpus", [])))


def cores(wanted: Wanted) -> list[Finding]:
    """Cores for each process: decoding on the CPU takes most of them."""
    have, ranks = usable_cores(), ranks_here(wanted)
    each = have / ranks
    of_ranks = f"{ranks} rank{'s' if ranks > 1 else ''}"
    what = f"{have:g} for {of_ranks}: {each:.3g} each"
    on_gpu = bool(torch_facts().get("gpus")) or wanted.gpu
    if each < 1:
        what += "; ranks wait for each other"
        mend = f"torchrun --nproc_per_node={max(1, int(have))} …, or docker run --cpus={ranks} …"
        return [Finding(name="cores", state="slow", what=what, mend=mend)]
    if on_gpu and each < CORES_A_GPU:
        what += f"; {CORES_A_GPU} or more keep a GPU busy"
        mend = "byol-fast convert DIR OUT.beton --max-side 500, then --data OUT.beton"
        return [Finding(name="cores", state="slow", what=what, mend=mend)]
    seen = len(os.sched_getaffinity(0))
    if have < seen:
        what += f" by the container's quota, though {seen} are visible; threads follow it"
    return [Finding(name="cores", state="ok", what=what)]


def shared_memory(wanted: Wanted, path: str = "/dev/shm") -> list[Finding]:
    """Shared memory, through which NCCL connects the GPUs of a machine."""
    ranks = ranks_here(wanted)
    needed = SHM_A_RANK * ranks if ranks > 1 else 0
    mend = f"docker run --shm-size={max(1, -(-needed // (1 << 30)))}g …"
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return [Finding(name=path, state="missing", what=str(error.strerror), mend=mend)]
    what = f"{free / 2**20:,.0f} MiB free"
    if free < needed:
        what += f"; {ranks} ranks need about {needed / 2**20:,.0f}"
        return [Finding(name=path, state="slow", what=what, mend=mend)]
    return [Finding(name=path, state="ok", what=what)]


def output(wanted: Wanted) -> list[Finding]:
    """Where runs are written: rights, room and speed."""
    name, folder = "out", Path(wanted.out).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    block = os.urandom(1 << 20)
    try:
        free = shutil.disk_usage(folder).free
        if free < 2 * _WRITE_BYTES:
            raise OSError(28, "No space left on device")
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(_WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = _WRITE_BYTES / (time.perf_counter() - started)
    except OSError as error:
        what = f"{folder} cannot be written to: {error.strerror}"
        mend = "byol-fast pretrain --out DIR … with a folder on another disk, or mend its rights"
        return [Finding(name=name, state="missing", what=what, mend=mend, asked=True)]
    seconds = CHECKPOINT_BYTES / rate
    what = f"{folder}: {rate / 1e6:,.0f} MB/s written, {free / 1e9:,.0f} GB free"
    if free < SPARE_BYTES:
        mend = f"rm old runs, or --out on another disk: a run takes up to {SPARE_BYTES >> 30} GB"
        return [Finding(name=name, state="slow", what=what, mend=mend, asked=True)]
    if seconds > 30:
        what += f"; a checkpoint of a ResNet-50 takes about {seconds:.0f} s"
        mend = "byol-fast pretrain --out DIR … on a local disk, or --checkpoint.every 2h"
        return [Finding(name=name, state="slow", what=what, mend=mend, asked=True)]
    return [Finding(name=name, state="ok", what=what, asked=True)]


def data(wanted: Wanted) -> list[Finding]:
    """How fast the images are read, past what the page cache holds."""
    if not wanted.data or wanted.data.startswith("synthetic:"):
        return []
    pieces = sample(wanted.data)
    if not pieces:
        what = f"{wanted.data} does not exist, or holds nothing that can be read"
        mend = "byol-fast doctor --data DIR with a folder of images that is there"
        return [Finding(name="data", state="missing", what=what, mend=mend, asked=True)]
    size, seconds, count = read_all(pieces, _READ_SECONDS)
    rate, needed = size / seconds, TARGET_FPS * IMAGE_BYTES * ranks_here(wanted)
    what = f"{rate / 1e6:,.0f} MB/s, {count / seconds:,.0f} reads/s by {_READ_THREADS} threads"
    if rate < needed and torch_facts().get("gpus"):
        what += f"; {TARGET_FPS} images/s for each GPU are about {needed / 1e6:,.0f} MB/s"
        mend = "byol-fast convert DIR /local/train.beton --max-side 500, then --data that file"
        return [Finding(name="data", state="slow", what=what, mend=mend, asked=True)]
    return [Finding(name="data", state="ok", what=what, asked=True)]


def sample(data: str) -> list[Piece]:
    """Up to `_READS` pieces of the data, in the order of the folders: files, or parts of a file."""
    from pipelines.errors import DataError
    from pipelines.stores.tarshards import is_tar, shard_paths

    path = Path(data).expanduser()
    try:
        files = shard_paths(path) if is_tar(path) else [path]
    except DataError:
        return []
    if path.is_dir() and not is_tar(path):
        return list(islice(_below(path), _READS))
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    step = max(IMAGE_BYTES, sum(sizes.values()) // _READS)
    return [
        Piece(str(file), offset, min(IMAGE_BYTES, size - offset))
        for file, size in sizes.items()
        for offset in range(0, size, step)
    ]


def _below(folder: Path) -> Iterator[Piece]:
    for here, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(here, name)
            if os.path.isfile(path):
                yield Piece(path, 0, 1 << 20)


def read_all(pieces: Sequence[Piece], limit: float) -> tuple[int, float, int]:
    """Reads pieces of files for at most `limit` seconds: bytes, seconds, pieces."""
    started = time.perf_counter()

    def read(piece: Piece) -> int:
        try:
            fd = os.open(piece.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return 0
        try:
            os.posix_fadvise(fd, piece.offset, piece.length, os.POSIX_FADV_DONTNEED)
            return len(os.pread(fd, piece.length, piece.offset))
        except OSError:
            return 0
        finally:
            os.close(fd)

    size = count = 0
    todo = takewhile(lambda _: time.perf_counter() - started < limit, pieces)
    for got in in_order(read, todo, workers=_READ_THREADS, ahead=4 * _READ_THREADS):
        size, count = size + got, count + 1
    return size, max(time.perf_counter() - started, 1e-6), count


def index(wanted: Wanted) -> list[Finding]:
    """What the data set holds, and whether the first start has to index it."""
    if not wanted.data or not Path(wanted.data).expanduser().exists():
        return []
    from pipelines.errors import DataError
    from pipelines.index import refuse_if_bad, stored_index
    from pipelines.stores import open_store
    from pipelines.stores.tarshards import is_tar

    path = Path(wanted.data).expanduser()
    mend = f"python -m pipelines.index {shlex.quote(wanted.data)} --verify"
    try:
        if not (path.is_dir() or is_tar(path)):  # a file that needs no index
            what = f"{len(open_store(path, progress=False)):,} images; such a file needs none"
            return [Finding(name="index", state="ok", what=what, asked=True)]
        found = stored_index(path)
        if found is None:
            what = "none that holds: the first start reads every image once"
            return [Finding(name="index", state="slow", what=what, mend=mend)]
        refuse_if_bad(found)
    except DataError as error:
        return [Finding(name="index", state="missing", what=str(error), mend=mend, asked=True)]
    what = f"{len(found):,} images, {len(found.classes)} classes, {len(found.bad)} left out"
    if not found.verified:
        what += "; only headers were read"
        return [Finding(name="index", state="slow", what=what, mend=mend)]
    return [Finding(name="index", state="ok", what=what)]
