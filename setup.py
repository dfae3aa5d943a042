"""Packaging of byol_fast and pipelines; pyproject.toml holds the tools' settings only."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version in byol_fast/_version.py, read as text: importing would need torch."""
    text = (ROOT / "byol_fast" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('byol_fast/_version.py holds no line __version__ = "…"')
    return found.group(1)


# Lower bounds only; the exact versions of a known-good set are in requirements.lock.
INSTALL = [
    "torch>=2.10",  # older ones load weights with CVE-2025-32434 and CVE-2026-24747
    "torchvision>=0.25",
    "numpy>=1.26",
    "pillow>=10.3",
    "simplejpeg>=1.7",
    "safetensors>=0.4.3",
    "pyyaml>=6.0",
    "rich>=13.0",
    "tensorboard>=2.15",
]

EXTRAS = {
    "dali": ["nvidia-dali-cuda130>=2.4"],
    "dali-cuda12": ["nvidia-dali-cuda120>=2.4"],
    "ffcv": ["ffcv>=1.0.2"],  # compiled on the spot: launch/install_ffcv.sh brings the libraries
    "evaluate": ["scikit-learn>=1.4", "pycocotools>=2.0.8"],  # SVMs; COCO's masks and metric
    "onnx": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2"],  # interop export --to onnx
    "wandb": ["wandb>=0.17"],
    "quickstart": ["scikit-image>=0.24"],  # its wheel holds free photographs
    "dev": [
        "mypy>=1.10",
        "onnx>=1.16",
        "onnxruntime>=1.18",
        "onnxscript>=0.2",
        "pycocotools>=2.0.8",
        "pytest>=8.0",
        "pytest-xdist>=3.5",  # half the time on two cores
        "ruff>=0.9",
        "scikit-image>=0.24",
        "scikit-learn>=1.4",  # SVMs; the tests compare kNN with it
        "setuptools>=68",
        "types-PyYAML",
        "wheel",
    ],
    # what tests and benchmarks compare weights, features and speed with
    "peers": ["byol-pytorch>=0.9", "lightly>=1.6", "timm>=1.0"],
}

setup(
    name="byol-fast",
    version=version(),
    description="BYOL pretraining on a folder of images, on one GPU, a node or a cluster",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "byol_fast",
        "byol_fast.evaluate",
        "byol_fast.evaluate.commands",
        "byol_fast.evaluate.dense",
        "byol_fast.interop",
        "byol_fast.networks",
        "byol_fast.report",
        "byol_fast.session",
        "byol_fast.updates",
        "byol_fast.watching",
        "pipelines",
        "pipelines.augment",
        "pipelines.conversion",
        "pipelines.formats",
        "pipelines.sources",
        "pipelines.stores",
    ],
    package_data={"byol_fast": ["py.typed"], "pipelines": ["py.typed"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["byol-fast=byol_fast.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
