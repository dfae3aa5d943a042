"""A frozen network with the classifier that was trained on it: class and score of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from byol_fast import export
from byol_fast.evaluate import head as heads
from byol_fast.evaluate.features import Crop, evaluating, inference, stream
from byol_fast.evaluate.files import Files
from byol_fast.networks.backbone import feature_dim
from byol_fast.weights import Weights
from pipelines.errors import DataError
from pipelines.spec import AugmentSpec


class Prediction(TypedDict):
    """What is said of one image."""

    pred_class: str  # the best class
    pred_score: float  # its share of 1: by softmax, or by sigmoid where classes go together
    pred_label: int  # its number
    top: list[tuple[str, float]]  # the best classes and their scores, the best first


class Classifier(nn.Module):
    """Images `[B, 3, S, S]`, normalised, to logits `[B, C]`.

    Args:
        backbone: images to features `[B, F]`; see `byol_fast.load_backbone`.
        head: features to logits.
        classes: C names.
        image_size: S in pixels, and `crop`, `spec`: how `predict` shows files to the network.
        multi_label: an image may have several of the classes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        classes: Sequence[str],
        *,
        image_size: int = 224,
        crop: Crop = "centre",
        spec: AugmentSpec | None = None,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        if len(classes) != head.out_features:
            raise ValueError(f"{len(classes)} class names for {head.out_features} outputs")
        self.backbone, self.head, self.classes = backbone, head, tuple(classes)
        self.image_size, self.multi_label = image_size, multi_label
        self.crop, self.spec = crop, spec or AugmentSpec()

    @classmethod
    def load(
        cls,
        weights: Path | str,
        head: Path | str,
        *,
        backbone: str | None = None,
        stem: str | None = None,
        image_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Classifier:
        """The network in `weights` with the classifier in `head`, in eval mode.

        Args:
            weights: as in `byol_fast.load_backbone`.
            head: the `.head.safetensors` that linear or transfer evaluation wrote.
            backbone, stem, image_size: for weights that do not say.

        Raises:
            CheckpointError: one of the files is missing, damaged or something else.
            ValueError: they do not belong together: the head was trained on other weights.
        """
        found = export.read_weights(weights)
        layer, classes, about = heads.load(head)
        size = image_size or about.get("image_size") or found.meta.get("image_size", 224)
        net = export.build(found, backbone=backbone, stem=stem, image_size=size)
        width = feature_dim(net, size)
        if width != layer.in_features:
            raise ValueError(
                f"{head} takes {layer.in_features} features and {weights} gives {width}: "
                "they are of different networks"
            )
        if not _belongs(about, found):
            raise ValueError(
                f"{head} was trained on the features of other weights ({about.get('weights_file')}"
                f", sha256 {str(about['weights_sha256'])[:12]}…) than {found.file} (sha256 "
                f"{found.sha256[:12]}…), so its classes would mean nothing: name the weights that "
                "it was trained on, or train a classifier on these (python -m byol_fast.evaluate "
                "linear)"
            )
        usual = AugmentSpec()
        spec = AugmentSpec(
            mean=tuple(found.meta.get("mean", usual.mean)),
            std=tuple(found.meta.get("std", usual.std)),
        )
        classifier = cls(
            net,
            layer,
            classes,
            image_size=size,
            crop=about.get("crop", "centre"),
            spec=spec,
            multi_label=bool(about.get("multi_label", False)),
        )
        classifier.to(memory_format=torch.channels_last)  # as its input: no conversion in a forward
        return classifier.to(device).eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x).float())
        return logits

    def predict(
        self, images: Sequence[Path | str] | Path | str | Tensor, *, batch_size: int = 64
    ) -> list[Prediction]:
        """One prediction for each image.

        Args:
            images: paths, one path, or `[N, 3, S, S]` normalised as the network takes it.

        Raises:
            DataError: a file cannot be read as an image.
        """
        if isinstance(images, Tensor):
            device = next(self.parameters()).device
            with evaluating(self), inference(device):
                logits = [self(part.to(device)).float().cpu() for part in images.split(batch_size)]
            return self.explain(torch.cat(logits)) if logits else []
        paths = [Path(p) for p in ([images] if isinstance(images, Path | str) else images)]
        found, bad = self.predict_files(paths, batch_size=batch_size)
        if bad:
            path, reason = next(iter(bad.items()))
            raise DataError(f"{path} {reason}" + (f" ({len(bad)} in all)" if len(bad) > 1 else ""))
        return [found[path] for path in paths]

    def predict_files(
        self,
        paths: Sequence[Path],
        *,
        batch_size: int = 64,
        threads: int | None = None,
        backend: str = "torch",
        most: int = 5,
    ) -> tuple[dict[Path, Prediction], dict[Path, str]]:
        """Predictions of the files that can be decoded, and a reason for each of the others."""
        store = Files(dict.fromkeys(paths))
        bad = {Path(path): reason for path, reason in store.quarantined}
        found: dict[Path, Prediction] = {}
        device = next(self.parameters()).device
        for rows, features, wrong in stream(
            self.backbone,
            store,
            image_size=self.image_size,
            spec=self.spec,
            device=device,
            batch_size=batch_size,
            threads=threads,
            backend=backend,
            crop=self.crop,
        ):
            with torch.no_grad():
                logits = self.head(features.to(device)).cpu()
            for row, each in zip(rows, self.explain(logits, most=most), strict=True):
                path = Path(store.name(row))
                if row in wrong:
                    bad[path] = wrong[row]
                else:
                    found[path] = each
        return found, bad

    def explain(self, logits: Tensor, *, most: int = 5) -> list[Prediction]:
        """Classes and scores of logits `[N, C]`, the `most` best of each image."""
        scores = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        values, indices = scores.topk(min(most, len(self.classes)), dim=1)
        return [
            Prediction(
                pred_class=self.classes[where[0]],
                pred_score=best[0],
                pred_label=where[0],
                top=[(self.classes[i], score) for i, score in zip(where, best, strict=True)],
            )
            for best, where in zip(values.tolist(), indices.tolist(), strict=True)
        ]


def _belongs(about: dict[str, Any], weights: Weights) -> bool:
    """Whether a head was trained on these weights: the same file, or another one of its tensors (a
    run's checkpoint, `.safetensors` and `.pth`). A head that does not say is taken at its word."""
    if about.get("weights_sha256") in (None, weights.sha256):
        return True
    return about.get("weights_tensors_sha256") == weights.tensors_sha256
