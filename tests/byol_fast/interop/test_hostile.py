"""Files made to exhaust the machine or to end the interpreter: refused in bounded time and memory.

They are read in a process of their own with little address space, since what they provoke where
they are not refused is a crash or a machine without memory.
"""

import argparse
import json
import struct
import subprocess
import sys
import zipfile

import safetensors.torch
import torch

SCRIPT = """
import resource, sys, threading
import torch, torchvision
from byol_fast import load_backbone
from byol_fast.interop import limits, networks
limits.MEMORY = 1 << 25  # reached by smaller files
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)
def everything():
    for path in sys.argv[1:]:
        for read in (networks.read, lambda path: load_backbone(path, backbone="resnet18")):
            try:
                read(path)
            except Exception as error:
                print(f"{path}: {type(error).__name__}: {error}", flush=True)
            else:
                print(f"{path}: READ", flush=True)
threading.stack_size(1 << 20)  # what recurses in C ends here sooner
reader = threading.Thread(target=everything)
reader.start()
reader.join()
"""
DEEP = b")" + b"\x85" * 30_000  # tuples in tuples
TWICE = b")q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"h\x00"  # hashed in 2^60 steps
MB = b"B" + struct.pack("<i", 1 << 20) + bytes(1 << 20)
TEXT = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
SHAPED = b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1tRq\x01"


def tensor(size: bytes, stride: bytes, elements: bytes = b"K\x01", key: bytes = b"0") -> bytes:
    """A tensor of a storage with one number."""
    text = b"X" + struct.pack("<I", len(key)) + key
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + text
    storage += b"X\x03\x00\x00\x00cpu" + elements + b"tQ"
    rest = b"K\x00" + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\nq\x01"
HUGE = tensor(number(7_000_000_000) + b"\x85", b"K\x00\x85")
EMPTY = tensor(number(1 << 40) + b"\x85", b"K\x01\x85", elements=b"K\x00", key=b"none")
CUT = tensor(b"K\x01\x85", b"K\x01\x85", elements=b"J\x00\x00\x00\x10")
LAUGHS = b"}q\x00" + b"".join(
    b"}(" + b"".join(b"K%ch\x00" % n for n in range(10)) + b"uq\x00" for _ in range(40)
)
# what the pickle says, and part of the message
PICKLES = {
    "set": (b"\x8f(" + DEEP + b"\x90", "key of a dict or set"),
    "key": (b"}" + DEEP + b"K\x01s", "key of a dict or set"),
    "frozenset": (b"(" + DEEP + b"\x91", "key of a dict or set"),
    "set-call": (b"cbuiltins\nset\n(](" + DEEP + b"etR", "key of a dict or set"),
    "counter": (b"ccollections\nCounter\n(](" + DEEP + b"etR", "key of a dict or set"),
    "dict-call": (b"cbuiltins\ndict\n(]" + DEEP + b"K\x01\x86atR", "key of a dict or set"),
    "exponential": (b"}" + TWICE + b"K\x01s", "key of a dict or set"),
    "lists": (
        MB + b"q\x01" + b"cbuiltins\nlist\nq\x02" + b"h\x02h\x01\x85R" * 9999,
        "asks for more memory",
    ),
    "strings": (
        TEXT
        + b"q\x01X\x06\x00\x00\x00latin1q\x03c_codecs\nencode\nq\x02"
        + b"h\x02h\x01h\x03\x86R" * 9999,
        "asks for more memory",
    ),
    "arrays": (
        SHAPED
        + MB
        + b"q\x02cnumpy._core.numeric\n_frombuffer\nq\x03"
        + b"h\x03(h\x02h\x01J\x00\x00\x10\x00\x85X\x01\x00\x00\x00CtR" * 9999,
        "asks for more memory",
    ),
    "sets": (b"\x8f" * 300_000, "asks for more memory"),
    "bytes8": (b"\x8e" + struct.pack("<q", 1 << 40), "damaged"),
    "long4": (b"\x8b" + struct.pack("<i", 2_000_000) + b"\x01" * 2_000_000, "thousands of digits"),
    "zeros": (b"cbuiltins\nbytearray\n" + number(1 << 36) + b"\x85R", "asks for empty bytes"),
    "stride": (b"}X\x0c\x00\x00\x00conv1.weight" + HUGE + b"s", "claims 7,000,000,000 numbers"),
    "empty": (b"}X\x0c\x00\x00\x00conv1.weight" + EMPTY + b"s", "claims 1,099,511,627,776"),
    "cut": (
        b"}X\x01\x00\x00\x00a" + CUT + b"s",
        "cut short",
    ),
    "types": (TYPE + b"(h\x01N" * 5000 + b")" + b"Nt" * 5000 + b"R", "nested deeper"),
    "self": (b"}q\x00X\x0a\x00\x00\x00state_dicth\x00s", "no state dict"),
    "laughs": (LAUGHS, "no state dict"),
    "nested": (b"]" * 50_000 + b"a" * 49_999, "no state dict"),
}


