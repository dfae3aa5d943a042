"""The parts of a run put together, at the newest checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial

import torch

from byol_fast import checkpoint, monitor
from byol_fast import config as configuration
from byol_fast.compiled import Networks, as_they_stand, compiled
from byol_fast.config import Config
from byol_fast.distributed import World, statistics_group
from byol_fast.errors import OutOfMemory
from byol_fast.graphed import refusal
from byol_fast.model import BYOL
from byol_fast.networks.small_maps import trim
from byol_fast.optim import LARS, param_groups
from byol_fast.recipes import Resolved
from byol_fast.session import fitting, replay, split
from byol_fast.session.judging import judges
from byol_fast.session.opening import Data
from byol_fast.session.plan import RunPlan
from byol_fast.session.resuming import open_folder, same_run, taking_over
from byol_fast.session.runfolder import RunFolder
from byol_fast.step import AUTOCAST
from byol_fast.trainer import Trainer
from pipelines.pipeline import ViewPipeline, build

log = logging.getLogger(__name__)

PRECISIONS = {
    "bf16": "convolutions and matrix products in bf16, statistics, loss and updates in fp32",
    "fp16": "convolutions and matrix products in fp16 with a loss scale, the rest in fp32",
    "tf32": "fp32, with operands that a GPU rounds to TF32 (10 bits of mantissa)",
    "fp32": "fp32 throughout, without TF32",
}
OUTPUT_SIZE = 256  # of projector and predictor, as in the paper


def assemble(
    resolved: Resolved,
    data: Data,
    world: World,
    stack: contextlib.ExitStack,
) -> tuple[Trainer, RunFolder]:
    """Model, optimizer, pipeline and log around one trainer, at the newest checkpoint."""
    config = resolved.config
    folder = RunFolder(config.out)
    state = open_folder(folder, world, stack)
    identity = {"config": configuration.to_dict(config), "data": data.parts.identity()}
    if state is not None:
        with taking_over(state, folder):
            same_run(state, identity, allowed=config.checkpoint.allow_config_change)
    model = build_model(config, world)
    pipeline = _build_pipeline(resolved, data, world)
    stack.callback(pipeline.close)
    optimizer = LARS(
        param_groups(model.online, resolved.weight_decay, adapt=config.optim.adapt),
        lr=0.0,
        norm=config.optim.norm,
        lr_in_momentum=config.optim.lr_in_momentum,
    )
    evaluation, probe = judges(
        data,
        world,
        spec=configuration.spec(config),
        feature_dim=model.feature_dim,
        threads=config.input.threads,
    )
    plan = _run_plan(resolved, world)
    log.info("precision %s: %s", plan.precision, PRECISIONS[plan.precision])
    runlog = monitor.RunLog(
        folder.path,
        rank=world.rank,
        world_size=world.size,
        total_steps=plan.total_steps,
        tensorboard=config.monitor.tensorboard,
        wandb=config.monitor.wandb,
        resume_step=None if state is None else state["step"],
        config=identity["config"],
    )
    stack.callback(runlog.close)
    advice = partial(
        fitting.advice,
        model,
        world,
        resolved.split,
        image_size=config.image_size,
        dtype=_views_dtype(config, world),
        autocast_dtype=AUTOCAST.get(plan.precision),
    )
    trainer = Trainer(
        world=world,
        folder=folder,
        plan=plan,
        model=model,
        networks=_build_networks(resolved, model, plan, world, advice),
        out_of_memory_advice=advice,
        optimizer=optimizer,
        pipeline=pipeline,
        evaluation=evaluation,
        probe=probe,
        runlog=runlog,
        identity={**identity, "hyper": model.hyper},
        graph=config.run.engine == "graph",
    )
    if state is not None:
        with taking_over(state, folder):
            trainer.load_state(state)
        log.info("resumed at step %d of %d", trainer.step, plan.total_steps)
        if change := resolved.split.change(resolved.before):
            runlog.event(trainer.step, "ranks", change)
    if world.is_main:
        _describe(folder, resolved, data, trainer)
    return trainer, folder


def _describe(folder: RunFolder, resolved: Resolved, data: Data, trainer: Trainer) -> None:
    """Write what the run is into its folder. Raises ValueError where that is not possible."""
    try:
        checkpoint.write_text(folder.path / "config.yaml", configuration.to_yaml(resolved.config))
        checkpoint.write_text(folder.path / split.FILE, resolved.split.to_json())
        replay.note_parts(folder.path, data.parts)
        folder.status("running", step=trainer.step, total_steps=trainer.plan.total_steps)
    except OSError as error:
        raise ValueError(
            f"the run folder {folder.path} cannot be written: {error}. Free some space, mend "
            f"its permissions, or choose another with --out"
        ) from error


def _build_pipeline(resolved: Resolved, data: Data, world: World) -> ViewPipeline:
    config = resolved.config
    backend, _, decode = config.backend.partition(":")
    return build(
        data.store,
        spec=configuration.spec(config),
        batch_size=resolved.global_batch,
        accumulate=resolved.split.accumulate,
        rank=world.rank,
        world_size=world.size,
        place=data.parts.place(world.rank),
        seed=config.seed,
        device=world.device,
        backend=backend,
        threads=config.input.threads,
        decode=decode or "auto",
        dtype=_views_dtype(config, world),
    )


def _views_dtype(config: Config, world: World) -> torch.dtype:
    """On a GPU views are written in what the first convolution reads: half of fp32's bytes."""
    precision = _precision(config.run.precision, world)
    return AUTOCAST.get(precision, torch.float32) if world.device.type == "cuda" else torch.float32


