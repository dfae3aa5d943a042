"""From turns to the table: percentiles, ratios within a round, and what they would mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.hardware import percentiles
from benchmarks.rows import DALI, FFCV, Row

Turns = dict[Row, list[dict[str, float]]]

# Ours over theirs. Crops beside whole views is the work a loader's cores are left with when the
# colours are the GPU's.
RATIOS = (
    ("torch crops", "pil crops"),
    ("dali crops", "pil crops"),
    ("ffcv crops", "pil crops"),
    ("ffcv crops", FFCV),
    ("torch crops", FFCV),
    ("torch crops", "lightly transform"),
    ("dali crops", "lightly transform"),
    ("ffcv crops", "lightly transform"),
    ("torch crops", "torchvision v2"),
    ("torch views", "lightly transform"),
    ("torch views", "pil views"),
    ("torch views", "torchvision v2"),
    ("dali views", "lightly transform"),
    ("dali views", DALI),
    ("dali crops", DALI),
    ("ffcv views", DALI),
)
RANKS = (1, 4, 8)


def summarise(turns: Turns, needed: float | None = None) -> dict[str, Any]:
    """Rows and ratios by name; with `needed` images/s a GPU also what each row could feed."""
    rates = {
        row: {
            "clock": np.array([t["images"] / t["seconds"] for t in some]),
            "core": np.array([t["images"] / t["processor_seconds"] for t in some]),
        }
        for row, some in turns.items()
    }
    rows = {row.label: _row(row, turns[row], rates[row]) for row in turns}
    ratios = {
        f"{ours.label} / {theirs.label}": {
            "of": [ours.label, theirs.label],
            **{unit: percentiles(rates[ours][unit] / rates[theirs][unit]) for unit in rates[ours]},
        }
        for ours, theirs in _pairs(list(turns))
    }
    result: dict[str, Any] = {"rows": rows, "ratios": ratios}
    if needed is not None:
        result["estimates"] = {name: _estimate(row, needed) for name, row in rows.items()}
    return result


def _row(row: Row, turns: list[dict[str, float]], rate: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "work": row.work,
        "peer": row.peer,
        "store": row.store,
        "decode": row.decode or None,
        "threads": row.threads,
        "images_per_second": percentiles(rate["clock"]),
        "images_per_core_second": percentiles(rate["core"]),
        "first_batch_seconds": float(f"{turns[0]['first_batch_seconds']:.3g}"),
        "host_mb": round(max(t["host_mb"] for t in turns)),
        "imports_mb": round(turns[0]["imports_mb"]),
        "gpu_mb": round(max(t["gpu_mb"] for t in turns)),
        "n": len(turns),
    }


def _pairs(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Ours and the rival with as many threads, or the rival's first row where there is none."""
    for ours, theirs in RATIOS:
        rivals = [row for row in rows if row.kind == theirs]
        for row in rows:
            if row.kind == ours and rivals:
                place = "cpu" if row.decode in ("cpu", "") else "mixed"
                alike = [(r.decode in ("", place), r.threads == row.threads) for r in rivals]
                yield row, rivals[alike.index(max(alike))]


def _estimate(row: dict[str, Any], needed: float) -> dict[str, Any]:
    """What a row could feed if each rank took `needed` images/s and all shared these cores."""
    rate, core = row["images_per_second"][1], row["images_per_core_second"][1]
    share = {str(ranks): float(f"{min(1.0, rate / (needed * ranks)):.3g}") for ranks in RANKS}
    return {"needed": needed, "share": share, "cores_a_rank": float(f"{needed / core:.3g}")}


def show(result: dict[str, Any]) -> None:
    """The tables on stdout."""
    width = max(map(len, result["rows"]))
    titles = ("images/s", "images/s a core", "first batch", "host MB", "imports", "GPU MB", "n")
    print(f"{'':{width}}{{:>20}}{{:>20}}{{:>13}}{{:>9}}{{:>9}}{{:>8}}{{:>4}}".format(*titles))
    for name, row in result["rows"].items():
        print(
            f"{name:{width}}{_spread(row['images_per_second'], 0):>20}"
            f"{_spread(row['images_per_core_second'], 0):>20}"
            f"{row['first_batch_seconds']:>11.2f} s{row['host_mb']:>9}{row['imports_mb']:>9}"
            f"{row['gpu_mb']:>8}{row['n']:>4}"
        )
    if result["ratios"]:
        width = max(map(len, result["ratios"]))
        print("\nratios, median (p20-p80) over the rounds: on the clock, and a core")
    for name, units in result["ratios"].items():
        print(f"{name:{width}}{_spread(units['clock'], 2):>22}{_spread(units['core'], 2):>22}")
    if "estimates" in result:
        _show_estimates(result["estimates"])
    for kind in ("left_out", "failed"):
        for name, reason in result.get(kind, {}).items():
            print(f"{kind.replace('_', ' ')}: {name}: {reason}")


def _show_estimates(estimates: dict[str, Any]) -> None:
    needed, width = next(iter(estimates.values()))["needed"], max(map(len, estimates))
    print(
        f"\nestimate, not measured: the share of {needed:g} images/s a rank that each row could "
        "feed\nif so many ranks shared these cores, and the cores that one rank takes"
    )
    print(f"{'':{width}}" + "".join(f"{f'{n} ranks':>10}" for n in RANKS) + f"{'cores':>10}")
    for name, row in estimates.items():
        shares = "".join(f"{share:>10.1%}" for share in row["share"].values())
        print(f"{name:{width}}{shares}{row['cores_a_rank']:>10.1f}")


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = values
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
