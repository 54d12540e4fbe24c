"""Search without gradients, by optuna: for whatever is not differentiable (a quantized network, a metric of files).

The grid is parametrised as in `static`: N logits, searched in a box around a start. Trials are kept in any optuna
storage (SQLite by default), so that a search goes on where it was killed, and many workers may share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import optuna
import torch

from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import NoiseSchedule, TimeGrid, TsAdaptError, unknown

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


@dataclass
class BlackboxOptions:
    """How the gradient-free search runs."""

    trials: int = 100
    """In all: a resumed search makes the missing ones."""
    sampler: str = "cmaes"
    radius: float = 2.0
    """Half the width of the box of logits around the start."""
    storage: str | None = None
    """An optuna storage URL; None: an SQLite file beside the result."""
    seed: int = 0


@dataclass(frozen=True)
class BlackboxResult:
    grid: TimeGrid
    distance: float
    start_distance: float
    trials: int


def search_blackbox(
    score: Callable[[TimeGrid], float],
    noise: NoiseSchedule,
    start: TimeGrid,
    options: BlackboxOptions,
    *,
    storage: str,
    study: str,
    progress: bool = True,
) -> BlackboxResult:
    """The grid of least `score` among `options.trials`; the first trial is `start` itself, so none is worse.

    `storage` is an optuna URL, `study` the name of the search in it; both given again, the search goes on.
    """
    from sqlalchemy.exc import SQLAlchemyError  # of optuna's storages; a fifth of a second to import

    if options.sampler not in SAMPLERS:
        raise unknown("sampler", options.sampler, SAMPLERS)
    centre = times_to_logits(start.times, noise).detach()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        run = optuna.create_study(study_name=study, storage=storage, load_if_exists=True, direction="minimize")
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise TsAdaptError(
            f"the storage {storage!r} cannot be used ({' '.join(str(error).split())[:200]}); "
            "give a URL such as sqlite:///file.db in a folder that exists, or remove the damaged file"
        ) from error
    run.sampler = SAMPLERS[options.sampler](options.seed + len(run.trials))  # resumed, it draws other trials
    if not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in run.trials):
        run.enqueue_trial({f"logit_{i}": 0.0 for i in range(start.steps)})

    def grid_of(values: dict[str, float]) -> TimeGrid:
        moved = torch.tensor([values[f"logit_{i}"] for i in range(start.steps)], dtype=torch.float64)
        return TimeGrid(logits_to_times(centre + moved, noise))

    def objective(trial: optuna.Trial) -> float:
        r = options.radius
        return score(grid_of({f"logit_{i}": trial.suggest_float(f"logit_{i}", -r, r) for i in range(start.steps)}))

    finished = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in run.trials)
    missing = options.trials - finished
    if missing > 0:
        run.optimize(objective, n_trials=missing, show_progress_bar=progress)
    complete = [
        trial for trial in run.trials if trial.state == optuna.trial.TrialState.COMPLETE and trial.value is not None
    ]
    if not complete:
        raise TsAdaptError(f"no trial of the study {study!r} is complete; set trials to at least 1")
    first = min(complete, key=lambda trial: trial.number)
    best = run.best_trial
    assert best.value is not None and first.value is not None
    return BlackboxResult(grid_of(best.params), best.value, first.value, len(complete))
