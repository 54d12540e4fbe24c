"""A quantized layer: y = op(Q_a(x), W^) + b, op the matrix product or convolution of the layer it stands for.

It has two parts: what keeps the weight (`weights`, `codebooks`), and what is done to the input (`activations`). A part
is a module with a `kind`, under which it is stored, and a `spec`, the JSON from which `from_spec` makes one of the same
shapes; its tensors are its state dict, and all of them count as bytes. Called, a weight part gives the weight, and an
activation part maps x to x^.

`SplitLayer` is a layer whose input is a concatenation [x_1, x_2] of unlike ranges: a sum of two layers, quantized each
by itself (Q-Diffusion, Li et al. 2023, section 4.2: the shortcuts of a U-Net's decoder).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.layers.timestep import TimestepListener

Layer = nn.Linear | nn.Conv2d

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, weight, bias) -> y."""


class Part(nn.Module):
    """A piece of a quantized network that can be stored.

    kind       under which it is
    described  the arguments of `__init__` that `spec` holds; attributes of the same names
    timed      whether the part asks a listener for the timestep
    derived    whether `from_spec` makes the very tensors again from the original, so that none are stored
    """

    kind: ClassVar[str]
    described: ClassVar[tuple[str, ...]] = ()
    timed: ClassVar[bool] = False
    derived: ClassVar[bool] = False

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs beside the original layer; JSON."""
        return {name: getattr(self, name) for name in self.described}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        """A part for `original` (the layer in full precision) whose state dict has the right names and shapes.

        listener  of the network that it is in, for parts that are `timed`
        """
        return cls(**spec)

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

    def product(self, operation: Operation, x: Tensor, bias: Tensor | None) -> Tensor:
        """What `operation` makes of x and the weight, in the precision of x."""
        weight = self()
        return operation(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), bias)


class ActivationPart(Part):
    """Calling it maps the input x of a layer to x^, of the same shape, in the dtype that the product is formed in."""

    bits: int


class QuantizedLayer(nn.Module):
    """Stands for the Linear or Conv2d `layer`.

    stored      the weight
    activation  the quantizer of the input; None: the input stays as it is
    bias        a copy of the layer's, in full precision
    """

    def __init__(self, layer: Layer, stored: WeightPart, activation: ActivationPart | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.activation = activation
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.operation = operation_of(layer)
        self.numel = layer.weight.numel()
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """W^, in the shape of the layer's weight."""
        return self.stored.dense()

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        if self.activation is not None:
            x = self.activation(x)
        if not self.stored.differentiable and x.requires_grad and torch.is_grad_enabled():
            raise TsAdaptError(
                f"{self.stored.kind} computes with integers, which pass no gradient on; take minmax-w8a8 for one"
            )
        return self.stored.product(self.operation, x, self.bias).to(given)

    def extra_repr(self) -> str:
        activation = "full" if self.activation is None else self.activation.bits
        return f"weight bits={self.stored.bits}, activation bits={activation}"


class SplitLayer(nn.Module):
    """Stands for `layer`: its first `at` input channels and the others go through a layer of their own, added up.

    The layers in `parts` are quantized by themselves; the first has the bias.
    """

    def __init__(self, layer: Layer, at: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(split_layer(layer, at))
        self.channels = [at, layer.weight.shape[1] - at]
        self.dim = -1 if isinstance(layer, nn.Linear) else 1
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = (part(piece) for part, piece in zip(self.parts, x.split(self.channels, self.dim), strict=True))
        total: Tensor = sum(rest, first)
        return total


def operation_of(layer: Layer) -> Operation:
    """What `layer` does with an input, a weight and a bias."""
    if isinstance(layer, nn.Linear):
        return F.linear
    how: dict[str, Any] = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    if layer.padding_mode == "zeros":
        return partial(F.conv2d, padding=layer.padding, **how)
    return partial(_padded, pad=list(layer._reversed_padding_repeated_twice), mode=layer.padding_mode, how=how)


def _padded(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, pad: list[int], mode: str, how: dict[str, Any]
) -> Tensor:
    y: Tensor = F.conv2d(F.pad(x, pad, mode=mode), weight, bias, **how)
    return y


def split_layer(layer: Layer, at: int) -> list[Layer]:
    """The layers, of the first `at` input channels and of the others, whose sum is `layer`; the first has the bias."""

    def half(weight: Tensor, bias: Tensor | None) -> Layer:
        new = copy.deepcopy(layer)
        new.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        new.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        setattr(new, "in_features" if isinstance(new, nn.Linear) else "in_channels", weight.shape[1])
        return new

    return [half(layer.weight[:, :at], layer.bias), half(layer.weight[:, at:], None)]
