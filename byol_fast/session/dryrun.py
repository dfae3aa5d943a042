"""What `--dry-run` looks at beside data and arithmetic: all that would end the run at its start."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from byol_fast.assemble import build_model
from byol_fast.config import Config
from byol_fast.watching import sinks

if TYPE_CHECKING:
    from byol_fast.distributed import World

_SOURCES = {"dali": "pipelines.sources.dali_source", "ffcv": "pipelines.sources.ffcv_source"}


def check(config: Config, world: World) -> None:
    """Builds the network and imports the packages that the settings name.

    Raises:
        ValueError: the backbone or its hidden layer do not exist.
        MissingBackend: a package is missing or broken.
    """
    build_model(config, world)
    if config.monitor.wandb:
        sinks.require_wandb()
    if source := _SOURCES.get(config.backend.partition(":")[0]):
        importlib.import_module(source)
