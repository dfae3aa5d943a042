"""The doctor's checks of Python, PyTorch with its GPU, DALI and FFCV.

Libraries are imported in processes of their own: one that crashes or hangs is a finding.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import cache
from typing import Any

from byol_fast.doctor import SECONDS, Finding, Wanted

LEAST_TORCH = (2, 10)  # older ones can be made to run code by weights (see SECURITY.md)
DRIVER_MEND = "install NVIDIA's driver (https://www.nvidia.com/drivers), then: nvidia-smi"

_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
out = {"version": torch.__version__, "cuda": torch.version.cuda, "available": cuda, "gpus": []}
if cuda:
    out["nccl"] = list(torch.cuda.nccl.version()) if torch.distributed.is_nccl_available() else None
    out["bf16"] = torch.cuda.is_bf16_supported()
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        out["gpus"].append([p.name, p.total_memory, f"sm_{p.major}{p.minor}"])
    x = torch.ones(64, 64, device="cuda")
    out["works"] = (x @ x).sum().item() == 64.0 ** 3
else:
    out["nccl"] = torch.distributed.is_nccl_available() or None
try:
    import triton
    out["triton"] = triton.__version__
except ImportError as error:
    out["triton"], out["triton_error"] = None, str(error)
print(json.dumps(out))
"""

# One JPEG of 16 x 16 pixels, decoded on the CPU, then where a GPU is on it.
_DALI = """
import io, json, sys
import numpy as np
import nvidia.dali as dali
from PIL import Image
file = io.BytesIO()
Image.new("RGB", (16, 16), (200, 30, 30)).save(file, "JPEG")
data = np.frombuffer(file.getvalue(), np.uint8)

def decoded(device):
    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=0 if device == "mixed" else None)
    def pipe():
        source = dali.fn.external_source(source=lambda: [data], device="cpu")
        return dali.fn.decoders.image(source, device=device)
    p = pipe()
    p.build()
    (out,) = p.run()
    out = out.as_cpu() if device == "mixed" else out
    return bool(np.array(out.at(0))[0, 0, 0] > 150)

out = {"version": dali.__version__, "cpu": decoded("cpu")}
if sys.argv[1] == "gpu":
    try:
        out["gpu"] = decoded("mixed")
    except Exception as error:
        out["gpu"], out["error"] = False, str(error).strip().splitlines()[0]
print(json.dumps(out))
"""

_FFCV = """
import json
try:
    import pipelines.sources.ffcv_library, numba
    print(json.dumps({"version": numba.__version__}))
except (ImportError, OSError) as error:
    print(json.dumps({"failed": str(error)}))
"""

_asking = threading.Lock()


def probe(script: str, *args: str, seconds: float = SECONDS - 1) -> dict[str, Any]:
    """What a Python process prints as JSON on its last line; else `failed` or `late` says why."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", script, *args],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"late": f"it did not load within {seconds:g} s"}
    if run.returncode < 0:
        return {"failed": f"it crashed with {signal.Signals(-run.returncode).name}"}
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (ValueError, TypeError, IndexError):
        return {"failed": lines[-1] if lines else f"it ended with status {run.returncode}"}


def torch_facts() -> dict[str, Any]:
    """What the installed PyTorch says of itself and of the GPUs; asked once, whoever asks."""
    with _asking:
        return _torch_facts()


@cache
def _torch_facts() -> dict[str, Any]:
    return probe(_TORCH)


@cache
def driver() -> str | None:
    """The NVIDIA driver's version; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.split("\n")[0].strip() or None if told.returncode == 0 else None


def python(wanted: Wanted) -> list[Finding]:
    """The interpreter."""
    version, good = ".".join(map(str, sys.version_info[:3])), sys.version_info >= (3, 11)
    return [
        Finding(
            name="Python",
            state="ok" if good else "missing",
            what=version if good else f"{version}; 3.11 or newer is needed",
            mend="" if good else "uv venv --python 3.12 .venv",
            asked=True,
        )
    ]


def pytorch(wanted: Wanted) -> list[Finding]:
    """PyTorch, then what it needs for a GPU."""
    facts = torch_facts()
    install = "pip install -c requirements.lock ."
    if "late" in facts:
        return [_late("PyTorch", facts), _driver(wanted)]
    if "failed" in facts:
        what = f"cannot be imported: {facts['failed']}"
        first = Finding(name="PyTorch", state="missing", what=what, mend=install, asked=True)
        return [first, _driver(wanted)]
    release = tuple(int("".join(filter(str.isdigit, n)) or 0) for n in facts["version"].split("."))
    least = ".".join(map(str, LEAST_TORCH))
    if release[:2] < LEAST_TORCH:
        what, mend = (
            f"{facts['version']}; {least} or newer is needed",
            f'pip install "torch>={least}"',
        )
        first = Finding(name="PyTorch", state="missing", what=what, mend=mend, asked=True)
    else:
        first = Finding(name="PyTorch", state="ok", what=facts["version"], asked=True)
    return [first, *_gpu(wanted, facts), _nccl(wanted, facts), _triton(wanted, facts)]


