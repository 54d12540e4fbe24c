"""Where the times of a run come from: `set_timesteps(N)` asks the schedule's source for the plan of N steps.

    Plan     the nominal times, which a pipeline's loop sees, and the step policy that the run follows
    Source   the plans of a schedule: of a fixed family of grids, for any N, or those that were learned for some

Over a number of steps that was not learned a grid is interpolated, with its corrections (`grids.between`), with a
warning; those of the images of one batch are not. A predictor of several N serves those between by itself
(`predictors.predictor`). Any other N is refused, and so is one far beyond what was learned: a call without a number of
steps asks for the pipeline's own, of 25 to 1000, which nobody who attached a schedule for a few meant.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError, TsAdaptWarning
from ts_adapt.grids.between import FURTHEST, grid_between
from ts_adapt.grids.given import from_sigmas, from_timesteps
from ts_adapt.grids.parametric import neighbours
from ts_adapt.interfaces import EMBEDDING, GUIDANCE, MAX_STEPS, MODEL_TIMES, NoiseSchedule, StepPolicy, TimeGrid
from ts_adapt.numerics import validate_grid
from ts_adapt.policies import FollowGrid
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.predictor import served
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.schedules.resolve import build_grid

Predictor = OneShot | Recursive
LISTS = ("timesteps", "sigmas")
"""The arguments by which times are given to a run."""
OWN_NUMBER = " (a call without num_inference_steps asks for the pipeline's own number)"


@dataclass(frozen=True)
class Plan:
    """The times of a run; values only, so that a schedule can be copied and pickled at any moment.

    times      the nominal times `(N+1,)`, float64: what a pipeline's loop sees. For a grid that the batch shares they
               are the times; for others, those of the static grid or the mean of the grids
    policy     the step policy of a run that begins at this place of the nominal times
    own_times  every sample has times, or corrections, of its own
    told       the network has to be told other times than the nominal ones, own times or model times, to be given an
               offset of its embedding of them, or listened to, for its guidance
    inside     a run may begin at a later place than 0; what sees pure noise, as one-shot predictors do, may not
    rows       the number of samples that it is for; None: any
    grid, predictor    what the times are those of; None for any other step policy
    """

    times: Tensor
    policy: Callable[[int], StepPolicy]
    own_times: bool = True
    told: bool = True
    inside: bool = False
    rows: int | None = None
    grid: TimeGrid | None = None
    predictor: Predictor | None = None

    @classmethod
    def of_grid(cls, grid: TimeGrid) -> Plan:
        """Along `grid`, fixed, static, or one for each sample of a batch; a run that begins inside takes the rest."""
        rows = grid.own_rows
        times = (grid.times.mean(0) if grid.per_sample else grid.times).detach().cpu()
        own, told = rows is not None, rows is not None or bool({MODEL_TIMES, GUIDANCE, EMBEDDING} & grid.held.keys())
        return cls(times, partial(_along, grid), own, told, inside=True, rows=rows, grid=grid)

    @classmethod
    def of_predictor(cls, predictor: Predictor, steps: int) -> Plan:
        """As `predictor` says; its static grid of `steps` steps gives the nominal times."""
        times, inside = predictor.static(steps).detach().cpu(), isinstance(predictor, Recursive)
        return cls(times, partial(predictor.policy, steps), inside=inside, predictor=predictor)

    @classmethod
    def of_policy(cls, policy: StepPolicy, times: Tensor) -> Plan:
        """As `policy` says; `times` stand for it in a pipeline's loop."""
        return cls(times, partial(_whole, policy))

    @property
    def steps(self) -> int:
        return self.times.shape[-1] - 1


def _along(grid: TimeGrid, begin: int) -> FollowGrid:
    return FollowGrid(grid, first=begin)


def _whole(policy: StepPolicy, begin: int) -> StepPolicy:
    return policy


