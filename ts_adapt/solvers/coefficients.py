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

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Node, NoiseSchedule

_TAYLOR_TERMS = 18
_POWERS = torch.arange(_TAYLOR_TERMS, dtype=torch.float64)


def check_end(solver: Any, end: Tensor, what: str = "the grid") -> None:
    """TsAdaptError, naming `what`, if sigma is 0 at a time of `end`, of any shape, and `reaches_0` of `solver`, or of
    the one behind its corrector, is False."""
    inner = getattr(solver, "solver", solver)
    if not getattr(inner, "reaches_0", True) and bool((solver.noise_schedule.sigma(end.detach()) == 0).any()):
        raise TsAdaptError(
            f"{type(inner).__name__} cannot step to sigma = 0, where {what} ends; end the grid at sigma > 0, or "
            "take DPM-Solver++ or UniPC"
        )


@dataclass(frozen=True)
class Place:
    """alpha, sigma and log_snr at one time, each `()` or `(B,)`, float64; log_snr may be infinite."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor


@dataclass(frozen=True)
class Met:
    """The memory of a multistep solver, newest first.

    values    past predictions (x0, or eps for the solvers that interpolate eps), each `(B, ...)`
    log_snrs  lambda at their evaluation, each `()` or `(B,)`
    """

    values: tuple[Tensor, ...] = ()
    log_snrs: tuple[Tensor, ...] = ()

    def push(self, value: Tensor, log_snr: Tensor, keep: int) -> Met:
        """The history with `value` in front, no longer than `keep`."""
        return Met((value, *self.values)[:keep], (log_snr, *self.log_snrs)[:keep])


class Defaults:
    """What a solver is unless it says otherwise: deterministic, of one evaluation a step, with what was met as memory.

    reaches_0  whether it can step to sigma = 0
    """

    evaluations_per_step = 1
    needs_noise = False
    reaches_0 = True

    def __init__(self, noise_schedule: NoiseSchedule) -> None:
        self.noise_schedule = noise_schedule

    def init(self, x: Tensor) -> Any:
        return Met()

    def __repr__(self) -> str:
        options = {name: value for name, value in vars(self).items() if name != "needs_noise"}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def place(noise_schedule: NoiseSchedule, t: Tensor) -> Place:
    """The noise schedule at t `()` or `(B,)`.

    Where log-SNR is infinite its slope is too: the gradient to such a time, which a grid pins, is zero.
    """
    t = t.to(torch.float64)
    if t.requires_grad:
        pinned = torch.isinf(noise_schedule.log_snr(t.detach()))
        t = torch.where(pinned, t.detach(), t)
    return Place(noise_schedule.alpha(t), noise_schedule.sigma(t), noise_schedule.log_snr(t))


def first_order(t: Place, s: Place) -> tuple[Tensor, Tensor]:
    """The weights of x_t and x0 in the DDIM step from t to s."""
    return s.sigma / t.sigma, -s.alpha * torch.expm1(t.log_snr - s.log_snr)


def phis(count: int, z: Tensor) -> list[Tensor]:
    """phi_1(z) .. phi_count(z), for any finite z.

    Inside |z| < 1 the last one is Taylor's series and the recurrence leads down; outside it leads up from phi_1.
    """
    small = z.abs() < 1
    inner = torch.where(small, z, 0.0)
    falling = [(inner.unsqueeze(-1).pow(_POWERS.to(z.device)) * _taylor(count).to(z.device)).sum(-1)]
    outer = torch.where(small, 1.0, z)
    rising = [torch.expm1(outer) / outer]
    for k in range(1, count):
        falling.append(inner * falling[-1] + 1 / math.factorial(count - k))
        rising.append((rising[-1] - 1 / math.factorial(k)) / outer)
    return [torch.where(small, near, far) for near, far in zip(reversed(falling), rising, strict=True)]


@functools.cache
def _taylor(k: int) -> Tensor:
    """1 / (n + k)!: the coefficients of phi_k."""
    with torch.inference_mode(False):  # it is kept, and a later caller may want gradients
        return torch.tensor([1 / math.factorial(n + k) for n in range(_TAYLOR_TERMS)], dtype=torch.float64)


def finite_step(t: Place, s: Place) -> tuple[Tensor, Tensor]:
    """h, with 1 in the place of an infinite h, and where it is infinite."""
    h = s.log_snr - t.log_snr
    endless = torch.isinf(h)
    return torch.where(endless, 1.0, h), endless


def moments(h: Tensor, z: Tensor, count: int) -> list[Tensor]:
    """int_0^h e^(z(1 - u/h)) (u/h)^n du for n = 1 .. count, with z = -h (data) or h (noise)."""
    return [math.factorial(n) * h * phi_n for n, phi_n in enumerate(phis(count + 1, z)[1:], 1)]


def lagrange_weights(gaps: Sequence[Tensor], h: Tensor, moments: Sequence[Tensor]) -> list[Tensor]:
    """The integrals of l_k over the step, k >= 1, for the places at u = 0 and at u = `gaps`.

    `gaps` are lambda_k - lambda_t (negative for the past, h for the end of the step; infinite ones allowed), h the
    step length, `moments` as above, one for each gap. With q_k = h / gap_k, which is 0 for an infinite gap,

        l_k(u) = q_k u/h prod_{j != k} q_k (1 - q_j u/h) / (q_k - q_j)

    The weight of the value at u = 0 follows from sum_k l_k = 1, so that the integral is moment_0 v_0 + sum_k w_k (v_k -
    v_0). At most one gap may be infinite.
    """
    inverse = [h / gap for gap in gaps]  # 0 for an infinite gap
    weights = []
    for k, q_k in enumerate(inverse):
        polynomial = [torch.ones_like(q_k)]  # prod_j (1 - q_j u/h), by rising powers of u/h
        norm = q_k
        for j, q_j in enumerate(inverse):
            if j != k:
                lower = polynomial
                polynomial = [*lower, -q_j * lower[-1]]
                polynomial[1:-1] = [a - q_j * b for a, b in zip(lower[1:], lower[:-1], strict=True)]
                norm = norm * q_k / (q_k - q_j)
        terms = (c * moment for c, moment in zip(polynomial, moments, strict=True))
        weights.append(norm * sum(terms, torch.zeros_like(h)))
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
    alpha = torch.where(endless, 0.0, s.alpha)
    return [alpha * w for w in lagrange_weights(gaps, h, integrals)]


def half_weight(t: Place, s: Place, gap: Tensor, variant: str) -> Tensor:
    """The weight of x0_k - x0_t in x_s where the integral of u over the step is taken as B(h) h / 2.

    B(h) = h for variant "bh1", 1 - e^-h for "bh2" (UniPC, Zhao et al. 2023; "bh2" is also DPM-Solver++(2M)'s midpoint
    rule). `gap` is lambda_k - lambda_t. Zero over an infinite step and for an infinite gap.
    """
    h, endless = finite_step(t, s)
    b_h = h if variant == "bh1" else -torch.expm1(-h)
    return torch.where(endless, 0.0, 0.5 * s.alpha * b_h * (h / gap))


def learned_terms(next_node: Node, order: int, unit: Tensor, values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The terms (c_k unit, v_k) that `next_node.coefficients` c `(K,)` or `(B, K)` add to x_s; none where c is None.

    `values` are the predictions v_0 (at t), v_1, ... met so far, `unit` the weight that makes c free of the scale of
    the step; K is the solver's order, and coefficients of values not yet met wait. c = 0 changes nothing.
    """
    c = next_node.coefficients
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
