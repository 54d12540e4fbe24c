"""Min-max quantization: the baseline at any number of bits.

    weights      symmetric, a scale for each output channel, the largest |w| at the highest code
    activations  asymmetric, one scale and zero a layer for all times; static (calibrated) or dynamic (of each sample)

Options: other ranges, other groups, AdaRound's rounding of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import InputRecord, record_inputs, second_moments
from ts_adapt.quantizers.calibration.ranges import check_range, find_range, weight_levels
from ts_adapt.quantizers.layers.activations import DynamicActivation, StaticActivation
from ts_adapt.quantizers.layers.affine import check_bits, check_group
from ts_adapt.quantizers.layers.quantized_layer import ActivationPart, Layer, QuantizedLayer, WeightPart
from ts_adapt.quantizers.layers.weights import AffineWeight, DenseWeight
from ts_adapt.quantizers.methods.adaround import learned_codes
from ts_adapt.quantizers.quantization import Quantization, Quantizer


@dataclass
class MinMaxOptions:
    """Bits and ranges. Raises TsAdaptError for what makes no sense, naming it."""

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

    def __post_init__(self) -> None:
        if self.bits is None and self.activation_bits is None:
            raise TsAdaptError("minmax has neither bits nor activation_bits; give one of them")
        for name in ("bits", "activation_bits"):
            if getattr(self, name) is not None:
                check_bits(getattr(self, name), name)
        check_range(self.weight_range)
        check_range(self.activation_range)
        check_group(self.group)


class MinMax(Quantizer):
    """See the module's head."""

    name = "minmax"
    Options = MinMaxOptions
    options: MinMaxOptions

    @property
    def needs_calls(self) -> bool:
        return self.options.adaround > 0 or self.calibrates_inputs

    @property
    def calibrates_inputs(self) -> bool:
        return self.options.activation_bits is not None and not self.options.dynamic

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        layers = to.layers()
        records = record_inputs(to.network, layers, calls) if self.calibrates_inputs else {}
        moments = second_moments(to.network, layers, calls) if self.options.adaround else {}
        for name, layer in layers.items():
            stored, activation = self.weight(layer, moments.get(name)), self.activation(records.get(name))
            to.replace(name, QuantizedLayer(layer, stored, activation))

    def weight(self, layer: Layer, moment: Tensor | None = None) -> WeightPart:
        """Where the weight of `layer` is kept; rounded by AdaRound where the second moment of its inputs is given."""
        o = self.options
        if o.bits is None:
            return DenseWeight(layer.weight)
        levels = weight_levels(o.weight_range, layer.weight, o.bits, o.group, symmetric=o.symmetric)
        part = AffineWeight.nearest(layer.weight, *levels, o.bits, o.group, symmetric=o.symmetric)
        if moment is not None:
            part.write(learned_codes(layer.weight, part, moment, o.adaround))
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
