"""Grids by optimisation without the objective's gradient: DMN, GITS and OSS at work on a model (`grids.optimized`,
`grids.dynamic`).

    dmn     the error bound of a solver of the student's order; no model
    gits    dynamic programming on the local errors of Euler's steps between the places of a teacher's trajectory
    oss     dynamic programming on the distance of the student's states to the teacher's; the median over samples

All three are baselines: what they minimise is not the distance at the end of the student's solve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ts_adapt.grids.dynamic import gits, median, oss
from ts_adapt.grids.optimized import dmn
from ts_adapt.interfaces import Solver, TimeGrid, unknown
from ts_adapt.sampling import integrate
from ts_adapt.search.objective import Batch, Objective

METHODS = ("dmn", "gits", "oss")


@dataclass
class OptimizedOptions:
    """The trajectories that gits and oss are given."""

    samples: int = 64
    """Training samples whose trajectories are looked at."""
    places: int = 60
    """Steps of these trajectories; the grid consists of some of their times."""


def search_optimized(
    method: str, objective: Objective, batch: Batch, teacher: Solver, trajectory: TimeGrid, steps: int
) -> TimeGrid:
    """The grid of `steps` steps that `method` finds.

    teacher, trajectory  the solver and the fine grid of the trajectories, from the noises of `batch`

    Raises TsAdaptError for an unknown method, and for more steps than `trajectory` has.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    noise, denoiser = objective.denoiser.noise, objective.denoiser
    if method == "dmn":
        return TimeGrid(dmn(noise, steps, order=objective.solver.order))
    with torch.no_grad():
        fine = integrate(denoiser, teacher, trajectory, batch.x_T, condition=batch.condition, keep_trajectory=True)
    assert fine.states is not None and fine.x0 is not None
    if method == "gits":
        return TimeGrid(gits(fine.states, fine.x0, trajectory.times, steps, noise))

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return denoiser(x_t, t, **batch.condition)

    return TimeGrid(median(oss(denoise, fine.states, trajectory.times, steps, noise)))
