"""The range [low, high] that the levels of a quantizer span.

    min_max      all of it
    percentile   without the outermost values: between two quantiles
    least_error  the range [f low, f high], 0 < f <= 1, whose nearest levels have the least mean |x^ - x|^p

The options call them minmax, percentile and, with p = 2, mse. Every function takes `(..., n)` and gives low and high of
shape `(..., 1)`: rows of grouped weights, or all values of an activation. `weights` `(..., n)` say how often each value
counts; None: once. Outliers that are cut off give the others finer levels.

What is cut off of an activation errs in one direction, and adds up in the layer that it goes to; rounding errors cancel
there. The finer the levels, the less rounding there is to save by cutting, and the more p is for activations of b bits:
p = max(2, 1 + b / 4). No paper's: chosen on the embedded model, where at 8 bits p = 3 brings the images nearer to those
of the full network than p = 2 does, with TDQ and with TinyDM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ts_adapt.errors import unknown
from ts_adapt.quantizers.layers.affine import SMALLEST_SCALE, fake_quantize, scale_and_zero, to_groups

Range = tuple[Tensor, Tensor]
SHRINKS = 40
LARGEST_QUANTILE_INPUT = 2**20


def min_max(x: Tensor) -> Range:
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)


def percentile(x: Tensor, share: float = 0.9995, weights: Tensor | None = None) -> Range:
    """Of more values than torch's quantile takes, every k-th is looked at. With weights it is the value at which their
    sum reaches the quantile."""
    if weights is not None:
        x, order = x.sort(-1)
        mass = weights.gather(-1, order).double().cumsum(-1)
        wanted = mass[..., -1:] * mass.new_tensor([1 - share, share])
        low, high = x.gather(-1, torch.searchsorted(mass, wanted).clamp(max=x.shape[-1] - 1)).split(1, -1)
        return low, high
    x = x[..., :: -(-x.shape[-1] // LARGEST_QUANTILE_INPUT)]
    low, high = torch.quantile(x.float(), x.new_tensor([1 - share, share], dtype=torch.float32), dim=-1, keepdim=True)
    return low.to(x.dtype), high.to(x.dtype)


def activation_power(bits: int) -> float:
    """p for activations of so many bits."""
    return max(2.0, 1 + bits / 4)


def least_error(
    x: Tensor,
    bits: int,
    symmetric: bool,
    *,
    exact_zero: bool = False,
    weights: Tensor | None = None,
    power: float = 2.0,
) -> Range:
    """SHRINKS factors between 1 and 1 / SHRINKS are tried, row by row; p is `power`."""
    share = 1 / x.shape[-1] if weights is None else weights / weights.sum(-1, keepdim=True)
    low, high = min_max(x)
    size = torch.maximum(low.abs(), high.abs()).clamp(min=SMALLEST_SCALE)
    best = torch.full_like(low, float("inf"))
    best_low, best_high = low, high
    for k in range(SHRINKS, 0, -1):
        small, large = low * (k / SHRINKS), high * (k / SHRINKS)
        scale, zero = scale_and_zero(small, large, bits, symmetric, exact_zero=exact_zero)
        wrong = (fake_quantize(x, scale, zero, bits, symmetric) - x).abs() / size
        error = (wrong.pow(power) * share).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, small, best_low), torch.where(better, large, best_high)
    return best_low, best_high


RANGES: dict[str, Callable[[Tensor, int, bool, bool, Tensor | None], Range]] = {
    "minmax": lambda x, bits, symmetric, exact_zero, weights: min_max(x),
    "percentile": lambda x, bits, symmetric, exact_zero, weights: percentile(x, weights=weights),
    "mse": lambda x, bits, symmetric, exact_zero, weights: least_error(
        x, bits, symmetric, exact_zero=exact_zero, weights=weights
    ),
}


def check_range(name: str) -> None:
    """TsAdaptError unless `name` is one of RANGES."""
    if name not in RANGES:
        raise unknown("range", name, RANGES)


def find_range(
    name: str, x: Tensor, bits: int, symmetric: bool, *, exact_zero: bool = False, weights: Tensor | None = None
) -> Range:
    """The range of `x` by the method called `name`; TsAdaptError for an unknown one."""
    check_range(name)
    return RANGES[name](x, bits, symmetric, exact_zero, weights)


def weight_levels(
    name: str, weight: Tensor, bits: int, group: int | str = "channel", *, symmetric: bool = True
) -> Range:
    """The scale and zero `(G, 1)` of a `weight`, whose rows of `to_groups` have the range called `name`."""
    rows = to_groups(weight.detach().float(), group)
    return scale_and_zero(*find_range(name, rows, bits, symmetric), bits, symmetric)
