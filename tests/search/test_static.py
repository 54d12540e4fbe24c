"""The static search: it improves on its start, never loses to it on validation, and honours LD3's two options."""

from __future__ import annotations

import pytest
import torch

from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.search.static import GridParameters, StaticOptions, best_start, search_static

STEPS = 4


def starts(noise):
    return {name: TimeGrid(fixed.make(name, noise, STEPS)) for name in ("linear", "log_snr", "karras")}


def split(batch):
    return batch.rows(slice(0, 32)), batch.rows(slice(32, None))


def test_learned_grid_beats_the_best_fixed_one_on_validation(problem):
    objective, batch = problem
    train, validation = split(batch)
    grids = starts(objective.denoiser.noise)
    options = StaticOptions(iterations=60, batch_size=16)
    result = search_static(objective, train, validation, grids, options, progress=False)
    _, means = best_start(objective, grids, validation)
    assert result.start_distance == pytest.approx(min(means.values()))
    assert result.distance < 0.9 * result.start_distance
    assert float(objective.measure(result.grid, validation).mean()) == pytest.approx(result.distance, rel=1e-6)


def test_result_is_never_worse_than_the_start(problem):
    objective, batch = problem
    train, validation = split(batch)
    wild = StaticOptions(iterations=4, batch_size=4, lr=50.0, validate_every=1)
    result = search_static(objective, train, validation, starts(objective.denoiser.noise), wild, progress=False)
    assert result.distance <= result.start_distance


def test_same_seed_same_grid(problem):
    objective, batch = problem
    train, validation = split(batch)
    run = [
        search_static(
            objective, train, validation, starts(objective.denoiser.noise), StaticOptions(iterations=5), progress=False
        )
        for _ in range(2)
    ]
    assert torch.equal(run[0].grid.times, run[1].grid.times)


def test_model_times_stay_between_their_neighbours_and_start_where_the_times_are(mixture):
    times = fixed.make("log_snr", mixture.noise, 5)
    parameters = GridParameters(times, mixture.noise, model_times=True, win_rate=0.5)
    grid = parameters()
    assert torch.allclose(grid.model_times, grid.times[:-1])
    with torch.no_grad():
        parameters.shift.fill_(100.0)
    moved = parameters()
    assert moved.model_times[0] == moved.times[0]
    assert bool((moved.model_times[1:] < moved.times[:-2]).all())
    assert bool((moved.model_times[1:] > moved.times[2:]).all())


def test_model_times_lower_the_training_distance(problem):
    objective, batch = problem
    train, validation = split(batch)
    options = StaticOptions(iterations=60, batch_size=16, model_times=True)
    result = search_static(objective, train, validation, starts(objective.denoiser.noise), options, progress=False)
    assert result.grid.model_times is not None
    assert result.distance < 0.9 * result.start_distance


def test_soft_teacher_runs_and_still_improves(problem):
    objective, batch = problem
    train, validation = split(batch)
    options = StaticOptions(iterations=30, batch_size=16, soft_teacher=True)
    result = search_static(objective, train, validation, starts(objective.denoiser.noise), options, progress=False)
    assert result.distance < result.start_distance


def test_no_start_is_refused(problem):
    objective, batch = problem
    with pytest.raises(TsAdaptError, match="at least one grid"):
        best_start(objective, {}, batch)
