"""WebDataset shards: images read where they lie in the tar files, never extracted."""

from __future__ import annotations

from pathlib import Path

from pipelines.index import refuse_if_bad, warn_of
from pipelines.scan import printable
from pipelines.stores.openfile import OpenFiles
from pipelines.stores.tarbuild import open_tar_index
from pipelines.stores.tarindex import TarIndex


class TarStore:
    """The images in a list of tar files, in the order of the shards' names and of their members.

    Args:
        index: where they lie; see `pipelines.stores.tarbuild.open_tar_index`.
    """

    encoded = True

    def __init__(self, index: TarIndex) -> None:
        self.index = index
        self.sizes, self.labels = index.sizes, index.labels
        self.classes, self.fingerprint = index.classes, index.fingerprint
        self.verified = index.verified  # every image was decoded strictly
        self._files = OpenFiles(index.paths)

    @classmethod
    def open(
        cls,
        data: str | Path,
        *,
        verify: bool = True,
        workers: int | None = None,
        progress: bool = True,
        max_bad_share: float = 0.05,
    ) -> TarStore:
        """Indexes the shards, or reads their index; arguments as in `stores.open_store`.

        Raises:
            DataError: no images, a shard that is no sound tar file, or more than `max_bad_share`
                of the images are bad.
        """
        index, _ = open_tar_index(data, verify=verify, workers=workers, progress=progress)
        refuse_if_bad(index, max_bad_share)
        warn_of(index)
        return cls(index)

    @property
    def quarantined(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the images that are no rows."""
        return tuple((printable(b.path), b.reason) for b in self.index.bad)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, row: int) -> bytes:
        """The image's bytes.

        Raises:
            BadImage: its shard is gone, or was cut short.
        """
        shard = self.index.shard(row)
        return self._files[shard].read(int(self.index.offsets[row]), int(self.index.lengths[row]))

    def name(self, row: int) -> str:
        """`shards/000.tar/n01440764/12.jpg`."""
        shard = self.index.paths[self.index.shard(row)]
        return f"{printable(str(shard))}/{printable(self.index.names[row])}"
