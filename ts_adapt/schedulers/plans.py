"""Where the times of a run come from: `set_timesteps(N)` asks a source for the plan of N steps.

    Family      a fixed family of grids                       any N
    Grids       grids learned for some N                      these N, and those between the least and the greatest
    Predictors  one-shot or recursive ones, learned for some N    these N
    Chosen      any other step policy                         the N that its owner says

Between two learned numbers of steps n < N < m the grid is interpolated in log-SNR, at equal places i/N of the solve:

    lambda_N(i/N) = (1 - w) lambda_n(i/N) + w lambda_m(i/N),      w = (N - n) / (m - n)

Corrections (model times, output scales, coefficients) belong to the steps they were learned with and are not
interpolated. A predictor has no such rule, so an N it was not learned for is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ts_adapt.assembly import build_grid
from ts_adapt.grids.parametric import interpolate
from ts_adapt.interfaces import NoiseSchedule, StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.noise import RectifiedFlow, time_of_edm_sigma
from ts_adapt.numerics import validate_grid, validate_times
from ts_adapt.policies import FollowGrid
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.schedule_file import MAX_STEPS

Predictor = OneShot | Recursive
CORRECTIONS = ("model_times", "output_scale", "coefficients")


@dataclass(frozen=True)
class Plan:
    """The times of a run of N steps.

    times      the nominal times `(N+1,)`, float64: what a pipeline's loop sees. For a grid that the batch shares they
               are the times; for others, those of the static grid or the mean of the grids
    policy     (place of the nominal times where the run begins) -> the step policy
    own_times  every sample has its own times
    told       the network has to be told other times than the nominal ones: own times, or model times
    inside     a run may begin at a later place than 0; one-shot predictors see pure noise and may not
    predictor  the network that chooses the times, if any
    """

    times: Tensor
    policy: Callable[[int], StepPolicy]
    own_times: bool = False
    told: bool = False
    inside: bool = True
    predictor: Predictor | None = None


class Source:
    """`learned`: the numbers of steps it was learned for, None for any. `own_times`, `told`, `inside`: as in `Plan`."""

    learned: tuple[int, ...] | None = None
    own_times = False
    told = False
    inside = True

    def plan(self, steps: int, noise: NoiseSchedule) -> Plan:
        """The plan of `steps` steps; TsAdaptError where there is none."""
        raise NotImplementedError


class Family(Source):
    """A fixed family of grids, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def plan(self, steps: int, noise: NoiseSchedule) -> Plan:
        return plan_of_grid(build_grid(self.name, noise, steps))


class Grids(Source):
    """Learned grids by their number of steps; `(B, N+1)` times are one grid per image of a batch of B."""

    def __init__(self, grids: Mapping[int, TimeGrid], noise: NoiseSchedule) -> None:
        self.grids = {steps: validate_grid(grid, noise) for steps, grid in sorted(grids.items())}
        for steps, grid in self.grids.items():
            if grid.steps != steps:
                raise TsAdaptError(f"the grid for {steps} steps has {grid.steps}; give it under its own number")
        self.learned = tuple(self.grids)
        self.own_times = any(grid.per_sample for grid in self.grids.values())
        self.told = self.own_times or any(grid.model_times is not None for grid in self.grids.values())

    def plan(self, steps: int, noise: NoiseSchedule) -> Plan:
        return plan_of_grid(self.grids[steps] if steps in self.grids else self._between(steps, noise))

    def _between(self, steps: int, noise: NoiseSchedule) -> TimeGrid:
        learned = tuple(self.grids)
        if not learned[0] < steps < learned[-1]:
            raise _not_learned(steps, learned, ", and between them log-SNR is interpolated")
        low, high = max(n for n in learned if n < steps), min(n for n in learned if n > steps)
        pair = [self.grids[low], self.grids[high]]
        if any(grid.per_sample or any(getattr(grid, name) is not None for name in CORRECTIONS) for grid in pair):
            raise _not_learned(steps, learned, " (corrections and grids per image are not interpolated)")
        first, second = (interpolate(grid.times, noise, steps) for grid in pair)
        inside = torch.lerp(
            noise.log_snr(first[1:-1]), noise.log_snr(second[1:-1]), torch.tensor((steps - low) / (high - low)).double()
        )
        return validate_grid(TimeGrid(torch.cat([first[:1], noise.time(inside), first[-1:]])), noise)


class Predictors(Source):
    """One-shot or recursive predictors by their number of steps, all of one kind.

    `given` may be empty where a config names predictors without their weights; only `plan` then complains.
    """

    own_times = told = True

    def __init__(self, learned: tuple[int, ...], given: Mapping[int, Predictor]) -> None:
        self.learned = self.named = tuple(sorted(learned))
        self.given = dict(given)
        kinds = {predictor.kind for predictor in self.given.values()}
        if len(kinds) > 1:
            raise TsAdaptError("a schedule has predictors of one kind; these are one-shot and recursive, make two")
        self.inside = kinds != {OneShot.kind}

    def plan(self, steps: int, noise: NoiseSchedule) -> Plan:
        if steps not in self.named:
            raise _not_learned(steps, self.named)
        if steps not in self.given:
            raise TsAdaptError(
                "this schedule was made from a config, which holds no weights of predictors; load it with "
                "LearnedScheduler.from_pretrained, or build it with from_predictors"
            )
        predictor = self.given[steps]

        def policy(begin: int) -> StepPolicy:
            return predictor.policy(begin) if isinstance(predictor, Recursive) else predictor.policy()

        times = predictor.static_times.detach().cpu()
        return Plan(times, policy, own_times=True, told=True, inside=self.inside, predictor=predictor)


