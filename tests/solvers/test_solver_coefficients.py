"""phi functions, moments and Lagrange weights against quadrature; limits and gradients at infinite log-SNR."""

from __future__ import annotations

import math

import pytest
import torch

from ts_adapt.noise import BetaTable, ContinuousVP, RectifiedFlow
from ts_adapt.solvers.coefficients import (
    Place,
    data_weights,
    half_weight,
    lagrange_weights,
    moments,
    phis,
    place,
)


def f64(*values):
    return torch.tensor(values if len(values) != 1 else values[0], dtype=torch.float64)


def quadrature(function, h):
    """int_0^h function(u) du by the 40-point Gauss-Legendre rule, built from the Legendre Jacobi matrix."""
    k = torch.arange(1, 40, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (function(h * (nodes + 1) / 2) * vectors[0].square()).sum() * h


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_against_its_integral(k):
    for z in (-30.0, -3.0, -1.0, -0.999, -1e-3, -1e-9, 0.0, 1e-9, 0.5, 1.0, 1.001, 5.0):
        integral = quadrature(lambda u, z=z: torch.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1), 1.0)
        torch.testing.assert_close(phis(k, f64(z))[-1], integral, rtol=1e-11, atol=0)


def test_phi_gradcheck_across_the_switch():
    z = f64(-5.0, -1.1, -0.9, 0.0, 1e-7, 0.99, 1.2, 4.0).requires_grad_()
    for k in (1, 2, 3, 4):
        assert torch.autograd.gradcheck(lambda z, k=k: phis(k, z)[-1], z)


def test_phi_has_a_gradient_after_a_run_in_inference_mode():
    with torch.inference_mode():
        phis(7, f64(0.5))
    assert bool(torch.autograd.grad(phis(7, z := f64(0.5).requires_grad_())[-1], z)[0] > 0)


@pytest.mark.parametrize("sign", [-1, 1], ids=["data", "noise"])
@pytest.mark.parametrize("h", [1e-6, 0.3, 4.0])
def test_lagrange_weights_integrate_polynomials(h, sign):
    places = [f64(-0.7 * h), f64(-2.1 * h), f64(h)]
    h_t = f64(h)
    z = sign * h_t
    weights = lagrange_weights(places, h_t, moments(h_t, z, 3))
    for power in (1, 2, 3):
        exact = quadrature(lambda u, p=power: torch.exp(z * (1 - u / h)) * (u / h) ** p, h)
        found = sum(w * (p / h) ** power for w, p in zip(weights, places, strict=True))
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)


def test_a_place_at_infinity_is_left_out():
    h = f64(0.5)
    near, last = f64(-0.4), h
    with_infinity = lagrange_weights([near, f64(-math.inf), last], h, moments(h, -h, 3))
    without = lagrange_weights([near, last], h, moments(h, -h, 2))
    assert with_infinity[1] == 0
    torch.testing.assert_close(with_infinity[0::2], without)
    far = lagrange_weights([near, f64(-1e9), last], h, moments(h, -h, 3))
    torch.testing.assert_close(far, with_infinity, rtol=1e-7, atol=1e-7)


def test_bh_variants_agree_to_first_order():
    t, s = Place(f64(0.8), f64(0.6), f64(0.0)), Place(f64(0.8), f64(0.6), f64(1e-6))
    weights = [half_weight(t, s, f64(-2e-6), variant) for variant in ("bh1", "bh2")]
    exact = data_weights(t, s, [f64(-2e-6)])[0]
    for weight in weights:
        torch.testing.assert_close(weight, exact, rtol=1e-5, atol=0)


def test_weights_over_an_infinite_step_are_zero_per_sample():
    t = Place(f64(0.8, 0.8), f64(0.6, 0.6), f64(0.3, 0.3))
    s = Place(f64(1.0, 0.9), f64(0.0, 0.4), f64(math.inf, 0.8))
    for weight in (*data_weights(t, s, [f64(-0.2), f64(-1.0)]), half_weight(t, s, f64(-0.5), "bh2")):
        assert weight[0] == 0
        assert weight[1] != 0 and torch.isfinite(weight[1])


@pytest.mark.parametrize("noise_schedule", [RectifiedFlow(), BetaTable.from_config({"rescale_betas_zero_snr": True})])
def test_gradient_to_an_infinite_end_is_zero_not_nan(noise_schedule):
    t = f64(noise_schedule.t_max, 0.5 * noise_schedule.t_max).requires_grad_()
    p = place(noise_schedule, t)
    assert torch.isinf(p.log_snr[0]) and p.alpha[0] == 0
    (gradient,) = torch.autograd.grad((p.alpha + p.sigma + torch.exp(p.log_snr)).sum(), t)
    assert gradient[0] == 0
    assert torch.isfinite(gradient[1]) and gradient[1] != 0


def test_place_is_the_noise_schedule():
    noise_schedule, t = ContinuousVP(), torch.linspace(0.1, 0.9, 5)
    p = place(noise_schedule, t)
    assert p.alpha.dtype == torch.float64
    torch.testing.assert_close(p.log_snr, torch.log(p.alpha / p.sigma))
