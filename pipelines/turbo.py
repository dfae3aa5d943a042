"""simplejpeg, which decodes and encodes JPEGs; where it is missing, an error at its first use.

So the packages import without it, and synthetic data needs none of it.
"""

from __future__ import annotations

from typing import Any

from pipelines.errors import MissingBackend


class _Missing:
    def __init__(self, error: ImportError) -> None:
        self._error = str(error)

    def __getattr__(self, name: str) -> Any:
        raise MissingBackend(
            f"images cannot be decoded: simplejpeg is not installed ({self._error}); "
            "pip install simplejpeg"
        )


simplejpeg: Any
try:
    import simplejpeg
except ImportError as error:
    simplejpeg = _Missing(error)
