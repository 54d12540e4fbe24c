"""The oracle: better than the shared grid for every sample, and the same whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from small_predictors import OF_ANY
from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.distances import make
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import ContinuousVP
from ts_adapt.sampling import initial_noise
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.per_sample import LabelBatch, PerSampleOptions, search_per_sample
from ts_adapt.solvers import DDIM


def search(problem, rows, **options):
    objective, batch = problem
    static = TimeGrid(fixed.make("log_snr", objective.denoiser.noise_schedule, 4))
    return search_per_sample(objective, batch.rows(rows), static, PerSampleOptions(**{"iterations": 15, **options}))


def test_every_sample_is_at_least_as_good_as_the_static_grid_and_most_are_better(problem):
    labels = search(problem, slice(0, 24))
    assert bool((labels.distance <= labels.static_distance).all())
    assert float(labels.distance.mean()) < 0.6 * float(labels.static_distance.mean())


def same(one: LabelBatch, others: Sequence[LabelBatch]) -> bool:
    """Whether the grids of `one` are those of the `others`, one after the other."""
    return all(
        torch.allclose(value, torch.cat([parts(other.grid)[name] for other in others]), rtol=1e-4, atol=1e-6)
        for name, value in parts(one.grid).items()
    )


def parts(grid):
    return {"times": grid.times, **grid.corrections}


@pytest.mark.parametrize("corrections", [[], OF_ANY], ids=["times", "all"])
def test_a_sample_s_label_does_not_depend_on_its_batch(problem, corrections):
    together = search(problem, slice(0, 6), iterations=6, corrections=corrections)
    alone = [search(problem, slice(i, i + 1), iterations=6, corrections=corrections) for i in range(6)]
    assert len(together.grid.corrections) == len(corrections)
    assert same(together, alone)


def test_more_starts_are_never_worse(problem):
    one = search(problem, slice(0, 16), random_starts=0)
    three = search(problem, slice(0, 16), random_starts=2)
    assert bool((three.distance <= one.distance + 1e-9).all())
    assert int(three.start.max()) > 0


def test_given_starts_are_searched_between_the_static_and_the_random_ones(problem):
    objective, batch = problem
    rows, options = batch.rows(slice(0, 8)), PerSampleOptions(iterations=0, random_starts=1)
    noise_schedule = objective.denoiser.noise_schedule
    static, better = (
        TimeGrid(fixed.make("linear", noise_schedule, 4)),
        TimeGrid(fixed.make("log_snr", noise_schedule, 4)),
    )
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
    monkeypatch.setattr(objective.denoiser, "decode", lambda x, condition=None: decoded.append(x) or x)
    search((objective.differentiated("exact"), batch), slice(0, 4), iterations=5, random_starts=0)
    target = batch.target[:4]
    assert len(decoded) == 2 * 2 + 1 + 6  # static grid, result and targets measured, target of the descent, six solves
    assert sum(x.equal(target) for x in decoded) == 3


def test_checkpointing_changes_nothing_but_memory(problem):
    objective, batch = problem
    plain = search(problem, slice(0, 4), iterations=4)
    remembered = Objective(objective.denoiser, objective.solver, objective.distance, checkpoint=True)
    again = search((remembered, batch), slice(0, 4), iterations=4)
    assert torch.allclose(plain.grid.times, again.grid.times, rtol=1e-6)


def test_a_sample_whose_loss_is_not_finite_keeps_the_static_grid_and_harms_no_other(problem):
    objective, batch = problem

    def distance(x, y):
        value = objective.distance(x, y)
        return torch.where(torch.arange(len(value)) == 2, value * torch.nan, value)

    labels = search((Objective(objective.denoiser, objective.solver, distance), batch), slice(0, 4))
    static = fixed.make("log_snr", objective.denoiser.noise_schedule, 4)
    assert torch.equal(labels.grid.times[2], static)
    assert bool(torch.isfinite(labels.grid.times).all())
    assert bool((labels.distance[[0, 1, 3]] < labels.static_distance[[0, 1, 3]]).all())


def test_with_corrections_no_sample_is_worse_than_its_start_and_the_stored_distance_is_the_grid_s(problem):
    objective, batch = problem
    labels = search(problem, slice(0, 16), corrections=OF_ANY)
    assert bool((labels.distance <= labels.static_distance).all())
    again = objective.measure(labels.grid, batch.rows(slice(0, 16)))
    assert torch.allclose(again, labels.distance, rtol=1e-5, atol=1e-9)
    assert float(labels.distance.mean()) < 0.5 * float(search(problem, slice(0, 16)).distance.mean())


def test_a_static_grid_with_corrections_is_a_start_too(problem):
    objective, batch = problem
    noise_schedule, rows = objective.denoiser.noise_schedule, batch.rows(slice(0, 4))
    space = GridSpace(noise_schedule, 4, ["scale", "coefficients"], objective.solver.order)
    z = space.numbers(TimeGrid(fixed.make("log_snr", noise_schedule, 4)))
    static = space.grid(z + 0.01 * torch.linspace(-1, 1, space.size, dtype=torch.float64))
    none = PerSampleOptions(iterations=0, random_starts=0, corrections=["scale", "coefficients"])
    labels = search_per_sample(objective, rows, static, none)
    for name, value in parts(static).items():
        assert torch.equal(parts(labels.grid)[name], value.expand(4, *value.shape))
    assert torch.equal(labels.distance, objective.measure(static, rows))
    with pytest.raises(TsAdaptError, match="output_scale, which are not learned here"):
        search_per_sample(objective, rows, static, PerSampleOptions())


class Exaggerating(GaussianDenoiser):
    """Its network's prediction of eps is `factor` times what it should be, sample by sample of the batch."""

    factor: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, *, output_scale: Tensor | None = None, **others: Tensor) -> Tensor:
        wrong = self.factor if output_scale is None else self.factor * output_scale
        return super().__call__(x_t, t, output_scale=wrong, **others)


