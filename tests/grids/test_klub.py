"""KLUB: the bound of a Gaussian in closed form and its optimal grid, all subsets of a mixture's places, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from noise_schedules import PLAIN, assert_falls
from ts_adapt.denoisers.analytic import GaussianDenoiser, example_mixture
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import make
from ts_adapt.grids.klub import Draw, bound_costs, klub
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import ContinuousVP, VarianceExploding
from ts_adapt.numerics import finite_log_snr_range
from ts_adapt.sampling import initial_noise, noise_for


def gaussian_data(noise_schedule: NoiseSchedule, variance: float, batch: int) -> tuple[GaussianDenoiser, Tensor, Draw]:
    """The exact denoiser of N(0.5, variance) on 8x8 pictures, samples of it, and draws for their paths."""
    shape = (1, 8, 8)
    x0 = 0.5 + variance**0.5 * initial_noise(7, range(batch), shape).double()
    return GaussianDenoiser(noise_schedule, 0.5, variance, shape), x0, noise_for(8, range(batch), x0)


def snr_of(times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    return torch.exp(2 * noise_schedule.log_snr(times).clamp(max=finite_log_snr_range(noise_schedule)[1]))


@pytest.mark.parametrize("variance", [0.05, 1.0])
@pytest.mark.parametrize("noise_schedule", PLAIN.values(), ids=PLAIN)
def test_the_bound_of_a_gaussian_is_the_area_above_its_error_s_curve(noise_schedule, variance):
    """1/2 (m(s_i) (s_j - s_i) - int m ds) a dimension, m = v / (1 + v s)."""
    denoiser, x0, draw = gaussian_data(noise_schedule, variance, 128)
    times = make("log_snr", noise_schedule, 48)
    costs = bound_costs(denoiser, x0, times, noise_schedule, draw) / 64
    s = snr_of(times, noise_schedule)
    area = (1 + variance * s[None]).log() - (1 + variance * s[:, None]).log()
    known = 0.5 * (variance / (1 + variance * s[:, None]) * (s[None] - s[:, None]) - area)
    upper = torch.ones_like(costs, dtype=torch.bool).triu(3)
    assert not costs.tril().any()
    assert torch.allclose(costs[upper], known[upper], rtol=0.08, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("noise_schedule", PLAIN.values(), ids=PLAIN)
def test_a_gaussian_s_grid_is_geometric_in_one_plus_the_variance_times_the_snr(noise_schedule, steps):
    variance, places = 0.25, 160
    denoiser, x0, draw = gaussian_data(noise_schedule, variance, 96)
    times = klub(denoiser, x0, make("log_snr", noise_schedule, places), steps, noise_schedule, draw)
    q = 1 + variance * snr_of(times[[0, -1]], noise_schedule)
    best = q[0] * (q[1] / q[0]) ** torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    first, last = finite_log_snr_range(noise_schedule)
    reached, known = noise_schedule.log_snr(times)[1:-1], 0.5 * ((best[1:-1] - 1) / variance).log()
    assert torch.allclose(reached, known, rtol=0, atol=2.5 * (last - first) / places)
    assert_falls(times, noise_schedule, steps)


def test_of_all_grids_among_the_places_the_one_found_has_the_least_bound():
    mixture = example_mixture()
    x0, noise_schedule = mixture.draw(16, 3), mixture.noise_schedule
    times = make("karras", noise_schedule, 9)
    draw = noise_for(0, range(16), x0)
    costs = bound_costs(mixture, x0, times, noise_schedule, draw)
    found = klub(mixture, x0, times, 4, noise_schedule, draw)

    def bound(path: tuple[int, ...]) -> float:
        return float(sum(costs[i, j] for i, j in itertools.pairwise((0, *path, 9))))

    best = min(itertools.combinations(range(1, 9), 3), key=bound)
    assert torch.equal(found[1:-1], times[list(best)])


def test_the_walk_is_that_of_the_forward_process():
    """The states that the denoiser is shown have the variance of x_t, and their increments in y that of W(rho^2)."""
    noise_schedule, shape = VarianceExploding(), (1, 8, 8)
    x0, seen = torch.zeros(64, *shape, dtype=torch.float64), {}

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        seen[float(t)] = x_t
        return x_t

    times = make("karras", noise_schedule, 6)
    bound_costs(denoise, x0, times, noise_schedule, noise_for(0, range(64), x0))
    assert list(seen) == sorted(seen)  # from data to noise
    for a, b in itertools.combinations(times.tolist(), 2):
        assert float(seen[a].square().mean()) == pytest.approx(a**2, rel=0.06)
        assert float((seen[a] - seen[b]).square().mean()) == pytest.approx(a**2 - b**2, rel=0.06)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 9}, "a choice of 1 to 8"),
        ({"x0": torch.full((2, 1, 8, 8), torch.nan)}, "all of it finite"),
        ({"x0": torch.zeros(0, 1, 8, 8)}, "B >= 1"),
        ({"times": torch.linspace(0.9, 0.1, 9)}, "expected the ends of the noise"),
        ({"denoise": lambda x_t, t: x_t * torch.nan}, "denoiser's output holds a NaN"),
    ],
)
def test_bad_input_is_refused(change, message):
    noise_schedule = ContinuousVP()
    denoiser, x0, draw = gaussian_data(noise_schedule, 1.0, 2)
    given = {"denoise": denoiser, "x0": x0, "times": make("log_snr", noise_schedule, 8), "steps": 3, **change}
    with pytest.raises(TsAdaptError, match=message):
        klub(noise_schedule=noise_schedule, draw=draw, **given)
