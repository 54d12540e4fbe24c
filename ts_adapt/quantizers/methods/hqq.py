"""HQQ (Badri & Shaji 2023): weights at few bits without calibration, robust to outliers.

    minimise over z   ||W_e||_p^p + beta ||W_e - (W - W_r)||^2,      W_r = s (clamp(round(W / s + z)) - z),  p = 0.7

by half-quadratic splitting, for every group of weights alone, from the min-max range:

    W_e = sign(x) relu(|x| - |x|^(p - 1) / beta),   x = W - W_r
    z   = mean(W_q - (W - W_e) / s),                beta <- 1.01 beta

s stays. It ends when mean |W - W_r| of the layer rises; each group keeps the z of its least. The weight of a
convolution is flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.ranges import min_max
from ts_adapt.quantizers.layers import affine
from ts_adapt.quantizers.layers.quantized_layer import QuantizedLayer
from ts_adapt.quantizers.layers.weights import AffineWeight
from ts_adapt.quantizers.quantization import Quantization, Quantizer

NORM, BETA, GROWTH = 0.7, 10.0, 1.01


@dataclass
class HQQOptions:
    """Bits and groups. Raises TsAdaptError for what makes no sense, naming it."""

    bits: int = 4
    group: int | str = 64
    """Weights that share a scale and a zero: how many, or channel, or tensor."""
    axis: int = 0
    """Of a numbered group: 0 takes weights spread over the whole layer, 1 takes neighbours."""
    iterations: int = 20
    """Of the half-quadratic solver; 0: the min-max range is kept."""

    def __post_init__(self) -> None:
        affine.check_bits(self.bits)
        affine.check_group(self.group)
        if self.axis not in (0, 1):
            raise TsAdaptError(f"axis is {self.axis!r}; expected 0 or 1")
        if self.iterations < 0:
            raise TsAdaptError(f"iterations is {self.iterations}; expected 0 or more")


class HQQ(Quantizer):
    """See the module's head."""

    name = "hqq"
    Options = HQQOptions
    options: HQQOptions

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        for name, layer in to.layers().items():
            to.replace(name, QuantizedLayer(layer, self.weight(layer.weight)))

    def weight(self, weight: Tensor) -> AffineWeight:
        """`weight`, quantized."""
        o = self.options
        rows = affine.to_groups(weight.detach().float(), o.group, o.axis)
        scale, zero = affine.scale_and_zero(*min_max(rows), o.bits, False)
        zero = best_zero(rows, scale, zero, o.bits, o.iterations)
        return AffineWeight.nearest(weight, scale, zero, o.bits, o.group, axis=o.axis)


def best_zero(rows: Tensor, scale: Tensor, zero: Tensor, bits: int, iterations: int) -> Tensor:
    """The zeros `(G, 1)` for the groups `rows` `(G, n)` at `scale` `(G, 1)`, from `zero` on."""
    best, beta = zero, BETA
    least = torch.full_like(zero, torch.inf)
    former = torch.inf
    for step in range(iterations + 1):
        codes = affine.quantize(rows, scale, zero, bits, False)
        x = rows - affine.dequantize(codes, scale, zero)
        error = x.abs().mean(-1, keepdim=True)
        best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
        mean = float(error.mean())
        if step == iterations or mean >= former:
            break
        former = mean
        zero = (codes - (rows - shrink(x, beta)) / scale).mean(-1, keepdim=True)
        beta *= GROWTH
    return best


def shrink(x: Tensor, beta: float) -> Tensor:
    """The generalised soft threshold, the proximal map of ||.||_p^p / beta, p = NORM."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-30).pow(NORM - 1) / beta).clamp(min=0)
