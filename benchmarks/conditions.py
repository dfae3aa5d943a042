"""Under which conditions a figure was taken: what a reader needs to take it again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "pillow", "simplejpeg"),
    *("nvidia-dali-cuda130", "nvidia-dali-cuda120", "ffcv", "lightly", "byol-pytorch", "apex"),
)


def conditions(mode: str, command: list[str], device: torch.device) -> dict[str, Any]:
    """Command, commit, machine and versions; `command` without the interpreter's path."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    versions["torch"] = torch.__version__  # the build too
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "mode": mode,
        "command": shlex.join(command),
        "commit": commit or os.environ.get("BYOL_FAST_COMMIT"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def write(path: Path | None, text: str) -> None:
    """A result or a picture, where one was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def as_json(result: dict[str, Any]) -> str:
    """A result as the files in `results/` hold it."""
    return json.dumps(result, indent=1) + "\n"


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
