"""TDQ (So et al. 2023): activation scales that depend on the timestep, weights at learned scales.

    activations   x^ = s(t) round(x / s(t)), s(t) from a small network on the time embedding (`time_scale`)
    weights       LSQ (Esser et al. 2020): symmetric, a scale for each output channel, learned with the weights

    ptq   weights at scales of their range; of the predictors each learns the scale of least error at every
          timestep of the calibration set. Nothing else is trained.
    qat   starts from there, and leaves weights, their scales, biases and predictors to be trained together
          (`training.fine_tune`) by the diffusion loss or a teacher

`freeze` ends both: weights become packed codes, predictors become tables over the timesteps that will be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ts_adapt.interfaces import TsAdaptError, unknown
from ts_adapt.quantizers import affine
from ts_adapt.quantizers.calibration import InputRecord, record_inputs
from ts_adapt.quantizers.calls import Call
from ts_adapt.quantizers.clock import Clock
from ts_adapt.quantizers.layer import QuantizedLayer
from ts_adapt.quantizers.network import Quantization, Quantizer, quantization_of, quantized_layers
from ts_adapt.quantizers.parts import AffineWeight, DenseWeight, WeightPart
from ts_adapt.quantizers.ranges import RANGES, find_range
from ts_adapt.quantizers.time_scale import TimedActivation, embedding_of, fit, offset_of

MODES = ("ptq", "qat")


@dataclass
class TDQOptions:
    """Bits, and whether weights are to be trained."""

    bits: int | None = 8
    """Of the weights; None: they stay in full precision."""
    activation_bits: int = 8
    weight_range: str = "minmax"
    """From which the scales of weights start: minmax, percentile or mse."""
    mode: str = "ptq"
    """ptq, or qat: weights stay real numbers that can be trained, until they are frozen."""
    seed: int = 0
    """Of the predictors' first weights."""


class LSQWeight(WeightPart):
    """A weight that is trained: real numbers, rounded at each call to levels whose scales are trained too.

    value      the weight; log_scale  `(O, 1)`, the logarithm of the scale of each output channel
    """

    kind = "lsq"

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

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        shape = original.weight.shape
        return cls(torch.zeros(shape), torch.ones(affine.grouped_shape(shape, "channel")[0], 1), spec["bits"])


class TDQ(Quantizer):
    """See the module's head. Raises TsAdaptError for options that make no sense, naming them."""

    name = "tdq"
    needs_calls = True

    def __init__(self, options: TDQOptions | None = None) -> None:
        self.options: TDQOptions = options or TDQOptions()
        o = self.options
        if o.bits is not None:
            affine.check_bits(o.bits)
        affine.check_bits(o.activation_bits, "activation_bits")
        if o.weight_range not in RANGES:
            raise unknown("range", o.weight_range, RANGES)
        if o.mode not in MODES:
            raise unknown("mode of tdq", o.mode, MODES)
        if o.mode == "qat" and o.bits is None:
            raise TsAdaptError("tdq trains weights in the mode qat, but bits is None; give bits, or take ptq")

    @property
    def needs_training(self) -> bool:
        return self.options.mode == "qat"

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        layers = to.layers()
        records = record_inputs(to.network, layers, calls)
        embedding = embedding_of(to.network, max(float(record.times.max()) for record in records.values()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            parts = {name: self._input(record, embedding, to.clock) for name, record in records.items()}
        fit(list(parts.values()), list(records.values()))
        for name, layer in layers.items():
            part = parts[name].to(layer.weight.device)
            to.replace(name, QuantizedLayer(layer, self._weight(layer.weight), part))

    def _input(self, record: InputRecord, embedding: dict[str, Any], clock: Clock) -> TimedActivation:
        offset = offset_of(record)
        part = TimedActivation(self.options.activation_bits, offset, embedding, clock)
        size, share = (record.all_values - (offset or 0.0)).abs(), record.all_weights / record.all_weights.sum()
        mean = (share * size).sum()
        part.start(mean, (share * (size - mean).square()).sum().sqrt())
        return part

    def _weight(self, weight: Tensor) -> WeightPart:
        bits = self.options.bits
        if bits is None:
            return DenseWeight(weight)
        rows = affine.to_groups(weight.detach().float(), "channel")
        low, high = find_range(self.options.weight_range, rows, bits, True)
        scale, _ = affine.scale_and_zero(low, high, bits, True)
        part = LSQWeight(weight, scale, bits)
        return part if self.options.mode == "qat" else part.frozen()


def freeze(network: nn.Module, times: Tensor) -> nn.Module:
    """Weights as packed codes and predictors as tables over `times` `(T,)`, in the network's unit; in place.

    At these times nothing changes; between them scales are interpolated. Raises TsAdaptError for a network that is not
    quantized, no times, or times that are not finite.
    """
    quantization_of(network)
    times = torch.as_tensor(times, dtype=torch.float32).reshape(-1)
    if not times.numel() or not bool(torch.isfinite(times).all()):
        raise TsAdaptError(
            f"a table of scales needs finite timesteps; {times.numel()} were given, give those that will be asked for"
        )
    for _, layer in quantized_layers(network):
        if isinstance(layer.stored, LSQWeight):
            layer.stored = layer.stored.frozen()
        if isinstance(layer.activation, TimedActivation):
            layer.activation = layer.activation.table(times)
    return network
