"""Where the weight of a quantized layer is kept.

    AffineWeight    packed codes, scales, zeros                      W^ = s (q - z)
    BalancedWeight  the same of a weight whose channels are balanced (`methods.balancing`)
    DenseWeight     the weight as it was                             for layers whose input alone is quantized
    LSQWeight       the weight and its scales while they are trained
    TorchAOWeight   torchao's own tensor                             which computes with few bits

Sums of codebook vectors are in `codebooks`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.layers import affine
from ts_adapt.quantizers.layers.packing import from_units, in_bits, in_units, pack, packed_bytes, unpack
from ts_adapt.quantizers.layers.quantized_layer import WeightPart
from ts_adapt.quantizers.layers.timestep import TimestepListener

TORCHAO = {
    "dynamic": "Int8DynamicActivationInt8WeightConfig",
    "weight-only": "Int8WeightOnlyConfig",
    "float8": "Float8DynamicActivationFloat8WeightConfig",
}
"""Mode -> torchao's class of it."""


class AffineWeight(WeightPart):
    """Codes of `bits` bits, packed; a scale and, unless symmetric, a zero for each row of `to_groups`.

    Scales are kept as float16 in units of the layer's largest, zeros as float16; both as float32 for 8 bits and more,
    where float16 would cost precision.
    """

    kind = "affine"
    described = ("bits", "group", "axis", "symmetric")
    codes: Tensor
    unit: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, shape: torch.Size, bits: int, group: int | str, axis: int = 1, symmetric: bool = False) -> None:
        super().__init__()
        self.shape, self.bits, self.group, self.axis, self.symmetric = shape, bits, group, axis, symmetric
        self.rows = affine.grouped_shape(shape, group)
        self.real = torch.float16 if bits < 8 else torch.float32
        self.register_buffer("codes", torch.zeros(packed_bytes(self.rows[0] * self.rows[1], bits), dtype=torch.uint8))
        self.register_buffer("unit", torch.zeros((), dtype=torch.int32))
        self.register_buffer("scale", in_bits(torch.zeros(self.rows[0], 1), self.real))
        if not symmetric:
            self.register_buffer("zero", in_bits(torch.zeros(self.rows[0], 1), self.real))

    @classmethod
    def nearest(
        cls, weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int | str, *,
        axis: int = 1, symmetric: bool = False,
    ) -> Self:  # fmt: skip
        """`weight` at the nearest levels of `scale` and `zero` `(G, 1)`, as these are kept."""
        part = cls(weight.shape, bits, group, axis, symmetric).to(weight.device)
        part.keep(weight, scale, zero)
        return part

    def keep(self, weight: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Take over `weight` at the nearest levels of `scale` and `zero` `(G, 1)`, as these are kept."""
        unit, scale = in_units(scale, self.real)
        self.unit.copy_(unit)
        self.scale.copy_(scale)
        if not self.symmetric:
            self.zero.copy_(in_bits(zero, self.real))
        rows = affine.to_groups(weight.detach().float(), self.group, self.axis)
        self.write(affine.quantize(rows, *self.levels(), self.bits, self.symmetric))

    def write(self, codes: Tensor) -> None:
        """Take over the codes `(G, n)`."""
        low, _ = affine.code_range(self.bits, self.symmetric)
        self.codes.copy_(pack((codes - low).flatten(), self.bits))

    def levels(self) -> tuple[Tensor, Tensor]:
        """The scale and zero `(G, 1)`, float32."""
        scale = from_units(self.unit, self.scale, self.real)
        return scale, torch.zeros_like(scale) if self.symmetric else self.zero.view(self.real).float()

    def read(self) -> Tensor:
        """The codes `(G, n)`, float32."""
        low, _ = affine.code_range(self.bits, self.symmetric)
        codes = unpack(self.codes, self.bits, self.rows[0] * self.rows[1]).view(self.rows).float()
        return codes + low if low else codes

    def forward(self) -> Tensor:
        rows = affine.dequantize(self.read(), *self.levels())
        return affine.from_groups(rows, self.shape, self.group, self.axis)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        return cls(original.weight.shape, **spec)


class BalancedWeight(AffineWeight):
    """Codes of 2^rows W 2^-columns; calling it gives the weight for the input as it arrives.

    columns  `(I,)` exponents of the input channels; rows  `(O,)` exponents folded into this layer by the ones behind
    folded   whether the input arrives multiplied by 2^columns
    """

    kind = "balanced"
    columns: Tensor
    rows_exponent: Tensor

    def __init__(self, shape: torch.Size, bits: int, channels: int, folded: bool) -> None:
        super().__init__(shape, bits, "channel", symmetric=True)
        self.folded = folded
        self.register_buffer("columns", torch.zeros(channels, dtype=torch.int8))
        self.register_buffer("rows_exponent", torch.zeros(shape[0], dtype=torch.int8))

    def forward(self) -> Tensor:
        weight = super().forward()
        return weight if self.folded else weight * over_columns(self.columns, weight)

    def dense(self) -> Tensor:
        """What stands for the weight of the layer before balancing."""
        weight = super().forward()
        rows = affine.along(affine.power_of_two(self.rows_exponent), weight, 0)
        return weight * over_columns(self.columns, weight) / rows

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "channels": len(self.columns), "folded": self.folded}


def over_columns(columns: Tensor, weight: Tensor) -> Tensor:
    """2^columns over the input channels of `weight`; grouped convolutions, whose exponents are 0, by a 1."""
    if len(columns) != weight.shape[1]:
        return weight.new_ones(())
    return affine.along(affine.power_of_two(columns.to(weight.device)), weight, 1)


class DenseWeight(WeightPart):
    """The weight, in the precision it had."""

    kind = "dense"
    value: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", weight.detach().clone())

    @property
    def bits(self) -> int:
        return 8 * self.value.element_size()

    def forward(self) -> Tensor:
        return self.value

    def spec(self) -> dict[str, Any]:
        return {"dtype": str(self.value.dtype).removeprefix("torch.")}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        return cls(torch.zeros(original.weight.shape, dtype=getattr(torch, spec["dtype"])))


class LSQWeight(WeightPart):
    """A weight that is trained: real numbers, rounded at each call to levels whose scales are trained too.

    LSQ (Esser et al. 2020), symmetric. value  the weight; log_scale  `(O, 1)`, the logarithm of the scale of each
    output channel
    """

    kind = "lsq"
    described = ("bits",)

    def __init__(self, weight: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.value = nn.Parameter(weight.detach().clone().float(), requires_grad=False)
        self.log_scale = nn.Parameter(scale.detach().clone().float().log(), requires_grad=False)

    def forward(self) -> Tensor:
        rows = affine.lsq(affine.to_groups(self.value, "channel"), self.log_scale.exp(), self.bits)
        return affine.from_groups(rows, self.value.shape, "channel")

    def frozen(self) -> AffineWeight:
        """The same codes, packed; scales are rounded to the precision in which they are kept."""
        scale = self.log_scale.detach().exp()
        zero, rows = torch.zeros_like(scale), affine.to_groups(self.value.detach(), "channel")
        part = AffineWeight.nearest(self.value, scale, zero, self.bits, "channel", symmetric=True)
        part.write(affine.quantize(rows, scale, zero, self.bits, True))
        return part

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        shape = original.weight.shape
        return cls(torch.zeros(shape), torch.ones(affine.grouped_shape(shape, "channel")[0], 1), spec["bits"])


class TorchAOWeight(WeightPart):
    """The weight of a Linear in torchao's own tensor, which runs the product when a Linear multiplies it.

    mode  of TORCHAO
    """

    kind = "torchao"
    described = ("mode",)
    derived: ClassVar[bool] = True
    weight: Any

    def __init__(self, weight: Tensor, mode: str) -> None:
        super().__init__()
        self.bits, self.mode = 8, mode
        library = torchao_library()
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        library.quantize_(nn.Sequential(layer), getattr(library, TORCHAO[mode])())
        self.register_parameter("weight", nn.Parameter(layer.weight.data, requires_grad=False))

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

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        return cls(original.weight, spec["mode"])


def torchao_library() -> Any:
    """torchao's module of quantization; TsAdaptError where it is not installed."""
    try:
        import torchao.quantization as library
    except ImportError as error:
        raise TsAdaptError(
            f"the quantizer torchao needs the package torchao ({error}); pip install 'ts_adapt[quant]', or take minmax"
        ) from error
    return library