def _gpu(wanted: Wanted, facts: dict[str, Any]) -> list[Finding]:
    """CUDA, driver and GPU."""
    asked = wanted.gpu
    built = facts["cuda"]
    cuda = Finding(
        name="CUDA",
        state="ok" if built else "missing",
        what=f"PyTorch is built for CUDA {built}" if built else "this PyTorch is for CPUs only",
        mend="" if built else "pip install --force-reinstall torch torchvision",
        asked=asked,
    )
    if not facts["available"]:
        what = "no GPU can be used: training runs on the CPU, hundreds of times slower"
        mend = DRIVER_MEND if driver() is None else "docker run --gpus all …, or a newer driver"
        gpu = Finding(name="GPU", state="missing", what=what, mend=mend, asked=asked)
    else:
        names = ", ".join(f"{n} ({m / 2**30:.0f} GiB, {sm})" for n, m, sm in facts["gpus"])
        gpu = Finding(name="GPU", state="ok", what=names, asked=asked)
        if not facts.get("works"):
            gpu = Finding(
                name="GPU",
                state="missing",
                what=f"{names}: its sums are wrong",
                mend="nvidia-smi -q, and another GPU",
                asked=asked,
            )
        elif not facts["bf16"]:
            what = f"{names}: without bfloat16, so training is in float32"
            mend = "byol-fast pretrain --precision fp16 …"
            gpu = Finding(name="GPU", state="slow", what=what, mend=mend, asked=asked)
    return [cuda, _driver(wanted), gpu]


def _driver(wanted: Wanted) -> Finding:
    version = driver()
    if version is None:
        what = "no NVIDIA driver answers"
        return Finding(
            name="driver", state="missing", what=what, mend=DRIVER_MEND, asked=wanted.gpu
        )
    return Finding(name="driver", state="ok", what=version, asked=wanted.gpu)


def _nccl(wanted: Wanted, facts: dict[str, Any]) -> Finding:
    several = wanted.gpu and wanted.ranks > 1
    if not facts["nccl"]:
        what = "not in this PyTorch: several GPUs cannot train together"
        mend = "pip install --force-reinstall torch torchvision"
        return Finding(name="NCCL", state="missing", what=what, mend=mend, asked=several)
    version = facts["nccl"]
    what = ".".join(map(str, version)) if isinstance(version, list) else "there, without use here"
    return Finding(name="NCCL", state="ok", what=what, asked=several)


def _triton(wanted: Wanted, facts: dict[str, Any]) -> Finding:
    if not facts["triton"]:
        what = f"cannot be imported ({facts['triton_error']}): a GPU goes without our kernels"
        mend = "pip install -c requirements.lock triton"
        return Finding(name="Triton", state="missing", what=what, mend=mend)
    if shutil.which(os.environ.get("CC", "cc")) is None and shutil.which("gcc") is None:
        what = f"{facts['triton']}, but no C compiler, which its kernels and torch.compile need"
        return Finding(name="Triton", state="slow", what=what, mend="apt-get install gcc libc6-dev")
    return Finding(name="Triton", state="ok", what=facts["triton"])


def dali(wanted: Wanted) -> list[Finding]:
    """DALI, and whether it decodes on the GPU."""
    asked = wanted.backend == "dali"
    on_gpu = driver() is not None
    facts = probe(_DALI, "gpu" if on_gpu else "cpu")
    if "late" in facts:
        return [_late("DALI", facts)]
    if "failed" in facts or not facts["cpu"]:
        what = f"cannot be used: {facts.get('failed', 'it decodes a JPEG wrongly')}"
        extra = "dali-cuda12" if _cuda_twelve() else "dali"
        mend = f'pip install -c requirements.lock ".[{extra}]"'
        return [Finding(name="DALI", state="missing", what=what, mend=mend, asked=asked)]
    found = [Finding(name="DALI", state="ok", what=facts["version"], asked=asked)]
    name, asked = "DALI on the GPU", asked and wanted.gpu
    if not on_gpu:
        what, mend = "no GPU to decode on: images are decoded on the CPU", DRIVER_MEND
        return [*found, Finding(name=name, state="missing", what=what, mend=mend, asked=asked)]
    if not facts["gpu"]:
        what = f"does not decode ({facts.get('error', 'wrong pixels')}): images go by the CPU"
        mend = "byol-fast pretrain --backend dali:cpu …"
        return [*found, Finding(name=name, state="slow", what=what, mend=mend, asked=asked)]
    able = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "all").split(",")
    if not {"all", "video"} & set(able):
        what = "decodes, without the JPEG engines: the container lacks the driver's video part"
        mend = "docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility,video …"
        return [*found, Finding(name=name, state="slow", what=what, mend=mend, asked=asked)]
    return [*found, Finding(name=name, state="ok", what="decodes a JPEG", asked=asked)]


def _cuda_twelve() -> bool:
    return str(torch_facts().get("cuda") or "").startswith("12.")


def ffcv(wanted: Wanted) -> list[Finding]:
    """FFCV's decoder, which only reads .beton files."""
    asked = wanted.backend == "ffcv"
    facts = probe(_FFCV)
    if "late" in facts:
        return [_late("FFCV", facts)]
    if "failed" in facts:
        what = f"{facts['failed']}; only --backend ffcv needs it"
        mend = "launch/install_ffcv.sh"
        return [Finding(name="FFCV", state="missing", what=what, mend=mend, asked=asked)]
    return [Finding(name="FFCV", state="ok", what="its decoder loads", asked=asked)]


def _late(name: str, facts: dict[str, Any]) -> Finding:
    """A busy machine is no missing package."""
    mend = "byol-fast doctor, when the machine is less busy"
    return Finding(name=name, state="slow", what=facts["late"], mend=mend)
