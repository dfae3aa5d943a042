"""What fps.py's figures mean: each beside the target, and what limits the run."""

from __future__ import annotations

from typing import Any

from benchmarks.stepping import FORWARDS_OF_AN_IMAGE

TARGET = 5408 / 8  # mmpretrain's linear evaluation of BYOL ResNet-50: 5408 images/s on 8 BI-V100


def verdict(result: dict[str, Any]) -> list[str]:
    """Each rate beside the target, and what the comparison means."""
    target, lines = result["target_fps"], []
    lines.append(
        f"target: {target:.0f} images/s per GPU"
        + (
            " (mmpretrain's linear evaluation of BYOL ResNet-50, one forward an image; a BYOL "
            f"image costs {FORWARDS_OF_AN_IMAGE} such forwards)"
            if target == TARGET
            else ""
        )
    )
    for mode in ("step", "loader", "e2e", "linear-eval"):
        if mode in result["modes"]:
            rate = result["modes"][mode]["images_per_second_per_gpu"][1]
            met = "met" if rate >= target else "missed"
            lines.append(f"{mode}: {rate:.1f} images/s per GPU, {rate / target:.2f}x: {met}")
    for row in result.get("projection", {}).get("rows", [])[1:]:
        rate, wanted = row["images_per_second"], target * row["ranks"]
        lines.append(
            f"predicted for {row['ranks']} GPUs: {rate:,.0f} images/s, "
            f"{rate / wanted:.2f}x of {wanted:,.0f}"
        )
    return lines


def bottleneck(result: dict[str, Any]) -> str:
    """One sentence: what limits the run, and what to do about it."""
    modes = result["modes"]
    step, e2e, loader = (modes.get(name) for name in ("step", "e2e", "loader"))
    if e2e is not None and e2e["wait_share"] > 0.05:
        return (
            f"Loading limits: the device waits {e2e['wait_share']:.0%} of the time for data; give "
            "the ranks more cores, use DALI with a GPU (--backend dali), or convert to smaller "
            "images (python -m pipelines.convert --max-side)."
        )
    if step is None:
        if loader is not None:
            rate = loader["images_per_second_per_gpu"][1]
            return (
                f"The loader gives {rate:.0f} images/s to each rank; run --mode step e2e to see "
                "whether that is enough."
            )
        return "No step was measured: run --mode step e2e to see what limits training."
    if step["host_share"] is not None and step["host_share"] > 0.9:
        launches = f" with {step['launches']} launches" if step["launches"] else ""
        return (
            f"Launching limits: the host is busy {step['host_share']:.0%} of a step{launches}; "
            "use --engine graph or a larger batch."
        )
    if step["flop_share"] >= step["byte_share_estimate"]:
        return (
            f"Arithmetic limits: {step['flop_share']:.0%} of a matrix product's FLOP/s are "
            "reached; a lower precision or a smaller network is what is left."
        )
    return (
        f"Memory traffic limits: about {step['byte_share_estimate']:.0%} of a copy's bytes/s are "
        f"reached and {step['flop_share']:.0%} of a matrix product's FLOP/s; "
        + (
            "compile the networks (--engine compile), which fuses the element-wise passes."
            if step["engine_ran"] == "eager"
            else "fewer passes over activations would be faster, more arithmetic would not."
        )
    )
