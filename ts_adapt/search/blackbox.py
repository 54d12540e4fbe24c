"""Search without gradients, by optuna: for whatever is not differentiable (a quantized network, a metric of files).

The grid is parametrised as in `static`: N logits, searched in a box around a start. Trials are kept in any optuna
storage (SQLite by default), so that a search goes on where it was killed, and many workers may share it (`workers`).
What draw i proposes is a function of (seed, i) and of the trials that are complete: killed and started again, a single
worker ends in the same grid as if it had not been.

    draw 0         the start itself
    cmaes          CMA-ES (Hansen 2016), told the complete trials of all other draws in generations, in their order
    tpe, random    optuna's, with a seed of the draw's own
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial
from tqdm import tqdm

from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import NoiseSchedule, TimeGrid
from ts_adapt.options import Count, Positive, Seed, check_options
from ts_adapt.sampling import generator_for
from ts_adapt.search.workers import Worker, complete, draw_of, explained, open_study


@dataclass
class BlackboxOptions:
    """How the gradient-free search runs."""

    trials: Count = 100
    """In all, of all workers: a resumed search makes the missing ones."""
    sampler: Literal["cmaes", "tpe", "random"] = "cmaes"
    radius: Positive = 2.0
    """Half the width of the box of logits around the start."""
    storage: str | None = None
    """Of many workers: an optuna storage URL, such as postgresql+psycopg://USER@HOST/DATABASE, or journal:///FILE in a
    folder that they share; None: an SQLite file beside the result, for one."""
    seed: Seed = 0


@dataclass(frozen=True)
class BlackboxResult:
    grid: TimeGrid
    distance: float
    start_distance: float
    trials: int


def search_blackbox(
    score: Callable[[TimeGrid], float],
    noise_schedule: NoiseSchedule,
    start: TimeGrid,
    options: BlackboxOptions,
    *,
    storage: str,
    study: str,
    alone: bool = False,
    progress: bool = True,
) -> BlackboxResult:
    """The grid of least `score` among `options.trials`; the first trial is `start` itself, so none is worse.

    storage  a URL (see `workers`); study: the name of the search in it. Both given again, the search goes on
    alone    no other process works on this study: what one that died left there is made again at once

    Raises TsAdaptError for an unknown sampler, no trials, and a storage that cannot be used.
    """
    check_options(options, "blackbox.")
    centre = times_to_logits(start.times, noise_schedule).detach()
    space = {f"logit_{i}": FloatDistribution(-options.radius, options.radius) for i in range(start.steps)}

    def grid_of(values: dict[str, Any]) -> TimeGrid:
        moved = torch.tensor([values[name] for name in space], dtype=torch.float64)
        return TimeGrid(logits_to_times(centre + moved, noise_schedule))

    run = open_study(study, storage, _Draws(SAMPLERS[options.sampler], options.seed, space))
    worker = Worker(run, options.trials, alone=alone)
    with explained(storage), tqdm(total=options.trials, desc="blackbox", unit="trial", disable=not progress) as bar:
        while (trial := worker.take()) is not None:
            with worker.working_on(trial):
                values = {name: trial.suggest_float(name, side.low, side.high) for name, side in space.items()}
                value = score(grid_of(values))
            worker.tell(trial, value)
            bar.update(len(complete(run)) - bar.n)
        made = complete(run)
    best = min(made.values(), key=_value)  # of equals the first
    return BlackboxResult(grid_of(best.params), _value(best), _value(made[0]), len(made))


def _value(trial: FrozenTrial) -> float:
    return float("inf") if trial.value is None else trial.value


class _Draws(BaseSampler):
    """Draw 0 is the middle of `space`, every other that of a sampler made for it, with a seed of its own."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, space: dict[str, Any]) -> None:
        self.make, self.seed, self.space = make, seed, space
        self.sampler = make(seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, space: dict[str, Any]) -> dict[str, Any]:
        draw = draw_of(study.get_trials(deepcopy=False), trial)
        if draw == 0:
            return dict.fromkeys(space, 0.0)
        seed = int(torch.randint(2**31 - 1, (), generator=generator_for(self.seed, draw)))
        self.sampler = self.make(seed)
        return self.sampler.sample_relative(study, trial, self.sampler.infer_relative_search_space(study, trial))

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, side: BaseDistribution) -> Any:
        return self.sampler.sample_independent(study, trial, name, side)


class _CmaEs(RandomSampler):
    """CMA-ES, whose state follows from the complete trials: nothing of it has to be stored."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return study.sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, space: dict[str, Any]) -> dict[str, Any]:
        from cmaes import CMA

        box = np.array([[side.low, side.high] for side in space.values()])
        state = CMA(mean=box.mean(1), sigma=np.ptp(box, axis=1).min() / 6, bounds=box, seed=self.seed)
        done = [trial for draw, trial in complete(study).items() if draw > 0]
        told = [(np.array([trial.params[name] for name in space]), _value(trial)) for trial in done]
        for end in range(state.population_size, len(told) + 1, state.population_size):
            state.tell(told[end - state.population_size : end])
        return dict(zip(space, state.ask().tolist(), strict=True))


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed, multivariate=True),
    "cmaes": _CmaEs,
    "random": RandomSampler,
}
