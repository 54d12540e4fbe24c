"""The numbers of PTQD's correction (`layers.correction`), by least squares at each timestep of a calibration set.

1 + k = cov(F, F^) / var(F)             within channels, over all of them
b     = mean F^ - (1 + k) mean F        of each channel
s^2   = mean (F^ - (1 + k) F - b)^2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import rows_by_time
from ts_adapt.quantizers.layers.correction import OutputCorrection, output_dim
from ts_adapt.quantizers.layers.timestep import TimestepListener

SMALLEST_GAIN = 0.5
"""Where less is left of F, it is not multiplied back: the noise would be as well."""


def measured(
    calls: Sequence[Call], full: Sequence[Tensor], quantized: Sequence[Tensor], listener: TimestepListener
) -> OutputCorrection:
    """The correction for what was said to `calls`: `full`, in full precision, and `quantized`."""
    pairs: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for call, right, said in zip(calls, full, quantized, strict=True):
        for time, rows in rows_by_time(right, call.timestep):
            pairs.setdefault(time, []).append((_by_channel(right[rows], call.x), _by_channel(said[rows], call.x)))
    found = [_fitted(*(torch.cat(part, 1) for part in zip(*pairs[time], strict=True))) for time in sorted(pairs)]
    times = torch.tensor(sorted(pairs), device=full[0].device)
    gain, bias, spread = (torch.stack(part) for part in zip(*found, strict=True))
    return OutputCorrection(times, gain, bias, spread, listener)


def _by_channel(raw: Tensor, x: Tensor) -> Tensor:
    """`(C, n)`, float64, without the channels of a learned variance, of which the state `x` has none."""
    dim = output_dim(raw)
    own = raw.narrow(dim, 0, x.shape[dim]) if raw.ndim == x.ndim and raw.shape[dim] == 2 * x.shape[dim] else raw
    return own.movedim(dim, 0).flatten(1).double()


def _fitted(right: Tensor, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 + k `()`, b `(C,)` and s `()` of values `(C, n)`."""
    centre, centre_said = right.mean(1), said.mean(1)
    x, y = right - centre[:, None], said - centre_said[:, None]
    gain = ((x * y).sum() / x.square().sum().clamp(min=1e-30)).clamp(min=SMALLEST_GAIN)
    return gain, centre_said - gain * centre, (y - gain * x).square().mean().sqrt()
