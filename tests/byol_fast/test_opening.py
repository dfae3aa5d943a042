"""The data of a run as it is opened: notes on it are logged once, whatever the number of ranks."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from byol_fast import config
from byol_fast.distributed import World
from byol_fast.session.opening import open_data
from byol_fast.session.signals import StopSignal
from tests.support import make_folder


class Second(World):
    """Rank 1 of two, whose other rank has the same as this one."""

    def gather(self, value: Any, **options: Any) -> list[Any]:
        return [value, value]


@pytest.mark.parametrize(
    ("world", "told"),
    [(World(0, 1, torch.device("cpu")), 1), (Second(1, 2, torch.device("cpu")), 0)],
)
def test_notes_are_logged_by_the_first_rank_of_a_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, world: World, told: int
) -> None:
    folder = make_folder(tmp_path / "images", images=8)
    (folder / "@eaDir").mkdir()
    words = ["--data", str(folder), "--out", str(tmp_path / "run"), "--recipe", "quickstart"]
    (folder / "more").mkdir()
    for again in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            open_data(config.parse(words), world, StopSignal())
        assert caplog.text.count("a NAS or the system keeps (@eaDir)") == told, again
        assert caplog.text.count("1 folder without images, which are no classes (more)") == told
