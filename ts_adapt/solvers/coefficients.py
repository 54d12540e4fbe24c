"""What all solvers share: places on the noise schedule, integrals of polynomials in log-SNR, memory, learned weights.

A step goes from t to s, h = lambda_s - lambda_t > 0. The probability-flow ODE has two exact forms, one for each
quantity that is interpolated between the evaluations:

    data    x_s = (sigma_s / sigma_t) x_t + alpha_s int_0^h e^-(h-u) x0(u) du
    noise   x_s = (alpha_s / alpha_t) x_t - sigma_s int_0^h e^(h-u) eps(u) du            u = lambda - lambda_t

With the first value held constant, both are the DDIM step

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) x0,

finite at either end: for alpha_t = 0 (h infinite) and for sigma_s = 0 (h infinite; x_s = alpha_s x0). A multistep
method adds differences to the past values, whose weights are the integrals of Lagrange's polynomials l_k over the
places lambda_k. These integrals are exact combinations of

    int_0^h e^(z(1 - u/h)) (u/h)^n du = n! h phi_{n+1}(z),    z = -h (data) or h (noise),
    phi_k(z) = sum_n z^n / (n+k)!,    phi_{k+1}(z) = (phi_k(z) - 1/k!) / z,    phi_0 = exp

(Hochbruck & Ostermann 2010). An infinite lambda_k is a limit that exists: l_k = 0, and its factor leaves the other l_j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ts_adapt.interfaces import Node, NoiseSchedule, TsAdaptError

_TAYLOR_TERMS = 18


@dataclass(frozen=True)
class Place:
    """alpha, sigma and log_snr at one time, each `()` or `(B,)`, float64; log_snr may be infinite."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor


@dataclass(frozen=True)
class History:
    """The memory of a multistep solver, newest first.

    values    past predictions (x0, or eps for the solvers that interpolate eps), each `(B, ...)`
    log_snrs  lambda at their evaluation, each `()` or `(B,)`
    """

    values: tuple[Tensor, ...] = ()
    log_snrs: tuple[Tensor, ...] = ()

    def push(self, value: Tensor, log_snr: Tensor, keep: int) -> History:
        """The history with `value` in front, no longer than `keep`."""
        return History((value, *self.values)[:keep], (log_snr, *self.log_snrs)[:keep])


def place(noise_schedule: NoiseSchedule, t: Tensor) -> Place:
    """The noise schedule at t `()` or `(B,)`.

    Where log-SNR is infinite its slope is too: the gradient to such a time, which a grid pins, is zero.
    """
    t = t.to(torch.float64)
    pinned = torch.isinf(noise_schedule.log_snr(t.detach()))
    t = torch.where(pinned, t.detach(), t)
    return Place(noise_schedule.alpha(t), noise_schedule.sigma(t), noise_schedule.log_snr(t))


def first_order(t: Place, s: Place) -> tuple[Tensor, Tensor]:
    """The weights of x_t and x0 in the DDIM step from t to s."""
    return s.sigma / t.sigma, -s.alpha * torch.expm1(t.log_snr - s.log_snr)


def phi(k: int, z: Tensor) -> Tensor:
    """phi_k(z), k >= 1, for any finite z: Taylor's series inside |z| < 1, the recurrence outside."""
    small = z.abs() < 1
    inner = torch.where(small, z, 0.0)
    series = torch.zeros_like(inner)
    for n in reversed(range(_TAYLOR_TERMS)):
        series = series * inner + 1 / math.factorial(n + k)
    outer = torch.where(small, 1.0, z)
    value = torch.expm1(outer) / outer
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / outer
    return torch.where(small, series, value)


def finite_step(t: Place, s: Place) -> tuple[Tensor, Tensor]:
    """h, with 1 in the place of an infinite h, and where it is infinite."""
    h = s.log_snr - t.log_snr
    endless = torch.isinf(h)
    return torch.where(endless, 1.0, h), endless


def moments(h: Tensor, z: Tensor, count: int) -> list[Tensor]:
    """int_0^h e^(z(1 - u/h)) (u/h)^n du for n = 1 .. count, with z = -h (data) or h (noise)."""
    return [math.factorial(n) * h * phi(n + 1, z) for n in range(1, count + 1)]


