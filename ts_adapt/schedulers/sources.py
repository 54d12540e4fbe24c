"""Where the times of a run come from: `set_timesteps(N)` asks a source for the plan of N steps.

    Family      a fixed family of grids                           any N
    Grids       grids learned for some N                          these N, and those between the least and the greatest
    Predictors  one-shot or recursive ones, learned for some N    these N
    Chosen      any other step policy                             the N that its owner says

Between two learned numbers of steps n < N < m the grid is interpolated in log-SNR, at equal places i/N of the solve:

    lambda_N(i/N) = (1 - w) lambda_n(i/N) + w lambda_m(i/N),      w = (N - n) / (m - n)

Corrections (model times, output scales, coefficients) belong to the steps they were learned with and are not
interpolated. A predictor has no such rule, so an N it was not learned for is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ts_adapt.grids.parametric import interpolate
from ts_adapt.interfaces import MAX_STEPS, NoiseSchedule, StepPolicy, TimeGrid, TsAdaptError, one_line
from ts_adapt.numerics import validate_grid
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.schedulers.plans import GridPlan, Plan, PolicyPlan, Predictor, PredictorPlan
from ts_adapt.schedules.file import CORRECTIONS
from ts_adapt.schedules.name import fixed_name
from ts_adapt.schedules.resolve import build_grid

DEFAULT_GRID = "uniform"


class Source:
    """`learned`: the numbers of steps it was learned for, None for any.

    own_times, told, inside  as in `Plan`: the first two where it may be so of a plan, the last where it is of all
    """

    learned: tuple[int, ...] | None = None
    own_times = told = False
    inside = True

    def plan(self, steps: int, noise: NoiseSchedule) -> Plan:
        """The plan of `steps` steps; TsAdaptError where there is none."""
        raise NotImplementedError


class Family(Source):
    """A fixed family of grids, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def plan(self, steps: int, noise: NoiseSchedule) -> GridPlan:
        return GridPlan(build_grid(self.name, noise, steps))


class Grids(Source):
    """Learned grids by their number of steps; `(B, N+1)` times are one grid per image of a batch of B."""

    def __init__(self, grids: Mapping[int, TimeGrid], noise: NoiseSchedule) -> None:
        self.grids = {steps: validate_grid(grid, noise) for steps, grid in sorted(grids.items())}
        for steps, grid in self.grids.items():
            if grid.steps != steps:
                raise TsAdaptError(f"the grid for {steps} steps has {grid.steps}; give it under its own number")
        self.learned: tuple[int, ...] = tuple(self.grids)
        plans = [GridPlan(grid) for grid in self.grids.values()]
        self.own_times, self.told = any(plan.own_times for plan in plans), any(plan.told for plan in plans)

    def plan(self, steps: int, noise: NoiseSchedule) -> GridPlan:
        return GridPlan(self.grids[steps] if steps in self.grids else self._between(steps, noise))

    def _between(self, steps: int, noise: NoiseSchedule) -> TimeGrid:
        if not self.learned[0] < steps < self.learned[-1]:
            raise _not_learned(steps, self.learned, ", and between them log-SNR is interpolated")
        low, high = max(n for n in self.learned if n < steps), min(n for n in self.learned if n > steps)
        pair = [self.grids[low], self.grids[high]]
        if any(grid.per_sample or grid.corrections for grid in pair):
            raise _not_learned(steps, self.learned, " (corrections and grids per image are not interpolated)")
        first, second = (interpolate(grid.times, noise, steps) for grid in pair)
        inside = torch.lerp(
            noise.log_snr(first[1:-1]), noise.log_snr(second[1:-1]), torch.tensor((steps - low) / (high - low)).double()
        )
        return validate_grid(TimeGrid(torch.cat([first[:1], noise.time(inside), first[-1:]])), noise)


class Predictors(Source):
    """One-shot or recursive predictors by the numbers of steps that they serve, all of one kind.

    `given` may be empty where a config names predictors without their weights; only `plan` then complains.
    """

    own_times = told = True

    def __init__(self, learned: tuple[int, ...], given: Mapping[int, Predictor]) -> None:
        self.learned: tuple[int, ...] = tuple(sorted(learned))
        self.given = dict(given)
        kinds = {predictor.kind for predictor in self.given.values()}
        if len(kinds) > 1:
            raise TsAdaptError("a schedule has predictors of one kind; these are one-shot and recursive, make two")
        self.inside = kinds != {OneShot.kind}

    def plan(self, steps: int, noise: NoiseSchedule) -> PredictorPlan:
        if steps not in self.learned:
            raise _not_learned(steps, self.learned)
        if steps not in self.given:
            raise TsAdaptError(
                "this schedule was made from a config, which holds no weights of predictors; load it with "
                "LearnedScheduler.from_pretrained, or build it with from_predictors"
            )
        return PredictorPlan(self.given[steps], steps)


