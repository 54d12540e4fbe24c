"""Small predictors that have learned nothing yet: they correct Karras's grids, for pictures of 1x4x4."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ts_adapt.grids import fixed
from ts_adapt.grids.corrections import CORRECTIONS
from ts_adapt.interfaces import Node, NoiseSchedule, StepPolicy, TimeGrid
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.predictor import Predictor
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.training import TrainResult, train_predictor
from ts_adapt.search.objective import Batch, Objective

KINDS = [OneShot, Recursive]
STEPS = 4
OF_ANY = [name for name in CORRECTIONS if name not in ("guidance", "embedding")]
"""The corrections of any denoiser, which nothing guides and in which no network embeds the time."""
WIDTH = 5
"""Of the embedding of the time, where a test has one."""


def build(
    kind: type[Predictor], noise_schedule: NoiseSchedule, served: int | Sequence[int] = STEPS, **options: Any
) -> Predictor:
    """A predictor for one number of steps, or for several; the same at every call."""
    torch.manual_seed(0)
    times = partial(fixed.make, "karras", noise_schedule)
    static = times(served) if isinstance(served, int) else [times(steps) for steps in served]
    return kind(noise_schedule, static, (1, 4, 4), **{"width": 8, "hidden": 32, "order": 3, **options})


def randomised(predictor: Any) -> Any:
    """`predictor`, whose numbers now depend on what it sees."""
    with torch.no_grad():
        predictor.encoder.weight.normal_(0, 0.3)
        predictor.encoder.bias.normal_(0, 0.03)
    return predictor


def walked(policy: StepPolicy, batch: Batch) -> list[Node]:
    """The nodes behind the first, along a `policy` that is shown the noises and the targets of `batch` at each."""
    node, state = policy.init(batch.x_T, {})
    nodes: list[Node] = []
    while node.index < node.steps:
        node, state = policy.next(batch.x_T, batch.target, node, state)
        nodes.append(node)
    return nodes


def start(objective: Objective, steps: int) -> dict[str, TimeGrid]:
    """A grid for a search to start from, by its name."""
    return {"log_snr": TimeGrid(fixed.make("log_snr", objective.denoiser.noise_schedule, steps))}


def split(batch: Batch) -> tuple[Batch, Batch]:
    """What is learned from of the fixture `problem`, and what validates."""
    return batch.rows(slice(0, 32)), batch.rows(slice(32, None))


def train(
    predictor: Any, problem: tuple[Objective, Batch], folder: Path, options: TrainOptions, **given: Any
) -> TrainResult:
    """`predictor` learns from the one part of the samples of `problem`, and the other validates."""
    objective, batch = problem
    return train_predictor(predictor, objective, *split(batch), options, folder, progress=False, **given)


def logged(folder: Path) -> dict[str, list[float]]:
    """The scalars that a training has left below `folder`, by name."""
    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    return {name: [point.value for point in events.Scalars(name)] for name in events.Tags()["scalars"]}
