"""bf16 and fp16: layers in 16 bits, the rest of the network in its own precision; nothing is calibrated.

Each planned layer does what torch.autocast makes of it on a GPU (`layers.half`): weight, bias and input are rounded,
the product is summed in float32, and rounded. Between the layers numbers return to the network's precision, where
autocast leaves them in 16 bits until an operation asks for more; products within attention stay in it too. So the
network is at least as exact as under autocast; `model.dtype` is the one that puts all of it into 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.layers.half import HALVES, HalfActivation, HalfWeight
from ts_adapt.quantizers.layers.quantized_layer import QuantizedLayer
from ts_adapt.quantizers.quantization import Quantization, Quantizer


@dataclass
class HalfOptions:
    """Raises TsAdaptError for other bits than 16."""

    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits != 16:
            raise TsAdaptError(f"bits is {self.bits}; bf and fp have 16 (for 8 there is torchao-fp8, for fewer hqq)")


class BF16(Quantizer):
    """8 bits of mantissa, the range of float32; see the module's head."""

    name = "bf"
    Options = HalfOptions
    dtype: ClassVar[str] = "bfloat16"

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        largest = torch.finfo(HALVES[self.dtype]).max
        for name, layer in to.layers().items():
            if bool((layer.weight.abs() > largest).any()):
                to.leave(name, f"weight beyond {largest:g}, the largest number of {self.dtype}")
                continue
            to.replace(name, QuantizedLayer(layer, HalfWeight(layer.weight, self.dtype), HalfActivation(self.dtype)))


class FP16(BF16):
    """11 bits of mantissa, up to 65504: larger inputs become infinite, and the run that meets them fails."""

    name = "fp"
    dtype = "float16"