def exaggerated(steps: int) -> tuple[Objective, Batch, TimeGrid]:
    """The teacher is DDIM along `steps` steps by a true denoiser; the student's network is off by a factor of its own
    for every sample, which an output scale of 1 / factor at all times undoes."""
    noise_schedule = ContinuousVP()
    x_T, grid = initial_noise(0, range(5), (1, 4, 4)).double(), TimeGrid(fixed.make("log_snr", noise_schedule, steps))
    true = GaussianDenoiser(noise_schedule, 0.3, 0.04, (1, 4, 4))
    wrong = Exaggerating(noise_schedule, 0.3, 0.04, (1, 4, 4))
    wrong.factor = torch.tensor([0.95, 0.9, 1.0, 1.05, 1.1], dtype=torch.float64)
    batch = Batch(torch.arange(5), x_T, x_T, {})
    target = Objective(true, DDIM(noise_schedule), make("l2")).student(grid, batch)
    return Objective(wrong, DDIM(noise_schedule), make("l2")), Batch(batch.index, x_T, target, {}), grid


def test_a_planted_error_of_each_sample_s_output_is_undone_by_its_scale():
    objective, batch, grid = exaggerated(1)
    options = PerSampleOptions(iterations=60, random_starts=0, corrections=["scale"])
    labels = search_per_sample(objective, batch, grid, options)
    found = labels.grid.corrections["output_scale"][:, 0]
    assert torch.allclose(found, 1 / objective.denoiser.factor, atol=1e-4)
    assert torch.equal(labels.grid.times, grid.times.expand(5, -1))


def test_the_distance_s_gradient_in_all_corrections_is_exact():
    objective, batch, grid = exaggerated(3)
    space = GridSpace(objective.denoiser.noise_schedule, 3, OF_ANY, objective.solver.order)
    away = 0.1 * space.unit * torch.linspace(-1, 1, space.size, dtype=torch.float64)
    z = (space.numbers(grid) + away).repeat(5, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(space.grid(z), batch), z)
