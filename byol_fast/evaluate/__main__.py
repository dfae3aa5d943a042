"""`python -m byol_fast.evaluate TASK --weights FILE --data DIR`: a table and a JSON file each.

A task is a module in `commands/` with `flags(parser)` and `run(args)`; it is imported when it is
asked for, and torch only when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Sequence

from byol_fast.errors import CheckpointError, Diverged, Exit, Preempted
from byol_fast.flags import nearest
from pipelines.errors import DataError, MissingBackend

TASKS = {  # name -> what it does; the module in `commands/` has the same name
    "knn": "weighted k nearest neighbours, nothing is trained",
    "linear": "a linear classifier on the frozen network",
    "svm": "linear SVMs, one a class (VOC07, or any labelled images)",
    "lowshot": "the same from few images of each class",
    "transfer": "logistic regression, its penalty chosen on validation images",
    "mhead": "linear classifiers on the stem and the four stages of a ResNet",
    "semi": "fine-tuning with 1% or 10% of the labels",
    "finetune": "fine-tuning the whole network on another labelled set",
    "detect": "a detector fine-tuned from the network: VOC07+12, COCO",
    "segment": "a segmenter fine-tuned from the network: VOC12, Cityscapes",
    "predict": "class and score of images, by a classifier that linear or transfer saved",
    "embed": "features of a folder of images as .npy",
    "table": "results that were written before, as one table",
}
PROGRAM = "python -m byol_fast.evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code of `errors.Exit`."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        print(_usage())
        return Exit.DONE
    if name not in TASKS:
        problem = f"error: unknown task {name!r}{nearest(name, TASKS)}" if name else ""
        print("\n".join(filter(None, [problem, _usage()])), file=sys.stderr)
        return Exit.USAGE
    task = importlib.import_module(f"byol_fast.evaluate.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=task.__doc__)
    task.flags(parser)
    args = parser.parse_args(words[1:])
    args.task = name
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        task.run(args)
    except DataError as error:
        return _failed(Exit.DATA, error)
    except CheckpointError as error:
        return _failed(Exit.NO_CHECKPOINT, error)
    except Diverged as error:
        return _failed(Exit.DIVERGED, error)
    except Preempted as error:
        return _failed(Exit.PREEMPTED, error)
    except (ValueError, MissingBackend, OSError) as error:
        return _failed(Exit.USAGE, error)
    except KeyboardInterrupt:  # of a task that has no checkpoint to save
        print("interrupted: no result was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return Exit.DONE


def _usage() -> str:
    lines = [f"  {name:<10}{about}" for name, about in TASKS.items()]
    head = f"usage: {PROGRAM} TASK …   ({PROGRAM} TASK --help)"
    return "\n".join([head, "", *lines])


def _failed(code: Exit, error: BaseException) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
