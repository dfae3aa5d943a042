"""What a complete run leaves: the exported backbone, the summary and the report."""

from __future__ import annotations

import logging

from byol_fast import export, report
from byol_fast.errors import SaveError
from byol_fast.session.runfolder import RunFolder
from byol_fast.trainer import Trainer

log = logging.getLogger(__name__)


def finish(trainer: Trainer, folder: RunFolder) -> None:
    """Export the online backbone, write `summary.json` and `report.html`. Rank 0 only.

    Raises:
        SaveError: one of them could not be written.
    """
    try:
        _finish(trainer, folder)
    except OSError as error:
        raise SaveError(
            f"training is complete and its checkpoint is in {folder.checkpoints}, but the results "
            f"are not all in {folder.path}: {error}. Free some space (or fix the folder's "
            f"permissions) and repeat the command: nothing is trained again"
        ) from error


def _finish(trainer: Trainer, folder: RunFolder) -> None:
    model, pipeline = trainer.model, trainer.pipeline
    spec = pipeline.stream.spec
    exports = export.export_backbone(
        model.online.encoder.backbone,
        folder.path / "exports" / "backbone",
        {**model.hyper, "mean": spec.mean, "std": spec.std, "steps": trainer.step},
    )
    images = trainer.step * trainer.plan.global_batch
    # Not of a run that was summed up before; one that was killed just before it was is.
    if trainer.session_seconds or folder.summary().get("images") != images:
        _summarise(trainer, folder, [str(path) for path in exports])
        trainer.runlog.event(trainer.step, "end", "training is complete")
    trainer.runlog.close()
    folder.status("done", step=trainer.step, total_steps=trainer.step)  # the report shows it
    page = report.write(folder.path)
    log.info("backbone: %s", ", ".join(str(path) for path in exports))
    log.info("report: %s", page)


def _summarise(trainer: Trainer, folder: RunFolder, exports: list[str]) -> None:
    stats, store = trainer.pipeline.stats(), trainer.pipeline.store
    seconds = trainer.clock.seconds
    images = trainer.step * trainer.plan.global_batch
    rate = images / seconds if seconds else 0.0
    folder.add_to_summary(
        training_seconds=seconds,
        images=images,
        images_per_second=rate,
        images_per_second_per_gpu=rate / trainer.world.size,
        device=str(trainer.world.device),
        # Seconds of this session; the step is what is left of the loop's wall time.
        throughput={
            "decode_wait": stats["wait"],
            "copy": stats["copy"],
            "augment": stats["augment"],
            "step": max(0.0, trainer.session_seconds - stats["wait"] - stats["augment"]),
        },
        quarantined=len(store.quarantined),
        skipped_steps=trainer.nonfinite.total,
        bad_images={store.name(row): reason for row, reason in stats["bad"].items()},
        exports=exports,
        report=str(folder.path / "report.html"),
    )
