"""TinyDM: channel balancing, time-grouped activations, quantized attention, and calibration at active timesteps.

    weights      balanced (`balancing`), then symmetric, a scale for each output channel
    activations  balanced, then by the quantizer of the timestep's group (`time_groups`)
    attention    q, k, v, logits and probabilities by calibrated quantizers, grouped likewise (`layers.attention`)

The calibration set is made by `collect(..., select="active")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import (
    InputRecord,
    Recorder,
    observe,
    observe_attention,
    record_inputs,
)
from ts_adapt.quantizers.calibration.ranges import check_range, weight_levels
from ts_adapt.quantizers.layers.activations import GroupedActivation
from ts_adapt.quantizers.layers.affine import along, channel_dim, check_bits, power_of_two
from ts_adapt.quantizers.layers.attention import TENSORS, QuantizedAttention
from ts_adapt.quantizers.layers.quantized_layer import Layer, QuantizedLayer, WeightPart
from ts_adapt.quantizers.layers.timestep import TimestepListener
from ts_adapt.quantizers.layers.weights import BalancedWeight, DenseWeight
from ts_adapt.quantizers.methods.balancing import Balance, balance, balanced_layer
from ts_adapt.quantizers.methods.time_groups import assign
from ts_adapt.quantizers.quantization import Quantization, Quantizer


@dataclass
class TinyDMOptions:
    """Bits, groups, and what of the collage is used. Raises TsAdaptError for what makes no sense, naming it."""

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

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_bits(self.bits)
        for name in ("activation_bits", "logit_bits", "probability_bits"):
            check_bits(getattr(self, name), name)
        check_range(self.weight_range)
        if not 1 <= self.groups <= 255:
            raise TsAdaptError(f"groups is {self.groups}; expected 1 to 255 quantizers for the timesteps to share")


class TinyDM(Quantizer):
    """See the module's head."""

    name = "tinydm"
    Options = TinyDMOptions
    options: TinyDMOptions
    needs_calls = True

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        o = self.options
        layers = to.layers()
        balances = {name: Balance.of(layer) for name, layer in layers.items()}
        if o.balance:
            balances = balance(to, layers, record_inputs(to.network, layers, calls))
        attentions = [name for name, module in to.network.named_modules() if hasattr(module, "processor") and name]
        records = self._records(to, layers, balances, attentions if o.attention else [], calls)
        for name, layer in layers.items():
            by = balances[name]
            inputs = self._input(records[name], o.activation_bits, to.listener, None if by.folded else by.columns)
            to.replace(
                name, QuantizedLayer(balanced_layer(layer, by), self._weight(layer, by), inputs.to(layer.weight.device))
            )
        bits = dict.fromkeys(TENSORS, o.activation_bits)
        bits |= {"logits": o.logit_bits, "probabilities": o.probability_bits}
        device = next(iter(layers.values())).weight.device
        for name in attentions if o.attention else ():
            parts = {t: self._input(records[f"{name}.{t}"], bits[t], to.listener) for t in TENSORS}
            attention = to.network.get_submodule(name)
            to.replace(f"{name}.processor", QuantizedAttention(attention.processor, parts).to(device))

    def _weight(self, layer: Layer, by: Balance) -> WeightPart:
        """The weight of `layer` at the levels that are the nearest once it is balanced."""
        o = self.options
        if o.bits is None:
            return DenseWeight(balanced_layer(layer, by.arriving()).weight)
        balanced = balanced_layer(layer, by).weight
        part = BalancedWeight(balanced.shape, o.bits, len(by.columns), by.folded).to(balanced.device)
        part.columns.copy_(by.columns)
        part.rows_exponent.copy_(by.rows)
        part.keep(balanced, *weight_levels(o.weight_range, balanced, o.bits))
        return part

    def _records(
        self, to: Quantization, layers: Mapping[str, Layer], balances: Mapping[str, Balance], attentions: list[str],
        calls: Sequence[Call],
    ) -> dict[str, InputRecord]:  # fmt: skip
        """Of the balanced inputs of `layers`, and of what flows in the attentions."""
        recorder = Recorder()

        def visit(name: str, x: Tensor, timestep: Tensor) -> None:
            if not balances[name].folded:
                x = x * along(power_of_two(balances[name].columns.to(x.device)), x, channel_dim(x))
            recorder.visit(name, x, timestep)

        with observe_attention(to.network, attentions, to.listener, recorder.visit):
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
        self, record: InputRecord, bits: int, listener: TimestepListener, exponents: Tensor | None = None
    ) -> GroupedActivation:
        if exponents is not None and not bool(exponents.any()):
            exponents = None
        return assign(record, bits, self.options.groups).quantizer(record, bits, listener, exponents)
