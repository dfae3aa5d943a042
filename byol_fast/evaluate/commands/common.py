"""What the tasks share: flags, opening weights and images, and how a result leaves."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast.evaluate import record
from byol_fast.evaluate.table import Row, render

if TYPE_CHECKING:
    import torch

    from byol_fast.evaluate.cache import FeatureCache
    from byol_fast.evaluate.data import Labelled
    from byol_fast.evaluate.features import Features
    from byol_fast.export import Weights
    from pipelines.spec import AugmentSpec


def weights_flags(parser: argparse.ArgumentParser) -> None:
    """Which network, where it runs, and how it is shown images."""
    network_flags(parser)
    add = parser.add_argument
    add("--image-size", type=int, help="pixels; else as trained, else 224")
    add(
        "--backend",
        default="auto",
        choices=["auto", "torch", "dali", "ffcv"],
        help="who decodes; auto: torch, on every machine",
    )


def network_flags(parser: argparse.ArgumentParser) -> None:
    """Which network, and where it runs."""
    add = parser.add_argument
    add("--weights", required=True, help="exported backbone, checkpoint or run folder")
    add("--backbone", help="torchvision name, for weights that do not say")
    add("--stem", choices=["imagenet", "cifar"], help="for weights that do not say")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=int, help="decoding threads; else one for each core")


def data_flags(parser: argparse.ArgumentParser) -> None:
    """Labelled images to train and to test on, and where the result goes."""
    add = parser.add_argument
    add("--data", required=True, help="labelled training images: class folders, a list, .npz")
    add("--test-data", help="labelled test images; else a fixed fifth of --data is held out")
    root_flags(parser)
    out_flag(parser)


def root_flags(parser: argparse.ArgumentParser) -> None:
    """Where the images of a list lie."""
    add = parser.add_argument
    add("--root", help="folder of the images that lists name; else the list's own")
    add("--test-root", help="the same for the list in --test-data; else --root")


def cache_flags(parser: argparse.ArgumentParser) -> None:
    """Where features are kept."""
    add = parser.add_argument
    add("--cache", type=Path, metavar="DIR", help="keep features there; else beside the weights")
    add("--no-cache", action="store_true", help="compute all features, and keep nothing")


def quick_flag(parser: argparse.ArgumentParser) -> None:
    """A short run for trying."""
    parser.add_argument("--quick", action="store_true", help="a short run; not the protocol")


def out_flag(parser: argparse.ArgumentParser) -> None:
    """Where the result goes."""
    parser.add_argument("--out", type=Path, help="result file; else JSON beside the weights")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A backbone that is ready, and how images reach it."""

    weights: Weights
    backbone: torch.nn.Module  # [B, 3, S, S] channels_last to [B, F], on `device`, in eval mode
    device: torch.device
    image_size: int  # S in pixels
    spec: AugmentSpec  # its mean and std are the training's
    threads: int | None
    backend: str

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of `features.extract` and `linear.fit` that say how images are read."""
        return {
            "image_size": self.image_size,
            "spec": self.spec,
            "device": self.device,
            "threads": self.threads,
            "backend": self.backend,
            "progress": True,
        }

    @property
    def deciding(self) -> dict[str, Any]:
        """Those of `reading` that decide the features: the arguments of `FeatureCache.key`."""
        names = ("image_size", "spec", "device", "backend")
        return {name: self.reading[name] for name in names}


def open_network(args: argparse.Namespace) -> Network:
    """The network of `--weights`.

    Raises:
        CheckpointError: there are no weights, or they are damaged.
        ValueError: they are of another network or do not say of which; there is no such device.
    """
    import torch

    from byol_fast import export

    weights = export.read_weights(args.weights)
    device = device_of(args.device)
    backbone = export.build(
        weights,
        backbone=args.backbone,
        stem=args.stem,
        image_size=args.image_size,
        device=device,
    ).to(memory_format=torch.channels_last)  # as its input: no conversion in every forward
    return Network(
        weights=weights,
        backbone=backbone,
        device=device,
        image_size=args.image_size or weights.meta.get("image_size", 224),
        spec=_spec(weights),
        threads=args.threads,
        backend=args.backend,
    )


def open_cache(args: argparse.Namespace, network: Network) -> FeatureCache:
    """Where features of this network are kept: `--cache`, else `feature-cache` by the weights."""
    from byol_fast.evaluate.cache import FeatureCache

    weights = network.weights
    beside = weights.folder / "feature-cache"
    described = {
        "weights": weights.sha256,
        "backbone": args.backbone or weights.meta.get("backbone"),
        "stem": args.stem or weights.meta.get("stem", "imagenet"),
        "hidden_layer": weights.meta.get("hidden_layer", -1),
    }
    return FeatureCache(root=None if args.no_cache else args.cache or beside, network=described)


def rate_of(*features: Features) -> float | None:
    """Images/s of reading and network; None where all of them came from a cache."""
    seconds = sum(each.seconds for each in features)
    computed = sum(each.computed for each in features)
    return computed / seconds if computed and seconds else None


def from_cache(*features: Features) -> list[str]:
    """A note where features were not computed now."""
    stored = sum(each.stored for each in features)
    return [f"features of {stored} images came from the cache"] if stored else []


def open_labelled(args: argparse.Namespace) -> Labelled:
    """The images of `--data` and `--test-data`; raises DataError as `data.prepare` does."""
    from byol_fast.evaluate import data
    from pipelines.stores import open_store

    root, test_root = args.root, args.test_root or args.root
    return data.prepare(
        open_store(args.data, root=root, verify=False),
        open_store(args.test_data, root=test_root, verify=False) if args.test_data else None,
    )


def finish(
    args: argparse.Namespace,
    where: Path,
    provenance: dict[str, Any],
    result: dict[str, Any],
    rows: list[Row],
    notes: list[str] | None = None,
) -> None:
    """Write the result to `where`, and print its rows as a table with `notes` below it."""
    record.write(where, {**provenance, **result, "rows": [row.as_dict() for row in rows]})
    print(render(rows, weights=provenance["weights"]["file"], data=provenance["data"]["train"]))
    for note in notes or []:
        print(note)
    print(f"result: {where} ({headline(rows)})")


def headline(rows: list[Row]) -> str:
    """The best row's first figure, in words: `top-1 71.23`."""
    name = next(iter(rows[0].figures))
    return f"{name} {100 * max(row.figures.get(name, 0.0) for row in rows):.2f}"


def device_of(name: str) -> torch.device:
    """The device that `--device` names, torch's threads limited to the usable cores; ValueError
    where there is none."""
    import torch

    from pipelines.cores import limit_torch_threads

    limit_torch_threads()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported here")
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