class Chosen(Source):
    """Any step policy; `times` `(N+1,)` are the nominal times that stand for it in a pipeline's loop."""

    own_times = told = True
    inside = False

    def __init__(self, policy: StepPolicy, times: Tensor, noise: NoiseSchedule) -> None:
        self._plan = PolicyPlan(policy, validate_grid(times, noise).times)
        self.learned: tuple[int, ...] = (self._plan.steps,)

    def plan(self, steps: int, noise: NoiseSchedule) -> PolicyPlan:
        if steps not in self.learned:
            raise _not_learned(steps, self.learned)
        return self._plan


def source_of(grid: Any, grids: Any, predictors: Any, noise: NoiseSchedule | None) -> Source:
    """The source that a config names by one of `grid`, `grids` and `predictors`; `DEFAULT_GRID` where it names none.

    Raises TsAdaptError for more than one, for what is no such thing, and for learned grids where `noise` is not known.
    """
    if sum(value is not None for value in (grid, grids, predictors)) > 1:
        raise TsAdaptError("a schedule has one of `grid`, `grids` and `predictors`; more than one was given")
    if predictors is not None:
        return Predictors(tuple(steps for served in served_by(predictors) for steps in served), {})
    if grids is not None:
        found = grids_from_json(grids)
        if not found or noise is None:
            lacking = "no noise schedule: give it betas" if found else "no grid: give at least one that was learned"
            raise TsAdaptError(f"`grids` of the schedule has {lacking}")
        return Grids(found, noise)
    return Family(str(fixed_name(DEFAULT_GRID if grid is None else str(grid))))


def served_by(predictors: Any) -> list[list[int]]:
    """The numbers of steps of each predictor that a config names: [5, [10, 20]] are one for 5, and one for 10 and 20.

    Raises TsAdaptError for anything else.
    """
    listed = predictors if isinstance(predictors, list | tuple) else []
    found = [list(served) if isinstance(served, list | tuple) else [served] for served in listed]
    every = [steps for served in found for steps in served]
    whole = all(type(steps) is int and 1 <= steps <= MAX_STEPS for steps in every)
    if not found or not all(found) or not whole or len(set(every)) < len(every):
        raise TsAdaptError(
            "`predictors` lists numbers of steps, such as [5, 10], or [[5, 10]] for one that serves both; got "
            f"{predictors!r}"
        )
    return found


def grids_to_json(grids: Mapping[int, TimeGrid]) -> dict[str, dict[str, Any]]:
    """`grids` as a config holds them: lists of numbers by name, by the number of steps."""
    return {
        str(steps): {name: value.tolist() for name, value in {"times": grid.times, **grid.corrections}.items()}
        for steps, grid in sorted(grids.items())
    }


def grids_from_json(data: Any) -> dict[int, TimeGrid]:
    """The inverse of `grids_to_json`; TsAdaptError for anything else."""
    grids: dict[int, TimeGrid] = {}
    try:
        for steps, entry in data.items():
            given = {name: torch.tensor(values, dtype=torch.float64) for name, values in entry.items()}
            foreign = given.keys() - {"times", *CORRECTIONS}
            if foreign or not 1 <= int(steps) <= MAX_STEPS or int(steps) in grids:
                raise ValueError(f"{steps!r} with {', '.join(entry)}")
            grids[int(steps)] = TimeGrid(**given)
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TsAdaptError(
            f'`grids` of a schedule are {{"5": {{"times": [...]}}, ...}}, lists of numbers by the number of steps; '
            f"these are not ({one_line(error)})"
        ) from error
    return grids


def _not_learned(steps: int, learned: tuple[int, ...], more: str = "") -> TsAdaptError:
    known = ", ".join(map(str, learned))
    return TsAdaptError(
        f"num_inference_steps is {steps}; this schedule was learned for {known}{more}: give one of them"
    )
