"""Grids with corrections between the numbers of steps that were learned: linear in their unconstrained numbers."""

from __future__ import annotations

import pytest
import torch

from noise_schedules import PLAIN
from small_predictors import WIDTH
from ts_adapt.grids.between import among, grid_between, shares
from ts_adapt.grids.corrections import CORRECTIONS
from ts_adapt.grids.parametric import between
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import COEFFICIENTS, HISTORY, NoiseSchedule, TimeGrid
from ts_adapt.predictors.one_shot import OneShot

NOISES = {name: PLAIN[name] for name in ("vp", "flow", "edm")}
LEARNED = (3, 5, 9)


def learned(noise_schedule: NoiseSchedule, names: list[str]) -> dict[int, TimeGrid]:
    found = {}
    for steps in LEARNED:
        space = GridSpace(noise_schedule, steps, names, 3, WIDTH)
        z = 0.1 * torch.randn(space.size, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
        found[steps] = space.grid(z)
    return found


@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("steps", [2, 3, 4, 6, 9, 10])
@pytest.mark.filterwarnings("ignore:.*was not trained for")
def test_it_is_what_a_predictor_is_before_training(noise_schedule: NoiseSchedule, steps: int) -> None:
    grids = learned(noise_schedule, [*CORRECTIONS])
    found = grid_between(grids, noise_schedule, steps)
    predictor = OneShot(
        noise_schedule, [*grids.values()], (1, 4, 4), corrections=[*CORRECTIONS], order=3, embedding=WIDTH
    )
    if steps not in LEARNED:
        predictor.keep(steps, 1)
    expected = predictor(torch.zeros(1, 1, 4, 4), steps=steps)
    torch.testing.assert_close(found.times, expected.times[0], rtol=1e-4, atol=1e-6)
    assert found.held.keys() == expected.held.keys()
    for field, value in expected.held.items():
        torch.testing.assert_close(found.held[field], value[0], rtol=1e-4, atol=1e-5)


def test_of_a_number_that_was_learned_it_is_that_grid_and_without_corrections_their_times() -> None:
    noise_schedule = NOISES["vp"]
    grids = learned(noise_schedule, ["shift", "history"])
    assert grid_between(grids, noise_schedule, 5) is grids[5]
    found = grid_between({n: TimeGrid(grid.times) for n, grid in grids.items()}, noise_schedule, 4)
    assert not found.held
    assert torch.equal(found.times, between({n: grid.times for n, grid in grids.items()}, noise_schedule, 4))


def test_weights_reach_as_far_back_as_those_that_were_learned_and_a_grid_without_counts_as_none() -> None:
    noise_schedule = NOISES["vp"]
    times = {n: torch.linspace(1, 0.001, n + 1, dtype=torch.float64) for n in (3, 5)}
    both = {n: TimeGrid.of(times[n], {HISTORY: torch.ones(n, n + 1).double()}) for n in times}
    weights = grid_between(both, noise_schedule, 4).held[HISTORY]
    torch.testing.assert_close(weights, torch.tensor([1, 1, 1, 1, 0.5]).double().expand(4, -1))
    one = {3: TimeGrid(times[3]), 5: TimeGrid.of(times[5], {COEFFICIENTS: torch.ones(5, 2).double()})}
    found = grid_between(one, noise_schedule, 4).held[COEFFICIENTS]
    torch.testing.assert_close(found, torch.full((4, 2), 0.5).double())


@pytest.mark.parametrize("others", LEARNED)
def test_the_first_step_stands_for_the_first_and_the_last_for_the_last(others: int) -> None:
    for steps in range(2, 12):
        assert among(0, steps, others) == [(0, 1.0)] and among(steps - 1, steps, others) == [(others - 1, 1.0)]
        for step in range(steps):
            place = sum(j * part for j, part in among(step, steps, others))
            assert place == pytest.approx(step * (others - 1) / (steps - 1))
        assert sum(share for _, share in shares(LEARNED, steps)) == pytest.approx(1)