def lagrange_weights(gaps: Sequence[Tensor], h: Tensor, moments: Sequence[Tensor]) -> list[Tensor]:
    """The integrals of l_k over the step, k >= 1, for the places at u = 0 and at u = `gaps`.

    `gaps` are lambda_k - lambda_t (negative for the past, h for the end of the step; infinite ones allowed), h the
    step length, `moments` as above, one for each gap. The weight of the value at u = 0 follows from sum_k l_k = 1, so
    that the integral is moment_0 v_0 + sum_k w_k (v_k - v_0).
    """
    far = [torch.isinf(gap) for gap in gaps]
    ratios = [torch.where(f, -1.0, gap) / h for f, gap in zip(far, gaps, strict=True)]
    weights = []
    for k, r_k in enumerate(ratios):
        polynomial = [torch.ones_like(r_k)]  # l_k(u) r_k .. / u, by rising powers of u
        norm = r_k
        for j, r_j in enumerate(ratios):
            if j == k:
                continue
            times_u = [torch.zeros_like(r_j), *polynomial]
            times_r = [*(r_j * c for c in polynomial), torch.zeros_like(r_j)]
            unchanged = [*polynomial, torch.zeros_like(r_j)]
            polynomial = [torch.where(far[j], c, a - b) for a, b, c in zip(times_u, times_r, unchanged, strict=True)]
            norm = norm * torch.where(far[j] | far[k], 1.0, r_k - r_j)
        integral = torch.zeros_like(h)
        for c, moment in zip(polynomial, moments, strict=True):
            integral = integral + c * moment
        weights.append(torch.where(far[k], 0.0, integral / norm))
    return weights


def data_weights(
    t: Place, s: Place, past: Sequence[Tensor], *, end: bool = False, curvature: float = 1.0
) -> list[Tensor]:
    """The weights of x0_k - x0_t in x_s, for the past evaluations at log-SNR `past`, exact for polynomials in lambda.

    end        s itself is one more place of evaluation, the last of the weights (a corrector)
    curvature  a factor on the second moment; 1/2 is the published DPM-Solver++(3M)

    Over an infinite step the weights are zero: what remains is the DDIM step.
    """
    h, endless = finite_step(t, s)
    gaps = [log_snr - t.log_snr for log_snr in past] + ([h] if end else [])
    integrals = moments(h, -h, len(gaps))
    integrals[1:2] = [curvature * m for m in integrals[1:2]]
    return [torch.where(endless, 0.0, s.alpha * w) for w in lagrange_weights(gaps, h, integrals)]


def half_weight(t: Place, s: Place, gap: Tensor, variant: str) -> Tensor:
    """The weight of x0_k - x0_t in x_s where the integral of u over the step is taken as B(h) h / 2.

    B(h) = h for variant "bh1", 1 - e^-h for "bh2" (UniPC, Zhao et al. 2023; "bh2" is also DPM-Solver++(2M)'s midpoint
    rule). `gap` is lambda_k - lambda_t. Zero over an infinite step and for an infinite gap.
    """
    h, endless = finite_step(t, s)
    far = torch.isinf(gap)
    b_h = h if variant == "bh1" else -torch.expm1(-h)
    weight = 0.5 * s.alpha * b_h * h / torch.where(far, 1.0, gap)
    return torch.where(endless | far, 0.0, weight)


def learned_terms(node: Node, order: int, unit: Tensor, values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The terms (c_k unit, v_k) that `node.coefficients` c `(K,)` or `(B, K)` add to x_s; none where c is None.

    `values` are the predictions v_0 (at t), v_1, ... met so far, `unit` the weight that makes c free of the scale of
    the step; K is the solver's order, and coefficients of values not yet met wait. c = 0 changes nothing.
    """
    c = node.coefficients
    if c is None:
        return []
    if c.shape[-1] != order:
        raise TsAdaptError(
            f"the grid has {c.shape[-1]} coefficients a step, the solver of order {order} takes {order}; "
            "give one for each of its weights"
        )
    return [(unit * c[..., k].to(unit), value) for k, value in enumerate(values[:order])]


def check_order(solver: str, order: int, allowed: Sequence[int]) -> int:
    """`order`, or TsAdaptError where `solver` has no such order."""
    if order not in allowed:
        raise TsAdaptError(f"{solver} has no order {order}; choose one of {', '.join(map(str, allowed))}")
    return order


def check_variant(variant: str) -> str:
    """`variant`, or TsAdaptError unless it is one of UniPC's B(h)."""
    if variant not in ("bh1", "bh2"):
        raise TsAdaptError(f"UniPC has no variant {variant!r}; choose bh1 (B(h) = h) or bh2 (B(h) = 1 - e^-h)")
    return variant
