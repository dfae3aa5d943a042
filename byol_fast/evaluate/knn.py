"""k nearest neighbours on frozen features: exact, by cosine, each neighbour voting exp(s / T).

The protocol of Wu et al. 2018 (instance discrimination), which mmpretrain and lightly report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from byol_fast.evaluate.features import Features, extract
from pipelines.spec import AugmentSpec
from pipelines.stores import Store

_QUERIES = 1024  # rows of one similarity block
_BANK = 32768  # columns of one similarity block: 128 MiB of fp32


def predict(
    bank: Tensor,  # [m, F]
    bank_labels: Tensor,  # [m] in [0, classes)
    queries: Tensor,  # [q, F]
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> Tensor:  # [q] int64, on the CPU
    """The class of every query by a weighted vote of its k nearest bank entries.

    Exact and deterministic: among equal similarities the lower bank index is taken, among equal
    votes the lower class. A k beyond the bank means the whole bank.

    Raises:
        ValueError: shapes that do not fit, labels outside [0, classes), k < 1, temperature <= 0.
    """
    _check(bank, bank_labels, queries, classes, k, temperature)
    similarities, indices = neighbours(bank, queries, k=k, device=device)
    return vote(similarities, bank_labels.cpu()[indices], temperature=temperature)


def accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> float:
    """Top-1 share in [0, 1] of the queries whose predicted class is theirs; see `predict`."""
    at_k = accuracies(
        bank,
        bank_labels,
        queries,
        query_labels,
        classes=classes,
        ks=(k,),
        temperature=temperature,
        device=device,
    )
    return at_k[k]


def accuracies(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    classes: int,
    ks: tuple[int, ...],
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Top-1 for several k out of one search; see `accuracy`."""
    if not len(queries) or len(query_labels) != len(queries):
        raise ValueError(f"{len(queries)} queries with {len(query_labels)} labels: need one each")
    for k in ks:
        _check(bank, bank_labels, queries, classes, k, temperature)
    similarities, indices = neighbours(bank, queries, k=max(ks), device=device)
    labels, truth = bank_labels.cpu()[indices], query_labels.cpu()
    result = {}
    for k in ks:  # neighbours come nearest first, so the first k of max(ks) are the k nearest
        guess = vote(similarities[:, :k], labels[:, :k], temperature=temperature)
        result[k] = (guess == truth).double().mean().item()
    return result


def neighbours(
    bank: Tensor,  # [m, F]
    queries: Tensor,  # [q, F]
    *,
    k: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # [q, min(k, m)] cosines fp32, bank indices int64; both on the CPU
    """The k most similar bank entries of each query: nearest first, equals by bank index."""
    k = min(k, len(bank))
    similarities = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    bank = nn.functional.normalize(bank.float(), dim=1)
    with _full_precision():
        for start in range(0, len(queries), _QUERIES):
            rows = slice(start, min(start + _QUERIES, len(queries)))
            block = nn.functional.normalize(queries[rows].float().to(device), dim=1)
            best, where = _search(block, bank, k)
            similarities[rows], indices[rows] = best.cpu(), where.cpu()
    return similarities, indices


def vote(
    similarities: Tensor,  # [q, k]
    labels: Tensor,  # [q, k]
    *,
    temperature: float,
) -> Tensor:  # [q] int64
    """The class with the largest sum of exp(s / T); on equal sums the lower class."""
    # Subtracting the largest keeps exp finite at any temperature and changes no winner; fp64 on the
    # CPU, since CUDA's scatter_add sums in no fixed order.
    scores = similarities.cpu().double()
    weights = torch.exp((scores - scores.amax(dim=1, keepdim=True)) / temperature)
    # A column for each class that occurs, in their order: numbers may be those of taxa or products.
    present, labels = torch.unique(labels.cpu(), return_inverse=True)
    votes = torch.zeros(len(scores), len(present), dtype=torch.float64)
    return present[votes.scatter_add_(1, labels, weights).argmax(dim=1)]


def raw_pixel_features(
    store: Store,
    image_size: int,
    *,
    spec: AugmentSpec | None = None,
    batch_size: int = 256,
    threads: int | None = None,
    progress: bool = False,
) -> Features:
    """The baseline without a network: the flattened, normalised evaluation crop, `[n, 3*S*S]`.

    It takes 12 * S * S bytes per image (12 KiB at 32 px), so it is meant for small images.
    """
    return extract(
        nn.Flatten(),
        store,
        image_size=image_size,
        spec=spec,
        device="cpu",
        batch_size=batch_size,
        threads=threads,
        progress=progress,
    )


def _search(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k over the bank, block by block: what was best so far competes with a block's best."""
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), _BANK):
        similarities = queries @ bank[start : start + _BANK].to(queries.device).T
        chosen = _leftmost_topk(similarities, min(k, similarities.shape[1]))
        # Earlier bank entries stand left of later ones, so "leftmost" is "lower bank index".
        best = torch.cat([best, similarities.gather(1, chosen)], dim=1)
        where = torch.cat([where, chosen + start], dim=1)
        chosen = _leftmost_topk(best, min(k, best.shape[1]))
        best, where = best.gather(1, chosen), where.gather(1, chosen)
    order = best.sort(dim=1, descending=True, stable=True).indices
    return best.gather(1, order), where.gather(1, order)


def _leftmost_topk(x: Tensor, k: int) -> Tensor:
    """Column indices `[n, k]`, ascending, of the k largest of each row; among equals the leftmost.

    torch.topk leaves open which of several equal values it takes, so rows in which the k-th value
    occurs outside the chosen ones too are chosen again by a stable sort; they are rare.
    """
    values, chosen = x.topk(k, dim=1)
    tied = (x >= values[:, -1:]).sum(dim=1) > k
    if bool(tied.any()):
        ordered = x[tied].sort(dim=1, descending=True, stable=True).indices
        chosen[tied] = ordered[:, :k]
    return chosen.sort(dim=1).values


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 matrix products without TF32, whose 10 bits would reorder close neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, temperature: float
) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank and queries must be [m, F] and [q, F], got {list(bank.shape)} and "
            f"{list(queries.shape)}"
        )
    if not len(bank) or len(labels) != len(bank):
        raise ValueError(f"a bank of {len(bank)} features has {len(labels)} labels: need one each")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"bank labels must lie in [0, {classes}), got {int(labels.min())} to "
            f"{int(labels.max())}; -1 marks an image without a label"
        )
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be >= 1 and temperature > 0, got {k} and {temperature}")
