"""The numbers of a run that its trainer needs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The run in numbers; a step is an optimizer step, τ the target's decay."""

    total_steps: int
    warmup_steps: int
    peak_lr: float
    target_decay: float  # τ at step 0
    global_batch: int
    seed: int
    precision: str  # fp32 | tf32 | bf16 | fp16
    stop_after: int  # this session trains no further; the schedules still end at total_steps
    log_every: int  # steps
    eval_every: int  # epochs; 0: only before the first and after the last step
    checkpoint_steps: int  # 0: by time alone
    checkpoint_minutes: float
    keep_checkpoints: int
    keep_every: Fraction | None  # steps
    stop_collapsed: bool
    stop_nonfinite: bool

    def evaluation_due(self, step: int, images_per_epoch: int) -> bool:
        """Whether the network is evaluated after `step`."""
        if step == self.total_steps:
            return True
        epochs, before = (s * self.global_batch // images_per_epoch for s in (step, step - 1))
        return self.eval_every > 0 and epochs // self.eval_every > before // self.eval_every
