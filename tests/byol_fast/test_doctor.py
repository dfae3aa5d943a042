"""`byol-fast doctor`: what it says of machines that lack something, and of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import ROOT, make_folder

from byol_fast import doctor, doctor_machine, doctor_packages
from byol_fast.doctor import Finding, Wanted, as_text, examine, verdict
from byol_fast.errors import Exit

CPU_TORCH = {
    **{"version": "2.15.0+cpu", "cuda": None, "available": False, "gpus": [], "nccl": None},
    "triton": None,
    "triton_error": "No module named 'triton'",
}
GPUS = {
    **{"version": "2.15.0+cu130", "cuda": "13.0", "available": True, "nccl": [2, 29, 3]},
    **{"gpus": [["NVIDIA H100", 80 << 30, "sm_90"]] * 8, "bf16": True, "works": True},
    "triton": "3.9.0",
}


@pytest.fixture
def torch_says(monkeypatch: pytest.MonkeyPatch) -> Any:
    def say(facts: dict[str, Any], driver: str | None = "580.1") -> None:
        monkeypatch.setattr(doctor_packages, "torch_facts", lambda: facts)
        monkeypatch.setattr(doctor_machine, "torch_facts", lambda: facts)
        monkeypatch.setattr(doctor_packages, "driver", lambda: driver)

    return say


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert all(f.mend for f in findings if f.state != "ok"), findings
    return {finding.name: finding for finding in findings}


def test_a_machine_without_a_gpu(torch_says: Any) -> None:
    torch_says(CPU_TORCH, driver=None)
    found = by_name(doctor_packages.pytorch(Wanted()))
    assert list(found) == ["PyTorch", "CUDA", "driver", "GPU", "NCCL", "Triton"]
    assert found.pop("PyTorch").state == "ok"
    assert {f.state for f in found.values()} == {"missing"}
    assert verdict(list(found.values())) == Exit.DONE
    asked = doctor_packages.pytorch(Wanted(device="cuda"))
    assert verdict(asked) == Exit.USAGE
    assert "asked for and missing: CUDA, driver, GPU" in as_text(asked, 1.0)


def test_a_machine_with_eight(torch_says: Any) -> None:
    torch_says(GPUS)
    found = by_name(doctor_packages.pytorch(Wanted(device="cuda")))
    assert {f.state for f in found.values() if f.name != "Triton"} == {"ok"}
    assert "NVIDIA H100 (80 GiB, sm_90)" in found["GPU"].what
    assert found["NCCL"].what == "2.29.3"
    torch_says({**GPUS, "works": False})
    assert by_name(doctor_packages.pytorch(Wanted(device="cuda")))["GPU"].state == "missing"
    torch_says({**GPUS, "bf16": False})
    assert by_name(doctor_packages.pytorch(Wanted()))["GPU"].state == "slow"


@pytest.mark.parametrize(
    ("facts", "state", "text"),
    [
        ({"failed": "No module named 'torch'"}, "missing", "No module named"),
        ({"late": "it did not load within 19 s"}, "slow", "19 s"),
        ({**CPU_TORCH, "version": "2.9.1"}, "missing", "2.10 or newer is needed"),
    ],
)
def test_torch_that_is_missing_late_or_old(
    torch_says: Any, facts: dict[str, Any], state: str, text: str
) -> None:
    torch_says(facts)
    first = doctor_packages.pytorch(Wanted())[0]
    assert (first.state, text in first.what) == (state, True)
    assert verdict([first]) == (Exit.USAGE if state == "missing" else Exit.DONE)


def test_missing_dali_names_the_wheel_for_this_cuda(
    torch_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_packages, "_DALI", "import no_such_package")
    for cuda, extra in (("13.0", "[dali]"), ("12.6", "[dali-cuda12]")):
        torch_says({**GPUS, "cuda": cuda})
        (found,) = doctor_packages.dali(Wanted())
        assert found.state == "missing" and "no_such_package" in found.what
        assert extra in found.mend
    assert verdict([found]) == Exit.DONE
    assert verdict(doctor_packages.dali(Wanted(backend="dali"))) == Exit.USAGE


def test_dali_that_does_not_decode_on_the_gpu(
    torch_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"version": "2.4.0", "cpu": True, "gpu": False, "error": "nvJPEG: no device"}
    monkeypatch.setattr(doctor_packages, "probe", lambda *args: told)
    torch_says(GPUS)
    found = by_name(doctor_packages.dali(Wanted(backend="dali", device="cuda")))
    assert found["DALI"].state == "ok"
    assert found["DALI on the GPU"].state == "slow"
    assert "nvJPEG: no device" in found["DALI on the GPU"].what
    told["gpu"] = True
    monkeypatch.setenv("NVIDIA_DRIVER_CAPABILITIES", "compute,utility")
    assert "video" in by_name(doctor_packages.dali(Wanted()))["DALI on the GPU"].mend
    monkeypatch.setenv("NVIDIA_DRIVER_CAPABILITIES", "compute,utility,video")
    assert by_name(doctor_packages.dali(Wanted()))["DALI on the GPU"].state == "ok"


@pytest.mark.parametrize(
    ("script", "key", "text"),
    [
        ("import os; os.abort()", "failed", "SIGABRT"),
        ("raise RuntimeError('broken driver')", "failed", "broken driver"),
        ("import time; time.sleep(60)", "late", "did not load within 0.5 s"),
        ("print('no JSON')", "failed", "no JSON"),
        ("import sys; sys.exit(3)", "failed", "status 3"),
    ],
)
def test_a_package_that_crashes_or_hangs_is_a_finding(script: str, key: str, text: str) -> None:
    assert text in doctor_packages.probe(script, seconds=0.5 if key == "late" else 600)[key]


# Cores, memory, disks


def test_one_core_for_eight_ranks(torch_says: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "usable_cores", lambda: 1.0)
    torch_says(CPU_TORCH)
    found = by_name(doctor_machine.cores(Wanted(ranks=8)))["cores"]
    assert found.state == "slow" and "1 for 8 ranks: 0.125 each" in found.what
    assert "--nproc_per_node=1" in found.mend
    monkeypatch.setattr(doctor_machine, "usable_cores", lambda: 32.0)
    torch_says(GPUS)  # whose number is the number of ranks
    assert "32 for 8 ranks: 4 each; 8 or more" in doctor_machine.cores(Wanted())[0].what
    monkeypatch.setattr(doctor_machine, "usable_cores", lambda: 128.0)
    assert doctor_machine.cores(Wanted())[0].state == "ok"
    monkeypatch.setattr(doctor_machine, "usable_cores", lambda: 2.0)
    monkeypatch.setattr(doctor_machine.os, "sched_getaffinity", lambda pid: set(range(64)))
    torch_says(CPU_TORCH)
    (found,) = doctor_machine.cores(Wanted(ranks=1))
    assert found.state == "ok" and "2 for 1 rank: 2 each by the container's quota" in found.what


def test_shared_memory_too_small_for_the_ranks(
    torch_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_says(CPU_TORCH)
    disk = SimpleNamespace(free=64 << 20)  # Docker's default
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: disk)
    found = by_name(doctor_machine.shared_memory(Wanted(ranks=8)))["/dev/shm"]
    assert found.state == "slow" and "--shm-size=1g" in found.mend
    assert doctor_machine.shared_memory(Wanted(ranks=1))[0].state == "ok"
    monkeypatch.undo()
    torch_says(CPU_TORCH)
    assert doctor_machine.shared_memory(Wanted(), "/no/such/place")[0].state == "missing"


def test_where_runs_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "_WRITE_BYTES", 4 << 20)
    (found,) = doctor_machine.output(Wanted(out=str(tmp_path / "not" / "yet")))
    assert found.state in ("ok", "slow") and str(tmp_path) in found.what
    assert list(tmp_path.iterdir()) == []  # nothing is made or left
    (found,) = doctor_machine.output(Wanted(out="/proc/runs"))
    assert found.state == "missing" and verdict([found]) == Exit.USAGE
    disk = SimpleNamespace(free=1 << 30)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: disk)
    (found,) = doctor_machine.output(Wanted(out=str(tmp_path)))
    assert found.state == "slow" and "1 GB free" in found.what


def test_data_and_its_index(
    tmp_path: Path, torch_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.convert import main as convert
    from pipelines.index import main as index

    torch_says(CPU_TORCH)
    monkeypatch.setattr(doctor_machine, "_READ_SECONDS", 0.2)
    folder = make_folder(tmp_path / "images", images=40)
    os.mkfifo(folder / "class0" / "pipe.jpg")  # to be passed over
    wanted = Wanted(data=str(folder))
    assert doctor_machine.data(wanted)[0].state == "ok"
    assert len(doctor_machine.sample(wanted.data)) == 40
    (found,) = doctor_machine.index(wanted)
    assert found.state == "slow" and found.mend.endswith("--verify")
    for path in (folder, *folder.iterdir()):  # changed a while ago: the index is relied on
        if path.is_dir():
            os.utime(path, (time.time() - 60,) * 2)
    assert index([str(folder)]) == 0
    assert "only headers" in doctor_machine.index(wanted)[0].what
    assert index([str(folder), "--verify"]) == 0
    (found,) = doctor_machine.index(wanted)
    assert found.state == "ok" and "40 images, 4 classes, 1 left out" in found.what

    beton = tmp_path / "a.beton"
    assert convert([str(folder), str(beton)]) == 0
    assert "40 images" in doctor_machine.index(Wanted(data=str(beton)))[0].what
    pieces = doctor_machine.sample(str(beton))
    assert sum(piece.length for piece in pieces) == beton.stat().st_size
    assert doctor_machine.read_all(pieces, 5.0)[0] == beton.stat().st_size
    beton.write_bytes(b"not a beton")
    assert verdict(doctor_machine.index(Wanted(data=str(beton)))) == Exit.DATA

    (found,) = doctor_machine.data(Wanted(data=str(tmp_path / "nowhere")))
    assert found.state == "missing" and verdict([found]) == Exit.DATA


def test_too_many_broken_images_are_data_that_is_missing(tmp_path: Path) -> None:
    from pipelines.index import main as index

    folder = make_folder(tmp_path / "images", images=8)
    for path in sorted((folder / "class0").iterdir()):
        path.write_bytes(b"")
    for path in (folder, *folder.iterdir()):
        os.utime(path, (time.time() - 60,) * 2)
    assert index([str(folder), "--verify"]) == 4
    (found,) = doctor_machine.index(Wanted(data=str(folder)))
    assert found.state == "missing" and "2 of 8" in found.what
    assert verdict([found]) == Exit.DATA


# The whole


def test_a_check_that_raises_or_hangs_does_not_take_the_others_along() -> None:
    never = threading.Event()

    def fine(wanted: Wanted) -> list[Finding]:
        return [Finding(name="fine", state="ok", what="yes")]

    def raises(wanted: Wanted) -> list[Finding]:
        raise OSError("undefined symbol")

    def hangs(wanted: Wanted) -> list[Finding]:
        never.wait()
        return []

    run = {"hangs": hangs, "raises": raises, "fine": fine}
    found = examine(Wanted(), run, seconds=0.5)
    never.set()
    assert [(f.name, f.state) for f in found] == [
        ("hangs", "slow"),
        ("raises", "missing"),
        ("fine", "ok"),
    ]
    assert "no answer in 0.5 s" in found[0].what and "undefined symbol" in found[1].what


@pytest.mark.parametrize(("name", "code"), [("out", 2), ("data", 4), ("index", 4), ("DALI", 0)])
def test_a_check_that_raises_counts_where_it_was_asked_for(name: str, code: int) -> None:
    """A folder below one that may not be entered, say."""

    def raises(wanted: Wanted) -> list[Finding]:
        raise PermissionError(13, "Permission denied")

    assert verdict(examine(Wanted(data="images"), {name: raises})) == code


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--ranks", "0"], ["--backend", "tensorflow"], ["--no-such"]):
        with pytest.raises(SystemExit) as caught:
            doctor.main(argv)
        assert caught.value.code == 2
    assert "whole number of at least 1" in capsys.readouterr().err


def test_a_real_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", images=16)
    command = [sys.executable, "-m", "byol_fast.cli", "doctor", "--json"]
    run = subprocess.run(
        [*command, "--data", str(folder), "--out", str(tmp_path / "runs"), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    found = {f["name"]: f for f in report["findings"]}
    named = ("Python", "PyTorch", "DALI", "FFCV", "cores", "/dev/shm", "out", "data", "index")
    assert set(named) <= set(found)
    assert all(f["state"] in ("ok", "slow", "missing") for f in found.values())
    assert all(f["mend"] for f in found.values() if f["state"] != "ok")
    assert found["Python"]["state"] == "ok" and found["PyTorch"]["state"] in ("ok", "slow")
    assert report["exit"] == 0
