"""A quantized layer: y = op(Q_a(x), W^) + b, op the matrix product or convolution of the layer it stands for.

`SplitLayer` is a layer whose input is a concatenation [x_1, x_2] of unlike ranges: a sum of two layers, quantized each
by itself (Q-Diffusion, Li et al. 2023, section 4.2: the shortcuts of a U-Net's decoder).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.interfaces import TsAdaptError
from ts_adapt.quantizers.parts import ActivationPart, WeightPart
from ts_adapt.quantizers.traversal import Layer

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, weight, bias) -> y."""


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


class QuantizedLayer(nn.Module):
    """Stands for the Linear or Conv2d `layer`.

    stored      the weight; a part (`parts.py`)
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
        if self.activation is not None:
            x = self.activation(x)
        if not self.stored.differentiable and x.requires_grad and torch.is_grad_enabled():
            raise TsAdaptError(
                f"{self.stored.kind} computes with integers, which pass no gradient on; take minmax-w8a8 for one"
            )
        weight = self.stored()
        return self.operation(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), self.bias)

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


def split_layer(layer: Layer, at: int) -> list[Layer]:
    """The layers, of the first `at` input channels and of the others, whose sum is `layer`; the first has the bias."""
    halves: list[Layer] = []
    for index, weight in enumerate((layer.weight[:, :at], layer.weight[:, at:])):
        has_bias = layer.bias is not None and index == 0
        half: Layer
        if isinstance(layer, nn.Linear):
            half = nn.Linear(weight.shape[1], layer.out_features, bias=has_bias)
        else:
            half = nn.Conv2d(
                weight.shape[1], layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
                layer.dilation, bias=has_bias, padding_mode=layer.padding_mode,  # type: ignore[arg-type]
            )  # fmt: skip
        half.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if has_bias:
            half.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)  # type: ignore[union-attr]
        halves.append(half)
    return halves
