"""What is around a run: a disk without room, odd folders, a terminal that goes away."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.harness import SMALL

NO_ROOM_AT_THE_END = """
import errno
from byol_fast import export, report
def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")
if {place!r} == "export":
    export.safetensors.torch.save_file = full
else:
    report.write = full
"""


@pytest.mark.parametrize("place", ["export", "report"])
def test_f2_no_room_for_the_results(runs, tmp_path: Path, place: str):
    """The run is not called done before its results are written; nothing is trained again."""
    out = tmp_path / "run"
    run = runs(out, *SMALL, fault=NO_ROOM_AT_THE_END.format(place=place))
    assert run.wait() == 1, run.said
    assert "No space left" in run.said and "repeat the command" in run.said
    assert "Traceback" not in run.said
    assert run.status["state"] == "failed" and "No space left" in run.status["reason"]
    again = runs(out, *SMALL)
    assert again.wait() == 0 and again.status["state"] == "done"
    assert (out / "exports" / "backbone.safetensors").exists() and (out / "report.html").exists()
