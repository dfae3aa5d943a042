"""How the images of a step are shared out: ranks × micro-batches of one size.

The global batch is the run's; how it is split follows the machines. A run that goes on with another
number of ranks takes as many micro-batches as keep each of them within the largest that it has had,
which is what is known to fit into memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

FILE = "ranks.json"  # in the run folder


@dataclass(frozen=True, kw_only=True)
class Split:
    """`batch = ranks × micro_batch × accumulate`, in images."""

    ranks: int
    accumulate: int  # micro-batches of one optimizer step on each rank
    micro_batch: int  # images of one forward pass on one rank
    largest: int  # micro-batch that this run has had since `asked` was set
    asked: int | None  # --input.accumulate, None where it is left open
    bn_batch: int  # images that BatchNorm's statistics are taken over

    def statistics(self) -> str:
        """How many images BatchNorm takes its statistics over, which is part of the method."""
        batch = self.ranks * self.micro_batch * self.accumulate
        if self.bn_batch == batch:
            return f"BatchNorm's statistics are over all {batch} images of a step"
        together, why = self.bn_batch // self.micro_batch, []
        if self.accumulate > 1:
            why.append(f"{self.accumulate} micro-batches (--input.accumulate)")
        if together < self.ranks:
            why.append(f"{together} of {self.ranks} ranks together (--model.bn-sync)")
        return (
            f"BatchNorm's statistics are over {self.bn_batch} of the {batch} images of a step, "
            f"not over all as in the paper: {', '.join(why)}"
        )

    def change(self, before: Split | None) -> str:
        """What a resumed run does otherwise than before, in words; empty if nothing."""
        if before is None or (before.ranks, before.accumulate) == (self.ranks, self.accumulate):
            return ""
        text = (
            f"{before.ranks} × {before.micro_batch} × {before.accumulate} → {self.ranks} × "
            f"{self.micro_batch} × {self.accumulate} (ranks × images × micro-batches of a step): "
            f"the batch and the rows stay"
        )
        if before.bn_batch != self.bn_batch:
            text += (
                f"; BatchNorm's statistics are over {self.bn_batch} images instead of "
                f"{before.bn_batch}"
            )
            if self.asked is None and self.accumulate > before.accumulate:
                text += f" (--input.accumulate {before.accumulate} keeps them, if memory allows)"
        return text

    def to_json(self) -> str:
        """For the run folder, and so for the session that resumes."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


def read(folder: Path) -> Split | None:
    """The split of the session before; None if there is no checkpoint to go on from.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / FILE
    if not os.path.isfile(path) or not any((folder / "checkpoints").glob("step-*.pt")):
        return None
    try:
        return Split(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): remove it, and set --input.accumulate to the number "
            f"of micro-batches that fit into memory"
        ) from error


def share_out(
    batch: int,
    ranks: int,
    *,
    asked: int | None = None,
    together: int | None = None,
    batch_norm: bool = True,
    before: Split | None = None,
) -> Split:
    """Share a global batch out over the ranks.

    Args:
        asked: micro-batches on each rank; None leaves it open.
        together: ranks whose BatchNorm statistics are taken together; None for all.
        batch_norm: whether there is a BatchNorm, which needs two images.
        before: the split of the session that is resumed. Unless `asked` has changed since, its
            micro-batch is what the new one may not exceed.

    Raises:
        ValueError: the batch cannot be shared out, or leaves BatchNorm one image.
    """
    if before is None or asked not in (None, before.asked):
        accumulate, largest = asked or 1, None
        _refuse_uneven(batch, ranks, accumulate)
    else:
        if batch % ranks:
            fitting = [n for n in range(1, ranks) if batch % n == 0]
            raise ValueError(
                f"batch_size {batch} of this run cannot be shared out evenly over {ranks} ranks: "
                f"go on with {fitting[-1]}, or another number that divides it"
            )
        each, largest = batch // ranks, before.largest
        accumulate = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= largest)
    micro_batch = batch // (ranks * accumulate)
    bn_batch = micro_batch * (ranks if together is None else together)
    if batch_norm and bn_batch < 2:
        raise ValueError(
            f"batch_size {batch} leaves BatchNorm one image for its statistics on {ranks} ranks × "
            f"{accumulate} micro-batches: use --batch-size {2 * ranks * accumulate} or more"
        )
    return Split(
        ranks=ranks,
        accumulate=accumulate,
        micro_batch=micro_batch,
        largest=largest or micro_batch,
        asked=asked,
        bn_batch=bn_batch,
    )


def _refuse_uneven(batch: int, ranks: int, accumulate: int) -> None:
    shares = ranks * accumulate
    if batch % shares:
        below = batch // shares * shares
        near = f"{below} or {below + shares}" if below else str(shares)
        raise ValueError(
            f"batch_size {batch} cannot be shared out evenly over {ranks} ranks × "
            f"{accumulate} micro-batches: use --batch-size {near}"
        )
