"""DMN: the bound against quadrature, its minimum against searches by other means, cases with a known minimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noise_schedules import NOISES, assert_falls
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import FIXED, make
from ts_adapt.grids.optimized import dmn, error_bound
from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import VarianceExploding
from ts_adapt.numerics import finite_log_snr_range


def finite_log_snr(times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """lambda at `times`, the ends being those of the finite range."""
    noisy, clean = finite_log_snr_range(noise_schedule)
    return torch.cat([torch.tensor([noisy]), noise_schedule.log_snr(times)[1:-1], torch.tensor([clean])]).double()


def bound_by_quadrature(lam: np.ndarray, order: int) -> float:
    """The bound, its weights integrated numerically."""
    steps, total = len(lam) - 1, 0.0
    for n in range(steps):
        p = min(order, n + 1, steps - n)
        used = list(range(n + 1 - p, n + 1))
        reaches = []
        for k in used:
            others = [lam[j] for j in used if j != k]

            def integrand(x: float, k: int = k, others: list[float] = others) -> float:
                return float(np.exp(x) * np.prod([(x - other) / (lam[k] - other) for other in others]))

            reaches.append(scipy.integrate.quad(integrand, lam[n], lam[n + 1])[0] * np.exp(-lam[k]))
        total += float(np.linalg.norm(reaches))
    return total


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_bound_is_made_of_exact_integrals(order: int) -> None:
    lam = torch.tensor([-4.0, -2.7, -2.3, -0.4, 0.9, 1.0, 3.2], dtype=torch.float64)
    assert float(error_bound(lam, order)) == pytest.approx(bound_by_quadrature(lam.numpy(), order), rel=1e-9)


def test_gradient_of_the_bound() -> None:
    lam = torch.tensor([-3.0, -1.5, -0.2, 0.4, 1.9, 2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: error_bound(x, 3), lam)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(NOISES)), st.integers(1, 12), st.integers(1, 3))
def test_grids_share_the_ends_and_have_a_smaller_bound_than_any_fixed_grid(
    schedule: str, steps: int, order: int
) -> None:
    noise_schedule = NOISES[schedule]
    times = dmn(noise_schedule, steps, order)
    assert_falls(times, noise_schedule, steps)

    def bound(grid: Tensor) -> float:
        return float(error_bound(finite_log_snr(grid, noise_schedule), order))

    assert bound(times) <= min(bound(make(name, noise_schedule, steps)) for name in set(FIXED)) * (1 + 1e-9)


@pytest.mark.parametrize("schedule", sorted(NOISES))
def test_grids_have_logits_and_can_be_a_start_of_a_search(schedule: str) -> None:
    for steps in (3, 9):
        times = dmn(NOISES[schedule], steps, 3)
        again = logits_to_times(times_to_logits(times, NOISES[schedule]), NOISES[schedule])
        torch.testing.assert_close(again, times, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", sorted(NOISES))
@pytest.mark.parametrize("steps", [2, 3, 7, 16])
def test_the_first_order_is_uniform_in_log_snr(schedule: str, steps: int) -> None:
    """e = e^-lambda makes the bound sum_n (e^{h_n} - 1), convex in the h_n of a given sum."""
    times = dmn(NOISES[schedule], steps, 1)
    torch.testing.assert_close(times, make("log_snr", NOISES[schedule], steps), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("schedule", ["sd", "edm", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [2, 3])
def test_the_minimum_is_that_of_a_search_of_the_whole_range(schedule: str, order: int, steps: int) -> None:
    noise_schedule = NOISES[schedule]
    noisy, clean = finite_log_snr_range(noise_schedule)
    lam = np.linspace(noisy, clean, 100 if steps == 2 else 30)
    inside = np.array(list(itertools.combinations(lam[1:-1], steps - 1)))

    def bound(values: np.ndarray) -> float:
        grid = np.concatenate([[noisy], values, [clean]])
        if not (np.diff(grid) > 0).all():
            return np.inf
        return float(error_bound(torch.from_numpy(grid), order))

    best = inside[np.argmin([bound(values) for values in inside])]
    best = scipy.optimize.minimize(bound, best, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10}).x
    found = noise_schedule.log_snr(dmn(noise_schedule, steps, order))[1:-1].numpy()
    assert bound(found) <= bound(best) * (1 + 1e-7)
    np.testing.assert_allclose(found, best, atol=2e-3)


@pytest.mark.parametrize("start", ["karras", "uniform"])
@pytest.mark.parametrize("steps", [5, 10])
def test_the_minimum_is_that_of_a_constrained_trust_region_from_elsewhere(start: str, steps: int) -> None:
    noise_schedule = NOISES["vp"]
    noisy, clean = finite_log_snr_range(noise_schedule)

    def bound(inside: np.ndarray) -> tuple[float, np.ndarray]:
        lam = torch.from_numpy(np.concatenate([[noisy], inside, [clean]])).requires_grad_()
        value = error_bound(lam, 3)
        (gradient,) = torch.autograd.grad(value, lam)
        return value.item(), gradient[1:-1].numpy()

    rises = np.eye(steps, steps - 1) - np.eye(steps, steps - 1, -1)
    gaps = np.full(steps, 1e-3)
    gaps[0] += noisy
    gaps[-1] -= clean
    found = scipy.optimize.minimize(
        bound,
        noise_schedule.log_snr(make(start, noise_schedule, steps))[1:-1].numpy(),
        jac=True,
        method="trust-constr",
        constraints=[scipy.optimize.LinearConstraint(rises, gaps, np.inf, keep_feasible=True)],
        options={"maxiter": 300},
    )
    np.testing.assert_allclose(noise_schedule.log_snr(dmn(noise_schedule, steps, 3))[1:-1].numpy(), found.x, atol=2e-3)


def test_only_the_range_of_log_snr_matters() -> None:
    """And not even its place: where all sigmas are 10 times larger, so are the grid's."""
    vp = NOISES["vp"]
    noisy, clean = finite_log_snr_range(vp)
    edm = VarianceExploding(t_min=float(np.exp(-clean)), t_max=float(np.exp(-noisy)))
    torch.testing.assert_close(vp.log_snr(dmn(vp, 6, 3)), edm.log_snr(dmn(edm, 6, 3)), rtol=0, atol=1e-6)
    far = VarianceExploding(t_min=10 * edm.t_min, t_max=10 * edm.t_max)
    torch.testing.assert_close(dmn(far, 6, 3), 10 * dmn(edm, 6, 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["zero_snr", "edm_to_0", "flow"])
def test_infinite_ends_are_pinned_outside_the_finite_rest(schedule: str) -> None:
    noise_schedule = NOISES[schedule]
    noisy, clean = finite_log_snr_range(noise_schedule)
    inside = noise_schedule.log_snr(dmn(noise_schedule, 8, 3))[1:-1]
    assert bool(((inside > noisy) & (inside < clean)).all())


def test_one_step_goes_from_end_to_end() -> None:
    for noise_schedule in NOISES.values():
        assert dmn(noise_schedule, 1, 3).tolist() == [noise_schedule.t_max, noise_schedule.t_min]


def test_bad_options_are_refused() -> None:
    for steps, order, message in ((0, 3, "steps is 0"), (4, 0, "order is 0")):
        with pytest.raises(TsAdaptError, match=message):
            dmn(NOISES["vp"], steps, order)
