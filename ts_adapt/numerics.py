"""Broadcasting, float64 coefficients, validation of time grids.

A coefficient is `()` (shared by the batch) or `(B,)` (per sample), float64; a state is `(B, ...)` in the network's
dtype. `scale(c, x)` is the one place where the two meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import NoiseSchedule, TimeGrid

MARGIN = 1e-3
"""The share of all times that is left out at an end where log-SNR is infinite."""


def as_node_times(t: float | Tensor) -> Tensor:
    """A time as a float64 tensor."""
    return torch.as_tensor(t, dtype=torch.float64)


def expand(c: Tensor, x: Tensor) -> Tensor:
    """`()` or `(B,)` -> a shape that broadcasts with `x` `(B, ...)`, in the dtype of x.

    A `()` on the CPU stays there: kernels of every device take it as a scalar, where a copy would wait.
    """
    if c.ndim == 0 and c.device.type == "cpu":
        return c.to(x.dtype)
    c = c.to(device=x.device, dtype=x.dtype)
    return c.reshape(c.shape + (1,) * (x.ndim - 1))


def scale(c: Tensor, x: Tensor) -> Tensor:
    """c x, with c `()` or `(B,)` in float64 and x `(B, ...)`."""
    return expand(c, x) * x


def combine(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """sum_k c_k x_k over pairs (c_k, x_k)."""
    (c, x), *rest = terms
    total = scale(c, x)
    for c, x in rest:
        total = total + scale(c, x)
    return total


def shortened(rows: Tensor, most: float) -> Tensor:
    """`rows` `(B, ...)`, each of which is longer than `most` shortened to that; what is not finite counts as 0."""
    rows = torch.nan_to_num(rows, posinf=0.0, neginf=0.0)
    return scale(most / rows.flatten(1).norm(dim=1).clamp_min(most), rows)


def shorten_gradient(numbers: Tensor, most: float = 1.0) -> Tensor:
    """`numbers` `(B, ...)` as they are; backward, each row's gradient is `shortened` to `most`.

    A sample about to end in another mode has a gradient many times those of all others: it may not decide alone.
    """
    if numbers.requires_grad:
        numbers.register_hook(lambda gradient: shortened(gradient, most))
    return numbers


def check_steps(steps: int) -> None:
    """TsAdaptError unless a grid can have so many."""
    if steps < 1:
        raise TsAdaptError(f"steps is {steps}; a time grid has at least 1")


def dtype_of(network: nn.Module, default: torch.dtype) -> torch.dtype:
    """The precision of a network's floating-point weights; `default` where it has none."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), default)


