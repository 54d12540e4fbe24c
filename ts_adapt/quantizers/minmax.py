"""Min-max quantization: the baseline at any number of bits.

    weights      symmetric, a scale for each output channel, the largest |w| at the highest code
    activations  asymmetric, one scale and zero a layer for all times; static (calibrated) or dynamic (of each sample)

Options: other ranges, other groups, AdaRound's rounding of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ts_adapt.interfaces import TsAdaptError, unknown
from ts_adapt.quantizers import affine
from ts_adapt.quantizers.adaround import learned_codes
from ts_adapt.quantizers.calibration import InputRecord, record_inputs
from ts_adapt.quantizers.calls import Call
from ts_adapt.quantizers.gram import grams
from ts_adapt.quantizers.layer import QuantizedLayer
from ts_adapt.quantizers.network import Quantization, Quantizer
from ts_adapt.quantizers.parts import (
    ActivationPart,
    AffineWeight,
    DenseWeight,
    DynamicActivation,
    StaticActivation,
    WeightPart,
)
from ts_adapt.quantizers.ranges import RANGES, find_range
from ts_adapt.quantizers.traversal import Layer


@dataclass
class MinMaxOptions:
    """Bits and ranges."""

    bits: int | None = 8
    """Of the weights; None: they stay in full precision."""
    activation_bits: int | None = None
    """Of the inputs of the quantized layers; None: they stay in full precision."""
    group: int | str = "channel"
    """Weights that share a scale: channel (of the output), tensor, or how many."""
    symmetric: bool = True
    """Of the weights."""
    weight_range: str = "minmax"
    """minmax, percentile or mse."""
    activation_range: str = "minmax"
    dynamic: bool = False
    """Activation ranges from each sample at run time instead of calibrated ones."""
    adaround: int = 0
    """Iterations of AdaRound for each layer; 0: weights are rounded to the nearest level."""


class MinMax(Quantizer):
    """See the module's head. Raises TsAdaptError for options that make no sense, naming them."""

    name = "minmax"

    def __init__(self, options: MinMaxOptions | None = None) -> None:
        self.options: MinMaxOptions = options or MinMaxOptions()
        o = self.options
        if o.bits is None and o.activation_bits is None:
            raise TsAdaptError("minmax has neither bits nor activation_bits; give one of them")
        for bits, what in ((o.bits, "bits"), (o.activation_bits, "activation_bits")):
            if bits is not None:
                affine.check_bits(bits, what)
        for name in (o.weight_range, o.activation_range):
            if name not in RANGES:
                raise unknown("range", name, RANGES)
        affine.check_group(o.group)

    @property
    def needs_calls(self) -> bool:
        o = self.options
        return o.adaround > 0 or (o.activation_bits is not None and not o.dynamic)

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        o = self.options
        layers = to.layers()
        static = o.activation_bits is not None and not o.dynamic
        records = record_inputs(to.network, layers, calls) if static else {}
        inputs = grams(to.network, layers, calls) if o.adaround else {}
        for name, layer in layers.items():
            to.replace(
                name, QuantizedLayer(layer, self.weight(layer, inputs.get(name)), self.activation(records.get(name)))
            )

    def weight(self, layer: Layer, gram: Tensor | None = None) -> WeightPart:
        """Where the weight of `layer` is kept; rounded by AdaRound where the `gram` of its inputs is given."""
        o = self.options
        if o.bits is None:
            return DenseWeight(layer.weight)
        rows = affine.to_groups(layer.weight.detach().float(), o.group)
        low, high = find_range(o.weight_range, rows, o.bits, o.symmetric)
        scale, zero = affine.scale_and_zero(low, high, o.bits, o.symmetric)
        part = AffineWeight.nearest(layer.weight, scale, zero, o.bits, o.group, symmetric=o.symmetric)
        if gram is not None:
            part.write(learned_codes(layer.weight, part, gram, o.adaround))
        return part

    def activation(self, record: InputRecord | None) -> ActivationPart | None:
        """What is done to the input of a layer that has received `record`; None: dynamic ranges."""
        o = self.options
        if o.activation_bits is None:
            return None
        if record is None:
            return DynamicActivation(o.activation_bits)
        if o.activation_range == "minmax":
            return StaticActivation.of_range(record.low.min(), record.high.max(), o.activation_bits)
        found = find_range(
            o.activation_range, record.all_values, o.activation_bits, False, exact_zero=True, weights=record.all_weights
        )
        return StaticActivation.of_range(*found, o.activation_bits)
