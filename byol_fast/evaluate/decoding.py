"""Which decoder and which resizing an evaluation uses: pinned, so that its figures repeat.

Pretraining takes whatever is fastest on a machine, and tries DALI's decoders on its first batches.
Decoders differ by a level or two of 255, and with them accuracies in the last digits. So `auto`
means the torch source here, on every machine; another backend is used only where it is named, and
DALI then decodes with libjpeg-turbo on the CPU, the one of its decoders that every machine has and
that gives the same pixels each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipelines.pipeline import open_source
from pipelines.stores import Store

if TYPE_CHECKING:
    from pipelines.sources import Source

_DALI_DECODER = "cpu"
DECODERS = {  # backend -> what decodes
    "torch": "libjpeg-turbo (simplejpeg), other formats by Pillow",
    "dali": "libjpeg-turbo (DALI, cpu), other formats by Pillow",
    "ffcv": "libjpeg with the fast inverse DCT (FFCV), other formats by Pillow",
    "synthetic": "none",
}
_RESIZERS = {
    "torch": "bicubic, antialiased (torch, uint8)",
    "dali": "bicubic, antialiased (DALI, {device})",
    "ffcv": "bicubic, antialiased, from a reduced size for large windows (compiled)",
    "synthetic": "none",
}


def pinned(backend: str, store: Store) -> str:
    """The backend that `auto` means in an evaluation; any other name is returned as it is."""
    from pipelines.stores.synthetic import SyntheticStore

    if backend != "auto":
        return backend
    return "synthetic" if isinstance(store, SyntheticStore) else "torch"


def described(backend: str, store: Store, device: torch.device) -> dict[str, str]:
    """Backend, decoder and resizing of the images of `store`, for keys and result files.

    Raises:
        ValueError: there is no such backend.
    """
    name = pinned(backend, store)
    if name not in DECODERS:
        raise ValueError(f"backend is auto, torch, dali, ffcv or synthetic, got {backend!r}")
    decoder = DECODERS[name] if store.encoded else "none: the data set holds pixels"
    resizing = _RESIZERS[name].format(device=device.type)
    return {"backend": name, "decoder": decoder, "resizing": resizing}


def open_pinned(
    store: Store, image_size: int, device: torch.device, *, backend: str, threads: int | None
) -> Source:
    """`open_source` with the backend and the decoder that `described` names."""
    return open_source(
        store,
        image_size,
        device,
        backend=pinned(backend, store),
        threads=threads,
        decode=_DALI_DECODER,
    )