def torch_file(path, body: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    torch.save({"w": torch.ones(1), "none": torch.empty(0)}, path.with_suffix(".good"))
    with (
        zipfile.ZipFile(path.with_suffix(".good")) as good,
        zipfile.ZipFile(path, "w", compression) as bad,
    ):
        for name in good.namelist():
            stem = path.name.partition(".")[0]
            is_pickle = name.endswith("/data.pkl")
            bad.writestr(name, b"\x80\x04" + body + b"." if is_pickle else good.read(name))
        bad.writestr(f"{stem}/data/none", b"")
    path.with_suffix(".good").unlink()


def described(path, meta: str) -> None:
    weights = {"conv1.weight": torch.ones(64, 3, 3, 3)}
    safetensors.torch.save_file(weights, path, metadata={"byol_fast": meta})


def test_hostile_files_are_refused(tmp_path):
    expected = {}
    for name, (body, reason) in PICKLES.items():
        torch_file(tmp_path / f"{name}.pth", body)
        expected[f"{name}.pth"] = reason
    for name in ("set", "exponential", "self"):
        (tmp_path / f"{name}.pkl").write_bytes(b"\x80\x04" + PICKLES[name][0] + b".")
        expected[f"{name}.pkl"] = PICKLES[name][1]
    torch_file(tmp_path / "bomb.pth", b"}", zipfile.ZIP_DEFLATED)
    expected["bomb.pth"] = "not compressed"
    usual = {"stem": "cifar", "hidden_layer": -1, "image_size": 32}
    for name, meta in {
        "size": {**usual, "backbone": "resnet18", "image_size": 1_000_000},
        "backbone": {**usual, "backbone": ["resnet18"]},
        "padding": {**usual, "backbone": "resnet18", "padding": {"same": 1}},
        "stem_changes": {**usual, "backbone": "resnet18", "stem_changes": {"stride": 10**9}},
    }.items():
        described(tmp_path / f"{name}.safetensors", json.dumps(meta))
        key = "image_size" if name == "size" else name
        expected[f"{name}.safetensors"] = f"with a {key} that byol_fast does not write"
    described(tmp_path / "deep.safetensors", "[" * 100_000)
    expected["deep.safetensors"] = ""
    shared = {f"layer{i}.weight": torch.ones(1) for i in range(3)}
    torch.save({**shared, "x": argparse.Namespace()}, tmp_path / "fine.pth")
    expected["fine.pth"] = "no layout known"
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in expected)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, (answer.returncode, answer.stdout[-500:], answer.stderr[-2000:])
    lines = answer.stdout.splitlines()
    assert len(lines) == 2 * len(expected)
    for name, reason in expected.items():
        first, second = (line for line in lines if line.startswith(f"{tmp_path / name}: "))
        assert "CheckpointError" in first and reason in first, first
        assert "CheckpointError" in second, second
