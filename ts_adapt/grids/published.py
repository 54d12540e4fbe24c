"""Published tables of time grids, and rounding to integer timesteps.

Align Your Steps (Sabour et al. 2024) gives 11 edm_sigmas s_0 .. s_10 for 10 steps of three models; s_10 = 0. For
other N its authors replace the final 0 by the smallest sigma of the model's range, interpolate log s linearly

    log s(u), u = i/N,      through the nodes (k/10, log s_k), k = 0 .. 10

and set the last one to 0 again. Sigmas become times by t(lambda = -log s). The original is of integers where the noise
schedule is a table: for 10 steps the published timesteps, which are no roundings of the published sigmas, for other N
the timesteps nearest to the interpolated ones. It ends in sigma 0, at `noise_schedule.t_end`; where that is not
reached, t_min stands for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import nearest_timesteps, pin_ends, then
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import BetaTable
from ts_adapt.numerics import check_steps, finite_log_snr_range, validate_times


@dataclass(frozen=True)
class SigmaTable:
    """edm_sigmas of a published grid, without the final 0; `sigma_min` is the low end of the range it was made for.

    timesteps  that were published beside the sigmas; none for a model without a table
    """

    sigmas: tuple[float, ...]
    sigma_min: float
    timesteps: tuple[int, ...] = ()


TABLES: dict[str, SigmaTable] = {
    "sd15": SigmaTable(
        (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
        0.0292,
        (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    ),
    "sdxl": SigmaTable(
        (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
        0.0292,
        (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
    ),
    "svd": SigmaTable((700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034), 0.002),
}

PUBLISHED = {"ays-sd15": "sd15", "ays-sdxl": "sdxl", "ays-svd": "svd"}
"""What a grid is called that is made of a table."""
RANGE_TOLERANCE = 0.02
"""How far, in log edm_sigma, an end of the noise schedule may lie from the one a table was made for."""


def ays(table: str, noise_schedule: NoiseSchedule, steps: int, native: bool = False, rescale: bool = False) -> Tensor:
    """The Align Your Steps grid of `table` (sd15, sdxl, svd) over `steps` intervals: times `(steps+1,)`, float64.

    The ends are the noise schedule's t_max and t_min. With `native` the first is the table's own (at most t_max), the
    last sigma 0, or t_min where the noise schedule does not reach 0, and the times are timesteps where it has any. With
    `rescale` log edm_sigma is mapped linearly from the table's range to the noise schedule's.

    Raises TsAdaptError if `steps` is below 1, and for a table that was made for another range of edm_sigma, unless
    `rescale` is on.
    """
    check_steps(steps)
    published = TABLES[table]
    nodes = torch.tensor([*published.sigmas, published.sigma_min], dtype=torch.float64).log().neg()
    if rescale:
        low, high = finite_log_snr_range(noise_schedule)
        nodes = low + (high - low) * (nodes - nodes[0]) / (nodes[-1] - nodes[0])
    else:
        _refuse_other_range(table, noise_schedule)
    place = torch.linspace(0, len(nodes) - 1, steps + 1, dtype=torch.float64)
    node = place.floor().long().clamp(max=len(nodes) - 2)
    found = torch.lerp(nodes[node], nodes[node + 1], place - node)
    times = pin_ends(noise_schedule.time(found), noise_schedule)
    if native:
        times = then(_native(published, noise_schedule, found[:-1]), noise_schedule.t_end)
    return validate_times(times, noise_schedule, what=f"the {table} grid over {steps} steps")


def _native(published: SigmaTable, noise_schedule: NoiseSchedule, log_snr: Tensor) -> Tensor:
    """The points of evaluation `(N,)` of the original, at `log_snr` `(N,)`."""
    if not isinstance(noise_schedule, BetaTable):
        return noise_schedule.time(log_snr).clamp(max=noise_schedule.t_max)
    if len(log_snr) == len(published.timesteps) and noise_schedule.t_max == published.timesteps[0]:
        return torch.tensor(published.timesteps)
    return nearest_timesteps(torch.exp(-log_snr), noise_schedule)


def _refuse_other_range(table: str, noise_schedule: NoiseSchedule) -> None:
    """The clean end is compared only where it is finite: a schedule that reaches sigma 0 has the table's own end."""
    published = TABLES[table]
    noisy, clean = (
        float(noise_schedule.log_snr(torch.tensor(t, dtype=torch.float64)))
        for t in (noise_schedule.t_max, noise_schedule.t_min)
    )
    off_above = abs(noisy + math.log(published.sigmas[0])) > RANGE_TOLERANCE
    off_below = math.isfinite(clean) and abs(clean + math.log(published.sigma_min)) > RANGE_TOLERANCE
    if off_above or off_below:
        raise TsAdaptError(
            f"the table {table} was made for edm_sigma in [{published.sigma_min:.4g}, {published.sigmas[0]:.5g}], "
            f"this noise schedule has [{math.exp(-clean):.4g}, {math.exp(-noisy):.5g}]; "
            "use another table, or rescale=True to stretch this one"
        )


def round_to_timesteps(times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """`times` `(N+1,)` or `(B, N+1)` moved to the integer timesteps nearest in log edm_sigma; float64.

    For networks and schedulers that take integers only: a real time is the better input wherever it is possible.

    Raises TsAdaptError unless `noise_schedule` is a table of timesteps, and if two times fall on the same timestep,
    naming the places.
    """
    if not isinstance(noise_schedule, BetaTable):
        raise TsAdaptError(
            f"times are rounded to the timesteps of a BetaTable; {type(noise_schedule).__name__} has none"
        )
    times = validate_times(times, noise_schedule)
    below, above, at = (
        noise_schedule.log_snr(times.floor()),
        noise_schedule.log_snr(times.ceil()),
        noise_schedule.log_snr(times),
    )
    rounded = torch.where(below - at > at - above, times.ceil(), times.floor())
    same = (rounded[..., 1:] >= rounded[..., :-1]).nonzero().tolist()
    if same:
        named = [f"{i} and {i + 1}" + (f" of sample {row[0]}" if row else "") for *row, i in same]
        shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        raise TsAdaptError(
            f"rounded to integer timesteps, the time grid repeats itself at places {shown}; "
            "take fewer steps, or keep the real times"
        )
    return rounded
