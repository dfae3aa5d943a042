"""The training loop: clock, schedules, log, evaluation, checkpoints. The method is in step.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from byol_fast import checkpoint, gauges, graphed, monitor
from byol_fast.clock import Clock
from byol_fast.compiled import Networks
from byol_fast.distributed import World, data_parallel
from byol_fast.errors import Diverged, Preempted
from byol_fast.model import BYOL
from byol_fast.online_eval import OnlineEvaluation, save_view_pairs
from byol_fast.optim import LARS, set_lr
from byol_fast.probe import OnlineProbe
from byol_fast.runfolder import RunFolder
from byol_fast.schedules import learning_rate, target_decay
from byol_fast.signals import StopSignal
from byol_fast.step import AUTOCAST, StepOutput, train_step
from pipelines.pipeline import ViewPipeline, Views


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The run in numbers; a step is an optimizer step, τ the target's decay."""

    total_steps: int
    warmup_steps: int
    peak_lr: float
    target_decay: float  # τ at step 0
    global_batch: int
    seed: int
    precision: str  # fp32 | bf16 | fp16
    stop_after: int  # this session trains no further; the schedules still end at total_steps
    log_every: int  # steps
    eval_every: int  # epochs; 0: only before the first and after the last step
    checkpoint_steps: int  # 0: by time alone
    checkpoint_minutes: float
    keep_checkpoints: int
    stop_on_collapse: bool


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
        graph: bool = False,  # whether the step becomes a CUDA graph
    ) -> None:
        self.world, self.folder, self.plan, self.model = world, folder, plan, model
        self.optimizer, self.pipeline, self.evaluation = optimizer, pipeline, evaluation
        self.probe, self.runlog, self.identity = probe, runlog, identity
        with graphed.side_stream(world.device) if graph else nullcontext():
            self.networks = replace(networks, online=data_parallel(networks.online, world))
        self.lr, self.decay = 0.0, plan.target_decay
        self.scaler = torch.amp.GradScaler(world.device.type) if plan.precision == "fp16" else None
        self.graphed = (
            graphed.GraphedStep(
                model, self.networks, optimizer, autocast_dtype=AUTOCAST.get(plan.precision)
            )
            if graph
            else None
        )
        self.step = 0
        self.clock, self._seconds_before = Clock(), 0.0
        self._finite = torch.ones((), dtype=torch.bool, device=world.device)
        self._probe_loss = torch.zeros((), device=world.device)
        self._saved_step, self._saved_at = -1, time.monotonic()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, and whom it belongs to."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "probe": self.probe.state_dict() if self.probe else {},
            "seconds": self.clock.seconds,
            **self.identity,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue after the step at which `state()` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.probe and state["probe"]:
            self.probe.load_state_dict(state["probe"])
        self.step, self._saved_step = state["step"], state["step"]
        self.clock, self._seconds_before = Clock(state["seconds"], self.step), state["seconds"]

    @property
    def session_seconds(self) -> float:
        """Seconds of training since this process began."""
        return self.clock.seconds - self._seconds_before

    def run(self) -> bool:
        """Train to `total_steps` or `stop_after`; whether the run is complete.

        Raises:
            Diverged: the loss is not finite, or the embeddings collapsed and policy says stop.
            Preempted: a signal ended the run; its checkpoint is written.
        """
        if self.step == 0:
            self._baselines()
        stop = min(self.plan.total_steps, self.plan.stop_after)
        views = self.pipeline.steps(self.step, stop)
        self.clock.lap()
        with StopSignal() as signal:
            while self.step < stop:
                output = self._one_step(views)
                if self.step % self.plan.log_every == 0 or self.step in (1, stop):
                    self._log(output)
                if self._evaluation_due():
                    self._evaluate()
                ending, saving = self.world.any(signal.received, self._checkpoint_due(stop))
                if ending or saving:
                    self._save()
                if ending:
                    raise Preempted(f"{signal.name or 'a signal to another rank'} at {self.step}")
        return self.step >= self.plan.total_steps

    def _one_step(self, views: Iterator[Views]) -> StepOutput:
        plan, taken = self.plan, list[Views]()
        # A seed per step instead of a generator's state: dropout resumes with nothing to save.
        torch.manual_seed((plan.seed * 1_000_003 + self.step) * 8191 + self.world.rank)
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
            )
        if self.probe is not None:
            self._probe_loss = self.probe.update(output.representation, taken[0].label)
        self._finite &= output.loss.isfinite()
        if self.step == 0 and self.world.is_main:
            save_view_pairs(self.folder.path / "views.npz", taken[0].x, self.pipeline.stream.spec)
        self.step += 1
        return output

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
        self._refuse_non_finite()
        dim = output.projection.shape[1]
        found = monitor.alarms(values, self.runlog.history, dim=dim)  # history: on rank 0 alone
        self.runlog.log(self.step, values)
        for text in found:
            self.runlog.event(self.step, "alarm", text)
        (collapsed,) = self.world.any(bool(found) and self.plan.stop_on_collapse)
        if collapsed:
            raise Diverged("\n".join(found) or "another rank saw a collapse")

    def _gauges(self, output: StepOutput) -> dict[str, float]:
        # Not the predictions: the predictor says the mean of the targets at first (see alarms.py).
        z = output.projection.float()
        first, second = z.chunk(2)
        gradients = [p.grad for p in self.model.online.parameters() if p.grad is not None]
        device_values = {
            "grad_norm": torch.nn.utils.get_total_norm(gradients),
            "embedding_std": gauges.embedding_std(z),
            "rankme": gauges.rankme(z),
            "alignment": gauges.alignment(first, second),
            "uniformity": gauges.uniformity(z),
        }
        if self.probe is not None:
            device_values["probe_loss"] = self._probe_loss
        loss = self.world.mean(output.loss.detach().double().cpu())
        numbers = torch.stack([v.double() for v in device_values.values()]).tolist()
        return {
            "epoch": self.step * self.plan.global_batch / len(self.pipeline.store),
            "loss": float(loss),
            "lr": self.lr,
            "target_decay": self.decay,
            **dict(zip(device_values, numbers, strict=True)),
        }

    def _refuse_non_finite(self) -> None:
        (broken,) = self.world.any(not bool(self._finite))
        if broken:
            text = (
                f"the loss is not a finite number at step {self.step} or shortly before: training "
                f"has diverged. No checkpoint of it is kept; the newest one in "
                f"{self.folder.checkpoints} is from before. Try a lower --optim.base-lr, more "
                f"warm-up, or --precision fp32"
            )
            self.runlog.event(self.step, "diverged", text)
            raise Diverged(text)

    def _baselines(self) -> None:
        """What the trained network has to beat: raw pixels, and itself before training."""
        with self._alone():
            if self.evaluation is not None and self.world.is_main:
                untrained = self.evaluation.measure(self._backbone())["knn_accuracy"]
                self.folder.add_to_summary(
                    knn_raw_pixels=self.evaluation.raw_pixels(),
                    knn_untrained=untrained,
                    knn_data=self.evaluation.source,
                )
                self.runlog.log(0, {"epoch": 0.0, "knn_accuracy": untrained})

    def _evaluation_due(self) -> bool:
        if self.step == self.plan.total_steps:
            return True
        epochs = self.step * self.plan.global_batch // len(self.pipeline.store)
        before = (self.step - 1) * self.plan.global_batch // len(self.pipeline.store)
        every = self.plan.eval_every
        return every > 0 and epochs // every > before // every

    def _evaluate(self) -> None:
        with self._alone():
            if self.evaluation is not None and self.world.is_main:
                values = self.evaluation.measure(self._backbone(), self.probe)
                self.runlog.log(self.step, values)
                self.evaluation.save_embedding(self.folder.path / "embedding.npz")
                self.folder.add_to_summary(knn_trained=values["knn_accuracy"])

    def _checkpoint_due(self, stop: int) -> bool:
        if self.step == stop:
            return self._saved_step != self.step
        if self.plan.checkpoint_steps and self.step % self.plan.checkpoint_steps == 0:
            return True
        return (
            self.world.is_main
            and time.monotonic() - self._saved_at > 60 * self.plan.checkpoint_minutes
        )

    def _save(self) -> None:
        self._refuse_non_finite()
        if self.world.is_main:
            self.runlog.sync()
            checkpoint.save(
                self.folder.checkpoints, self.step, self.state(), keep=self.plan.keep_checkpoints
            )
            self.folder.status("running", step=self.step, total_steps=self.plan.total_steps)
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def _backbone(self) -> torch.nn.Module:
        return self.model.online.encoder.backbone

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Rank 0 works while the others wait; the time does not count as training."""
        with self.clock.paused():
            yield
            self.world.barrier()
