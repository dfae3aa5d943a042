"""A backbone as an ONNX file, checked with onnxruntime where that is installed."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.export import write_bytes
from pipelines.errors import import_problem

log = logging.getLogger(__name__)

OPSET = 18
TOLERANCE = 1e-4  # of the largest feature


def write(net: nn.Module, path: Path, meta: Mapping[str, Any]) -> Path:
    """`images` [N, 3, S, S] to `features` [N, F], any N, one S; the network is put into eval mode.

    The file is compared with the network before it takes its place; where onnxruntime is missing,
    that is logged.

    Raises:
        ImportError: onnx or onnxscript is missing, with the command that installs them.
        ValueError: the file computes something else.
        OSError: disk full or read-only.
    """
    install = "pip install '.[onnx]' in the checkout"
    try:
        import onnx
    except Exception as error:
        raise import_problem("ONNX", "onnx", error, install) from error
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
    except Exception as error:
        raise import_problem("onnxscript", "onnxscript", error, install) from error
    size = int(meta.get("image_size", 224))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net.eval(),
            (images,),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for key in ("backbone", "stem", "padding", "image_size", "mean", "std", "network"):
        if key in meta:
            onnx.helper.set_model_props(model, {**_props(model), key: json.dumps(meta[key])})
    content = model.SerializeToString()
    _check(net, content, images)
    write_bytes(path, content)
    return path


def _props(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _check(net: nn.Module, content: bytes, images: Tensor) -> None:
    try:
        import onnxruntime
    except Exception as error:
        problem = import_problem("onnxruntime", "onnxruntime", error, "pip install onnxruntime")
        log.warning("the file was not compared with the network: %s", problem)
        return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        (found,) = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            expected = net(batch)
        worst = (torch.from_numpy(found) - expected).abs().max().item()
        if worst > TOLERANCE * max(expected.abs().max().item(), 1.0):
            raise ValueError(f"the ONNX file's features are off by {worst:.2g}: nothing written")
