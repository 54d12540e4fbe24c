"""Times from the numbers of other programs: falling sigmas, or timesteps of the network.

    sigmas      s_0 > .. > s_N            t_i = t(lambda = -log s_i): k-diffusion's and EDM's sigma_t / alpha_t;
                                          t_i = s_i for a rectified flow
    timesteps   tau_0 > .. > tau_{N-1}    t_i = the time at which the network is told tau_i

Ends. The programs denoise fully in their last step, to sigma 0, where a noise schedule may end at a small sigma: t_min
stands for that 0, unless t_min is evaluated and sigma 0 reached beyond it, and timesteps, which name evaluations only,
end there. A first sigma that is infinite (zero terminal SNR) is written by these programs as sqrt((1 - a) / a) with
a = 4.8973451890853435e-08.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.published import RANGE_TOLERANCE
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.numerics import validate_times

CLIPPED_SIGMA = math.sqrt((1 - 4.8973451890853435e-08) / 4.8973451890853435e-08)
"""The first sigma of ComfyUI's and Forge's tables with zero terminal SNR."""
ROUNDING = 1e-6
"""The relative difference up to which a sigma is taken for the end of the noise schedule, without a word."""


def from_sigmas(given: Sequence[float], noise_schedule: NoiseSchedule, what: str) -> tuple[Tensor, list[str]]:
    """The times `(N+1,)`, float64, of N + 1 sigmas for a model with `noise_schedule`, and remarks on what was changed.

    A last 0 below the sigma of t_min becomes t_min; where the sigma before is that of t_min already, the 0 is at t_end,
    or, where the noise schedule does not reach it, dropped, and with it a step. A first or last sigma that is off the
    schedule's end by at most RANGE_TOLERANCE is moved to it. Raises TsAdaptError, naming `what`, for anything but N + 1
    falling numbers within the range.
    """
    sigmas, remarks = _falling(given, what, "sigma"), list[str]()
    high, low = noise_schedule.program_sigma(
        torch.tensor([noise_schedule.t_max, noise_schedule.t_min], dtype=torch.float64)
    ).tolist()
    if sigmas[-1] < 0:
        raise TsAdaptError(f"{what} holds the sigma {sigmas[-1]:.6g}; sigmas are not negative")
    if math.isinf(high) and sigmas[0] >= CLIPPED_SIGMA * (1 - ROUNDING):
        sigmas[0] = high
    reached = noise_schedule.reaches_0
    twice = sigmas[-1] == 0 < low and len(sigmas) > (1 if reached else 2) and sigmas[-2] <= low * (1 + RANGE_TOLERANCE)
    if twice:
        sigmas.pop()
        if not reached:
            remarks.append(f"the last 0 is left out: the model ends at sigma {low:.4g}, so this is one step fewer")
    elif sigmas[-1] == 0 < low:
        sigmas[-1] = low
        remarks.append(f"the last 0 becomes {low:.4g}, the smallest sigma of the model (t_min)")
    for place, end, name, sign in ((0, high, "largest", 1), (-1, low, "smallest", -1)):
        beyond = sign * (math.log(sigmas[place] / end) if 0 < end < math.inf else sigmas[place] - end)
        if beyond > RANGE_TOLERANCE:
            raise TsAdaptError(
                f"{what} holds the sigma {sigmas[place]:.6g}, outside the model's [{low:.4g}, {high:.6g}]; give the "
                "model that the list is for"
            )
        if beyond > ROUNDING:
            remarks.append(f"sigma {sigmas[place]:.6g} becomes {end:.6g}, the {name} of the model")
        if beyond >= -ROUNDING:
            sigmas[place] = end
    remarks += _own_ends("sigma", sigmas[0], sigmas[-1], high, low)
    times = noise_schedule.time_of_program_sigma(torch.tensor(sigmas, dtype=torch.float64)).tolist()
    if sigmas[0] == high:
        times[0] = noise_schedule.t_max
    if sigmas[-1] == low:
        times[-1] = noise_schedule.t_min
    if twice and reached:
        times.append(noise_schedule.t_end)
    return validate_times(torch.tensor(times, dtype=torch.float64), noise_schedule, what=what), remarks


def from_timesteps(given: Sequence[float], noise_schedule: NoiseSchedule, what: str) -> tuple[Tensor, list[str]]:
    """The times `(N+1,)`, float64, of N timesteps, or of N + 1 whose last is that of t_min, and remarks.

    Raises TsAdaptError, naming `what`, for anything but falling timesteps within the range of `noise_schedule`.
    """
    times, remarks = _falling(given, what, "timestep"), list[str]()
    ends = torch.tensor([noise_schedule.t_max, noise_schedule.t_min], dtype=torch.float64)
    high, low = noise_schedule.timestep(ends).tolist()
    for place, end in ((0, high), (-1, low)):
        if math.isclose(times[place], end, rel_tol=ROUNDING):
            times[place] = end
    if times[0] > high or times[-1] < low:
        wrong = times[0] if times[0] > high else times[-1]
        raise TsAdaptError(
            f"{what} holds the timestep {wrong:.6g}; those of the model run from {high:.6g} down to {low:.6g}"
        )
    if times[-1] != low:
        times.append(low)
        remarks.append(f"{len(times) - 1} timesteps are {len(times) - 1} steps: the end, {low:.4g}, is added")
    remarks += _own_ends("timestep", times[0], times[-1], high, low)
    return validate_times(
        noise_schedule.time_of_timestep(torch.tensor(times, dtype=torch.float64)), noise_schedule, what=what
    ), remarks


def _falling(given: Sequence[float], what: str, kind: str) -> list[float]:
    """`given` as a new list; TsAdaptError unless it is finite and falls strictly."""
    values = [float(value) for value in given]
    for place, value in enumerate(values):
        if not math.isfinite(value):
            raise TsAdaptError(f"{what} holds the {kind} {value} at place {place}; give finite numbers")
    for place, (value, after) in enumerate(pairwise(values)):
        if after >= value:
            wrong = "is there twice" if after == value else f"is followed by {after:.6g}"
            raise TsAdaptError(
                f"{what}: {kind} {value:.6g} at place {place} {wrong}; {kind}s fall strictly, from noise to data"
            )
    return values


def _own_ends(kind: str, first: float, last: float, high: float, low: float) -> list[str]:
    remarks = []
    if first < high and not math.isclose(first, high, rel_tol=RANGE_TOLERANCE):  # high may be infinite
        remarks.append(
            f"the list starts at {kind} {first:.6g}, not at pure noise ({high:.6g}), which sampling starts from"
        )
    if last > low and not math.isclose(last, low, rel_tol=RANGE_TOLERANCE):
        remarks.append(f"the list ends at {kind} {last:.6g}: the noise of that level stays in the images")
    return remarks
