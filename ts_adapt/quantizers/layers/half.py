"""Layers in 16 bits, as torch.autocast runs them: Q is rounding to bfloat16 or float16.

    y = Q(op(Q(x), Q(W)) + Q(b)),      the product summed in float32

In that precision itself where there are kernels for it that sum so: on GPUs, and of bfloat16 on CPUs. Otherwise, and
under gradient, in the precision of x from the rounded numbers, which is the same up to the order of the sum; gradients
then pass as if nothing was rounded, and are themselves not rounded to 16 bits, where small ones would vanish.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.layers.quantized_layer import ActivationPart, Operation
from ts_adapt.quantizers.layers.timestep import TimestepListener
from ts_adapt.quantizers.layers.weights import DenseWeight

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(x: Tensor, to: torch.dtype) -> Tensor:
    """x at the nearest number of the precision `to`, in its own dtype and with the gradient of x."""
    return x if x.dtype == to else x + (x.to(to).to(x.dtype) - x).detach()


class HalfWeight(DenseWeight):
    """Q(W), made again from the layer's own weight; `dtype` of HALVES."""

    kind = "half"
    derived: ClassVar[bool] = True

    def __init__(self, weight: Tensor, dtype: str) -> None:
        super().__init__(weight.to(_half(dtype)))
        self.precision: torch.dtype = _half(dtype)

    def product(self, operation: Operation, x: Tensor, bias: Tensor | None) -> Tensor:
        y = operation(x, self.value.to(x.dtype), None if bias is None else bias.to(self.precision).to(x.dtype))
        return rounded(y, self.precision)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        return cls(original.weight, spec["dtype"])


class HalfActivation(ActivationPart):
    """Q(x), of the dtype that the product is formed in."""

    kind = "half-input"
    described = ("dtype",)
    bits = 16

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype
        self.precision: torch.dtype = _half(dtype)

    def forward(self, x: Tensor) -> Tensor:
        learning = x.requires_grad and torch.is_grad_enabled()
        if learning or (self.precision is torch.float16 and x.device.type == "cpu"):
            return rounded(x, self.precision)
        return x.to(self.precision)


def _half(dtype: str) -> torch.dtype:
    if dtype not in HALVES:
        raise TsAdaptError(f"dtype is {dtype!r}; expected {' or '.join(HALVES)}")
    return HALVES[dtype]
