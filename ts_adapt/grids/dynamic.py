"""Time grids chosen among the times of a teacher's trajectory, by dynamic programming: GITS and OSS.

The teacher has states x_j and predictions x0_j at t_0 > .. > t_M. In EDM's variables y = x / alpha, rho = sigma / alpha
its ODE is dy/drho = eps, and one Euler step (DDIM) from place i to place j leads to

    y_{i,j} = x0_i + rho_j eps_i,      eps_i = (x_i - alpha_i x0_i) / sigma_i

GITS (Chen et al. 2024) gives every such step a cost, as its authors' code the mean over the samples of the deviation

    |P (y_M - y_{i,j})| - |P (y_M - y_j)|,     P projects on what is normal to the chord y_0 y_M

and takes the N steps 0 = i_0 < .. < i_N = M of the smallest sum, errors made later weighing more by a factor gamma:

    sum_n gamma^n c(i_n, i_{n+1}) :      V_k(i) = min_j c(i, j) + gamma V_{k-1}(j),  V_0(M) = 0,  V_0(i < M) = infinity

OSS (Pei et al. 2025) lets the student walk, each sample for itself. z_k(j) is the student's state at place j after k
steps, of all that it can be the one nearest to the teacher's:

    z_k(j) = DDIM(z_{k-1}(i), i -> j)  with the i < j that makes |z_k(j) - x_j|^2 smallest,     z_0(0) = x_0

and the grid is the way that led to z_N(M). One state is kept for a place, though a worse z_k(i) may lead to a better
z_{k+1}(j): exact over two steps, a heuristic over more.

Written from the papers' mathematics: arXiv 2405.11326 and 2503.21774. The public code of OSS lets a place inherit its
state from fewer steps, after which the way back can belong to another state; here z_k(j) has taken k steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import has_ends, pin_ends
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.numerics import check_finite, combine, validate_times
from ts_adapt.parameterization import to_epsilon

COEFFICIENT = 1.15
"""gamma of GITS, as published (1.2 for Stable Diffusion)."""

PART = 16
"""Samples whose costs are found at a time: bounds the memory, some float64 copies of their trajectories."""

Denoise = Callable[[Tensor, Tensor], Tensor]
"""x_t `(B, ...)`, t `()` -> x0 `(B, ...)`: a `Denoiser`, or one with its condition bound."""


def cheapest_path(costs: Tensor, steps: int, coefficient: float = 1.0) -> Tensor:
    """The places `(steps+1,)`, from 0 to M, whose 1 to M steps have the smallest sum of coefficient^n
    `costs[i_n, i_{n+1}]`.

    costs  `(M+1, M+1)`, of a step from the row's place to the column's; only what lies above the diagonal counts

    Raises TsAdaptError for a cost that is not finite.
    """
    backwards = torch.ones_like(costs, dtype=torch.bool).tril()
    if not bool(torch.isfinite(costs[~backwards]).all()):
        raise TsAdaptError("costs of steps hold a NaN or infinite value; check the trajectory they were made from")
    costs = costs.to(torch.float64).masked_fill(backwards, torch.inf)
    value = torch.full_like(costs[0], torch.inf)
    value[-1] = 0
    choices = []
    for _ in range(steps):
        value, choice = (costs + coefficient * value).min(1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return torch.tensor(path)


def gits(states: Tensor, x0: Tensor, times: Tensor, steps: int, noise_schedule: NoiseSchedule) -> Tensor:
    """The GITS grid over `steps` intervals: times `(steps+1,)`, float64, out of the teacher's.

    states  `(B, M+1, ...)`, x0 `(B, M, ...)`, times `(M+1,)`: the teacher's trajectories from t_max to t_min, as
            `integrate(..., keep_trajectory=True)` returns them; published are 256 samples and M = 60

    Raises TsAdaptError for shapes that do not fit, values that are not finite, times with other ends than the noise
    schedule's, or `steps` outside [1, M].
    """
    times = _check_teacher(states, times, steps, noise_schedule)
    places = cheapest_path(step_costs(states, x0, times, noise_schedule), steps, COEFFICIENT).to(times.device)
    return validate_times(pin_ends(times, noise_schedule)[places], noise_schedule, what="the GITS grid")


def step_costs(states: Tensor, x0: Tensor, times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """c `(M+1, M+1)`, float64, on the CPU: the mean cost of one Euler step between any two places of a teacher.

    Arguments as in `gits`. Zero on and below the diagonal. Costs may be negative.

    Raises TsAdaptError for x0 of another shape than the states, or not finite.
    """
    if x0.shape != states[:, 1:].shape or not bool(torch.isfinite(x0).all()):
        raise TsAdaptError(
            f"x0 of the teacher has shape {tuple(x0.shape)}; expected {tuple(states[:, 1:].shape)}, one prediction for "
            "each state but the last, all finite"
        )
    alpha, sigma = (value.to(states.device) for value in (noise_schedule.alpha(times), noise_schedule.sigma(times)))
    parts = zip(states.split(PART), x0.split(PART), strict=True)
    return torch.cat([_sample_costs(*part, alpha, sigma) for part in parts]).mean(0).cpu()


def _sample_costs(states: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """c of each sample, `(B, M+1, M+1)`; alpha, sigma `(M+1,)`, of which alpha_0 may be 0."""
    x, x0 = states.to(torch.float64).flatten(2), x0.to(torch.float64).flatten(2)
    y, rho = x[:, 1:] / alpha[1:, None], sigma[1:, None] / alpha[1:, None]
    end = y[:, -1:]
    chord = normalize(alpha[0] * end - x[:, :1], dim=-1)

    def from_chord(point: Tensor) -> Tensor:
        offset = end - point
        return (offset - (offset * chord).sum(-1, keepdim=True) * chord).square().sum(-1).sqrt()

    rows = []
    for i in range(x0.shape[1]):
        eps = to_epsilon(x0[:, i], x[:, i], alpha[i], sigma[i])
        reached = x0[:, i, None] + rho[i:] * eps[:, None]
        rows.append(pad(from_chord(reached) - from_chord(y[:, i:]), (i + 1, 0)))
    return torch.stack([*rows, torch.zeros_like(rows[0])], 1)


@torch.no_grad()
def oss(denoise: Denoise, states: Tensor, times: Tensor, steps: int, noise_schedule: NoiseSchedule) -> Tensor:
    """The OSS grid of each sample over `steps` intervals: times `(B, steps+1)`, float64, out of the teacher's.

    denoise  called with x_t `(B, ...)` and t `()`, the samples in the order of `states`, 1 + (steps - 1)(M - steps + 1)
             times
    states   `(B, M+1, ...)`, times `(M+1,)`: the teacher's trajectories from t_max to t_min; published is M = 200

    One grid for all is `median` of them. Raises TsAdaptError as `gits`, and if the denoiser's output is not finite.
    """
    times = _check_teacher(states, times, steps, noise_schedule)
    alpha, sigma = noise_schedule.alpha(times), noise_schedule.sigma(times)
    last, batch = len(times) - 1, states.shape[0]
    reached, origins = {0: states[:, 0]}, []
    for k in range(1, steps + 1):
        within = range(k if k < steps else last, last - (steps - k) + 1)  # a place is left for each step to come
        nearest = torch.full((last + 1, batch), torch.inf, dtype=torch.float64, device=states.device)
        origin = torch.zeros((last + 1, batch), dtype=torch.long, device=states.device)
        following = {j: states[:, j] for j in within}
        for i, z in reached.items():
            x0 = denoise(z, times[i])
            check_finite(x0, i, "the denoiser's output")
            eps = to_epsilon(x0, z, alpha[i], sigma[i])
            for j in range(max(i + 1, within.start), within.stop):
                x_s = combine((alpha[j], x0), (sigma[j], eps))
                distance = (x_s - states[:, j]).flatten(1).to(torch.float64).square().mean(1)
                nearer = distance < nearest[j]
                nearest[j] = torch.where(nearer, distance, nearest[j])
                origin[j] = torch.where(nearer, i, origin[j])
                following[j] = torch.where(nearer.reshape(-1, *[1] * (x_s.ndim - 1)), x_s, following[j])
        reached = following
        origins.append(origin)
    path = [torch.full((batch,), last, device=states.device)]
    for origin in reversed(origins):
        path.append(origin.gather(0, path[-1][None])[0])
    places = torch.stack(path[::-1], 1).to(times.device)
    return validate_times(pin_ends(times, noise_schedule)[places], noise_schedule, what="the OSS grid")


def median(times: Tensor) -> Tensor:
    """One grid `(N+1,)` for all samples: the median, place by place, of theirs `(B, N+1)`; the lower of the middle two.

    The k-th smallest times of strictly decreasing grids decrease strictly too.
    """
    return times.median(0).values


def check_places(times: Tensor, steps: int, noise_schedule: NoiseSchedule) -> Tensor:
    """The times `(M+1,)` of a teacher as float64; TsAdaptError unless from t_max to t_min, with M >= `steps` >= 1."""
    times = validate_times(times, noise_schedule, what="the teacher's time grid")
    if times.ndim != 1:
        raise TsAdaptError(
            f"the teacher's times have shape {tuple(times.shape)}; expected (M+1,), shared by all samples"
        )
    if not has_ends(times, noise_schedule):
        raise TsAdaptError(
            f"the teacher runs from {float(times[0]):.6g} to {float(times[-1]):.6g}; expected the ends of the noise "
            f"schedule, {noise_schedule.t_max:.6g} and {noise_schedule.t_min:.6g}: make its grid without native=True"
        )
    most = len(times) - 1
    if not 1 <= steps <= most:
        raise TsAdaptError(f"steps is {steps}; the teacher's {most} steps leave a choice of 1 to {most}")
    return times


def _check_teacher(states: Tensor, times: Tensor, steps: int, noise_schedule: NoiseSchedule) -> Tensor:
    """The times as float64; TsAdaptError unless the states are trajectories along them, and as `check_places`."""
    times = check_places(times, steps, noise_schedule)
    if states.ndim < 3 or states.shape[0] < 1 or states.shape[1] != len(times):
        raise TsAdaptError(
            f"the teacher's states have shape {tuple(states.shape)}; expected (B, {len(times)}, ...) with B >= 1, a "
            "state for each time: solve it with keep_trajectory=True"
        )
    if not bool(torch.isfinite(states).all()):
        raise TsAdaptError("the teacher's states hold a NaN or infinite value; solve it again in a higher precision")
    return times
