"""Time grids from unconstrained logits, the inverse, grids over other numbers of steps, positions in log-SNR.

    w     = (1 - eps) softmax(logits) + eps / N          N weights, positive, of sum 1
    u_i   = w_1 + .. + w_i,  u_0 = 0,  u_N = 1
    t_i   = t(lambda_a + u_i (lambda_b - lambda_a)),     lambda_a at t_max, lambda_b at t_min
    t_0   = t_max,  t_N = t_min                          exactly

eps keeps neighbouring times apart for any logits, so grids are strictly decreasing by construction. Where lambda is
infinite at an end, [lambda_a, lambda_b] is `numerics.finite_log_snr_range`: the interior times lie on this finite
rest and the end is pinned outside it. N logits make N + 1 times in every case. Logits are defined up to a constant;
the inverse returns those of mean 0.

Over other numbers of steps N than those that were learned, log-SNR is interpolated at equal places i/N of the solve,
linearly between the nodes of a grid, and between the nearest two learned n < N < m:

    lambda_N(i/N) = (1 - w) lambda_n(i/N) + w lambda_m(i/N),      w = (N - n) / (m - n)

Below or above all that were learned it is that of the nearest alone. Rising functions of i/N add up to a rising one.
An end beyond t_min, at sigma 0, is no node: it stays, and the N points of evaluation are interpolated at i/(N - 1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import has_ends
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.numerics import check_steps, finite_log_snr_range, validate_times

FLOOR = 1e-4
"""eps: the share of the log-SNR range that is spread evenly, whatever the logits."""


def logits_to_times(logits: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """Times `(N+1,)` or `(B, N+1)`, float64, from `logits` `(N,)` or `(B, N)`; differentiable.

    Raises TsAdaptError if a logit is NaN or infinite.
    """
    if not bool(torch.isfinite(logits.detach()).all()):
        raise TsAdaptError("logits of a time grid hold a NaN or infinite value; try a smaller learning rate")
    weights = weights_of(logits.to(torch.float64))
    noisy, clean = finite_log_snr_range(noise_schedule)
    inside = noise_schedule.time(noisy + (clean - noisy) * weights.cumsum(-1)[..., :-1])
    nothing = 0 * weights[..., :1]  # so that a grid of one step, all ends, has a gradient (of zero) too
    return torch.cat([nothing + noise_schedule.t_max, inside, nothing + noise_schedule.t_min], -1)


def weights_of(logits: Tensor) -> Tensor:
    """w `(..., N)` of `logits` `(..., N)`."""
    return (1 - FLOOR) * torch.softmax(logits, -1) + FLOOR / logits.shape[-1]


def times_to_logits(times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """Logits `(N,)` or `(B, N)`, float64, of mean 0, from `times` `(N+1,)` or `(B, N+1)`: inverts `logits_to_times`.

    Raises TsAdaptError if the times do not run from t_max to t_min, or if an interval is so short that no logits
    stand for it, naming the place.
    """
    times = validate_times(times, noise_schedule)
    steps = times.shape[-1] - 1
    if not has_ends(times, noise_schedule):
        raise TsAdaptError(
            f"logits stand for grids from t_max {noise_schedule.t_max:.6g} to t_min {noise_schedule.t_min:.6g}; this "
            f"one runs from {float(times[..., 0].min()):.6g} to {float(times[..., -1].max()):.6g}: make it without "
            "native=True"
        )
    noisy, clean = finite_log_snr_range(noise_schedule)
    weights = _finite_log_snr(times, noise_schedule).diff(dim=-1) / (clean - noisy)
    short = (weights.detach() < (1 - 1e-3) * FLOOR / steps).nonzero().tolist()
    if short:
        *row, place = short[0]
        where = f"times {place} and {place + 1}" + (f" of sample {row[0]}" if row else "")
        raise TsAdaptError(
            f"{where} are too close for logits: neighbours differ by {FLOOR / steps:.1g} of the log-SNR range "
            f"[{noisy:.3g}, {clean:.3g}] at least, and only an infinite end lies outside it; take fewer steps"
        )
    softmax = (weights - FLOOR / steps) / (1 - FLOOR)
    logits = softmax.clamp(min=1e-12).log()
    return logits - logits.mean(-1, keepdim=True)


def interpolate(times: Tensor, noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    """The grid over `steps` intervals, float64: log-SNR interpolated linearly against i/N, with the ends of `times`.

    `times` `(N+1,)` or `(B, N+1)` -> `(steps+1,)` or `(B, steps+1)`. The same number of steps gives the same grid. An
    infinite end stands at the end of the finite range or, where its neighbour lies beyond that, as far from the
    neighbour as the next one. Where no more is known than one evaluation and sigma 0, t_min is the last evaluation.
    Raises TsAdaptError for bad times, or `steps` below 1.
    """
    check_steps(steps)
    times = validate_times(times, noise_schedule)
    if noise_schedule.t_end < noise_schedule.t_min and bool((times[..., -1] == noise_schedule.t_end).any()):
        if times.ndim == 2:
            return torch.stack([interpolate(row, noise_schedule, steps) for row in times])
        points = times[:-1] if len(times) > 2 else torch.cat([times[:1], times.new_tensor([noise_schedule.t_min])])
        return torch.cat([interpolate(points, noise_schedule, steps - 1) if steps > 1 else times[:1], times[-1:]])
    log_snr = _finite_log_snr(times, noise_schedule)
    if times.shape[-1] > 2:
        first, last = log_snr[..., :1], log_snr[..., -1:]
        second, third = log_snr[..., 1:2], log_snr[..., 2:3]
        before, penultimate = log_snr[..., -3:-2], log_snr[..., -2:-1]
        first = torch.where(second <= first, 2 * second - third, first)
        last = torch.where(penultimate >= last, 2 * penultimate - before, last)
        log_snr = torch.cat([first, log_snr[..., 1:-1], last], -1)
    place = torch.linspace(0, times.shape[-1] - 1, steps + 1, dtype=torch.float64, device=times.device)[1:-1]
    low = place.floor().long()
    inside = torch.lerp(log_snr[..., low], log_snr[..., low + 1], place - low)
    return torch.cat([times[..., :1], noise_schedule.time(inside), times[..., -1:]], -1)


def neighbours(learned: Collection[int], steps: int) -> list[int]:
    """The one or two of the numbers `learned` that a grid over `steps` is made of, rising: the nearest on each side."""
    below, above = [n for n in learned if n <= steps], [n for n in learned if n >= steps]
    return sorted({*sorted(below)[-1:], *sorted(above)[:1]})


def between(learned: Mapping[int, Tensor], noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    """The grid `(steps+1,)`, float64, that those `learned` `(n+1,)`, by their numbers of steps n, make over others.

    Of a number that was learned it is that grid. Raises TsAdaptError as `interpolate` does, and where two grids that
    begin at different times do not make a falling one.
    """
    low, *rest = neighbours(learned, steps)
    times = interpolate(learned[low], noise_schedule, steps) if low != steps else learned[low]
    if not rest:
        return validate_times(times, noise_schedule)
    other, weight = interpolate(learned[rest[0]], noise_schedule, steps), (steps - low) / (rest[0] - low)
    inside = torch.lerp(noise_schedule.log_snr(times[1:-1]), noise_schedule.log_snr(other[1:-1]), weight)
    times = torch.cat([times[:1], noise_schedule.time(inside), times[-1:]])
    return validate_times(times, noise_schedule, what=f"the grid between {low} and {rest[0]} steps")


def positions(times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """u in [0, 1] of `times` (any shape): 0 at t_max, 1 at t_min, linear in log-SNR between."""
    low, high = finite_log_snr_range(noise_schedule)
    return ((noise_schedule.log_snr(times).clamp(low, high) - low) / (high - low)).clamp(0, 1)


def times_at(u: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """The inverse of `positions`, strictly inside the ends."""
    low, high = finite_log_snr_range(noise_schedule)
    return noise_schedule.time(low + u * (high - low))


def _finite_log_snr(times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """lambda at `times`, with infinite ends replaced by those of the finite range."""
    noisy, clean = finite_log_snr_range(noise_schedule)
    reached = noise_schedule.log_snr(times.detach())
    infinite = torch.isinf(reached)
    finite_times = torch.where(
        infinite, 0.5 * (noise_schedule.t_max + noise_schedule.t_min), times
    )  # keeps NaN out of the gradient
    ends = torch.where(reached < 0, reached.new_tensor(noisy), reached.new_tensor(clean))
    return torch.where(infinite, ends, noise_schedule.log_snr(finite_times))
