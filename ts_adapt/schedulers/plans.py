"""The times of one run of N steps: what a pipeline's loop sees, and the step policy that the run follows.

    GridPlan         a grid: fixed, static, or one for each image of a batch
    PredictorPlan    a one-shot or recursive predictor
    PolicyPlan       any other step policy

A plan is made of values only, so that a schedule can be copied and pickled at any moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ts_adapt.grids.given import from_sigmas, from_timesteps
from ts_adapt.interfaces import MAX_STEPS, NoiseSchedule, StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.noise import RectifiedFlow
from ts_adapt.policies import FollowGrid
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive

Predictor = OneShot | Recursive
SHARED_DIMS = {"times": 1, "model_times": 1, "output_scale": 1, "coefficients": 2}
"""What a grid holds -> its number of dimensions where all samples share it."""


class Plan:
    """The times of a run.

    times      the nominal times `(N+1,)`, float64: what a pipeline's loop sees. For a grid that the batch shares they
               are the times; for others, those of the static grid or the mean of the grids
    own_times  every sample has times, or corrections, of its own
    told       the network has to be told other times than the nominal ones: own times, or model times
    rows       the number of samples that it is for; None: any
    inside     a run may begin at a later place than 0; one-shot predictors see pure noise and may not
    predictor  the network that chooses the times, if any
    """

    times: Tensor
    own_times = told = False
    rows: int | None = None
    inside = True
    predictor: Predictor | None = None

    @property
    def steps(self) -> int:
        return self.times.shape[-1] - 1

    def policy(self, begin: int) -> StepPolicy:
        """What a run that begins at place `begin` of the nominal times follows."""
        raise NotImplementedError


class GridPlan(Plan):
    """Follows `grid`; a run that begins inside follows the rest of it."""

    def __init__(self, grid: TimeGrid) -> None:
        self._whole = FollowGrid(grid)
        held = ((getattr(grid, name), ndim) for name, ndim in SHARED_DIMS.items())
        own = [value for value, ndim in held if value is not None and value.ndim > ndim]
        self.times = (grid.times.mean(0) if grid.per_sample else grid.times).detach().cpu()
        self.own_times, self.rows = bool(own), len(own[0]) if own else None
        self.told = self.own_times or grid.model_times is not None

    def policy(self, begin: int) -> StepPolicy:
        return FollowGrid(self._whole.grid, first=begin) if begin else self._whole


class PredictorPlan(Plan):
    """Asks `predictor`; its static grid of `steps` steps gives the nominal times."""

    own_times = told = True

    def __init__(self, predictor: Predictor, steps: int) -> None:
        self.predictor: Predictor = predictor
        self.times = predictor.static(steps).detach().cpu()
        self.inside = isinstance(predictor, Recursive)

    def policy(self, begin: int) -> StepPolicy:
        return self.predictor.policy(self.steps, begin)


class PolicyPlan(Plan):
    """Follows `policy`; `times` stand for it in a pipeline's loop."""

    own_times = told = True
    inside = False

    def __init__(self, policy: StepPolicy, times: Tensor) -> None:
        self._policy, self.times = policy, times

    def policy(self, begin: int) -> StepPolicy:
        return self._policy


def given_plan(timesteps: Any, sigmas: Any, noise: NoiseSchedule, time_scale: float) -> GridPlan:
    """The plan of times given by hand, as `timesteps` in the network's unit, or as `sigmas`; it ends in t_min.

    The sigmas are edm_sigmas, or t for a rectified flow; a 0 at their end is that end. Raises TsAdaptError for both at
    once, and for numbers that do not fall, or leave the noise schedule.
    """
    if timesteps is not None and sigmas is not None:
        raise TsAdaptError("timesteps and sigmas were given; give one of them")
    if timesteps is not None:
        times, _ = from_timesteps(_numbers(timesteps, "timesteps"), noise, "the list of timesteps", scale=time_scale)
    else:
        given = _numbers(sigmas, "sigmas")
        times, _ = from_sigmas(given if given[-1] == 0 else [*given, 0.0], noise, "the list of sigmas")
    return GridPlan(TimeGrid(times))


def _numbers(given: Sequence[float] | Tensor, what: str) -> list[float]:
    try:
        values = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TsAdaptError(f"{what} is a list of numbers; got {type(given).__name__} ({error})") from error
    if values.ndim != 1 or not 1 <= len(values) <= MAX_STEPS:
        raise TsAdaptError(f"{what} is a list of 1 to {MAX_STEPS} numbers; got shape {tuple(values.shape)}")
    numbers: list[float] = values.tolist()
    return numbers


def stands_for_number(sigmas: Any, noise: NoiseSchedule) -> bool:
    """Whether `sigmas` are 1, 1 - 1/N, .., 1/N: what pipelines of flows give where the user has not."""
    if sigmas is None or not isinstance(noise, RectifiedFlow):
        return False
    given = _numbers(sigmas, "sigmas")
    default = torch.linspace(1, 1 / len(given), len(given), dtype=torch.float64)
    return torch.allclose(torch.tensor(given, dtype=torch.float64), default, atol=1e-6)
