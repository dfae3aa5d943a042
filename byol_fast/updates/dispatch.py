"""Which implementation of LARS updates which parameter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from byol_fast.updates import lars_updates
from byol_fast.updates.lars_updates import Update
from byol_fast.updates.layouts import by_kind, kind, overlapping, same_order

if TYPE_CHECKING:
    from byol_fast.updates.fused_update import FusedGroup

log = logging.getLogger(__name__)

Impl = Literal["auto", "reference", "foreach", "fused", "apex"]


class Dispatch:
    """The kernels of one optimizer, and what they cannot take.

    Args:
        impl: see `optim.LARS`.
        groups: the parameters of each group.

    Raises:
        ValueError: "fused" was asked for and cannot take a parameter.
        ImportError: the package of `impl` is missing.
    """

    def __init__(self, impl: Impl, groups: Sequence[list[Tensor]]) -> None:
        everything = [p for group in groups for p in group]
        self.impl: Impl = _choose(everything) if impl == "auto" else impl
        self.fused: list[FusedGroup] = []  # one for each group, with "fused" alone
        self._logged: set[str] = set()
        self._unsupported: Callable[[Tensor], str] | None = None
        self._update: Update = lars_updates.foreach
        # Each reads what the one before wrote: one after the other, whatever the implementation.
        self._overlapping = {everything[index] for index in overlapping(everything)}
        match self.impl:
            case "fused":
                from byol_fast.updates.fused_update import FusedGroup, unsupported

                if refused := _first_refused(unsupported, everything):
                    raise ValueError(f"impl='fused' cannot take {refused}; use 'foreach'")
                self._unsupported = unsupported
                self.fused = [FusedGroup() for _ in groups]
            case "apex":
                from byol_fast.updates.apex_update import unsupported as refused_by_apex
                from byol_fast.updates.apex_update import update

                self._unsupported, self._update = refused_by_apex, update
            case "reference":
                self._update = lars_updates.reference

    def split(self, params: list[Tensor]) -> tuple[list[Tensor], list[tuple[Update, list[Tensor]]]]:
        """What the fused kernels take of a group, and the rest with the update that takes it."""
        own: list[Tensor] = []
        loose: list[Tensor] = []
        alone: list[Tensor] = []
        for p in params:
            if p in self._overlapping:
                alone.append(p)
            elif self._unsupported is None:
                own.append(p)
            else:
                reason = self._unsupported(p)
                if not reason and own and p.device != own[0].device:
                    reason = "it is on another device than the first"
                if reason:
                    self._say_once(f"a parameter of shape {list(p.shape)}: {reason}")
                (loose if reason else own).append(p)
        others: list[tuple[Update, list[Tensor]]] = []
        if not self.fused:
            lists = by_kind(own) if self.impl == "foreach" else [range(len(own))]
            others = [(self._update, [own[index] for index in some]) for some in lists]
            own = []
        others += [(lars_updates.foreach, [loose[i] for i in some]) for some in by_kind(loose)]
        others.append((lars_updates.reference, alone))
        return own, [(update, some) for update, some in others if some]

    def take(self, averages: dict[Tensor, Tensor], p: Tensor) -> Tensor | None:
        """The target of a parameter, taken out, if the kernel can walk through both at once."""
        target = averages.get(p)
        if target is None:
            return None
        if kind(target) == kind(p) and same_order(p, target):
            return averages.pop(p)
        self._say_once(
            f"the average of a parameter of shape {list(p.shape)}: it has another dtype, device or "
            "memory order"
        )
        return None

    def _say_once(self, what: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            log.warning("LARS updates by foreach, not by %s, %s", self.impl, what)


def _choose(params: list[Tensor]) -> Impl:
    """What "auto" means for these parameters."""
    if not (params and params[0].is_cuda):
        return "foreach"
    try:
        from byol_fast.updates.fused_update import unsupported
    except ImportError as error:  # no Triton
        refused = str(error)
    else:
        refused = _first_refused(unsupported, params)
    if refused:
        log.info("LARS is multi-tensor calls (foreach), not fused: %s", refused)
    return "foreach" if refused else "fused"


def _first_refused(unsupported: Callable[[Tensor], str], params: list[Tensor]) -> str:
    for p in params:
        if reason := unsupported(p):
            return f"a parameter of shape {list(p.shape)}: {reason}"
    return ""
