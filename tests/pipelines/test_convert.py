"""Conversion: the same bytes for the same input, nothing broken let in, nothing left behind."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion import runner as conversion
from pipelines.conversion.betonwriter import BetonWriter
from pipelines.conversion.runner import convert
from pipelines.conversion.storage import Storage
from pipelines.convert import main
from pipelines.decode import decode
from pipelines.errors import DataError
from pipelines.stores import open_store, sidecar
from pipelines.stores.betonfile import load
from tests.pipelines.fake_store import encoded, picture

ROOT = Path(__file__).parents[2]


def make_folder(root: Path, images: int = 24) -> Path:
    """Three classes: JPEGs of several sizes, every fourth image a PNG, one a CMYK JPEG."""
    for i in range(images):
        pixels = picture(40 + 3 * i, 60 + i, seed=i)
        kind, mode, name = (
            ("PNG", "RGB", f"{i:02}.png") if i % 4 == 3 else ("JPEG", "RGB", f"{i:02}.jpg")
        )
        path = root / "abc"[i % 3] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels, kind, "CMYK" if i == 5 else mode))
    return root


def quietly(
    data: str | Path, out: Path, *, workers: int = 2, **options: object
) -> dict[str, object]:
    storage = options.pop("storage", Storage())
    return convert(data, out, storage=storage, workers=workers, progress=False, **options)  # type: ignore[arg-type]


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if ".part" in name)


# What is written


def test_a_folder_becomes_a_beton(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "data"), tmp_path / "a.beton"
    entries = quietly(folder, out)
    source, store = open_store(folder, progress=False), open_store(out)
    assert len(store) == len(source) == 24
    assert (store.sizes == source.sizes).all() and (store.labels == source.labels).all()
    assert store.classes == source.classes == ("a", "b", "c")
    assert store.fingerprint == entries["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert entries["stored"] == {"copied": 17, "encoded": 7}
    for row in range(24):
        if source.name(row).endswith("jpg") and not source.name(row).endswith("05.jpg"):
            assert store.read(row) == source.read(row)
        else:
            got, expected = decode(store.read(row)), decode(source.read(row))
            assert np.abs(got.astype(int) - expected).mean() < 6
    assert leftovers(tmp_path) == []


def test_the_sidecar(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "data"), tmp_path / "a.beton"
    quietly(folder, out, storage=Storage("lossless", 80, 70))
    entries = json.loads((tmp_path / "a.beton.json").read_text())
    store = open_store(out)
    sizes, lengths = store.sizes, load(out).lengths
    assert entries["format"] == sidecar.FORMAT
    assert entries["bytes"] == out.stat().st_size
    assert entries["samples"] == 24 and entries["classes"] == ["a", "b", "c"]
    assert entries["source"]["fingerprint"] == open_store(folder, progress=False).fingerprint
    assert entries["options"] == {
        **{"mode": "lossless", "quality": 80, "max_side": 70, "labels": True}
    }
    assert set(entries["libraries"]) == {"simplejpeg", "pillow"}
    assert sum(entries["stored"].values()) == 24 and entries["quarantined"] == []
    for name, column in (("height", sizes[:, 0]), ("width", sizes[:, 1]), ("image_bytes", lengths)):
        assert entries[name]["min"] == column.min() and entries[name]["max"] == column.max()
        assert entries[name]["mean"] == pytest.approx(column.mean(), abs=0.06)
    assert sizes.max() == 70


@pytest.mark.parametrize("storage", [Storage(), Storage("raw"), Storage("lossless", max_side=64)])
def test_the_same_bytes_whatever_the_workers(tmp_path: Path, storage: Storage) -> None:
    folder = make_folder(tmp_path / "data")
    seen = set()
    for workers in (1, 2, 5):
        quietly(folder, tmp_path / f"{workers}.beton", workers=workers, storage=storage)
        seen.add((tmp_path / f"{workers}.beton").read_bytes())
    assert len(seen) == 1


def test_options_change_the_bytes(tmp_path: Path) -> None:
    folder, seen = make_folder(tmp_path / "data"), []
    for number, storage in enumerate(
        (Storage(), Storage(quality=50), Storage("raw"), Storage("lossless"), Storage(max_side=50))
    ):
        quietly(folder, tmp_path / f"{number}.beton", storage=storage)
        seen.append((tmp_path / f"{number}.beton").read_bytes())
    assert len(set(seen)) == 5


def test_labels_may_be_left_out(tmp_path: Path) -> None:
    quietly(make_folder(tmp_path / "data"), tmp_path / "a.beton", labels=False)
    store = open_store(tmp_path / "a.beton")
    assert set(store.labels.tolist()) == {-1} and store.classes == ()
    assert load(tmp_path / "a.beton").label_field is None


def test_arrays_with_some_labels(tmp_path: Path) -> None:
    images = np.stack([picture(12, 10, seed=i) for i in range(4)])
    np.savez(tmp_path / "a.npz", images=images, labels=[1, -1, 0, 1], classes=["no", "yes"])
    entries = quietly(tmp_path / "a.npz", tmp_path / "a.beton", storage=Storage("lossless"))
    store = open_store(tmp_path / "a.beton")
    assert store.labels.tolist() == [1, -1, 0, 1] and store.classes == ("no", "yes")
    assert entries["stored"] == {"raw": 4} and not store.encoded
    for row in range(4):
        np.testing.assert_array_equal(store.read(row), images[row])
    np.savez(tmp_path / "b.npz", images=images)
    quietly(tmp_path / "b.npz", tmp_path / "b.beton")
    assert load(tmp_path / "b.beton").label_field is None


def test_a_beton_can_be_converted_again(tmp_path: Path) -> None:
    quietly(make_folder(tmp_path / "data"), tmp_path / "a.beton")
    quietly(tmp_path / "a.beton", tmp_path / "b.beton", storage=Storage(max_side=50))
    store = open_store(tmp_path / "b.beton")
    assert store.classes == ("a", "b", "c") and store.sizes.max() == 50
    with pytest.raises(DataError, match="is what is to be converted"):
        quietly(tmp_path / "a.beton", tmp_path / "a.beton", force=True)


# Broken images


def break_some(folder: Path) -> None:
    whole = (folder / "a" / "12.jpg").read_bytes()
    (folder / "a" / "12.jpg").write_bytes(whole[: len(whole) * 2 // 3])  # its header is sound
    (folder / "b" / "page.jpg").write_bytes(b"<html>404</html>")


@pytest.mark.parametrize("verified", [False, True])
def test_broken_images_are_left_out_named_and_counted(tmp_path: Path, verified: bool) -> None:
    folder, out = make_folder(tmp_path / "data", 48), tmp_path / "a.beton"
    break_some(folder)
    if verified:
        open_store(folder, verify=True, progress=False)
    entries = quietly(folder, out)
    reasons = {Path(bad["name"]).name: bad["reason"] for bad in entries["quarantined"]}  # type: ignore[attr-defined]
    assert set(reasons) == {"12.jpg", "page.jpg"}
    assert "corrupt JPEG" in reasons["12.jpg"] and "web page" in reasons["page.jpg"]
    store = open_store(out)
    assert len(store) == 47
    assert store.labels.tolist() == [0] * 15 + [1] * 16 + [2] * 16
    names = [f"{i:02}" for i in range(0, 48, 3) if i != 12]
    for row, name in enumerate(names[:8]):
        assert store.sizes[row].tolist() == [40 + 3 * int(name), 60 + int(name)]


def test_the_bytes_do_not_depend_on_who_found_the_broken_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacities = []

    class Recording(BetonWriter):
        def __init__(self, file: IO[bytes], capacity: int, *, labelled: bool) -> None:
            capacities.append(capacity)  # of a large set it settles where the images begin
            super().__init__(file, capacity, labelled=labelled)

    monkeypatch.setattr(conversion, "BetonWriter", Recording)
    for name, verify in (("one", False), ("two", True)):
        folder = make_folder(tmp_path / name / "data", 48)
        break_some(folder)
        open_store(folder, verify=verify, progress=False)
        quietly(folder, tmp_path / f"{name}.beton")
    assert (tmp_path / "one.beton").read_bytes() == (tmp_path / "two.beton").read_bytes()
    assert capacities == [49, 49]


def test_too_many_broken_images_are_refused(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "data"), tmp_path / "a.beton"
    break_some(folder)
    with pytest.raises(DataError, match=r"2 of 25 images cannot be used so far.*5\.0%.*12\.jpg"):
        quietly(folder, out)
    assert not out.exists() and leftovers(tmp_path) == []


# The file that is written


def test_an_existing_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "data"), tmp_path / "a.beton"
    out.write_bytes(b"precious")
    with pytest.raises(DataError, match="exists: remove it, add --force"):
        quietly(folder, out)
    assert out.read_bytes() == b"precious"
    quietly(folder, out, force=True)
    assert len(open_store(out)) == 24


@pytest.mark.parametrize(
    ("name", "message"), [("a.ffcv", "the ending .beton"), ("none/a.beton", "is not a folder")]
)
def test_names_that_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        quietly(make_folder(tmp_path / "data"), tmp_path / name)


def test_a_folder_that_hides_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, private = make_folder(tmp_path / "data"), tmp_path / "private"
    private.mkdir()

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if str(path).startswith(f"{private}/"):
                raise PermissionError(13, "Permission denied")
            return real(path, *rest, **options)

        return call

    monkeypatch.setattr(os, "stat", refusing(os.stat))
    monkeypatch.setattr(os, "open", refusing(os.open))
    with pytest.raises(DataError, match=r"a\.beton cannot be written \(Permission denied"):
        quietly(folder, private / "a.beton")


def test_a_disk_without_room_is_found_out_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = make_folder(tmp_path / "data"), tmp_path / "a.beton"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(DataError, match=r"would have about .* GB are free"):
        quietly(folder, out)
    assert not out.exists() and leftovers(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    code = (
        "import resource, signal, sys; from pipelines.convert import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = run_code(code, folder, tmp_path / "a.beton")
    assert done.returncode == 4, done.stderr
    assert "a.beton cannot be written (File too large)" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["data", "data.index.npz"]


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )


def test_a_worker_that_fails_ends_the_command(tmp_path: Path) -> None:
    """Though another one hangs, as on a dead disk: the first would otherwise be waited for."""
    folder = make_folder(tmp_path / "data", 48)
    code = (
        "import sys, time; from pipelines.conversion import runner as conversion\n"
        "from pipelines.convert import main\n"
        "conversion._SAMPLE, conversion._ROWS = 1, 4\n"
        "class Failing(conversion.Storage):\n"
        "    def __call__(self, image):\n"
        "        if len(image) == BAD: raise RuntimeError('broken tool')\n"
        "        if len(image) == SLOW: time.sleep(600)\n"
        "        return super().__call__(image)\n"
        "import pipelines.convert as command; command.Storage = Failing\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    slow, bad = folder / "a" / "18.jpg", folder / "b" / "16.jpg"
    code = code.replace("BAD", str(bad.stat().st_size)).replace("SLOW", str(slow.stat().st_size))
    done = run_code(code, folder, tmp_path / "a.beton", "--workers", "2")
    assert done.returncode == 1
    assert "RuntimeError: broken tool" in done.stderr
    assert f"{bad} could not be converted" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["data", "data.index.npz"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    folder, out = make_folder(tmp_path / "data", 48), tmp_path / "a.beton"
    code = (
        "import signal, sys, time; from pipelines.conversion import runner as conversion\n"
        "from pipelines.convert import main\n"
        # a shell that starts the tests in the background has it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Slow(conversion.Storage):\n"
        "    def __call__(self, image):\n"
        "        time.sleep(0.02 if BEGUN else 0); return super().__call__(image)\n"
        "import pipelines.convert as command; command.Storage = Slow\n"
        "real = conversion._Job.write; BEGUN = []\n"
        "def write(self, file):\n"
        "    BEGUN.append(1); print('writing', flush=True); real(self, file); time.sleep(60)\n"
        "conversion._Job.write = write\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(folder), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as run:
        assert run.stdout is not None and run.stdout.readline() == b"writing\n"
        time.sleep(0.1)
        run.send_signal(number)
        _, errors = run.communicate(timeout=600)
    assert not out.exists() and not (tmp_path / "a.beton.json").exists()
    if number == signal.SIGKILL:
        assert leftovers(tmp_path) == [".a.beton.part"]
    else:
        assert run.returncode == 128 + number
        assert b"interrupted" in errors and b"Traceback" not in errors
        assert leftovers(tmp_path) == []
    quietly(folder, out)
    assert len(open_store(out)) == 48 and leftovers(tmp_path) == []


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make_folder(tmp_path / "data", 48), tmp_path / "a.beton"
    (folder / "a" / "gone.jpg").write_bytes(b"")
    assert main([str(folder), str(out), "--max-side", "64", "--workers", "2"]) == 0
    text = capsys.readouterr().out
    assert "48 images (" in text and "classes: 3" in text and "quarantined: 1\n" in text
    assert "gone.jpg: an empty file" in text
    assert main([str(folder), str(out)]) == 4
    assert "exists" in capsys.readouterr().err
    options = ["--force", "--json", "--no-labels", "--mode", "raw", "--quality", "77"]
    assert main([str(folder), str(out), *options]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert entries["options"] == {"mode": "raw", "quality": 77, "max_side": None, "labels": False}
    assert entries["out"] == str(out) and entries["images_per_second"] > 0
    assert json.loads((tmp_path / "a.beton.json").read_text())["sha256"] == entries["sha256"]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["data"],
        ["data", "a.beton", "--quality", "0"],
        ["data", "a.beton", "--quality", "101"],
        ["data", "a.beton", "--max-side", "0"],
        ["data", "a.beton", "--workers", "x"],
        ["data", "a.beton", "--mode", "webp"],
        ["a.beton", "b.beton", "--check"],
    ],
)
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, pipelines.convert; print('torch' in sys.modules)"
    assert run_code(code).stdout == "False\n"


def test_what_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), str(tmp_path / "a.beton")]) == 4
    assert "does not exist" in capsys.readouterr().err
    assert main([str(tmp_path / "none.beton"), "--check"]) == 4


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.beton"
    quietly(make_folder(tmp_path / "data"), out)
    assert main(["--check", str(out)]) == 0
    assert "sha256 agrees" in capsys.readouterr().out
    file, whole = load(out), out.read_bytes()
    changed = bytearray(whole)
    start = int(file.offsets[4]) + int(file.lengths[4]) // 2
    changed[start : start + 40] = b"\xff\xc4" * 20
    out.write_bytes(changed)
    assert main(["--check", str(out), "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert report["sha256_agrees"] == "no" and report["sound"] is False
    assert [bad["name"] for bad in report["bad"]] == [f"{out}[4]"]
    (tmp_path / "a.beton.json").unlink()
    assert main(["--check", str(out)]) == 4
    assert f"{out}[4]: corrupt JPEG" in capsys.readouterr().out
    out.write_bytes(whole)
    assert main(["--check", str(out)]) == 0
    assert "no sidecar" in capsys.readouterr().out
    changed = bytearray(whole)
    changed[int(file.offsets[0]) - 1] ^= 1  # where nothing lies
    out.write_bytes(changed)
    assert main(["--check", str(out)]) == 0  # without a sidecar nobody can tell


def test_an_image_of_another_size_than_stated(tmp_path: Path) -> None:
    images = [picture(30, 40, seed=1), picture(30, 50, seed=2)]
    folder = tmp_path / "data"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.jpg")
    out = tmp_path / "a.beton"
    quietly(folder, out)
    changed = bytearray(out.read_bytes())
    place = 24 + 1041 + 1  # the width of the first image
    changed[place] += 1
    out.write_bytes(changed)
    assert main(["--check", str(out)]) == 4


def test_tasks_are_bounded_in_rows_and_pixels() -> None:
    small, large = np.full((40, 2), 10, np.int32), np.full((5, 2), 2000, np.int32)
    assert [len(task) for task in conversion._tasks(range(40), small)] == [16, 16, 8]
    assert [len(task) for task in conversion._tasks(range(5), large)] == [2, 2, 1]
    assert [row for task in conversion._tasks([3, 1], small) for row in task] == [3, 1]


def test_a_list_and_the_folder_of_its_images(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (tmp_path / "list.txt").write_text("\n".join(names))
    out = tmp_path / "a.beton"
    assert main([str(tmp_path / "list.txt"), str(out), "--root", str(folder)]) == 0
    assert len(open_store(out)) == len(names)
