"""The time grid of Align Your Steps for any model: the least upper bound on a Kullback-Leibler divergence, KLUB.

In y = x / alpha, rho = sigma / alpha, s = rho^-2 (the signal-to-noise ratio, e^{2 lambda}) and with the denoiser D, the
generative SDE runs from noise to data as

    dy = 2 (y - D(y, rho)) / rho drho + sqrt(2 rho) dW,      rho falling

A student evaluates D at the places of its grid only and keeps D_i = D(y_{rho_i}, rho_i) up to the next. By Girsanov's
theorem the divergence of its paths from the true ones, which bounds that of their ends, is

    sum_i int_{rho_{i+1}}^{rho_i} rho^-3 E|D_rho - D_i|^2 drho   =   1/2 sum_i int_{s_i}^{s_{i+1}} E|D_s - D_i|^2 ds

The true paths have the law of the forward process, so the expectation needs data and noise only: y_rho = x0 + W(rho^2)
with one Brownian path W for each x0. D is evaluated at every place j = 0 .. M of a fine grid on these paths; then all

    c(i, j) = 1/2 int_{s_i}^{s_j} E|D_s - D_i|^2 ds

are known, and dynamic programming finds the N steps with the smallest sum of them: the minimum of one estimate of the
bound, where the authors move one place after the other under fresh estimates.

Of the exact D, a martingale in s, E|D_s - D_i|^2 = m(s_i) - m(s) with m(s) = E|x0 - D_s|^2, and the bound is the area
between the curve m(s) and the steps above it. For Gaussian data of variance c^2, m = c^2 / (1 + c^2 s), and the minimum
is where 1 + c^2 s_i = 1 + c^2 / rho_i^2 rises geometrically.

The bound is that of a stochastic sampler of order 1, and every dimension counts in it by the noise that is left: most
of it lies near the data, where all dimensions of a picture count, and there the minimum has most of its places. What
few steps of an ODE solver reach is decided where there is more noise: for them this is a baseline that others beat.

Written from the mathematics of Sabour, Fidler and Kreis 2024, arXiv 2404.14507. Their tables for models of their own
are in `published`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.dynamic import Denoise, cheapest_path, check_places
from ts_adapt.grids.fixed import pin_ends
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.numerics import check_finite, combine, finite_log_snr_range, validate_times

Draw = Callable[[int], Tensor]
"""A number of a place -> standard normal noise `(B, ...)`, another for each place (`sampling.noise_for` makes one)."""


@torch.no_grad()
def klub(denoise: Denoise, x0: Tensor, times: Tensor, steps: int, noise_schedule: NoiseSchedule, draw: Draw) -> Tensor:
    """The KLUB grid over `steps` intervals: times `(steps+1,)`, float64, out of `times`.

    denoise  called with x_t `(B, ...)` and t `()`, the samples in the order of `x0`, M + 1 times
    x0       `(B, ...)`: data, or what stands for it, such as the end points of a teacher
    times    `(M+1,)`: the places, from t_max to t_min

    Raises TsAdaptError for times with other ends than the noise schedule's, `steps` outside [1, M], data or an output
    of the denoiser that is not finite.
    """
    times = check_places(times, steps, noise_schedule)
    places = cheapest_path(bound_costs(denoise, x0, times, noise_schedule, draw), steps).to(times.device)
    return validate_times(pin_ends(times, noise_schedule)[places], noise_schedule, what="the KLUB grid")


@torch.no_grad()
def bound_costs(denoise: Denoise, x0: Tensor, times: Tensor, noise_schedule: NoiseSchedule, draw: Draw) -> Tensor:
    """c `(M+1, M+1)`, float64, on the CPU: what a step from one place to another adds to the bound, the mean over B.

    Arguments and errors as in `klub`, whose times are checked. Zero on and below the diagonal. Where s is infinite at
    t_min, the integral ends with `numerics.finite_log_snr_range`.
    """
    if x0.ndim < 2 or x0.shape[0] < 1 or not bool(torch.isfinite(x0).all()):
        raise TsAdaptError(f"the data has shape {tuple(x0.shape)}; expected (B, ...) with B >= 1, all of it finite")
    log_snr = noise_schedule.log_snr(times)
    kept = torch.exp(log_snr[:-1] - log_snr[1:])  # rho_{j+1} / rho_j: the correlation of W(rho^2) / rho at the places
    walk, predictions = draw(len(times) - 1), []
    for j in reversed(range(len(times))):
        if j < len(kept):
            walk = combine((kept[j], walk), ((1 - kept[j].square()).sqrt(), draw(j)))
        predicted = denoise(
            combine((noise_schedule.alpha(times[j]), x0), (noise_schedule.sigma(times[j]), walk)), times[j]
        )
        check_finite(predicted, j, "the denoiser's output")
        predictions.append(predicted.flatten(1))
    along = torch.stack(predictions[::-1], 1)
    apart = torch.stack([_squared_distances(path.to(torch.float64)) for path in along]).mean(0).cpu()
    snr = torch.exp(2 * log_snr.clamp(max=finite_log_snr_range(noise_schedule)[1])).cpu()
    cells = 0.5 * (apart[:, 1:] + apart[:, :-1]).triu() * snr.diff()
    return pad(0.5 * cells.cumsum(1), (1, 0))


def _squared_distances(path: Tensor) -> Tensor:
    """Between all of `path` `(M+1, D)`: `(M+1, M+1)`, without the cancellation of |a|^2 - 2 ab + |b|^2."""
    return torch.cdist(path, path, compute_mode="donot_use_mm_for_euclid_dist").square()
