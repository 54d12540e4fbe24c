"""Grids by dynamic programming at work on a model: GITS, OSS (`grids.dynamic`) and KLUB (`grids.klub`).

    gits    the local errors of Euler's steps between the places of a teacher's trajectory
    oss     the distance of the student's states to the teacher's; the median over samples
    klub    the bound on the divergence of the generative SDE's paths when x0 stands still between the places

All three are baselines, as is DMN (`grids.optimized`), which needs no model: what they minimise is not the distance at
the end of the student's solve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ts_adapt.grids.dynamic import gits, median, oss
from ts_adapt.grids.klub import klub
from ts_adapt.interfaces import Solver, TimeGrid
from ts_adapt.options import Count, Evaluations
from ts_adapt.sampling import integrate, noise_for
from ts_adapt.search.objective import Batch, Objective

ON_MODEL = ("gits", "oss", "klub")
METHODS = ("dmn", *ON_MODEL)


@dataclass
class OptimizedOptions:
    """What gits, oss and klub are given."""

    samples: Count = 64
    """Training samples whose trajectories are looked at."""
    places: Evaluations = 60
    """Steps of these trajectories; the grid consists of some of their times."""


def search_optimized(
    method: str, objective: Objective, batch: Batch, teacher: Solver, trajectory: TimeGrid, steps: int
) -> TimeGrid:
    """The grid of `steps` steps that `method`, of `ON_MODEL`, finds.

    teacher, trajectory  gits, oss: the solver and the fine grid of the trajectories, from the noises of `batch`;
                         klub looks at the fine grid's places on ways from the targets of `batch` to noise

    Raises TsAdaptError for more steps than `trajectory` has.
    """
    noise_schedule, denoiser, places = objective.denoiser.noise_schedule, objective.denoiser, trajectory.times

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return denoiser(x_t, t, **batch.condition)

    if method == "klub":
        draw = noise_for(objective.seed, batch.index, batch.x_T)
        return TimeGrid(klub(denoise, batch.target, places, steps, noise_schedule, draw))
    with torch.no_grad():
        fine = integrate(denoiser, teacher, trajectory, batch.x_T, condition=batch.condition, keep_trajectory=True)
    assert fine.states is not None and fine.x0 is not None
    if method == "gits":
        return TimeGrid(gits(fine.states, fine.x0, places, steps, noise_schedule))
    return TimeGrid(median(oss(denoise, fine.states, places, steps, noise_schedule)))
