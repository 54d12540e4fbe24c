"""int8 and float8 Linear layers by torchao: the methods here that compute with few bits, not only store them.

    dynamic      a scale for each output channel of the weight and, at each call, for each token of the input;
                 the product is one of int8 matrices (`torch._int_mm`), summed in int32. No gradient.
    weight-only  int8 weights, real products: less memory, not less arithmetic.
    float8       weights and, at each call, inputs as float8 (e4m3), a scale for each; products of GPUs of compute
                 capability 8.9 and above (Ada, Hopper). No gradient.

torchao has no such convolution: Conv2d layers stay in full precision and are counted so. On disk there is no tensor of
it: the same codes are made again from the network's own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.layers.quantized_layer import QuantizedLayer
from ts_adapt.quantizers.layers.weights import TORCHAO, TorchAOWeight, torchao_library
from ts_adapt.quantizers.quantization import Quantization, Quantizer

FLOAT8_CAPABILITY, FLOAT8_MULTIPLE = (8, 9), 16
"""What float8 products need: a GPU of this compute capability, and sides of the weight that are multiples of this."""


@dataclass
class TorchAOOptions:
    """How Linear layers are run. Raises TsAdaptError for an unknown mode, and for other bits than 8."""

    mode: str = "dynamic"
    """dynamic (integer products), weight-only (int8 weights, real products) or float8 (float8 products)."""
    bits: int = 8
    """8; other numbers have no integer kernel here."""

    def __post_init__(self) -> None:
        if self.mode not in TORCHAO:
            raise unknown("torchao mode", self.mode, TORCHAO)
        if self.bits != 8:
            raise TsAdaptError(f"torchao runs Linear layers at 8 bits here, not {self.bits}; take minmax or hqq")


class TorchAO(Quantizer):
    """See the module's head.

    Raises TsAdaptError where torchao is not installed, for float8 on other devices, and for split shortcuts, which are
    convolutions.
    """

    name = "torchao"
    Options = TorchAOOptions
    options: TorchAOOptions

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        if to.layer_options.split_shortcuts:
            raise TsAdaptError(
                "torchao takes no convolutions, and split shortcuts are some; leave +split out, or take minmax"
            )
        if self.options.mode == "float8":
            _check_float8(next(to.network.parameters()).device)
        torchao_library()
        layers = to.layers()
        linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        if not linear:
            raise TsAdaptError(
                f"{type(to.network).__name__} has no Linear layer to quantize, and torchao takes no others"
            )
        for name, layer in layers.items():
            odd = self.options.mode == "float8" and any(side % FLOAT8_MULTIPLE for side in layer.weight.shape)
            if name in linear and odd:
                to.leave(name, f"Linear of sides that are no multiples of {FLOAT8_MULTIPLE}, as float8 products need")
            elif name in linear:
                to.replace(name, QuantizedLayer(layer, TorchAOWeight(layer.weight, self.options.mode)))
            else:
                to.leave(name, f"{type(layer).__name__}, which torchao's kernels do not take")


def _check_float8(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < FLOAT8_CAPABILITY:
        here = "a CPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
        raise TsAdaptError(
            "float8 products need a GPU of compute capability 8.9 or above (Ada, Hopper), and the network is on "
            f"{here}; take torchao-int8, or another machine"
        )
