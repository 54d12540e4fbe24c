"""What a quantized layer is made of: where its weight is kept, and what is done to its input.

    AffineWeight       packed codes, scales, zeros            W^ = s (q - z)
    DenseWeight        the weight as it was                   for layers whose input alone is quantized
    StaticActivation   one scale and zero, calibrated         x^ = s (round(x / s + z) - z)
    DynamicActivation  a scale and zero for each sample, from its own range at each call

A part is a module with a `kind`, under which it is stored, and a `spec`, the JSON from which `from_spec` makes one of
the same shapes; its tensors are its state dict. A weight part gives the weight when it is called, in float32; an
activation part maps x to x^. Everything that a weight part keeps counts: its bytes are those of its state dict.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ts_adapt.quantizers import affine
from ts_adapt.quantizers.clock import Clock
from ts_adapt.quantizers.packing import pack, packed_bytes, unpack


class Part(nn.Module, ABC):
    """A piece of a quantized layer that can be stored."""

    kind: ClassVar[str]

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs beside the original layer; JSON."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        """A part for `original` (the layer in full precision) whose state dict has the right names and shapes.

        `clock` is there for parts with `timed` set.
        """

    timed: ClassVar[bool] = False
    """Whether the part asks a `Clock` for the time."""

    derived: ClassVar[bool] = False
    """Whether `from_spec` makes the very tensors again from the original, so that none are stored."""

    @property
    def bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())


class WeightPart(Part):
    """Calling it gives the weight, float32 unless it was kept in another precision, in the layer's shape.

    bits            the nominal number of bits of a code
    differentiable  whether gradients pass from the layer's output to its input
    """

    bits: Any
    differentiable: ClassVar[bool] = True

    def dense(self) -> Tensor:
        """The weight as plain real numbers."""
        weight: Tensor = self()
        return weight


class ActivationPart(Part):
    """Calling it maps the input x of a layer to x^, of the same shape and dtype."""

    bits: int


class AffineWeight(WeightPart):
    """Codes of `bits` bits, packed; a scale and, unless symmetric, a zero for each row of `to_groups`.

    Scales are kept as float16 in units of the layer's largest, zeros as float16; both as float32 for 8 bits and more,
    where float16 would cost precision. They are kept as integers of the same bits: `network.to(dtype)` leaves them.
    """

    kind = "affine"
    codes: Tensor
    unit: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, shape: torch.Size, bits: int, group: int | str, axis: int = 1, symmetric: bool = False) -> None:
        super().__init__()
        self.shape, self.bits, self.group, self.axis, self.symmetric = shape, bits, group, axis, symmetric
        self.rows = affine.grouped_shape(shape, group)
        kept = torch.int16 if bits < 8 else torch.int32
        self.real = torch.float16 if bits < 8 else torch.float32
        self.register_buffer("codes", torch.zeros(packed_bytes(self.rows[0] * self.rows[1], bits), dtype=torch.uint8))
        self.register_buffer("unit", torch.zeros((), dtype=torch.int32))
        self.register_buffer("scale", torch.zeros(self.rows[0], 1, dtype=kept))
        if not symmetric:
            self.register_buffer("zero", torch.zeros(self.rows[0], 1, dtype=kept))

    @classmethod
    def nearest(
        cls,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor,
        bits: int,
        group: int | str,
        *,
        axis: int = 1,
        symmetric: bool = False,
    ) -> Self:
        """`weight` at the nearest levels of `scale` and `zero` `(G, 1)`, as these are kept."""
        part = cls(weight.shape, bits, group, axis, symmetric).to(weight.device)
        part.keep(scale, zero)
        rows = affine.to_groups(weight.detach().float(), group, axis)
        part.write(affine.quantize(rows, *part.levels(), bits, symmetric))
        return part

    def keep(self, scale: Tensor, zero: Tensor) -> None:
        """Take over the scale and zero `(G, 1)`, rounded to the precision in which they are kept."""
        unit = scale.abs().max().float()
        self.unit.copy_(unit.view(torch.int32))
        self.scale.copy_((scale.float() / unit).to(self.real).view(self.scale.dtype))
        if not self.symmetric:
            self.zero.copy_(zero.to(self.real).view(self.zero.dtype))

    def write(self, codes: Tensor) -> None:
        """Take over the codes `(G, n)`."""
        low, _ = affine.code_range(self.bits, self.symmetric)
        self.codes.copy_(pack((codes - low).flatten(), self.bits))

    def levels(self) -> tuple[Tensor, Tensor]:
        """The scale and zero `(G, 1)`, float32."""
        scale = self.scale.view(self.real).float() * self.unit.view(torch.float32)
        return scale, torch.zeros_like(scale) if self.symmetric else self.zero.view(self.real).float()

    def read(self) -> Tensor:
        """The codes `(G, n)`, float32."""
        low, _ = affine.code_range(self.bits, self.symmetric)
        codes = unpack(self.codes, self.bits, self.rows[0] * self.rows[1]).view(self.rows).float()
        return codes + low if low else codes

    def forward(self) -> Tensor:
        rows = affine.dequantize(self.read(), *self.levels())
        return affine.from_groups(rows, self.shape, self.group, self.axis)

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group, "axis": self.axis, "symmetric": self.symmetric}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(original.weight.shape, **spec)


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
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(torch.zeros(original.weight.shape, dtype=getattr(torch, spec["dtype"])))


class StaticActivation(ActivationPart):
    """One scale and zero `()` for all inputs of the layer, at all times."""

    kind = "static"
    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone().float().reshape(()))
        self.register_buffer("zero", zero.detach().clone().float().reshape(()))
        self.bits, self.symmetric = bits, symmetric

    @classmethod
    def of_range(cls, low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> Self:
        """Its levels span [low, high], both `()`."""
        return cls(*affine.scale_and_zero(low, high, bits, symmetric, exact_zero=True), bits, symmetric)

    def forward(self, x: Tensor) -> Tensor:
        return affine.fake_quantize(x, self.scale, self.zero, self.bits, self.symmetric)

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "symmetric": self.symmetric}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(torch.ones(()), torch.zeros(()), **spec)


class DynamicActivation(ActivationPart):
    """A scale and zero for each sample from its own smallest and largest value; no calibration."""

    kind = "dynamic"

    def __init__(self, bits: int, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(1, x.ndim))
        low, high = x.detach().amin(dims, keepdim=True), x.detach().amax(dims, keepdim=True)
        scale, zero = affine.scale_and_zero(low.float(), high.float(), self.bits, self.symmetric, exact_zero=True)
        return affine.fake_quantize(x, scale, zero, self.bits, self.symmetric)

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "symmetric": self.symmetric}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(**spec)
