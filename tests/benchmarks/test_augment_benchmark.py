"""benchmarks/augment.py runs here, small, and its rows do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import augment
from pipelines.augment import reference
from pipelines.spec import AugmentSpec
from tests.pipelines.test_augment import make_crops, strong_table

TINY = ["--device", "cpu", "--batch-size", "3", "--image-size", "32", "--rounds", "2"]


def test_the_loop_does_what_the_reference_does() -> None:
    spec = AugmentSpec(image_size=45, semantics="torchvision")
    crops, table = make_crops(2, 24, 45), strong_table(2, 24, "torchvision")
    out = augment.torchvision_loop(crops, table, spec, torch.float32)
    torch.testing.assert_close(out, reference.apply(crops, table, spec), rtol=0, atol=1e-4)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in out)


def test_it_runs_on_a_cpu_and_says_that_it_was_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "augment.json"
    augment.main([*TINY, "--dtype", "fp32", "--step-fps", "10", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["device"] == "cpu" and result["mode"] == "augment"
    names = ["reference, deepmind", "reference, torchvision", augment.LOOP]
    assert list(result["rows"]) == names
    for row in result["rows"].values():
        low, middle, high = row["us_per_image"]
        assert 0 < low <= middle <= high and row["n"] == 2
        assert row["apart"] < 1e-4
        share = result["floor_us_per_image"] / middle
        assert row["share_of_floor"] == pytest.approx(share, rel=0.05)
        assert row["share_of_a_step"] == pytest.approx(middle * 1e-5, rel=0.02)
    assert result["rows"][augment.LOOP]["faster_than_torchvision"] == 1
    printed = capsys.readouterr().out
    assert "these figures are the CPU's" in printed and all(name in printed for name in names)


def test_the_floor_is_one_read_of_crops_and_one_write_of_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(augment.hardware, "copy_bytes", lambda _: 1e9)
    result = augment.main([*TINY, "--dtype", "bf16"])
    assert result["floor_us_per_image"] == pytest.approx(2 * 3 * 32**2 * 3 / 1e9 * 1e6, rel=0.01)


@pytest.mark.parametrize("device", ["tpu", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        augment.main(["--device", device])
    assert ended.value.code == 2
    assert "no such device" in capsys.readouterr().err
