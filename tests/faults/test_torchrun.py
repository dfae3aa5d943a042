"""F11 and two machines: launch/torchrun.sh with ranks and machines that die."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.harness import ENDLESS, SMALL, free_port, wait_until
from faults.torchruns import Torchrun, python_with_tiny

pytestmark = pytest.mark.dist
TRIES = int(os.environ.get("BYOL_FAST_TRIES", "3"))  # 20 for the figure in docs/reliability.md


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return python_with_tiny(tmp_path)


@pytest.mark.slow
def test_f11_kill_one_of_two_ranks(python: Path, images: Path, tmp_path: Path):
    """One torchrun that survives every kill; each try is from a kill to a step after it.

    It was started with nohup and its terminal is closed before the first kill.
    """
    words = ["--data", images, *SMALL, *ENDLESS, "--checkpoint.every", "20"]
    many = {"NPROC": 2, "MAX_RESTARTS": TRIES}
    run = Torchrun(python, tmp_path / "run", words, before=["nohup"], **many)
    resuming, seconds = [], []
    try:
        run.wait_for_step(5)
        run.process.send_signal(signal.SIGHUP)
        run.wait_for_step(25)
        for attempt in range(TRIES):
            victim = wait_until(lambda: run.ranks(), "ranks")[attempt % 2]
            checkpoints = run.out / "checkpoints"
            newest = max(int(path.stem[5:]) for path in checkpoints.glob("step-*.pt"))
            resumed = run.said.count("resumed at step")
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            wait_until(lambda n=resumed: run.said.count("resumed at step") > n, "resuming")
            resuming.append(time.monotonic() - began)
            run.wait_for_step(newest + 25)
            seconds.append(time.monotonic() - began)
        for what, those in (("the checkpoint", resuming), ("25 steps after it", seconds)):
            print(f"seconds from the kill to {what}:", [round(s, 1) for s in those])
        assert len(seconds) == TRIES
        run.process.send_signal(signal.SIGTERM)
        run.wait()
        assert run.status["state"] == "preempted", run.said[-3000:]
    finally:
        run.close()


def ended(pid: int) -> bool:
    """Whether a process has ended; its parent may hang, and not have asked what became of it."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def in_namespaces() -> bool:
    """Whether two network namespaces can be joined here: root, and iproute2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"byol{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made.returncode == 0


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """Two "machines", as the words before a command and its variables: network namespaces with a
    cable between them, or where there are none two processes that meet on the loopback."""
    port = str(free_port())
    if not in_namespaces():
        yield [
            ([], {"MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1", "MASTER_PORT": port})
        ] * 2
        return
    names = [f"byol{os.getpid()}n{number}" for number in range(2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            ip(f"netns add {name}")
            stack.callback(lambda n=name: subprocess.run(["ip", "netns", "del", n]))
        ip(f"link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
        for number, name in enumerate(names):
            ip(f"-n {name} addr add 10.77.0.{number + 1}/24 dev veth0")
            ip(f"-n {name} link set veth0 up")
            ip(f"-n {name} link set lo up")
        yield [
            (
                ["ip", "netns", "exec", name],
                {
                    "MASTER_ADDR": "10.77.0.1",
                    "MASTER_PORT": port,
                    "LOCAL_ADDR": f"10.77.0.{number + 1}",
                    "GLOO_SOCKET_IFNAME": "veth0",
                },
            )
            for number, name in enumerate(names)
        ]


class Pair:
    """One run on two machines with one rank each."""

    def __init__(self, python: Path, out: Path, words: list, machines, **variables: object) -> None:
        self.nodes = [
            Torchrun(
                *(python, out, words),
                before=before,
                name=f"output{number}",
                **{"NNODES": 2, "NODE_RANK": number, "NPROC": 1, **env, **variables},
            )
            for number, (before, env) in enumerate(machines)
        ]

    def __enter__(self) -> list[Torchrun]:
        return self.nodes

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.close()


@pytest.mark.slow
def test_two_machines_train_to_the_end(python: Path, images: Path, tmp_path: Path, machines):
    with Pair(python, tmp_path / "run", ["--data", images, *SMALL], machines) as nodes:
        assert [node.wait() for node in nodes] == [0, 0], [node.said[-3000:] for node in nodes]
        assert nodes[0].step == 24
        assert "8 = 2 ranks × 4 × 1" in "".join(node.said for node in nodes)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1] if TRIES > 3 else [1])
def test_a_machine_s_torchrun_is_killed(
    python: Path, images: Path, tmp_path: Path, machines, lost: int
):
    """Its rank sees that it is orphaned; both ranks save and leave, and nobody is left over."""
    words = ["--data", images, *SMALL, *ENDLESS]
    with Pair(python, tmp_path / "run", words, machines) as nodes:
        nodes[0].wait_for_step(3)
        ranks = [pid for node in nodes for pid in node.ranks().values()]
        assert len(ranks) == 2
        nodes[lost].process.kill()
        assert nodes[1 - lost].wait() == 1
        wait_until(lambda: all(map(ended, ranks)), "the end of both ranks")
        said = "".join(node.said for node in nodes)
        # Without torchrun 0, which holds the meeting, torchrun 1 may end its rank first.
        assert lost == 0 or "its torchrun is gone" in said, said[-3000:]
        assert nodes[0].status["state"] == "preempted", said[-3000:]


@pytest.mark.slow
def test_a_cable_is_pulled(python: Path, images: Path, tmp_path: Path, machines):
    """Nothing arrives any more, not even an end of a connection: the silent rank is named.

    The torchrun that is cut off from the store is not waited for: it asks until TCP gives up.
    """
    if not machines[0][0]:
        pytest.skip("needs network namespaces: root and iproute2")
    words = ["--data", images, *SMALL, *ENDLESS]
    with Pair(python, tmp_path / "run", words, machines, BYOL_FAST_TIMEOUT=8) as nodes:
        nodes[0].wait_for_step(3)
        ip(f"-n {machines[0][0][-1]} link set veth0 down")
        cut_off = nodes[1].ranks()[1]
        assert nodes[0].wait() == 1
        wait_until(lambda: ended(cut_off), "rank 1's end")
        assert "rank 0, which holds the store, has been silent" in nodes[1].said
        assert "rank 1 has been silent" in nodes[0].said or "(silent)" in nodes[0].said
