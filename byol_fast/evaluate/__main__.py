"""`python -m byol_fast.evaluate knn|linear --weights FILE --data DIR`: one table, one JSON file."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast.errors import CheckpointError, Exit
from byol_fast.evaluate import protocols, record
from byol_fast.evaluate.table import Row, percent, render
from pipelines.errors import DataError, MissingBackend

if TYPE_CHECKING:
    import torch

    from byol_fast.evaluate.data import Labelled
    from byol_fast.export import Weights
    from pipelines.spec import AugmentSpec

QUICK_LABEL = "quick (cached centre crops, not a published protocol)"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code of `errors.Exit`."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        _run(args)
    except DataError as error:
        return _failed(Exit.DATA, error)
    except CheckpointError as error:
        return _failed(Exit.NO_CHECKPOINT, error)
    except (ValueError, MissingBackend, OSError) as error:
        return _failed(Exit.USAGE, error)
    return Exit.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m byol_fast.evaluate", description="Accuracy of frozen features on labels."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="knn|linear")
    knn = tasks.add_parser("knn", help="weighted k nearest neighbours, nothing is trained")
    linear = tasks.add_parser("linear", help="a linear classifier on the frozen network")
    for task in (knn, linear):
        _common_flags(task)
    add = knn.add_argument
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=protocols.KNN_TEMPERATURE, help="T of exp(s / T)")
    add("--batch-size", type=int, default=256, help="images of one forward pass")
    add = linear.add_argument
    add("--protocol", choices=["paper", "mmpretrain"], default="paper", help="the recipe")
    add("--quick", action="store_true", help="a check on cached centre crops; no protocol")
    add("--epochs", type=int, help="instead of the protocol's")
    add("--batch-size", type=int, help="instead of the protocol's; the lr follows it")
    add("--base-lr", type=float, help="per 256 images, instead of the protocol's")
    add("--seed", type=int, default=0, help="of order, crops and first weights")
    return parser


def _common_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", required=True, help="exported backbone, checkpoint or run folder")
    add("--data", required=True, help="labelled training images: class folders or .npz")
    add("--test-data", help="labelled test images; else a fixed fifth of --data is held out")
    add("--backbone", help="torchvision name, for weights that do not say")
    add("--stem", choices=["imagenet", "cifar"], help="for weights that do not say")
    add("--image-size", type=int, help="pixels; else as trained, else 224")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--backend", default="auto", choices=["auto", "torch", "dali", "ffcv"], help="who decodes")
    add("--threads", type=int, help="decoding threads; else one for each core")
    add("--out", type=Path, help="result file; else JSON beside the weights")


def _run(args: argparse.Namespace) -> None:
    protocol = _protocol(args) if args.task == "linear" else None  # complain before reading data
    if args.task == "knn" and (min(args.k) < 1 or args.temperature <= 0):
        raise ValueError("--k must be at least 1 and --temperature above 0")
    import torch

    from byol_fast import export
    from byol_fast.evaluate import data
    from pipelines.stores import open_store

    weights = export.read_weights(args.weights)
    device = _device(args.device)
    backbone = export.build(
        weights,
        backbone=args.backbone,
        stem=args.stem,
        image_size=args.image_size,
        device=device,
    ).to(memory_format=torch.channels_last)  # as its input: no conversion in every forward
    labelled = data.prepare(
        open_store(args.data, verify=False),
        open_store(args.test_data, verify=False) if args.test_data else None,
    )
    common = {
        "image_size": args.image_size or weights.meta.get("image_size", 224),
        "spec": _spec(weights),
        "device": device,
        "threads": args.threads,
        "backend": args.backend,
        "progress": True,
    }
    where = record.result_path(args, weights, labelled)
    if protocol is None:
        result, rows = _knn(args, backbone, labelled, common)
    else:
        result, rows = _linear(args, protocol, backbone, labelled, common, where)
    result = {**record.provenance(args, weights, labelled, common), **result}
    record.write(where, result)
    _report(result, rows, where)


def _knn(
    args: argparse.Namespace, backbone: torch.nn.Module, labelled: Labelled, common: dict[str, Any]
) -> tuple[dict[str, Any], list[Row]]:
    from byol_fast.evaluate import features, knn

    bank, queries = (
        features.extract(backbone, store, batch_size=args.batch_size, label=label, **common)
        for store, label in ((labelled.train, "bank"), (labelled.test, "queries"))
    )
    at_k = knn.accuracies(
        bank.features,
        bank.labels,
        queries.features,
        queries.labels,
        classes=len(labelled.classes),
        ks=tuple(args.k),
        temperature=args.temperature,
        device=common["device"],
    )
    usual = args.temperature == protocols.KNN_TEMPERATURE
    rate = (len(bank.ids) + len(queries.ids)) / max(bank.seconds + queries.seconds, 1e-9)
    whole = f" (all {len(bank.ids)} there are)"
    rows = [
        Row(
            protocol=f"kNN, T={args.temperature:g}, k={k}{whole if k > len(bank.ids) else ''}",
            top1=accuracy,
            images_per_second=rate,
            published=protocols.KNN.get(k) if usual and k <= len(bank.ids) else None,
        )
        for k, accuracy in at_k.items()
    ]
    result = {
        "protocol": {"name": "knn", "k": args.k, "temperature": args.temperature},
        "top1": {str(k): accuracy for k, accuracy in at_k.items()},
        "images_per_second": rate,
        "images": {"train": len(bank.ids), "test": len(queries.ids)},
        "undecodable": len(bank.bad) + len(queries.bad),
    }
    return result, rows


def _linear(
    args: argparse.Namespace,
    protocol: protocols.Protocol,
    backbone: torch.nn.Module,
    labelled: Labelled,
    common: dict[str, Any],
    where: Path,
) -> tuple[dict[str, Any], list[Row]]:
    from byol_fast.evaluate import head, linear

    outcome = linear.fit(
        backbone, labelled.train, labelled.test, protocol=protocol, seed=args.seed, **common
    )
    head_path = where.with_name(where.name.removesuffix(".json") + ".head.safetensors")
    head.save(outcome.head, head_path, classes=labelled.classes)
    changed = _changes(args)
    name = QUICK_LABEL if protocol.cached else f"linear, {protocol.name}{changed}"
    row = Row(
        protocol=name,
        top1=outcome.top1,
        top5=outcome.top5,
        images_per_second=outcome.images_per_second,
        published=protocols.LINEAR.get(protocol.name),
    )
    result = {
        "protocol": {**asdict(outcome.protocol), "peak_lr": outcome.protocol.peak_lr},
        "published_protocol": not (protocol.cached or changed),
        "arithmetic": outcome.protocol.arithmetic(),
        "top1": outcome.top1,
        "top5": outcome.top5,
        "final_loss": outcome.final_loss,
        "images_per_second": outcome.images_per_second,
        "images": {"train": len(labelled.train), "test": outcome.test_images},
        "undecodable": outcome.bad_images,
        "head": str(head_path),
    }
    return result, [row]


def _protocol(args: argparse.Namespace) -> protocols.Protocol:
    """The recipe with what the command line changes in it."""
    named = {"paper": protocols.PAPER, "mmpretrain": protocols.MMPRETRAIN}
    base = protocols.QUICK if args.quick else named[args.protocol]
    asked = {"epochs": args.epochs, "batch_size": args.batch_size, "base_lr": args.base_lr}
    return replace(base, **{key: value for key, value in asked.items() if value is not None})


def _changes(args: argparse.Namespace) -> str:
    asked = {"epochs": args.epochs, "batch": args.batch_size, "base lr": args.base_lr}
    changed = [f"{key} {value:g}" for key, value in asked.items() if value is not None]
    return f" with {', '.join(changed)}" if changed else ""


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there is no such GPU; use --device cpu")
    return device


def _spec(weights: Weights) -> AugmentSpec:
    """The normalisation the network was trained with."""
    from pipelines.spec import AugmentSpec

    meta, usual = weights.meta, AugmentSpec()
    return AugmentSpec(
        mean=tuple(meta.get("mean", usual.mean)), std=tuple(meta.get("std", usual.std))
    )


def _report(result: dict[str, Any], rows: list[Row], where: Path) -> None:
    print(render(rows, weights=result["weights"]["file"], data=result["data"]["train"]))
    print(f"tested on {result['data']['tested_on']}")
    if result["undecodable"]:
        print(f"{result['undecodable']} images could not be decoded and are left out")
    if "arithmetic" in result:
        print(f"classifier: {result['arithmetic']}; saved as {result['head']}")
    if result["protocol"]["name"] == "paper":
        print("the paper takes the best of five rates (base lr .05 to .4); this is one of them")
    print(f"result: {where} (top-1 {_headline(result['top1'])})")


def _headline(top1: dict[str, float] | float) -> str:
    return percent(max(top1.values()) if isinstance(top1, dict) else top1)


def _failed(code: Exit, error: BaseException) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