def build_model(config: Config, world: World) -> BYOL:
    """The two networks of a run, on the rank's device. Raises ValueError as `BYOL` does."""
    torch.manual_seed(config.seed)  # the same weights on every rank
    _set_float32(_precision(config.run.precision, world))
    torch.backends.cudnn.benchmark = True
    given, sizes = config.model, (config.model.hidden_size, OUTPUT_SIZE)
    model = BYOL(
        config.backbone,
        config.model.hidden_layer,
        config.image_size,
        projector=sizes,
        predictor=sizes if given.predictor == "mlp" else given.predictor,
        norm=given.norm,
        momentum=given.momentum,
        stem=config.model.stem,
        bn_sync=statistics_group(config.model.bn_sync, world),
    )
    if world.device.type == "cpu":
        trim(model)
    return model.to(world.device).to(memory_format=torch.channels_last)


def _build_networks(
    resolved: Resolved, model: BYOL, plan: RunPlan, world: World, advice: Callable[[], str]
) -> Networks:
    """The parts the step calls, compiled where that was asked for or there is a GPU."""
    config, accumulate = resolved.config, resolved.split.accumulate
    on_gpu = world.device.type == "cuda"
    if config.run.engine == "graph":
        reason = refusal(world.device, accumulate=accumulate, precision=plan.precision)
        if not reason and config.model.predictor == "directpred":
            reason = "DirectPred's eigenvalues make the host wait (--model.method)"
        if reason:
            raise ValueError(f"--run.engine graph: {reason}; use --run.engine auto")
    if config.run.engine == "eager" or (config.run.engine == "auto" and not on_gpu):
        return as_they_stand(model)
    try:
        return compiled(
            model,
            world,
            batch=resolved.split.micro_batch,
            image_size=config.image_size,
            dtype=_views_dtype(config, world),
            autocast_dtype=AUTOCAST.get(plan.precision),
        )
    except OutOfMemory as error:
        reason = str(error)
    raise OutOfMemory(f"out of memory in the trial before training, {reason}. {advice()}")


def _run_plan(resolved: Resolved, world: World) -> RunPlan:
    config = resolved.config
    return RunPlan(
        total_steps=resolved.total_steps,
        warmup_steps=resolved.warmup_steps,
        peak_lr=resolved.peak_lr,
        target_decay=resolved.target_decay,
        global_batch=resolved.global_batch,
        seed=config.seed,
        precision=_precision(config.run.precision, world),
        stop_after=resolved.stop_after,
        log_every=config.monitor.log_every,
        eval_every=config.monitor.eval_every,
        checkpoint_steps=config.checkpoint.every_steps,
        checkpoint_minutes=config.checkpoint.every_minutes,
        keep_checkpoints=config.checkpoint.keep_newest,
        keep_every=config.checkpoint.keep_every(
            samples=resolved.samples, global_batch=resolved.global_batch
        ),
        stop_collapsed=config.monitor.stop_collapsed,
        stop_nonfinite=config.monitor.stop_nonfinite,
    )


def _set_float32(precision: str) -> None:
    """What a GPU does with fp32 operands: under fp32 it does not round them to TF32.

    torch's own default rounds those of convolutions, and not those of matrix products.
    """
    tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def _precision(asked: str, world: World) -> str:
    """What `auto` means on this device."""
    if asked != "auto":
        return asked
    on_gpu = world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bf16" if on_gpu else "fp32"