class Chosen(Source):
    """Any step policy; `times` `(N+1,)` are the nominal times that stand for it in a pipeline's loop."""

    own_times = told = True
    inside = False

    def __init__(self, policy: StepPolicy, times: Tensor, noise: NoiseSchedule) -> None:
        self.policy, self.times = policy, validate_grid(times, noise).times
        self.learned = (self.times.shape[-1] - 1,)

    def plan(self, steps: int, noise: NoiseSchedule) -> Plan:
        if steps != self.times.shape[-1] - 1:
            raise _not_learned(steps, (self.times.shape[-1] - 1,))
        return Plan(self.times, lambda begin: self.policy, own_times=True, told=True, inside=False)


def plan_of_grid(grid: TimeGrid) -> Plan:
    """The plan that follows `grid`; a run that begins inside follows the rest of it."""

    @cache
    def policy(begin: int) -> StepPolicy:
        parts = [
            None if value is None else value.narrow(axis, begin, value.shape[axis] - begin)
            for value, axis in ((grid.model_times, -1), (grid.output_scale, -1), (grid.coefficients, -2))
        ]
        return FollowGrid(TimeGrid(grid.times[..., begin:], *parts))

    nominal = grid.times.mean(0) if grid.per_sample else grid.times
    told = grid.per_sample or grid.model_times is not None
    return Plan(nominal.detach().cpu(), policy, own_times=grid.per_sample, told=told)


def given_plan(timesteps: Any, sigmas: Any, noise: NoiseSchedule, time_scale: float) -> Plan:
    """The plan of times given by hand, as `timesteps` in the network's unit, or as `sigmas`; it ends in t_min.

    The sigmas are edm_sigmas, or t for a rectified flow; a 0 at their end is that end. Raises TsAdaptError for times
    that do not fall, or leave the noise schedule.
    """
    what = "sigmas" if timesteps is None else "timesteps"
    given = torch.as_tensor(sigmas if timesteps is None else timesteps, dtype=torch.float64).detach().cpu()
    if given.ndim != 1 or not len(given):
        raise TsAdaptError(f"{what} is a list of numbers; got shape {tuple(given.shape)}")
    if timesteps is not None:
        times = given / time_scale
    else:
        given = given[:-1] if given[-1] == 0 and len(given) > 1 else given
        times = given if isinstance(noise, RectifiedFlow) else time_of_edm_sigma(noise, given)
    end = times.new_tensor([noise.t_min])
    times = times if len(times) > 1 and times[-1] == end else torch.cat([times, end])
    return plan_of_grid(TimeGrid(validate_times(times, noise, what=f"the given {what}")))


def stands_for_number(sigmas: Any) -> bool:
    """Whether `sigmas` are 1, 1 - 1/N, .., 1/N: what pipelines of flows give where the user has not."""
    if sigmas is None:
        return False
    given = torch.as_tensor(sigmas, dtype=torch.float64)
    steps = len(given) if given.ndim == 1 else 0
    return steps > 0 and torch.allclose(given, torch.linspace(1, 1 / steps, steps, dtype=torch.float64), atol=1e-6)


def grids_to_json(grids: Mapping[int, TimeGrid]) -> dict[str, dict[str, Any]]:
    """`grids` as a config holds them: lists of numbers by name, by the number of steps."""
    names = ("times", *CORRECTIONS)
    return {
        str(steps): {name: getattr(grid, name).tolist() for name in names if getattr(grid, name) is not None}
        for steps, grid in sorted(grids.items())
    }


def grids_from_json(data: Any) -> dict[int, TimeGrid]:
    """The inverse of `grids_to_json`; TsAdaptError for anything else."""
    grids: dict[int, TimeGrid] = {}
    try:
        for steps, entry in data.items():
            given = {name: torch.tensor(values, dtype=torch.float64) for name, values in entry.items()}
            unknown = given.keys() - {"times", *CORRECTIONS}
            if unknown or not 1 <= int(steps) <= MAX_STEPS:
                raise ValueError(f"{steps!r} with {sorted(unknown)}")
            grids[int(steps)] = TimeGrid(**given)
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TsAdaptError(
            f'`grids` of a schedule are {{"5": {{"times": [...]}}, ...}}, lists of numbers by the number of steps; '
            f"these are not ({reason})"
        ) from error
    return grids


def _not_learned(steps: int, learned: tuple[int, ...], more: str = "") -> TsAdaptError:
    known = ", ".join(map(str, learned))
    return TsAdaptError(
        f"num_inference_steps is {steps}; this schedule was learned for {known}{more}: give one of them"
    )