@dataclass(frozen=True)
class Source:
    """Where the times of a schedule come from.

    family   a fixed family of grids, by its name: any number of steps
    plans    what was learned, by the number of steps; None for a predictor whose weights are not here
    """

    family: str | None = None
    plans: Mapping[int, Plan | None] = field(default_factory=dict)

    @classmethod
    def of_grids(cls, grids: Mapping[int, TimeGrid], noise_schedule: NoiseSchedule) -> Source:
        """Learned grids by their number of steps; `(B, N+1)` times are one grid per sample of a batch of B."""
        valid = {steps: validate_grid(grid, noise_schedule) for steps, grid in sorted(grids.items())}
        for steps, grid in valid.items():
            if grid.steps != steps:
                raise TsAdaptError(f"the grid for {steps} steps has {grid.steps}; give it under its own number")
        return cls(plans={steps: Plan.of_grid(grid) for steps, grid in valid.items()})

    @classmethod
    def of_predictors(cls, given: Mapping[int, Predictor]) -> Source:
        """Predictors of one kind by the numbers of steps that they serve."""
        if len({predictor.kind for predictor in given.values()}) > 1:
            raise TsAdaptError("a schedule has predictors of one kind; these are one-shot and recursive, make two")
        return cls(plans={steps: Plan.of_predictor(given[steps], steps) for steps in sorted(given)})

    @property
    def learned(self) -> tuple[int, ...] | None:
        """The numbers of steps it was learned for; None: any."""
        return tuple(self.plans) if self.family is None else None

    @property
    def grids(self) -> dict[int, TimeGrid]:
        return {steps: plan.grid for steps, plan in self.plans.items() if plan and plan.grid is not None}

    @property
    def predictors(self) -> dict[int, Predictor]:
        return {steps: plan.predictor for steps, plan in self.plans.items() if plan and plan.predictor is not None}

    @property
    def own_times(self) -> bool:
        """As in `Plan`, of any of the plans."""
        return any(plan is None or plan.own_times for plan in self.plans.values())

    @property
    def inside(self) -> bool:
        """As in `Plan`, of all of the plans."""
        return all(plan is None or plan.inside for plan in self.plans.values())

    def plan(self, steps: int, noise_schedule: NoiseSchedule) -> Plan:
        """The plan of `steps` steps; TsAdaptError where there is none."""
        if self.family is not None:
            return Plan.of_grid(build_grid(self.family, noise_schedule, steps))
        if steps not in self.plans:
            return self._between(steps, noise_schedule)
        plan = self.plans[steps]
        if plan is None:
            raise TsAdaptError(
                "this schedule was made from a config, which holds no weights of predictors; load it with "
                "LearnedScheduler.from_pretrained, or build it with from_predictors"
            )
        return plan

    def asked(
        self, steps: Any, timesteps: Any, sigmas: Any, noise_schedule: NoiseSchedule, lists: Collection[str] = LISTS
    ) -> Plan:
        """The plan for the arguments of `set_timesteps`; `lists` as in `LearnedScheduler`.

        Raises TsAdaptError for what cannot be planned, and for lists where each sample has times of its own.
        """
        given = {"timesteps": timesteps, "sigmas": sigmas}
        kept = {name: value for name, value in given.items() if value is not None and name in lists}
        spare = next((value for value in given.values() if value is not None), None)
        if spare is not None and (not kept or stands_for_number(timesteps, sigmas, noise_schedule)):
            steps, kept = len(spare), {}
        if not kept:
            count = whole(steps)
            if count is None or not 1 <= count <= MAX_STEPS:
                raise TsAdaptError(f"num_inference_steps is {steps!r}; expected a whole number from 1 to {MAX_STEPS}")
            return self.plan(count, noise_schedule)
        if self.own_times:
            raise TsAdaptError(
                "this schedule chooses the times of each image by itself; leave timesteps and sigmas out, or attach a "
                "fixed grid"
            )
        plan = given_plan(kept.get("timesteps"), kept.get("sigmas"), noise_schedule)
        if steps is not None and steps != plan.steps:
            raise TsAdaptError(
                f"num_inference_steps is {steps!r} and the times given are those of {plan.steps} steps; leave "
                "num_inference_steps out"
            )
        return plan

    def _between(self, steps: int, noise_schedule: NoiseSchedule) -> Plan:
        near = neighbours(self.plans, steps)
        learned = ", ".join(map(str, self.plans))
        for predictor in (self.predictors[n] for n in near if n in self.predictors):
            between_too = served(predictor.learned)
            if steps in between_too:
                return Plan.of_predictor(predictor, steps)
            learned += f" and serves {between_too[0]} to {between_too[-1]}" if len(between_too) > 1 else ""
        grids = {n: grid for n, grid in self.grids.items() if n in near}
        if not grids or any(grid.own_rows is not None for grid in grids.values()):
            rule = " (grids per image are not interpolated)" if grids else ""
            made = f"`ts-adapt export SCHEDULE --steps {steps} --out grid.json` makes"
            way = f", or LearnedScheduler.from_schedules of the grid that {made}" if grids or self.predictors else ""
            raise TsAdaptError(
                f"the number of steps is {steps}; this schedule was learned for {learned}{rule}: ask for a number that "
                f"it has{way}{OWN_NUMBER}"
            )
        if steps > FURTHEST * max(self.plans):
            raise TsAdaptError(
                f"the number of steps is {steps}, more than {FURTHEST} times the most that this schedule was learned "
                f"for ({learned}): ask for {max(self.plans)}, or take the grid that `ts-adapt export --steps {steps}` "
                f"makes{OWN_NUMBER}"
            )
        warnings.warn(
            f"{steps} steps were not learned: their grid is interpolated in log-SNR from what was learned for "
            f"{', '.join(map(str, grids))}; `ts-adapt export --steps` measures what that costs",
            TsAdaptWarning,
            stacklevel=5,
        )
        return Plan.of_grid(validate_grid(grid_between(grids, noise_schedule, steps), noise_schedule))


