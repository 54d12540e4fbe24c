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
from typing import Any, Self

import torch
from torch import Tensor, nn

from ts_adapt.interfaces import TsAdaptError, unknown
from ts_adapt.quantizers.calls import Call
from ts_adapt.quantizers.clock import Clock
from ts_adapt.quantizers.layer import QuantizedLayer
from ts_adapt.quantizers.network import Quantization, Quantizer
from ts_adapt.quantizers.parts import WeightPart

MODES = {
    "dynamic": "Int8DynamicActivationInt8WeightConfig",
    "weight-only": "Int8WeightOnlyConfig",
    "float8": "Float8DynamicActivationFloat8WeightConfig",
}
FLOAT8_CAPABILITY, FLOAT8_MULTIPLE = (8, 9), 16
"""What float8 products need: a GPU of this compute capability, and sides of the weight that are multiples of this."""


@dataclass
class TorchAOOptions:
    """How Linear layers are run."""

    mode: str = "dynamic"
    """dynamic (integer products), weight-only (int8 weights, real products) or float8 (float8 products)."""
    bits: int = 8
    """8; other numbers have no integer kernel here."""


class TorchAOWeight(WeightPart):
    """An int8 weight in torchao's own tensor, which runs the product when a Linear multiplies it."""

    kind = "torchao"
    weight: Any
    derived = True

    def __init__(self, weight: Tensor, mode: str) -> None:
        super().__init__()
        self.bits, self.mode = 8, mode
        self.register_parameter("weight", nn.Parameter(_converted(weight, mode), requires_grad=False))

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        return self.mode == "weight-only"

    @property
    def bytes(self) -> int:
        names, _ = self.weight.__tensor_flatten__()
        kept = [getattr(self.weight, name) for name in names]
        return sum(value.numel() * value.element_size() for value in kept)

    def forward(self) -> Tensor:
        weight: Tensor = self.weight
        return weight

    def dense(self) -> Tensor:
        weight: Tensor = self.weight.dequantize()
        return weight

    def spec(self) -> dict[str, Any]:
        return {"mode": self.mode}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(original.weight, spec["mode"])


class TorchAO(Quantizer):
    """See the module's head.

    Raises TsAdaptError for other bits than 8, where torchao is not installed, for float8 on other devices, and for
    split shortcuts, which are convolutions.
    """

    name = "torchao"

    def __init__(self, options: TorchAOOptions | None = None) -> None:
        self.options: TorchAOOptions = options or TorchAOOptions()
        if self.options.mode not in MODES:
            raise unknown("torchao mode", self.options.mode, MODES)
        if self.options.bits != 8:
            raise TsAdaptError(
                f"torchao runs Linear layers at 8 bits here, not {self.options.bits}; take minmax or hqq"
            )

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        if to.layer_options.split_shortcuts:
            raise TsAdaptError(
                "torchao takes no convolutions, and split shortcuts are some; leave +split out, or take minmax"
            )
        if self.options.mode == "float8":
            _check_float8(next(to.network.parameters()).device)
        _library()
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


def _library() -> Any:
    try:
        import torchao.quantization as library
    except ImportError as error:
        raise TsAdaptError(
            f"the quantizer torchao needs the package torchao ({error}); pip install 'ts_adapt[quant]', or take minmax"
        ) from error
    return library


def _converted(weight: Tensor, mode: str) -> Tensor:
    """`weight` `(O, I)` as torchao's int8 tensor."""
    library = _library()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    library.quantize_(nn.Sequential(layer), getattr(library, MODES[mode])())
    return layer.weight.data
