"""The numbers of a grid and its corrections: both ways, within bounds, differentiable."""

from __future__ import annotations

import pytest
import torch

from noise_schedules import PLAIN
from small_predictors import WIDTH
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import CORRECTIONS, GUIDANCE_BOUND, SCALE_BOUND
from ts_adapt.grids.fixed import make
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import COEFFICIENTS, EMBEDDING, GUIDANCE, HISTORY, TimeGrid
from ts_adapt.numerics import validate_grid

STEPS = 5
NOISES = {name: PLAIN[name] for name in ("table", "vp", "edm", "flow")}
WITH = [(), *((name,) for name in CORRECTIONS), CORRECTIONS]


@pytest.fixture(params=NOISES)
def noise_schedule(request):
    return NOISES[request.param]


def space(noise_schedule, corrections=CORRECTIONS):
    return GridSpace(noise_schedule, STEPS, corrections, 3, WIDTH)


@pytest.mark.parametrize("corrections", WITH, ids="+".join)
@pytest.mark.parametrize("shape", [(), (4,)], ids=["shared", "per-sample"])
def test_numbers_are_the_inverse_of_grid(noise_schedule, corrections, shape):
    here = space(noise_schedule, corrections)
    z = 0.5 * torch.randn(*shape, here.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = validate_grid(here.grid(z), noise_schedule)
    again = here.grid(here.numbers(grid))
    assert grid.held.keys() == again.held.keys() == {CORRECTIONS[name].field for name in corrections}
    for first, second in ((grid.times, again.times), *((grid.held[field], again.held[field]) for field in grid.held)):
        torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6 * float(grid.times.abs().max()))


def test_zeros_behind_the_logits_are_no_corrections(noise_schedule):
    here = space(noise_schedule)
    z = here.numbers(TimeGrid(make("log_snr", noise_schedule, STEPS)))
    assert z.shape == (here.size,) == (STEPS * (7 + STEPS + 1 + WIDTH),)
    grid = here.grid(z)
    assert torch.equal(grid.model_times, grid.times[:-1])
    for factors in (grid.output_scale, grid.held[GUIDANCE]):
        assert torch.equal(factors, torch.ones(STEPS, dtype=torch.float64))
    assert not any(bool(grid.held[field].any()) for field in (COEFFICIENTS, HISTORY, EMBEDDING))


@pytest.mark.parametrize("value", [-1e3, 1e3])
def test_corrections_stay_in_their_bounds_whatever_the_numbers(noise_schedule, value):
    here = space(noise_schedule)
    grid = here.grid(torch.cat([torch.zeros(STEPS), torch.full((here.size - STEPS,), value)]).double())
    assert grid.model_times[0] == grid.times[0]
    assert bool((grid.model_times[1:] < grid.times[:-2]).all()) and bool((grid.model_times[1:] > grid.times[2:]).all())
    for factors, bound in ((grid.output_scale, SCALE_BOUND), (grid.held[GUIDANCE], GUIDANCE_BOUND)):
        assert bool(((factors - 1).abs() <= bound).all())


def test_the_grid_is_differentiable_in_its_numbers():
    here = space(NOISES["vp"])
    z = 0.3 * torch.randn(here.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def flat(z):
        grid = here.grid(z)
        return torch.cat([grid.times, *(value.flatten() for value in grid.held.values())])

    assert torch.autograd.gradcheck(flat, z.requires_grad_())


def test_what_does_not_fit_is_refused(noise_schedule):
    times = make("log_snr", noise_schedule, STEPS)
    far = TimeGrid(times, output_scale=torch.full((STEPS,), 2.0, dtype=torch.float64))
    other = TimeGrid(times, coefficients=torch.zeros(STEPS, 2, dtype=torch.float64))
    short = TimeGrid.of(times, {HISTORY: torch.zeros(STEPS, 3, dtype=torch.float64)})
    for grid, corrections, message in (
        (TimeGrid(make("log_snr", noise_schedule, 4)), (), "has 4 steps; expected 5"),
        (far, (), "output_scale, which are not learned here"),
        (far, ("scale",), "further off than can be learned"),
        (other, ("coefficients",), "has 2 coefficients a step; expected 3"),
        (short, ("history",), "has 3 history a step; expected 6"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            space(noise_schedule, corrections).numbers(grid)
    with pytest.raises(TsAdaptError, match="did you mean 'shift'"):
        space(noise_schedule, ("shft",))
    with pytest.raises(TsAdaptError, match="no module of this one is given times"):
        GridSpace(noise_schedule, STEPS, ["embedding"])
