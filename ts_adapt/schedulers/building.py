"""The ways to a schedule: from a grid, from learned schedules, from predictors, from any step policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ts_adapt.interfaces import StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.numerics import validate_grid
from ts_adapt.schedulers.noise_config import UNKNOWN, noise_config
from ts_adapt.schedulers.plans import Predictor
from ts_adapt.schedulers.sources import Chosen, grids_to_json
from ts_adapt.schedules.file import LearnedGrid


class Constructors:
    """The constructors of `LearnedScheduler`. `options` are its own: `learned_for`, `clip_x0`.

    `config` is that of the pipeline's scheduler: the noise schedule and what the network predicts.
    """

    @classmethod
    def from_grid(
        cls,
        grid: str | TimeGrid | Tensor,
        solver: str = "unipc-2",
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """From a fixed grid: a family's name, or times `(N+1,)`, or `(B, N+1)` with one grid for each image of a batch.

        A family may do without `config` and takes over that of the pipeline it is attached to.
        """
        if isinstance(grid, str):
            noise = UNKNOWN if config is None else _required(config, "a family of grids")
            return cls._made(noise, solver=solver, grid=grid, **options)
        found = _as_grid(grid)
        noise = _required(config, "a grid of times")
        return cls._made(noise, solver=solver, grids=grids_to_json({found.steps: found}), **options)

    @classmethod
    def from_schedules(
        cls, schedules: LearnedGrid | Sequence[LearnedGrid], config: Mapping[str, Any], **options: Any
    ) -> Any:
        """From learned static schedules for one model and solver, each for another NFE, and the scheduler's config."""
        found = _all_of(schedules, LearnedGrid, "from_schedules", "learned schedules, which LearnedGrid.load reads")
        solvers, steps = {s.solver for s in found}, [s.grid.steps for s in found]
        if len(solvers) > 1 or len(set(steps)) < len(steps):
            raise TsAdaptError(
                f"schedules in one file share a solver and differ in NFE; these have {', '.join(sorted(solvers))} "
                f"and NFE {', '.join(map(str, steps))}"
            )
        options.setdefault("learned_for", _shared([s.about for s in found]))
        options.setdefault("solver", found[0].solver)
        grids = grids_to_json({s.grid.steps: s.grid for s in found})
        return cls._made(_required(config, "a learned schedule"), grids=grids, **options)

    @classmethod
    def from_predictors(
        cls, predictors: Predictor | Sequence[Predictor], solver: str, config: Mapping[str, Any], **options: Any
    ) -> Any:
        """From predictors of one kind (`load_predictor` reads them), each for other NFEs."""
        found = _all_of(predictors, Predictor, "from_predictors", "predictors, which load_predictor reads")
        found.sort(key=lambda predictor: predictor.learned[0])
        given = {steps: predictor for predictor in found for steps in predictor.learned}
        if len(given) < sum(len(predictor.learned) for predictor in found):
            raise TsAdaptError("two of the predictors are for the same NFE; give one for each")
        served = [list(p.learned) if len(p.learned) > 1 else p.learned[0] for p in found]
        schedule = cls._made(_required(config, "a predictor"), solver=solver, predictors=served, **options)
        schedule.use_predictors(given)
        return schedule

    @classmethod
    def from_policy(
        cls, policy: StepPolicy, times: Tensor, solver: str, config: Mapping[str, Any], **options: Any
    ) -> Any:
        """From any step policy; `times` `(N+1,)` are the nominal ones of the loop. It cannot be saved."""
        if not isinstance(policy, StepPolicy):
            raise TsAdaptError(f"a step policy has init and next; got {type(policy).__name__}, which has not")
        nominal = _as_grid(times).times
        schedule = cls._made(_required(config, "a step policy"), solver=solver, **options)
        schedule.source = Chosen(policy, nominal, schedule.noise)
        return schedule

    @classmethod
    def _made(cls, noise: Mapping[str, Any], **options: Any) -> Any:
        make: Any = cls
        return make(**noise, **options)


def _as_grid(grid: Any) -> TimeGrid:
    """`grid` with valid times; TsAdaptError where it is none."""
    try:
        return validate_grid(grid if isinstance(grid, TimeGrid) else torch.as_tensor(grid, dtype=torch.float64))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TsAdaptError(
            f"a grid is a family's name, a TimeGrid or a tensor of times; got {type(grid).__name__} ({error})"
        ) from error


def _all_of(given: Any, kind: Any, method: str, what: str) -> list[Any]:
    """`given`, one or several of `kind`, as a list; TsAdaptError for anything else."""
    found = list(given) if isinstance(given, list | tuple) else [given]
    if not found or not all(isinstance(one, kind) for one in found):
        names = ", ".join(type(one).__name__ for one in found) or "none"
        raise TsAdaptError(f"{method} takes at least one of {what}; got {names}")
    return found


def _required(config: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise TsAdaptError(f"{what} belongs to a noise schedule; pass config=pipe.scheduler.config")
    return noise_config(config)


def _shared(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them say alike."""
    first, *rest = abouts
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in rest)}
