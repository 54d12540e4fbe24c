"""The oracle: better than the shared grid for every sample, and the same whatever the batch."""

from __future__ import annotations

import torch

from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.search.objective import Objective
from ts_adapt.search.per_sample import PerSampleOptions, search_per_sample


def search(problem, rows, **options):
    objective, batch = problem
    static = TimeGrid(fixed.make("log_snr", objective.denoiser.noise, 4))
    return search_per_sample(objective, batch.rows(rows), static, PerSampleOptions(**{"iterations": 15, **options}))


def test_every_sample_is_at_least_as_good_as_the_static_grid_and_most_are_better(problem):
    labels = search(problem, slice(0, 24))
    assert bool((labels.distance <= labels.static_distance).all())
    assert float(labels.distance.mean()) < 0.6 * float(labels.static_distance.mean())


def test_stored_distance_is_that_of_the_stored_grid(problem):
    objective, batch = problem
    labels = search(problem, slice(0, 16))
    again = objective.measure(TimeGrid(labels.times), batch.rows(slice(0, 16)))
    assert torch.allclose(again, labels.distance, rtol=1e-5, atol=1e-9)


def test_a_sample_s_label_does_not_depend_on_its_batch(problem):
    together = search(problem, slice(0, 6), iterations=6)
    alone = [search(problem, slice(i, i + 1), iterations=6) for i in range(6)]
    assert torch.allclose(together.times, torch.cat([label.times for label in alone]), rtol=1e-4, atol=1e-6)


def test_more_starts_are_never_worse(problem):
    one = search(problem, slice(0, 16), random_starts=0)
    three = search(problem, slice(0, 16), random_starts=2)
    assert bool((three.distance <= one.distance + 1e-9).all())
    assert int(three.start.max()) > 0


def test_given_starts_are_searched_between_the_static_and_the_random_ones(problem):
    objective, batch = problem
    rows, options = batch.rows(slice(0, 8)), PerSampleOptions(iterations=0, random_starts=1)
    noise = objective.denoiser.noise
    static, better = TimeGrid(fixed.make("linear", noise, 4)), TimeGrid(fixed.make("log_snr", noise, 4))
    per_sample = TimeGrid(better.times.expand(8, -1))
    alone = search_per_sample(objective, rows, static, options)
    for start in (better, per_sample):
        labels = search_per_sample(objective, rows, static, options, [start, static])
        measured = objective.measure(start, rows)
        won = measured < alone.distance
        assert bool(won.any())
        assert torch.allclose(labels.distance, torch.minimum(measured, alone.distance), rtol=1e-5)
        assert torch.equal(labels.start, torch.where(won, 1, torch.where(alone.start == 1, 3, 0)))


def test_the_targets_are_decoded_once_for_all_iterations(problem, monkeypatch):
    objective, batch = problem
    decoded = []
    monkeypatch.setattr(objective.denoiser, "decode", lambda x: decoded.append(x) or x)
    search(problem, slice(0, 4), iterations=5, random_starts=0)
    target = batch.target[:4]
    assert len(decoded) == 2 + 1 + 6  # static grid and target measured, target of the descent, six solves
    assert sum(x.equal(target) for x in decoded) == 2


def test_checkpointing_changes_nothing_but_memory(problem):
    objective, batch = problem
    plain = search(problem, slice(0, 4), iterations=4)
    remembered = Objective(objective.denoiser, objective.solver, objective.distance, checkpoint=True)
    again = search((remembered, batch), slice(0, 4), iterations=4)
    assert torch.allclose(plain.times, again.times, rtol=1e-6)


def test_a_sample_whose_loss_is_not_finite_keeps_the_static_grid_and_harms_no_other(problem):
    objective, batch = problem

    def distance(x, y):
        value = objective.distance(x, y)
        return torch.where(torch.arange(len(value)) == 2, value * torch.nan, value)

    labels = search((Objective(objective.denoiser, objective.solver, distance), batch), slice(0, 4))
    static = fixed.make("log_snr", objective.denoiser.noise, 4)
    assert torch.equal(labels.times[2], static)
    assert bool(torch.isfinite(labels.times).all())
    assert bool((labels.distance[[0, 1, 3]] < labels.static_distance[[0, 1, 3]]).all())
