"""The range [low, high] that the levels of a quantizer span.

    min_max     all of it
    percentile  without the outermost values: the quantiles 1 - p and p
    mse         the range [f low, f high], 0 < f <= 1, whose nearest levels have the least squared error

Every function takes `(..., n)` and gives low and high of shape `(..., 1)`: rows of grouped weights, or all values of an
activation. Outliers that are cut off give the others finer levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ts_adapt.interfaces import unknown
from ts_adapt.quantizers.affine import fake_quantize, scale_and_zero

Range = tuple[Tensor, Tensor]
SHRINKS = 40
LARGEST_QUANTILE_INPUT = 2**20


def min_max(x: Tensor) -> Range:
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)


def percentile(x: Tensor, p: float = 0.9995) -> Range:
    """Of more values than torch's quantile takes, every k-th is looked at."""
    x = x[..., :: -(-x.shape[-1] // LARGEST_QUANTILE_INPUT)]
    low, high = torch.quantile(x.float(), x.new_tensor([1 - p, p], dtype=torch.float32), dim=-1, keepdim=True)
    return low.to(x.dtype), high.to(x.dtype)


def mse(x: Tensor, bits: int, symmetric: bool, *, exact_zero: bool = False) -> Range:
    """SHRINKS factors between 1 and 1 / SHRINKS are tried, row by row."""
    low, high = min_max(x)
    best = torch.full_like(low, float("inf"))
    best_low, best_high = low, high
    for k in range(SHRINKS, 0, -1):
        small, large = low * (k / SHRINKS), high * (k / SHRINKS)
        scale, zero = scale_and_zero(small, large, bits, symmetric, exact_zero=exact_zero)
        error = (fake_quantize(x, scale, zero, bits, symmetric) - x).square().mean(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, small, best_low), torch.where(better, large, best_high)
    return best_low, best_high


RANGES: dict[str, Callable[[Tensor, int, bool], Range]] = {
    "minmax": lambda x, bits, symmetric: min_max(x),
    "percentile": lambda x, bits, symmetric: percentile(x),
    "mse": lambda x, bits, symmetric: mse(x, bits, symmetric),
}


def find_range(name: str, x: Tensor, bits: int, symmetric: bool) -> Range:
    """The range of `x` by the method called `name`; TsAdaptError for an unknown one."""
    if name not in RANGES:
        raise unknown("range", name, RANGES)
    return RANGES[name](x, bits, symmetric)
