"""Fixed families of time grids: N intervals from t_max down to t_min, known before any model is seen.

With u_i = i/N, T = t_max, e = t_min, lambda the half log-SNR, s = exp(-lambda) the edm_sigma, i = 0 .. N:

    linear, uniform, ddim, trailing   t_i = T + u_i (e - T)
    quadratic                         t_i = (sqrt T + u_i (sqrt e - sqrt T))^2
    beta                              t_i = e + (T - e) F^-1(1 - u_i),  F of the Beta(.6, .6) distribution
    log_snr, exponential              lambda_i = lambda_T + u_i (lambda_e - lambda_T)
    karras                            s_i = (s_T^(1/7) + u_i (s_e^(1/7) - s_T^(1/7)))^7

All families share their ends, so that a comparison of them is one of placement alone. Then the four on the first
line are the same grid, and the two of log_snr (uniform in log s = -lambda); their names differ by the originals,
which `native=True` gives. Where lambda is infinite at an end, the families in lambda or s are laid over
`numerics.finite_log_snr_range` and their outermost point is moved to that end.

The originals (`NATIVE`) have N points of evaluation t_0 .. t_{N-1} and an end:

    linear       round(T - i T/N), end t_min = 0                                                 (ALD3's LINEAR)
    ddim         (N-1-i) floor((T+1)/N), then s = 0: starts below T                (Song et al. 2021, 'leading')
    trailing     round((T+1) - i (T+1)/N) - 1, end t_min                                    (Lin et al. 2024)
    quadratic    1 + floor((N-1-i)^2 / (N-1)^2 0.8 (T+1)), end t_min          (DDIM 'quad', as latent diffusion)
    beta         the N first of the times above, rounded to timesteps, then s = 0   (Lee et al. 2024, as in ComfyUI)
    karras       N points from s_T to s_e, then s = 0; of a table the timesteps nearest in s  (Karras et al. 2022)
    log_snr      of a table: N points uniform in log s, the timesteps nearest in s, then s = 0     (ALD3's SNR)
    exponential  N points uniform in log s at their real times, then s = 0                         (k-diffusion)

The integer ones exist for tables of timesteps only, and where no two of their timesteps are the same. `s = 0` is at
`noise_schedule.t_end`. Where the noise schedule does not reach it, t_min stands for it; the N points already end there,
an N-th step would have no length, and the N intervals of the common rule are the nearest thing: native and not are then
the same. `uniform`, and `log_snr` without a table (DPM-Solver's time_uniform and logSNR), are their own originals.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import BetaTable, edm_sigma, time_of_edm_sigma
from ts_adapt.numerics import check_steps, finite_log_snr_range, validate_times

Family = Callable[[NoiseSchedule, int], Tensor]

RHO = 7.0
BETA_SHAPE = 0.6


def make(name: str, noise_schedule: NoiseSchedule, steps: int, native: bool = False) -> Tensor:
    """The grid `name` over `steps` intervals: times `(steps+1,)`, float64, strictly decreasing.

    They run from the noise schedule's t_max to its t_min exactly; with `native` they are the published original (see
    above).

    Raises TsAdaptError if the name is unknown, `steps` is below 1, the original does not exist for this noise
    schedule, or has two equal timesteps because there are too many steps.
    """
    if name not in FIXED:
        raise unknown("grid", name, FIXED)
    check_steps(steps)
    what = f"{name} grid over {steps} steps"
    if native and name in NATIVE:
        return validate_times(NATIVE[name](noise_schedule, steps), noise_schedule, what=f"the native {what}")
    times = pin_ends(FIXED[name](noise_schedule, steps), noise_schedule)
    return validate_times(times, noise_schedule, what=f"the {what}")


def pin_ends(times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """`times` `(N+1,)` with t_max and t_min, exactly, in the first and last place."""
    return torch.cat([times.new_tensor([noise_schedule.t_max]), times[1:-1], times.new_tensor([noise_schedule.t_min])])


def has_ends(times: Tensor, noise_schedule: NoiseSchedule) -> bool:
    """Whether `times` `(..., N+1)` run from t_max to t_min, but for roundings."""
    ends = times.new_tensor([noise_schedule.t_max, noise_schedule.t_min])
    tolerance = 1e-6 * (noise_schedule.t_max - noise_schedule.t_min)
    return bool(((times.detach()[..., [0, -1]] - ends).abs() <= tolerance).all())


def _between(first: float, last: float, points: int) -> Tensor:
    return torch.linspace(first, last, points, dtype=torch.float64)


def uniform(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    """Uniform in t."""
    return _between(noise_schedule.t_max, noise_schedule.t_min, steps + 1)


def quadratic(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    """Uniform in sqrt(t) (DPM-Solver's time_quadratic)."""
    return _between(math.sqrt(noise_schedule.t_max), math.sqrt(noise_schedule.t_min), steps + 1).square()


def beta(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    """t at the quantiles 1 - i/N of Beta(.6, .6), dense at both ends (Lee et al. 2024, arXiv 2407.12173)."""
    from scipy.special import betaincinv  # the inverse of Beta's distribution function; a quarter of a second to import

    quantiles = betaincinv(BETA_SHAPE, BETA_SHAPE, _between(1, 0, steps + 1).numpy())
    return noise_schedule.t_min + (noise_schedule.t_max - noise_schedule.t_min) * torch.as_tensor(
        quantiles, dtype=torch.float64
    )


def log_snr(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    """Uniform in lambda (Lu et al. 2022, DPM-Solver)."""
    return noise_schedule.time(_between(*finite_log_snr_range(noise_schedule), steps + 1))


def karras(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    """Uniform in edm_sigma^(1/7) (Karras et al. 2022, equation 5)."""
    noisy, clean = (math.exp(-value / RHO) for value in finite_log_snr_range(noise_schedule))
    return time_of_edm_sigma(noise_schedule, _between(noisy, clean, steps + 1).pow(RHO))


def _last_timestep(noise_schedule: NoiseSchedule, name: str) -> int:
    if not isinstance(noise_schedule, BetaTable):
        raise TsAdaptError(
            f"the native {name} grid is made of a table's timesteps and {type(noise_schedule).__name__} has none; "
            "leave native=True out"
        )
    return round(noise_schedule.t_max)


def then(times: Tensor, end: float) -> Tensor:
    """The N points of evaluation `times` `(N,)`, and the end: `(N+1,)`, float64."""
    return torch.cat([times.to(torch.float64), torch.tensor([end], dtype=torch.float64)])


def nearest_timesteps(edm_sigmas: Tensor, noise_schedule: BetaTable) -> Tensor:
    """The timesteps of a table whose edm_sigmas are nearest to those given, of any shape; float64."""
    table = edm_sigma(noise_schedule, torch.arange(round(noise_schedule.t_max) + 1, dtype=torch.float64))
    return (edm_sigmas[..., None] - table).abs().argmin(-1).to(torch.float64)


def _native_linear(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    last = _last_timestep(noise_schedule, "linear")
    return (last - torch.arange(steps + 1, dtype=torch.float64) * last / steps).round()


def _native_ddim(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    stride = (_last_timestep(noise_schedule, "ddim") + 1) // steps
    return then(stride * torch.arange(steps - 1, -1, -1), noise_schedule.t_end)


def _native_trailing(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    length = _last_timestep(noise_schedule, "trailing") + 1
    places = torch.arange(steps, dtype=torch.float64)
    return then((length - length / steps * places).round() - 1, noise_schedule.t_min)


def _native_quadratic(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    root = math.sqrt(0.8 * (_last_timestep(noise_schedule, "quadratic") + 1))
    return then(1 + _between(0, root, steps).square().floor().flip(0), noise_schedule.t_min)


def _native_beta(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
    _last_timestep(noise_schedule, "beta")
    return then(beta(noise_schedule, steps)[:-1].round(), noise_schedule.t_end)


def _ending_in_sigma_0(family: Family) -> Family:
    """The original of a family of N sigmas, to which a 0 is appended."""

    def native(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        if not noise_schedule.reaches_0:
            return pin_ends(family(noise_schedule, steps), noise_schedule)
        return then(family(noise_schedule, steps - 1), noise_schedule.t_end)

    return native


def _at_timesteps(family: Family, otherwise: Family) -> Family:
    """The original of a family of N sigmas for a table: the timesteps nearest to them, the first of which is T."""

    def native(noise_schedule: NoiseSchedule, steps: int) -> Tensor:
        if not isinstance(noise_schedule, BetaTable):
            return otherwise(noise_schedule, steps)
        sigmas = edm_sigma(noise_schedule, family(noise_schedule, steps - 1))
        inside = nearest_timesteps(sigmas[1:], noise_schedule)
        return then(torch.cat([sigmas.new_tensor([noise_schedule.t_max]), inside]), noise_schedule.t_end)

    return native


FIXED: dict[str, Family] = {
    "linear": uniform,
    "ddim": uniform,
    "trailing": uniform,
    "uniform": uniform,
    "quadratic": quadratic,
    "karras": karras,
    "log_snr": log_snr,
    "exponential": log_snr,
    "beta": beta,
}

NATIVE: dict[str, Family] = {
    "linear": _native_linear,
    "ddim": _native_ddim,
    "trailing": _native_trailing,
    "quadratic": _native_quadratic,
    "karras": _at_timesteps(karras, _ending_in_sigma_0(karras)),
    "log_snr": _at_timesteps(
        log_snr, lambda noise_schedule, steps: pin_ends(log_snr(noise_schedule, steps), noise_schedule)
    ),
    "exponential": _ending_in_sigma_0(log_snr),
    "beta": _native_beta,
}
