"""TinyDM: channel balancing, time-grouped activations, quantized attention, and calibration at active timesteps.

    weights      balanced (`balancing`), then symmetric, a scale for each output channel
    activations  balanced, then by the quantizer of the timestep's group (`grouped`)
    attention    q, k, v, logits and probabilities by calibrated quantizers, grouped likewise (`attention`)

The calibration set is made by `calibration.collect(..., select="active")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ts_adapt.interfaces import TsAdaptError, unknown
from ts_adapt.quantizers import affine
from ts_adapt.quantizers.attention import TENSORS, QuantizedAttention, observed, processors
from ts_adapt.quantizers.balancing import Balance, balance, balanced_layer, over_columns
from ts_adapt.quantizers.calibration import InputRecord, Recorder, channel_dim, observe, record_inputs
from ts_adapt.quantizers.calls import Call
from ts_adapt.quantizers.clock import Clock
from ts_adapt.quantizers.grouped import GroupedActivation, assign
from ts_adapt.quantizers.layer import QuantizedLayer
from ts_adapt.quantizers.network import Quantization, Quantizer
from ts_adapt.quantizers.parts import AffineWeight, DenseWeight, WeightPart
from ts_adapt.quantizers.ranges import RANGES, find_range
from ts_adapt.quantizers.traversal import Layer


@dataclass
class TinyDMOptions:
    """Bits, groups, and what of the collage is used."""

    bits: int | None = 8
    """Of the weights; None: they stay in full precision."""
    activation_bits: int = 8
    weight_range: str = "minmax"
    """minmax, percentile or mse."""
    groups: int = 8
    """Quantizers that the timesteps share."""
    balance: bool = True
    """Channel balancing."""
    attention: bool = True
    """Quantized attention: q, k and v at `activation_bits`, and"""
    logit_bits: int = 6
    probability_bits: int = 4


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

    @classmethod
    def of(cls, balanced: Tensor, bits: int, by: Balance, weight_range: str) -> Self:
        """The nearest levels to a `balanced` weight."""
        part = cls(balanced.shape, bits, len(by.columns), by.folded).to(balanced.device)
        part.columns.copy_(by.columns)
        part.rows_exponent.copy_(by.rows)
        rows = affine.to_groups(balanced.detach().float(), "channel")
        part.keep(*affine.scale_and_zero(*find_range(weight_range, rows, bits, True), bits, True))
        part.write(affine.quantize(rows, *part.levels(), bits, True))
        return part

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

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(original.weight.shape, **spec)


class TinyDM(Quantizer):
    """See the module's head. Raises TsAdaptError for options that make no sense, naming them."""

    name = "tinydm"
    needs_calls = True

    def __init__(self, options: TinyDMOptions | None = None) -> None:
        self.options: TinyDMOptions = options or TinyDMOptions()
        o = self.options
        if o.bits is not None:
            affine.check_bits(o.bits)
        for name in ("activation_bits", "logit_bits", "probability_bits"):
            affine.check_bits(getattr(o, name), name)
        if o.weight_range not in RANGES:
            raise unknown("range", o.weight_range, RANGES)
        if not 1 <= o.groups <= 255:
            raise TsAdaptError(f"groups is {o.groups}; expected 1 to 255 quantizers for the timesteps to share")

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        o = self.options
        layers = to.layers()
        balances = {name: _none(layer) for name, layer in layers.items()}
        if o.balance:
            balances = balance(to, layers, record_inputs(to.network, layers, calls))
        attentions = processors(to.network) if o.attention else []
        records = self._records(to, layers, balances, attentions, calls)
        for name, layer in layers.items():
            by = balances[name]
            balanced = balanced_layer(layer, by)
            stored: WeightPart = (
                DenseWeight(balanced_layer(layer, by.arriving()).weight)
                if o.bits is None
                else BalancedWeight.of(balanced.weight, o.bits, by, o.weight_range)
            )
            inputs = self._input(records[name], o.activation_bits, to.clock, None if by.folded else by.columns)
            to.replace(name, QuantizedLayer(balanced, stored, inputs.to(layer.weight.device)))
        bits = dict.fromkeys(TENSORS, o.activation_bits)
        bits |= {"logits": o.logit_bits, "probabilities": o.probability_bits}
        device = next(iter(layers.values())).weight.device
        for name in attentions:
            parts = {t: self._input(records[f"{name}.{t}"], bits[t], to.clock) for t in TENSORS}
            attention = to.network.get_submodule(name)
            to.replace(f"{name}.processor", QuantizedAttention(attention.processor, parts).to(device))

    def _records(
        self,
        to: Quantization,
        layers: Mapping[str, Layer],
        balances: Mapping[str, Balance],
        attentions: list[str],
        calls: Sequence[Call],
    ) -> dict[str, InputRecord]:
        """Of the balanced inputs of `layers`, and of what flows in the attentions."""
        recorder = Recorder()

        def visit(name: str, x: Tensor, timestep: Tensor) -> None:
            if not balances[name].folded:
                x = x * affine.along(affine.power_of_two(balances[name].columns.to(x.device)), x, channel_dim(x))
            recorder.visit(name, x, timestep)

        with observed(to.network, attentions, to.clock, recorder.visit):
            observe(to.network, layers, calls, visit)
        for name in attentions:
            if f"{name}.query" not in recorder.seen:
                processor: Any = to.network.get_submodule(name).processor
                raise TsAdaptError(
                    f"{type(processor).__name__} of {name} does not call scaled_dot_product_attention; set the "
                    "network's default processor, or take tinydm with attention=False"
                )
        return recorder.records([*layers, *(f"{name}.{tensor}" for name in attentions for tensor in TENSORS)])

    def _input(
        self, record: InputRecord, bits: int, clock: Clock, exponents: Tensor | None = None
    ) -> GroupedActivation:
        if exponents is not None and not bool(exponents.any()):
            exponents = None
        return assign(record, bits, self.options.groups).quantizer(record, bits, clock, exponents)


def _none(layer: Layer) -> Balance:
    """No balancing of `layer`."""
    outputs, inputs = layer.weight.shape[:2]
    return Balance(torch.zeros(inputs, dtype=torch.int8), torch.zeros(outputs, dtype=torch.int8))
