"""The same images in a folder, in tar shards and in a `.beton` are the same rows to everything."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.conversion.runner import convert
from pipelines.conversion.storage import Storage
from pipelines.pipeline import build
from pipelines.sources import dali_available
from pipelines.spec import AugmentSpec
from pipelines.stores import Store, open_store
from tests.pipelines.fake_store import encoded, picture
from tests.pipelines.test_tar_store import write

IMAGES = 18
DALI = (
    pytest.mark.dali,
    pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed"),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """JPEGs in class folders; shards of them, in the folder's order; both converted."""
    root = tmp_path_factory.mktemp("alike")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BYOL_FAST_CACHE", str(root / "cache"))
        for i in range(IMAGES):
            path = root / "folder" / "abc"[i // 6] / f"{i:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(40 + 3 * i, 60 + i, seed=i)))
        folder = open_store(root / "folder", progress=False)
        for shard in range(3):
            files: dict[str, bytes] = {}
            for row in range(6 * shard, 6 * shard + 6):
                name = os.path.relpath(folder.name(row), root / "folder")
                files[name] = Path(folder.name(row)).read_bytes()
                files[name.replace(".jpg", ".cls")] = str(folder.labels[row]).encode()
            write(root / "shards" / f"{shard}.tar", files)
        for source, out in (("folder", "a.beton"), ("shards", "b.beton")):
            convert(root / source, root / out, storage=Storage(), workers=2, progress=False)
        yield {name: root / name for name in ("folder", "shards", "a.beton", "b.beton")}


def test_rows_sizes_labels_and_bytes(places: dict[str, Path]) -> None:
    stores: dict[str, Store] = {
        name: open_store(path, progress=False) for name, path in places.items()
    }
    folder = stores["folder"]
    assert len(folder) == IMAGES
    for store in stores.values():
        assert len(store) == IMAGES
        np.testing.assert_array_equal(store.sizes, folder.sizes)
        np.testing.assert_array_equal(store.labels, folder.labels)
        assert [store.read(row) for row in range(IMAGES)] == [
            folder.read(row) for row in range(IMAGES)
        ]
    assert stores["a.beton"].classes == folder.classes == ("a", "b", "c")
    assert stores["b.beton"].classes == stores["shards"].classes == ("0", "1", "2")
    assert places["a.beton"].read_bytes() == places["b.beton"].read_bytes()


@pytest.mark.parametrize("backend", ["torch", pytest.param("dali", marks=DALI)])
def test_views(places: dict[str, Path], backend: str) -> None:
    """The same rows, windows and colours, so the same pixels from one backend."""
    seen = []
    for path in places.values():
        pipeline = build(
            path, spec=AugmentSpec(image_size=32), batch_size=6, backend=backend, threads=1
        )
        batches = list(pipeline.epoch(0))
        seen.append(
            (
                torch.cat([batch.index for batch in batches]),
                torch.cat([batch.label for batch in batches]),
                torch.cat([batch.x for batch in batches], 1),
            )
        )
        pipeline.close()
    assert len(seen) == 4
    for index, label, x in seen[1:]:
        assert torch.equal(index, seen[0][0])
        assert torch.equal(label, seen[0][1])
        assert torch.equal(x, seen[0][2])
