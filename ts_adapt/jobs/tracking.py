"""TensorBoard, and Weights & Biases beside it: what any job writes to one goes to the other, by accelerate's tracker.

Both are told the run's name and its config, but not where black-box studies are kept. TensorBoard's files are written
always. The account is that of `wandb login` or of the variable WANDB_API_KEY; with WANDB_MODE=offline nothing leaves
the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ts_adapt import distributed
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.options import yaml_text
from ts_adapt.storage.files import make_folder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WANDB = "wandb"


@contextmanager
def board(config: Config, job: str, folder: Path) -> Iterator[SummaryWriter]:
    """What writes to TensorBoard's files in `folder`, where the run's name and its config stand first."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(make_folder(folder))) as writer:
        writer.add_text("run", f"{config.name} {job}")
        writer.add_text("config", f"```yaml\n{yaml_text(config.shown)}```")
        yield writer


@contextmanager
def tracked(config: Config, job: str) -> Iterator[None]:
    """While the block runs, the trackers of `config` follow `job`; of several processes the first one reports.

    Raises TsAdaptError for wandb where it is not installed, and where it cannot begin.
    """
    if WANDB not in config.trackers or distributed.rank() > 0:
        yield
        return
    if find_spec(WANDB) is None:
        raise TsAdaptError("the tracker wandb is not installed; pip install wandb, or leave it out of trackers")
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState(cpu=torch.device(config.model.device).type == "cpu")
    folder = make_folder(config.workspace.logs)
    tracker = WandBTracker("ts_adapt", name=f"{config.name} {job}", dir=str(folder), sync_tensorboard=True)
    try:
        tracker.start()
    except Exception as error:
        raise TsAdaptError(
            f"wandb cannot begin ({one_line(error)}); run `wandb login`, set WANDB_MODE=offline, or leave it out of "
            "trackers"
        ) from error
    tracker.store_init_configuration(config.shown)
    try:
        yield
    finally:
        tracker.finish()
