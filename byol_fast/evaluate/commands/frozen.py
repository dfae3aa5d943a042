"""Features and targets, opened once for the protocols that need nothing else."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast.evaluate import record
from byol_fast.evaluate.commands import common
from pipelines.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import nn

    from byol_fast.evaluate.cache import FeatureCache
    from byol_fast.evaluate.data import Labelled
    from byol_fast.evaluate.features import Crop, Features
    from byol_fast.evaluate.parts import Parts
    from byol_fast.evaluate.undecodable import Named
    from pipelines.stores import Store

    Targets = npt.NDArray[np.int8]  # [n, C]: 1 present, 0 absent, -1 difficult
    Metric = Callable[[torch.Tensor, torch.Tensor], float]


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line these protocols share."""
    common.weights_flags(parser)
    add = parser.add_argument
    add("--data", required=True, help="VOC2007 (or VOCdevkit), class folders, a list, .npz")
    add("--test-data", help="test images; else VOC's own list, or a fixed fifth of --data")
    common.root_flags(parser)
    common.out_flag(parser)
    common.cache_flags(parser)
    common.quick_flag(parser)
    add("--batch-size", type=int, default=256, help="images of one forward pass")


@dataclass(kw_only=True)
class Frozen:
    """A network, its images and its cache; `features` gives what the protocol learns from."""

    args: argparse.Namespace
    network: common.Network
    labelled: Labelled
    cache: FeatureCache
    crop: Crop
    corners: bool  # four averages a channel instead of one, where the network is a ResNet
    used: list[Features] = field(default_factory=list)
    stores: list[tuple[str, Store]] = field(default_factory=list)  # label and images of each
    keys: list[dict[str, Any]] = field(default_factory=list)

    @property
    def multi(self) -> bool:
        """Whether an image may show several classes."""
        from byol_fast.evaluate.voclabels import MultiLabelled

        return isinstance(self.labelled, MultiLabelled)

    @property
    def pooling(self) -> str:
        from byol_fast.evaluate.pooling import CORNERS, GLOBAL

        return CORNERS if self.corners else GLOBAL

    def features(self, store: Store, label: str) -> Features:
        """Features of `store`, out of the cache where they are there."""
        which: dict[str, Any] = {"crop": self.crop, "pooling": self.pooling}
        self.keys.append(self.cache.key(store, **self.network.deciding, **which))
        out = self.cache.extract(
            self._net(),
            store,
            batch_size=self.args.batch_size,
            label=label,
            **self.network.reading,
            **which,
        )
        self.used.append(out)
        self.stores.append((label, store))
        return out

    def targets(self, part: str, features: Features) -> Targets:
        """`[n, C]` of the rows of `features`, which are of `part`: `train` or `test`."""
        import numpy as np

        from byol_fast.evaluate.voclabels import MultiLabelled

        if isinstance(self.labelled, MultiLabelled):
            every = {"train": self.labelled.train_targets, "test": self.labelled.test_targets}
            return np.asarray(every[part][features.ids.numpy()])
        labels = features.labels.numpy()
        return np.asarray(labels[:, None] == np.arange(len(self.labelled.classes)), np.int8)

    def parts(self, **settings: Any) -> Parts:
        """Where finished steps of a protocol with these settings are kept."""
        import hashlib

        import numpy as np

        from byol_fast.evaluate.parts import Parts

        told = [self.targets(p, f) for p, f in zip(("train", "test"), self.used, strict=False)]
        labels = hashlib.sha256(b"".join(np.ascontiguousarray(t).tobytes() for t in told))
        key = {"features": self.keys, "labels": labels.hexdigest(), **settings}
        return Parts(self.cache.root, key)

    def both(self) -> tuple[Features, Features]:
        """Training and test features."""
        train = self.features(self.labelled.train, "train features")
        return train, self.features(self.labelled.test, "test features")

    def result_path(self, recipe: str) -> Path:
        """As `record.result_path`; known before anything is computed."""
        recipe += "-quick" if self.args.quick else ""
        weights, test = self.network.weights, self.labelled.test
        return record.result_path(self.args.out, weights, recipe, test.fingerprint)

    def label(self, protocol: str) -> str:
        """The protocol's name in the table."""
        if self.args.quick:
            return f"quick {protocol} (not a published protocol)"
        return protocol if self.as_published else f"{protocol}, on the network's own features"

    def described(self) -> dict[str, Any]:
        """What the features are, for the result file."""
        width = self.used[0].features.shape[1] if self.used else None
        return {"crop": self.crop, "pooling": self.pooling, "features": width}

    @property
    def as_published(self) -> bool:
        """Whether the features are the benchmark's: not with --quick, and of ResNets alone."""
        return self.corners and not self.args.quick

    def bad(self) -> dict[str, Named]:
        """The images that could not be decoded, by what they were for."""
        from byol_fast.evaluate import undecodable

        stores = zip(self.stores, self.used, strict=True)
        return {
            label.removesuffix(" features"): undecodable.named(store, out.bad)
            for (label, store), out in stores
        }

    def notes(self) -> list[str]:
        """What the output says below the table."""
        from byol_fast.evaluate import undecodable

        return [
            f"tested on {self.labelled.source}",
            *undecodable.notes(**self.bad()),
            *common.from_cache(*self.used),
        ]

    def _net(self) -> nn.Module:
        from byol_fast.evaluate.pooling import with_corners

        net = with_corners(self.network.backbone) if self.corners else None
        return net or self.network.backbone


def open_frozen(args: argparse.Namespace, *, crop: Crop, corners: bool = False) -> Frozen:
    """The network and the images that the command line names.

    Raises as `common.open_network`, `common.open_labelled` and `voclabels.open_voc` do.
    """
    from byol_fast.evaluate import voclabels
    from byol_fast.evaluate.pooling import with_corners

    network = common.open_network(args)
    labelled: Labelled
    if (root := voclabels.voc_root(args.data)) is not None:
        test_root = voclabels.voc_root(args.test_data) if args.test_data else None
        if args.test_data and test_root is None:
            raise DataError(
                f"{args.test_data} is no VOC folder, and --data is one: name the folder that has "
                "Annotations, ImageSets and JPEGImages"
            )
        labelled = voclabels.open_voc(root, test_root)
    else:
        labelled = common.open_labelled(args)
    return Frozen(
        args=args,
        network=network,
        labelled=labelled,
        cache=common.open_cache(args, network),
        crop=crop,
        corners=corners and with_corners(network.backbone) is not None,
    )


def open_benchmark(args: argparse.Namespace) -> Frozen:
    """`open_frozen` as the SVM benchmark has it: whole images, four averages a channel.

    `--quick` takes the features of kNN and of the linear check.
    """
    if args.quick:
        return open_frozen(args, crop="centre")
    return open_frozen(args, crop="whole", corners=True)


def default_jobs() -> int:
    """Every core this process may use."""
    from pipelines.cores import worker_threads

    return worker_threads()
