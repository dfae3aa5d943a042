"""The training loop: clock, schedules, log, evaluation, checkpoints. The method is in step.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from byol_fast import graphed, monitor
from byol_fast.compiled import Networks
from byol_fast.distributed import World, data_parallel
from byol_fast.errors import Diverged, OutOfMemory, Preempted
from byol_fast.guard import Guard
from byol_fast.memory import is_out_of_memory
from byol_fast.model import BYOL
from byol_fast.optim import LARS, set_lr
from byol_fast.schedules import learning_rate, target_decay
from byol_fast.session.async_checkpoint import CheckpointWriter
from byol_fast.session.clock import Clock
from byol_fast.session.divergence import NonFinite
from byol_fast.session.measuring import Measuring
from byol_fast.session.plan import RunPlan
from byol_fast.session.runfolder import RunFolder
from byol_fast.session.saving import Saving
from byol_fast.session.signals import StopSignal
from byol_fast.step import AUTOCAST, StepOutput, train_step
from byol_fast.watching import gauges
from byol_fast.watching.online_eval import OnlineEvaluation, save_view_pairs
from byol_fast.watching.probe import OnlineProbe
from pipelines.pipeline import ViewPipeline, Views


class Trainer:
    """One run over one pipeline; `run()` goes on from wherever `load_state` has put it."""

    def __init__(
        self,
        *,
        world: World,
        folder: RunFolder,
        plan: RunPlan,
        model: BYOL,
        networks: Networks,
        optimizer: LARS,
        pipeline: ViewPipeline,
        evaluation: OnlineEvaluation | None,
        probe: OnlineProbe | None,
        runlog: monitor.RunLog,
        identity: dict[str, Any],  # whom a checkpoint belongs to: configuration, data, model
        out_of_memory_advice: Callable[[], str],  # what to change where a step does not fit
        graph: bool = False,  # whether the step becomes a CUDA graph
    ) -> None:
        self.world, self.folder, self.plan, self.model = world, folder, plan, model
        self.optimizer, self.pipeline, self.probe = optimizer, pipeline, probe
        self.runlog, self.identity = runlog, identity
        self._out_of_memory_advice = out_of_memory_advice
        with graphed.side_stream(world.device) if graph else nullcontext():
            self.networks = replace(networks, online=data_parallel(networks.online, world))
        self.lr, self.decay = 0.0, plan.target_decay
        self.scaler = torch.amp.GradScaler(world.device.type) if plan.precision == "fp16" else None
        self.guard = Guard(model, window=min(plan.log_every, plan.total_steps))
        self.nonfinite = NonFinite(
            world, self.guard, pipeline, folder.path, runlog, stop=plan.stop_nonfinite
        )
        self.graphed = (
            graphed.GraphedStep(
                model,
                self.networks,
                optimizer,
                autocast_dtype=AUTOCAST.get(plan.precision),
                guard=self.guard,
            )
            if graph
            else None
        )
        self.step = 0
        self.clock, self._seconds_before = Clock(), 0.0
        self._probe_loss = torch.zeros((), device=world.device)
        self.measuring = Measuring(
            world,
            folder,
            runlog,
            evaluation=evaluation,
            probe=probe,
            backbone=model.online.encoder.backbone,
        )
        writer = CheckpointWriter(
            folder.checkpoints,
            keep=plan.keep_checkpoints,
            keep_every=plan.keep_every,
            before=runlog.sync,  # the log reaches as far as the checkpoint does
            after=lambda step: folder.running(step=step, total_steps=plan.total_steps),
        )
        self.saving = Saving(
            world,
            writer,
            every_steps=plan.checkpoint_steps,
            every_minutes=plan.checkpoint_minutes,
            keep_every=plan.keep_every,
        )

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, and whom it belongs to."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "probe": self.probe.state_dict() if self.probe else {},
            "seconds": self.clock.so_far,  # its steps reach beyond the last line of the log
            "skipped_steps": self.nonfinite.total,
            "evaluation_owed": self.measuring.owed,
            "evaluations_failed": self.measuring.failed,
            **self.identity,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue after the step at which `state()` was taken."""
        self.model.load_state_dict(state["model"])
        # Momentum is the checkpoint's; weight decay and the like are this session's, where a change
        # of them was allowed.
        given = [{**group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, given, strict=True):
            group.update(own, lr=group["lr"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.probe and state["probe"]:
            self.probe.load_state_dict(state["probe"])
        self.step = state["step"]
        self.saving.resumed(self.step)
        self.nonfinite.total = state.get("skipped_steps", 0)
        self.measuring.owed = state.get("evaluation_owed", False)
        self.measuring.failed = state.get("evaluations_failed", 0)
        self.clock, self._seconds_before = Clock(state["seconds"], self.step), state["seconds"]

    @property
    def session_seconds(self) -> float:
        """Seconds of training since this process began."""
        return self.clock.seconds - self._seconds_before

    def run(self, signal: StopSignal) -> bool:
        """Train to `total_steps` or `stop_after`; whether the run is complete.

        Raises:
            Diverged: steps were not finite or the embeddings collapsed, and policy says stop.
            OutOfMemory: a step did not fit; on the ranks where it did not.
            Preempted: a signal ended the run; its checkpoint is written.
            SaveError: a checkpoint could not be written.
        """
        stop = min(self.plan.total_steps, self.plan.stop_after)
        if self.step == 0:
            self.measuring.baselines(signal, self.clock)
        elif self.measuring.owes(self.step):
            self.measuring.measure(self.step, signal, self.clock)
        self._leave_if_asked(signal)
        views = self.pipeline.steps(self.step, stop)
        self.clock.lap()
        while self.step < stop:
            self.after_step(self._fitting_step(views), signal, stop)
        return self.step >= self.plan.total_steps

    def after_step(self, output: StepOutput, signal: StopSignal, stop: int) -> None:
        """What is due after a step: log, evaluation, checkpoint, and the end if a signal asks."""
        if self.step % self.plan.log_every == 0 or self.step in (1, stop):
            self._log(output)
        if self.plan.evaluation_due(self.step, self.pipeline.stream.images_per_epoch):
            self.measuring.measure(self.step, signal, self.clock)
        ending, saving, failed = self.world.any(
            signal.received, self.saving.due(self.step, stop), self.saving.failed
        )
        if failed and not ending:
            self.saving.settle()
        if ending or saving:
            self._save(wait=ending or self.step == stop)
        if ending:
            raise Preempted(f"{signal.name or 'a signal to another rank'} at step {self.step}")

    def _leave_if_asked(self, signal: StopSignal) -> None:
        """Before the first step of a session: there is nothing to save."""
        (ending,) = self.world.any(signal.received)
        if ending:
            name = signal.name or "a signal to another rank"
            raise Preempted(f"{name} at step {self.step}, before training")

    def _fitting_step(self, views: Iterator[Views]) -> StepOutput:
        try:
            return self._one_step(views)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Here the error is gone, and with it what its frames kept in memory.
        raise OutOfMemory(
            f"out of memory in step {self.step + 1}, rank {self.world.rank}: {reason} "
            f"{self._out_of_memory_advice()}"
        )

    def _one_step(self, views: Iterator[Views]) -> StepOutput:
        plan, taken = self.plan, list[Views]()
        # A seed per step instead of a generator's state: dropout resumes with nothing to save.
        seed = (plan.seed * 1_000_003 + self.step) * 8191 + self.world.rank
        torch.manual_seed(seed % 2**64)  # torch takes no more bits
        self.lr = learning_rate(
            self.step,
            peak=plan.peak_lr,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
        )
        self.decay = target_decay(self.step, base=plan.target_decay, total_steps=plan.total_steps)

        def batches() -> Iterator[Tensor]:  # one at a time: they are large
            for _ in range(self.pipeline.stream.accumulate):
                taken[:] = [next(views)]
                yield taken[0].x

        if self.graphed is not None:
            output = self.graphed(next(batches()), lr=self.lr, decay=self.decay)
        else:
            # Host numbers: kernels take them as arguments, a third of a tensor's passes in EMA.
            set_lr(self.optimizer, self.lr)
            output = train_step(
                self.model,
                self.networks,
                self.optimizer,
                batches(),
                accumulate=self.pipeline.stream.accumulate,
                decay=self.decay,
                autocast_dtype=AUTOCAST.get(plan.precision),
                scaler=self.scaler,
                guard=self.guard,
            )
        finite = self._finite(output)
        self.guard.note(self.step, finite, output.loss)
        if self.probe is not None:
            self._probe_loss = self.probe.update(output.representation, taken[0].label, finite)
        if self.step == 0 and self.world.is_main:
            save_view_pairs(self.folder.path / "views.npz", taken[0].x, self.pipeline.stream.spec)
        self.step += 1
        return output

    def _finite(self, output: StepOutput) -> Tensor:
        """Whether a step was one: its gradient is finite; under fp16, where that overflows now and
        then by design, its loss."""
        assert output.gradient_norm is not None
        return (output.loss if self.scaler else output.gradient_norm).isfinite()

    def _log(self, output: StepOutput) -> None:
        """One line of the log; here, and only here and when saving, the host waits for the GPU."""
        values = self._gauges(output)
        images = self.plan.global_batch * (self.step - self.clock.step)
        seconds = self.clock.lap(self.step)
        rate = images / seconds if seconds else 0.0
        waited = self.pipeline.stats()["wait"]
        values |= {
            "time/images_per_second": rate,
            "time/images_per_second_per_gpu": rate / self.world.size,
            "time/data_wait_share": (waited - self.clock.waited) / seconds if seconds else 0.0,
            "time/elapsed": self.clock.seconds,
        }
        self.clock.waited = waited
        self.nonfinite.look()
        dim = output.projection.shape[1]
        history = self.runlog.history  # on rank 0 alone
        found = monitor.alarms(values, history, dim=dim)
        collapses = monitor.collapse_alarms(values, history, dim=dim)
        self.runlog.log(self.step, values)
        for text in found:
            self.runlog.event(self.step, "alarm", text)
        (collapsed,) = self.world.any(bool(collapses) and self.plan.stop_collapsed)
        if collapsed:
            raise Diverged("\n".join(collapses) or "rank 0 saw a collapse")

    def _gauges(self, output: StepOutput) -> dict[str, float]:
        # Not the predictions: the predictor says the mean of the targets at first (see alarms.py).
        assert output.gradient_norm is not None
        device_values = {"grad_norm": output.gradient_norm, **gauges.of(output.projection)}
        if self.probe is not None:
            device_values["probe_loss"] = self._probe_loss
        loss = self.world.mean(output.loss.detach().double().cpu())
        numbers = torch.stack([v.double() for v in device_values.values()]).tolist()
        return {
            "epoch": self.step * self.plan.global_batch / self.pipeline.stream.images_per_epoch,
            "loss": float(loss),
            "lr": self.lr,
            "target_decay": self.decay,
            **dict(zip(device_values, numbers, strict=True)),
        }

    def _save(self, *, wait: bool) -> None:
        """Hand a checkpoint to the writer; with `wait`, until it is on the disk."""
        self.nonfinite.look()
        state = self.state() if self.world.is_main else None
        self.saving.save(self.step, state, wait=wait)
