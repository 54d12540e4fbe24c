"""Trainings by several processes, without a launcher's own seconds: one process imports everything, and forks them.

PYTHONPATH=tests python tests/predictors/trainers.py FOLDER     every case leaves in FOLDER/CASE what its processes have
"""

from __future__ import annotations

import ts_adapt  # noqa: F401  isort: skip

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import accelerate  # noqa: F401  (before the fork)
import torch
from torch import Tensor
from torch.utils import tensorboard  # noqa: F401  (before the fork)

from forked import codes, fork
from small_predictors import OF_ANY, build
from ts_adapt import plots  # noqa: F401  (before the fork)
from ts_adapt.denoisers.analytic import example_mixture
from ts_adapt.distances import make
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.predictors.losses import Labelled
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.training import train_predictor
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.solvers import UniPC
from ts_adapt.storage.files import write_json, write_tensors

SERVED = (2, 4)
OPTIONS = TrainOptions(loss="both", label_epochs=2, epochs=2, validate_every=1, batch_size=15, adversarial=0.5)
CASES = {
    "one": [(1, None)],
    "two": [(2, None)],
    "killed, then one": [(2, 10), (1, None)],
    "killed, then three": [(1, 17), (3, None)],
}
"""For each case how many processes train, and at which of its distances the last of them is killed; None: they end."""


def problem() -> tuple[Objective, Batch]:
    mixture = example_mixture()
    solver = UniPC(mixture.noise_schedule, order=3)
    x_T = initial_noise(0, range(50), (1, 4, 4))
    target = integrate(mixture, solver, fixed.make("log_snr", mixture.noise_schedule, 40), x_T).x
    return Objective(mixture, solver, make("l2"), derivative="exact"), Batch(torch.arange(50), x_T, target, {})


def part_of(folder: Path, rank: int, dies_at: int | None) -> None:
    """One process's part of a training; what it holds at the end goes to files of its own."""
    objective, batch = problem()
    noise_schedule, left = objective.denoiser.noise_schedule, dies_at

    def distance(x: Tensor, y: Tensor) -> Tensor:
        nonlocal left
        if left is not None:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return objective.distance(x, y)

    predictor = build(Recursive, noise_schedule, SERVED, corrections=OF_ANY, hidden=16)
    few, ones = batch.rows(slice(0, 20)), torch.ones(20)
    labels = {n: Labelled(few, TimeGrid(fixed.make("log_snr", noise_schedule, n).expand(20, -1)), ones) for n in SERVED}
    train, validation = batch.rows(slice(0, 31)), batch.rows(slice(31, None))
    result = train_predictor(
        predictor, replace(objective, distance=distance), train, validation, OPTIONS, folder, labels=labels,
        images=objective.denoiser.draw(40, 1).float(), checkpoint=folder / "training.safetensors", progress=rank == 0,
    )  # fmt: skip
    write_tensors(folder / f"{rank}.safetensors", predictor.state_dict())
    write_json(folder / f"{rank}.json", {"gain": result.gain, "epochs": result.epochs})


def run(folder: Path, count: int, dies_at: int | None) -> list[int]:
    """The exit codes of `count` processes that train together."""
    return codes(fork(count, lambda rank: part_of(folder, rank, dies_at if rank == count - 1 else None)))


def main() -> None:
    torch.set_num_threads(1)
    for case, runs in CASES.items():
        folder = Path(sys.argv[1]) / case
        folder.mkdir()
        ended = []
        for count, dies_at in runs:
            ended.append(run(folder, count, dies_at))
            if dies_at:
                (folder / "kept").write_bytes((folder / "training.safetensors").read_bytes())
        write_json(folder / "codes.json", ended)


if __name__ == "__main__":
    main()
