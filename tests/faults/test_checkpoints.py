"""Checkpoints under attack: killed while saving (F1), full disk (F2), read-only folder (F3),
damaged (F4), poisoned (F5)."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from faults.harness import SMALL, Zygote, assert_same_run, wait_until
from support import final

import byol_fast
from byol_fast import checkpoint
from byol_fast.errors import CheckpointError

# Saves one checkpoint after the other. With a number it kills itself at that event: a piece of data
# half written, before an fsync, before a rename, before a removal.
SAVER = """
import os, signal, torch
from pathlib import Path
from byol_fast import checkpoint
folder, left = Path(ARGS[0]), int(ARGS[1])

def event(before=lambda: None):
    global left
    left -= 1
    if left == 0:
        before()
        os.kill(os.getpid(), signal.SIGKILL)

def wrap(owner, name):
    real = getattr(owner, name)
    def call(*args, **options):
        event()
        return real(*args, **options)
    setattr(owner, name, call)

for name in ("fsync", "replace"):
    wrap(os, name)
wrap(Path, "unlink")
real_write = checkpoint._HashedFile.write
def write(self, data):
    event(lambda: (self._file.write(bytes(data)[: len(data) // 2]), self._file.flush()))
    return real_write(self, data)
checkpoint._HashedFile.write = write

first = max((int(p.name[5:13]) for p in folder.glob("step-*.pt")), default=0) + 1
(folder.parent / "ready").touch()
for step in range(first, first + 1_000_000):
    checkpoint.save(folder, step, {"weights": torch.full((50_000,), float(step)), "step": step})
"""


def assert_whole(folder: Path, least: int) -> int:
    """The newest checkpoint loads, holds what its step saved, and is not older than `least`."""
    state = checkpoint.latest(folder)
    assert state is not None and state["step"] >= least
    assert torch.equal(state["weights"], torch.full((50_000,), float(state["step"])))
    checkpoint.prepare(folder)
    assert not list(folder.glob("*.tmp*")), "temporary files are swept"
    for hash_path in folder.glob("*.sha256"):
        assert hash_path.with_suffix("").exists(), "no hash without its file"
    return int(state["step"])


def test_f1_kill_at_20_random_points_of_saving(zygote: Zygote, tmp_path: Path):
    folder, rng, newest = tmp_path / "checkpoints", random.Random(0), 0
    for _ in range(20):
        pid = zygote.start([folder, rng.randint(20, 200)], tmp_path / "output", {}, SAVER)
        assert zygote.wait(pid) == -signal.SIGKILL, (tmp_path / "output").read_text()
        newest = assert_whole(folder, newest)
    assert newest >= 20


@pytest.mark.parametrize("kills", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_attack_of_kills(zygote: Zygote, tmp_path: Path, kills: int):
    """kill -9 from outside after a random time: each time the newest checkpoint is whole."""
    folder, ready, rng, newest = tmp_path / "checkpoints", tmp_path / "ready", random.Random(1), 0
    for attempt in range(kills):
        ready.unlink(missing_ok=True)
        pid = zygote.start([folder, 0], tmp_path / "output", {}, SAVER)
        wait_until(ready.exists, "the saver saves")
        if attempt % 2 == 0:
            following = checkpoint.path_of(folder, newest + 1)
            wait_until(following.exists, "one more checkpoint")
        time.sleep(rng.uniform(0, 0.05))  # the attack's own random moment, not a synchronisation
        os.kill(pid, signal.SIGKILL)
        assert zygote.wait(pid) == -signal.SIGKILL
        newest = assert_whole(folder, newest)
    assert newest >= kills // 2


def test_attack_of_100_flipped_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Any bit of the file or of its hash: 100 of 100 are found, 0 load."""
    rng = random.Random(2)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"weights": torch.full((500,), float(step))})
    victim = checkpoint.path_of(tmp_path, 2)
    for attempt in range(100):
        file = victim.with_name(victim.name + ".sha256") if attempt % 10 == 9 else victim
        good = file.read_bytes()
        bad = bytearray(good)
        at = rng.randrange(64 if file != victim else len(bad))  # a hash is 64 digits
        bad[at] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        caplog.clear()
        state = checkpoint.latest(tmp_path)
        assert state is not None and state["step"] == 1, f"byte {at} of {file.name}"
        assert victim.name in caplog.text
        file.write_bytes(good)
    state = checkpoint.latest(tmp_path)
    assert state is not None and state["step"] == 2


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
"""
LARGE = (*SMALL, "--hidden-size", "64", "--log-every", "8")  # checkpoints of 300 kB, a short log


def test_f2_full_disk(runs, tmp_path: Path):
    out = tmp_path / "run"
    assert runs(out, *LARGE, "--max-steps", 4).wait() == 0
    old = checkpoint.path_of(out / "checkpoints", 4)
    before = old.read_bytes()
    run = runs(out, *LARGE, "--checkpoint.every", 8, fault=FULL)
    assert run.wait() == 1, run.said
    assert "NOT saved" in run.said and "Free some space" in run.said
    assert "Traceback" not in run.said
    assert run.status["state"] == "failed" and "NOT saved" in run.status["reason"]
    assert old.read_bytes() == before and final(out)["step"] == 4
    assert not list((out / "checkpoints").glob("*.tmp*"))
    assert runs(out, *LARGE).wait() == 0  # with room again it goes on
    assert final(out)["step"] == 24


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2.5 MB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2560k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_f2_too_little_room_is_said_before_writing(runs, small_disk: Path):
    out = small_disk / "run"
    first = runs(out, *LARGE, "--max-steps", 4)
    assert first.wait() == 0, first.said
    (small_disk / "others").write_bytes(bytes(1_200_000))
    run = runs(out, *LARGE)
    assert run.wait() == 1, run.said
    assert "it needs" in run.said and "are free in" in run.said
    assert final(out)["step"] == 4


def test_f2_room_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type(checkpoint.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10, 5, 2_000_000))
    with pytest.raises(OSError, match=r"needs 5\.0 MB and 2\.0 MB are free"):
        checkpoint.save(tmp_path, 1, {"weights": torch.zeros(1_000_000)})
    assert not list(tmp_path.iterdir())


# root writes where it likes: so these processes give up that right, and keep the rest.
AS_ANYBODY = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
sets = (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
for i in (0, 1):  # effective and permitted, without CAP_DAC_OVERRIDE, _READ_SEARCH and CAP_FOWNER
    sets[i] &= ~0b1110
assert libc.capset(header, sets) == 0
"""


@pytest.mark.parametrize("which", ["the run folder", "its checkpoints"])
def test_f3_read_only_at_the_start(runs, tmp_path: Path, which: str):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    locked = out if which == "the run folder" else out / "checkpoints"
    locked.chmod(0o555)
    run = runs(out, *SMALL, fault=AS_ANYBODY)
    assert run.wait() == 2, run.said
    assert str(locked) in run.said and "cannot be written" in run.said and "--out" in run.said
    assert "Traceback" not in run.said


def test_f3_read_only_in_the_middle(runs, tmp_path: Path):
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--max-steps", 2).wait() == 0
    lock = AS_ANYBODY + (
        "from byol_fast import trainer\n"
        "real = trainer.Trainer._one_step\n"
        "def one_step(self, views):\n"
        "    self.folder.checkpoints.chmod(0o555)\n"
        "    return real(self, views)\n"
        "trainer.Trainer._one_step = one_step\n"
    )
    run = runs(out, *SMALL, "--checkpoint.every", 1, fault=lock)
    assert run.wait() == 1, run.said
    assert "NOT saved" in run.said and "permissions" in run.said and "Traceback" not in run.said
    assert final(out)["step"] == 2


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "one byte flipped": _flip,
    "hash missing": lambda path: path.with_name(path.name + ".sha256").unlink(),
}


def test_f4_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(runs, tmp_path: Path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert runs(whole, *SMALL, "--checkpoint.every", 1).wait() == 0
    stop = 3
    assert runs(out, *SMALL, "--checkpoint.every", 1, "--max-steps", stop).wait() == 0
    for damage in DAMAGE.values():
        before, newest = sorted((out / "checkpoints").glob("*.pt"))
        damage(newest)
        stop += 3
        run = runs(out, *SMALL, "--checkpoint.every", 1, "--max-steps", stop)
        assert run.wait() == 0, run.said
        assert f"{newest} was set aside as {newest.name}.damaged" in run.said
        assert f"resumed at step {int(before.stem[5:])} of 24" in run.said
    assert runs(out, *SMALL).wait() == 0
    assert_same_run(whole, out)


def test_f4_one_that_cannot_be_read_is_named_and_the_one_before_is_taken(runs, tmp_path: Path):
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--checkpoint.every", 1, "--max-steps", 3).wait() == 0
    *_, newest = sorted((out / "checkpoints").glob("*.pt"))
    newest.chmod(0)
    for ranks in (1, 2):
        # Step 1 or 2: a checkpoint that falls due while another is being written is left out.
        before = sorted((out / "checkpoints").glob("*.pt"))[-2]
        run = runs(out, *SMALL, "--max-steps", 2, ranks=ranks, fault=AS_ANYBODY)
        assert run.wait() == 0, run.said
        assert f"{newest}: cannot be read: Permission denied" in run.said
        assert f"resumed at step {int(before.stem[5:])} of 24" in run.said
        assert "Traceback" not in run.said and newest.exists()


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_f25_a_good_checkpoint_outlives_a_damaged_one(runs, tmp_path: Path, ranks: int):
    """5 is good and 6 damaged; the run goes on from 5 and saves 9; then 9 is damaged as well."""
    out, words = tmp_path / "run", (*SMALL, "--checkpoint.every", "100")
    for step in (5, 6):
        assert runs(out, *words, "--max-steps", step, ranks=ranks).wait() == 0
    _flip(checkpoint.path_of(out / "checkpoints", 6))
    run = runs(out, *words, "--max-steps", 9, ranks=ranks)
    assert run.wait() == 0, run.said
    assert "resumed at step 5 of 24" in run.said
    assert "step-00000006.pt was set aside as step-00000006.pt.damaged" in run.said
    names = [p.name for p in sorted((out / "checkpoints").glob("*.pt"))]
    assert names == ["step-00000005.pt", "step-00000009.pt"]
    _flip(checkpoint.path_of(out / "checkpoints", 9))
    run = runs(out, *words, "--max-steps", 9, ranks=ranks)
    assert run.wait() == 0, run.said
    assert "resumed at step 5 of 24" in run.said and final(out)["step"] == 9


@pytest.mark.dist
def test_f27_a_rank_that_cannot_load_the_checkpoint_is_named_and_all_end(runs, tmp_path: Path):
    """Its machine's view of the disk differs, and the others must not wait for it in a step."""
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--max-steps", 2).wait() == 0
    fault = (
        "import os\n"
        "from byol_fast import checkpoint\n"
        "from byol_fast.errors import CheckpointError\n"
        "def load(path, **_):\n"
        "    raise CheckpointError(f'{path}: there is no such checkpoint')\n"
        "if os.environ['RANK'] == '1':\n"
        "    checkpoint.load = load\n"
    )
    run = runs(out, *SMALL, ranks=2, fault=fault)
    run.wait()
    assert set(run.codes.values()) == {3}, run.said
    assert "rank 1 on " in run.said and "there is no such checkpoint" in run.said
    assert "Traceback" not in run.said


def test_f4_none_is_left(runs, tmp_path: Path):
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--checkpoint.every", 1, "--max-steps", 3).wait() == 0
    names = sorted(p.name for p in (out / "checkpoints").glob("*.pt"))
    for name, damage in zip(names, (DAMAGE["truncated"], DAMAGE["one byte flipped"]), strict=True):
        damage(out / "checkpoints" / name)
    for ranks in (1, 2):
        run = runs(out, *SMALL, ranks=ranks)
        run.wait()
        assert set(run.codes.values()) == {3}, run.said
        assert all(name in run.said for name in names) and "Traceback" not in run.said


def _other_tensors(state: dict) -> None:
    for key in list(state["model"])[:3]:
        state["model"][key] = torch.zeros(5, 5)


OF_ANOTHER = {
    "other networks": (_other_tensors, "size mismatch"),
    "no settings": (lambda state: state.pop("config"), "it lacks 'config'"),
    "no momentum": (lambda state: state.pop("optimizer"), "it lacks 'optimizer'"),
    "another step": (lambda state: state.update(step=7), "holds step 7"),
}


@pytest.mark.parametrize("what", OF_ANOTHER)
def test_f4_of_another_model_though_its_hash_is_right(runs, tmp_path: Path, what: str):
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--max-steps", 1).wait() == 0
    change, reason = OF_ANOTHER[what]
    path = checkpoint.path_of(out / "checkpoints", 1)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    path.with_name(path.name + ".sha256").write_text(checkpoint.file_hash(path) + "\n")
    run = runs(out, *SMALL)
    assert run.wait() == 3, run.said
    assert reason in run.said and str(out / "checkpoints") in run.said
    assert "Traceback" not in run.said


def test_f9_a_change_that_no_permission_can_carry_over(runs, tmp_path: Path):
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--max-steps", 1).wait() == 0
    run = runs(out, *SMALL, "--hidden-size", "16", "--allow-config-change")
    assert run.wait() == 3, run.said
    assert "does not fit this run's networks" in run.said and "Traceback" not in run.said


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trap}",)


def test_f5_a_pickle_in_a_checkpoint_is_refused_and_not_run(runs, tmp_path: Path):
    out, trap = tmp_path / "run", tmp_path / "executed"
    assert runs(out, *SMALL, "--max-steps", 1).wait() == 0
    path = checkpoint.path_of(out / "checkpoints", 1)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "payload": Payload(trap)}, path)
    path.with_name(path.name + ".sha256").write_text(checkpoint.file_hash(path) + "\n")
    run = runs(out, *SMALL)
    assert run.wait() == 3, run.said
    assert "posix.system" in run.said and path.name in run.said
    assert not trap.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_f5_a_pickle_in_a_weights_file_is_refused_and_not_run(
    tmp_path: Path, name: str, writer: str
):
    trap, path = tmp_path / "executed", tmp_path / name
    content = {"conv1.weight": torch.zeros(1), "payload": Payload(trap)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises((CheckpointError, ValueError), match=name):
        byol_fast.load_backbone(path, backbone="resnet18", image_size=32)
    assert not trap.exists()
