"""FFCV's compiled part, loaded without the rest of the package.

`import ffcv` takes 6 s of compiling and sets torch's and numba's thread counts for the whole
process; the shared library alone takes 20 ms and changes nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_bool, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any


def _load() -> ctypes.CDLL:
    """libffcv.

    Raises:
        ImportError: the package is not installed, or has no compiled part.
        OSError: a library that it needs is missing.
    """
    found = importlib.util.find_spec("ffcv")
    if found is None or found.origin is None:
        raise ImportError("no package ffcv")
    libraries = sorted(Path(found.origin).parent.glob("_libffcv*.so"))
    if not libraries:
        raise ImportError(f"no compiled library in {Path(found.origin).parent}")
    return ctypes.CDLL(str(libraries[0]))


# int imdecode(data, length, height, width, pixels, crop height, crop width, x, y, numerator,
# denominator, crop, flip, rgb): decodes the whole JPEG at numerator / denominator of its size; 0 if
# libjpeg had nothing to complain of. The last argument is newer than 1.0.2, which ignores it.
imdecode: Any = _load().imdecode
imdecode.restype = c_int
imdecode.argtypes = (
    *(c_void_p, c_uint64, c_uint32, c_uint32, c_void_p, c_uint32, c_uint32),
    *(c_uint32, c_uint32, c_uint32, c_uint32, c_bool, c_bool, c_bool),
)