def as_grid(given: Any, noise_schedule: NoiseSchedule | None = None) -> TimeGrid:
    """What a user gives for a grid, with valid times; TsAdaptError where it is none."""
    try:
        grid = given if isinstance(given, TimeGrid) else torch.as_tensor(given, dtype=torch.float64)
        return validate_grid(grid, noise_schedule)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TsAdaptError(
            f"a grid is a family's name, a TimeGrid or a tensor of times; got {type(given).__name__} ({error})"
        ) from error


def given_plan(timesteps: Any, sigmas: Any, noise_schedule: NoiseSchedule) -> Plan:
    """The plan of times given by hand, as `timesteps` in the network's unit, or as `sigmas`; it ends in t_min,
    or as `from_sigmas` says.

    The sigmas are those of other programs; a 0 at their end is that end. Raises TsAdaptError for both at once, and for
    numbers that do not fall, or leave the noise schedule.
    """
    if timesteps is not None and sigmas is not None:
        raise TsAdaptError("timesteps and sigmas were given; give one of them")
    if timesteps is not None:
        times, _ = from_timesteps(_listed(timesteps, "timesteps"), noise_schedule, "the list of timesteps")
    else:
        given = _listed(sigmas, "sigmas")
        times, _ = from_sigmas(given if given[-1] == 0 else [*given, 0.0], noise_schedule, "the list of sigmas")
    return Plan.of_grid(TimeGrid(times))


def _listed(given: Sequence[float] | Tensor, what: str) -> list[float]:
    try:
        values = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TsAdaptError(f"{what} is a list of numbers; got {type(given).__name__} ({error})") from error
    if values.ndim != 1 or not 1 <= len(values) <= MAX_STEPS:
        raise TsAdaptError(f"{what} is a list of 1 to {MAX_STEPS} numbers; got shape {tuple(values.shape)}")
    numbers: list[float] = values.tolist()
    return numbers


def stands_for_number(timesteps: Any, sigmas: Any, noise_schedule: NoiseSchedule) -> bool:
    """Whether the lists are what pipelines of flows give by themselves, any of `usual_lists`."""
    if float(noise_schedule.program_sigma(torch.tensor(noise_schedule.t_max))) != 1:
        return False
    given = [_listed(sigmas, "sigmas")] if sigmas is not None else []
    given += [[t / noise_schedule.time_scale for t in _listed(timesteps, "timesteps")]] if timesteps is not None else []
    usual = usual_lists(len(given[0]), noise_schedule.time_scale)

    def near(one: list[float], other: list[float]) -> bool:
        return len(one) == len(other) and all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))

    return all(any(near(one, it) for it in usual) for one in given)


def usual_lists(steps: int, scale: float) -> list[list[float]]:
    """The sigmas of N steps that pipelines of flows give where their users give none, as fractions of the whole.

    1, 1 - 1/N, .., 1/N                         most of them
    whole timesteps from `scale` to 1           CogView4, and to the one before the last, GLM-Image
    linear to 1 - .025, from there quadratic    LTX with conditions
    """
    even = [1 - i / steps for i in range(steps)]
    whole = [torch.linspace(scale, 1, n, dtype=torch.float64).long() / scale for n in (steps, steps + 1)]
    half, low = steps // 2, 0.025
    found = [even, whole[0].tolist(), whole[1][:-1].tolist()]
    if not half:
        return found
    off, rest = half - low * steps, steps - half
    a, b = off / (half * rest**2), low / half - 2 * off / rest**2
    linear = [i * low / half for i in range(half)]
    return [*found, [1 - v for v in [*linear, *(a * i**2 + b * i + a * half**2 for i in range(half, steps))]]]


def whole(number: Any) -> int | None:
    """`number`, of whatever library, if it is a whole one."""
    try:
        return None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return None
