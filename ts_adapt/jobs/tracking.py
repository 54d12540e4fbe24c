"""Weights & Biases beside TensorBoard: what any job writes to TensorBoard goes there as well, by accelerate's tracker.

TensorBoard's files are written always. The account is that of `wandb login` or of the variable WANDB_API_KEY; with
WANDB_MODE=offline nothing leaves the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec

import torch

from ts_adapt import distributed
from ts_adapt.config import Config
from ts_adapt.interfaces import TsAdaptError, one_line
from ts_adapt.storage.files import make_folder

WANDB = "wandb"


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
    tracker.store_init_configuration(asdict(config))
    try:
        yield
    finally:
        tracker.finish()