def each_tensor(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with `change` of every tensor in it: itself, or those in mappings, lists and tuples.

    An output of diffusers or transformers, which is a mapping, stays of its class.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        parts = {key: each_tensor(part, change) for key, part in value.items()}
        output = isinstance(value, dict) and type(value) is not dict
        return type(value)(**parts) if output else parts
    if isinstance(value, list | tuple):
        return type(value)(each_tensor(part, change) for part in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that `each_tensor` meets in `value`, in order."""
    found: list[Tensor] = []

    def met(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each_tensor(value, met)
    return found


def finite_log_snr_range(noise_schedule: NoiseSchedule) -> tuple[float, float]:
    """The log-SNR at t_max and t_min; an infinite end is replaced by its value MARGIN of the time range inside.

    Returns (lambda at the noisy end, lambda at the clean end), both finite.
    """
    span = noise_schedule.t_max - noise_schedule.t_min
    ends = []
    for t, inside in (
        (noise_schedule.t_max, noise_schedule.t_max - MARGIN * span),
        (noise_schedule.t_min, noise_schedule.t_min + MARGIN * span),
    ):
        value = float(noise_schedule.log_snr(torch.tensor(t, dtype=torch.float64)))
        if not math.isfinite(value):
            value = float(noise_schedule.log_snr(torch.tensor(inside, dtype=torch.float64)))
        ends.append(value)
    return ends[0], ends[1]


def validate_times(
    times: Tensor, noise_schedule: NoiseSchedule | None = None, *, what: str = "the time grid"
) -> Tensor:
    """`times` as float64 `(N+1,)` or `(B, N+1)`; TsAdaptError unless finite, strictly decreasing, and inside the noise
    schedule.

    The message names the first offending place.
    """
    times = torch.as_tensor(times)
    if times.ndim not in (1, 2):
        raise TsAdaptError(f"{what} has shape {tuple(times.shape)}; expected (N+1,) or (B, N+1)")
    if times.shape[-1] < 2:
        raise TsAdaptError(f"{what} has {times.shape[-1]} time(s); at least 2 are needed, for one step")
    times = times.to(torch.float64)
    flat = times.detach().reshape(-1, times.shape[-1])
    if not bool(torch.isfinite(flat).all()):
        row, column = (~torch.isfinite(flat)).nonzero()[0].tolist()
        raise TsAdaptError(
            f"{what} holds {float(flat[row, column])} at place {column}{_of(times, row)}; times are finite"
        )
    falls = flat[:, 1:] < flat[:, :-1]
    if not bool(falls.all()):
        row, column = (~falls).nonzero()[0].tolist()
        a, b = float(flat[row, column]), float(flat[row, column + 1])
        kind = "twice the same time" if a == b else "not decreasing"
        raise TsAdaptError(
            f"{what} is {kind}: {a:.6g} then {b:.6g} at places {column} and {column + 1}{_of(times, row)}; "
            "times fall strictly, from noise to data"
        )
    if noise_schedule is not None:
        tolerance = 1e-9 * (abs(noise_schedule.t_max) + abs(noise_schedule.t_min))
        outside = (flat > noise_schedule.t_max + tolerance) | (flat < noise_schedule.t_min - tolerance)
        outside[:, -1] &= flat[:, -1] != noise_schedule.t_end
        if bool(outside.any()):
            row = int(outside.any(1).nonzero()[0])
            raise TsAdaptError(
                f"{what} runs from {float(flat[row, 0]):.6g} to {float(flat[row, -1]):.6g}{_of(times, row)}, outside "
                f"the noise schedule's [{noise_schedule.t_min:.6g}, {noise_schedule.t_max:.6g}]"
            )
    return times


def _of(times: Tensor, row: int) -> str:
    return f" of sample {row}" if times.ndim == 2 else ""


def validate_grid(
    grid: TimeGrid | Tensor, noise_schedule: NoiseSchedule | None = None, batch: int | None = None
) -> TimeGrid:
    """A grid whose times are valid and whose corrections fit; a plain tensor of times is wrapped."""
    if not isinstance(grid, TimeGrid):
        grid = TimeGrid(torch.as_tensor(grid))
    grid = replace(grid, times=validate_times(grid.times, noise_schedule))
    for field, value in grid.held.items():
        name, ndim = field.name, 1 + field.dims
        if not bool(torch.isfinite(value.detach().float()).all()):  # networks take single precision
            raise TsAdaptError(f"{name} of the grid hold a NaN or infinite value")
        if value.ndim not in (ndim, ndim + 1) or value.shape[-ndim] != grid.steps:
            raise TsAdaptError(
                f"{name} of the grid have shape {tuple(value.shape)}; its {grid.steps} steps need as many places"
            )
    for rows in (batch, grid.times.shape[0] if grid.per_sample else None):
        if rows is not None:
            check_rows(grid, rows)
    return grid


def check_rows(grid: TimeGrid, batch: int) -> None:
    """TsAdaptError unless what `grid` holds for every sample is for `batch` samples."""
    if grid.per_sample and grid.times.shape[0] != batch:
        raise TsAdaptError(f"there are {grid.times.shape[0]} grids for a batch of {batch}; give one, or one per sample")
    for field, value in grid.held.items():
        if value.ndim > 1 + field.dims and value.shape[0] != batch:
            raise TsAdaptError(f"{field.name} of the grid are for {value.shape[0]} samples; the grid is for {batch}")


def check_finite(x: Tensor, step: int, what: str) -> None:
    """TsAdaptError naming the step if `x` `(B, ...)` holds a NaN or infinity."""
    if not bool(torch.isfinite(x).all()):
        rows = (~torch.isfinite(x.flatten(1)).all(1)).nonzero().flatten().tolist()
        raise TsAdaptError(
            f"{what} holds a NaN or infinite value at step {step}, in sample(s) {rows[:8]} of the batch; "
            "try a higher precision (fp32), or a grid with smaller steps"
        )


def warming_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """The exponential moving average whose memory grows with the number of steps n: min(decay, (1 + n) / (10 + n))."""

    def average(mean: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        n = int(count)
        return mean.lerp(new, 1 - min(decay, (1 + n) / (10 + n)))

    return average
