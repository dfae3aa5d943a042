"""launch/: the files for Slurm, Kubernetes and SkyPilot say what those systems understand."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from faults.harness import ENDLESS, LIMIT, SMALL, wait_until
from faults.torchruns import python_with_tiny

from byol_fast.cli import PretrainCall, pretrain_arguments
from byol_fast.watching import metrics

LAUNCH = Path(__file__).resolve().parent.parent / "launch"

# Fields of kubeflow.org/v1: pkg/apis/kubeflow.org/v1/{pytorch,common}_types.go of the operator.
JOB = {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"}
ELASTIC = {"minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId"}
ELASTIC |= {"rdzvConf", "standalone", "maxRestarts", "metrics"}
RUN = {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"}
RUN |= {"schedulingPolicy", "suspend", "managedBy"}
REPLICA = {"replicas", "template", "restartPolicy"}
# SkyPilot's reference, "SkyPilot YAML".
TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts"}
TASK |= {"setup", "run", "config", "service"}
RESOURCES = {"infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type"}
RESOURCES |= {"use_spot", "disk_size", "disk_tier", "network_tier", "image_id", "ports", "labels"}
RESOURCES |= {"autostop", "any_of", "ordered", "job_recovery"}
MOUNT = {"source", "name", "mode", "store", "persistent"}


def document(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8")))


def understood(words: list[str]) -> None:
    call = pretrain_arguments(words)
    assert isinstance(call, PretrainCall), words


def test_kubernetes_is_a_pytorchjob() -> None:
    job = document("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert spec.keys() <= JOB and spec["elasticPolicy"].keys() <= ELASTIC
    assert spec["runPolicy"].keys() <= RUN
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")  # text, not null
    assert isinstance(spec["nprocPerNode"], str)
    assert spec["pytorchReplicaSpecs"].keys() == {"Worker"}  # a Master would set RANK beside PET_…
    worker, elastic = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"]
    assert worker.keys() <= REPLICA
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert 1 <= elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert elastic["rdzvBackend"] == "c10d" and isinstance(elastic["maxRestarts"], int)


def test_kubernetes_pods_fit_together() -> None:
    job = document("kubernetes.yaml")
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert all(isinstance(entry["value"], str) for entry in container["env"])
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
    limits = container["resources"]["limits"]
    assert str(limits["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in mounts.values()
    assert pod["terminationGracePeriodSeconds"] > 30  # torchrun's own patience
    assert container["command"] == ["torchrun", "-m", "byol_fast.pretrain"]
    understood(container["args"])
    paths = [
        word.partition("=")[2] for word in container["args"] if word.startswith(("--data", "--out"))
    ]
    assert len(paths) == 2 and all(path.startswith(tuple(mounts.values())) for path in paths)
    replicas = job["spec"]["elasticPolicy"]
    batch = pretrain_arguments(container["args"]).config.batch_size  # type: ignore[union-attr]
    for machines in range(replicas["minReplicas"], replicas["maxReplicas"] + 1):
        assert batch % (machines * int(job["spec"]["nprocPerNode"])) == 0


def pretraining_words(shell: str) -> list[str]:
    """What follows launch/torchrun.sh in a script."""
    line = next(
        line for line in shell.replace("\\\n", " ").splitlines() if "launch/torchrun.sh" in line
    )
    return shlex.split(line.partition("launch/torchrun.sh")[2])


def test_skypilot_is_a_task() -> None:
    task = document("skypilot.yaml")
    assert task.keys() <= TASK and task["resources"].keys() <= RESOURCES
    for path, mount in task["file_mounts"].items():
        assert path.startswith("/") and mount.keys() <= MOUNT
        assert mount["mode"] in ("COPY", "MOUNT", "MOUNT_CACHED")
    assert isinstance(task["num_nodes"], int)
    for part in ("setup", "run"):
        checked = subprocess.run(["bash", "-nc", task[part]], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    given = set(re.findall(r"\$\{?(SKYPILOT_\w+)", task["run"]))
    assert given == {
        *("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"),
        *("SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_TASK_ID"),
    }
    understood(pretraining_words(task["run"]))
    data, out = (pretraining_words(task["run"])[i] for i in (1, 3))
    assert data.startswith("/data") and out.startswith("/runs")


def test_skypilot_s_own_parser() -> None:
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    assert sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml")).num_nodes == 1


def test_variables_given_to_torchrun_sh_are_read_there() -> None:
    script = (LAUNCH / "torchrun.sh").read_text(encoding="utf-8")
    for name in ("slurm.sbatch", "skypilot.yaml"):
        text = (LAUNCH / name).read_text(encoding="utf-8")
        exports = " ".join(re.findall(r"export (.*)", text.replace("NODE_RANK=$SLURM", "")))
        for variable in set(re.findall(r"\b([A-Z_]+)(?==)", exports)) - {"SRUN_CPUS_PER_TASK"}:
            assert re.search(rf"\${{?{variable}\b", script), f"{name} sets {variable}"


@pytest.mark.parametrize(("hangup", "handled"), [("", "TERM INT QUIT"), ("-", "")])
def test_torchrun_sh_leaves_sighup_ignored_under_nohup(
    tmp_path: Path, hangup: str, handled: str
) -> None:
    """`hangup` is what the caller's shell does with SIGHUP: "" ignores it, "-" is the default."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ${PET_SIGNALS_TO_HANDLE-} $TORCHELASTIC_SIGNALS_TO_HANDLE\n")
    python.chmod(0o755)
    names = {"PET_SIGNALS_TO_HANDLE", "TORCHELASTIC_SIGNALS_TO_HANDLE"}
    env = {name: value for name, value in os.environ.items() if name not in names}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a shell cannot undo an ignored one
    try:
        done = subprocess.run(
            ["bash", "-c", f"trap '{hangup}' HUP; exec '{LAUNCH / 'torchrun.sh'}'"],
            env={**env, "PYTHON": str(python)},
            capture_output=True,
            text=True,
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.returncode == 0, done.stderr
    names_of = ",".join(f"SIG{name}" for name in handled.split())
    assert done.stdout.split() == [names_of] * 2 if handled else done.stdout.split() == []


@pytest.mark.parametrize(
    "name", ["slurm.sbatch", "kubernetes.yaml", "skypilot.yaml", "torchrun.sh"]
)
def test_the_head_says_how_it_is_used(name: str) -> None:
    head = "".join(
        line
        for line in (LAUNCH / name).read_text(encoding="utf-8").splitlines(True)[:20]
        if line[0] == "#"
    )
    assert f"launch/{name}" in head
    if "--data" in head:
        understood(shlex.split(head.partition(name)[2].splitlines()[0]))


FAKES = {
    # One machine; the signal that sbatch's script sends arrives at torchrun, as it does by srun.
    "srun": """[[ $1 == --kill-on-bad-exit=0 ]] || exit 99
    shift
    export SLURM_NODEID=0
    exec "$@"
    """,
    "scontrol": """case $1 in
    show) echo localhost ;;
    requeue) echo "$2" >>"$FAKE/requeued" ;;
    esac
    """,
}


class Batch:
    """launch/slurm.sbatch as Slurm would start it, with Slurm's commands faked."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder = folder
        tools = folder / "bin"
        tools.mkdir(exist_ok=True)
        for name, body in FAKES.items():
            (tools / name).write_text(f"#!/usr/bin/env bash\n{body}")
            (tools / name).chmod(0o755)
        slurm = {"SLURM_SUBMIT_DIR": LAUNCH.parent, "SLURM_JOB_NUM_NODES": 1, "SLURM_JOB_ID": 4711}
        slurm |= {"SLURM_JOB_NODELIST": "localhost", "NPROC": 1, "MAX_RESTARTS": 0}
        self.log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.process = subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sbatch"), *words, "--out", str(folder / "run")],
            env={
                **os.environ,
                **{name: str(value) for name, value in slurm.items()},
                "FAKE": str(folder),
                "PATH": f"{tools}:{os.environ['PATH']}",
                "PYTHON": str(python_with_tiny(folder)),
                "PYTHONPATH": str(LAUNCH.parent),
                "OMP_NUM_THREADS": "1",
            },
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []

    def wait(self) -> int:
        try:
            return self.process.wait(LIMIT)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            os.close(self.log)


@pytest.mark.slow
@pytest.mark.dist
def test_slurm_saves_requeues_and_ends(tmp_path: Path) -> None:
    """Time is up → checkpoint, requeue; a mistake afterwards → no requeue; again → done, exit 0."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(64) % 4)
    words = ["--data", str(tmp_path / "images.npz"), *SMALL]

    def training() -> bool:
        assert job.process.poll() is None, job.said
        return any("loss" in row for row in metrics.read(tmp_path / "run" / "metrics.jsonl").rows)

    job = Batch(tmp_path, [*words, *ENDLESS])
    wait_until(training, "training")
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 0, job.said
    assert job.requeued == ["4711"]
    assert '"state": "preempted"' in (tmp_path / "run" / "status.json").read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))

    mistaken = Batch(tmp_path, [*words, *ENDLESS, "--seed", "7"])  # another run's setting
    assert mistaken.wait() == 1, mistaken.said  # torchrun's own; what the ranks said is in the log
    assert "seed: 0 → 7" in mistaken.said and mistaken.requeued == ["4711"]

    status = (tmp_path / "run" / "status.json").read_text()
    step = int(re.search(r'"step": (\d+)', status)[1])  # type: ignore[index]
    last = Batch(tmp_path, [*words, *ENDLESS, "--max-steps", str(step + 2)])
    assert last.wait() == 0, last.said
    assert f"resumed at step {step}" in last.said
    assert last.requeued == ["4711"]
