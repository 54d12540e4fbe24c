"""TDQ (So et al. 2023): activation scales that depend on the timestep, weights at learned scales.

    activations   x^ = s(t) round(x / s(t)), s(t) from a small network on the time embedding (`TimedActivation`)
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
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import InputRecord, record_inputs
from ts_adapt.quantizers.calibration.ranges import activation_power, check_range, least_error, weight_levels
from ts_adapt.quantizers.layers.activations import TimedActivation, predicted_scale
from ts_adapt.quantizers.layers.affine import SMALLEST_SCALE, check_bits
from ts_adapt.quantizers.layers.quantized_layer import QuantizedLayer, WeightPart
from ts_adapt.quantizers.layers.timestep import TimestepListener
from ts_adapt.quantizers.layers.weights import DenseWeight, LSQWeight
from ts_adapt.quantizers.quantization import Quantization, Quantizer, quantization_of, quantized_layers

MODES = ("ptq", "qat")
SILU_MINIMUM = -0.2785
FIT_STEPS, FIT_LR = 300, 3e-3
FIT_VALUES = 8192
DEFAULT_WIDTH = 128


@dataclass
class TDQOptions:
    """Bits, and whether weights are to be trained. Raises TsAdaptError for what makes no sense, naming it."""

    bits: int | None = 8
    """Of the weights; None: they stay in full precision."""
    activation_bits: int = 8
    weight_range: str = "minmax"
    """From which the scales of weights start: minmax, percentile or mse."""
    mode: str = "ptq"
    """ptq, or qat: weights stay real numbers that can be trained, until they are frozen."""
    seed: int = 0
    """Of the predictors' first weights."""

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_bits(self.bits)
        check_bits(self.activation_bits, "activation_bits")
        check_range(self.weight_range)
        if self.mode not in MODES:
            raise unknown("mode of tdq", self.mode, MODES)
        if self.mode == "qat" and self.bits is None:
            raise TsAdaptError("tdq trains weights in the mode qat, but bits is None; give bits, or take ptq")


class TDQ(Quantizer):
    """See the module's head."""

    name = "tdq"
    Options = TDQOptions
    options: TDQOptions
    needs_calls = True

    @property
    def needs_training(self) -> bool:
        return self.options.mode == "qat"

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        layers = to.layers()
        records = record_inputs(to.network, layers, calls)
        embedding = sinusoids_of(to.network, max(float(record.times.max()) for record in records.values()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            parts = {name: self._input(record, embedding, to.listener) for name, record in records.items()}
        fit(list(parts.values()), list(records.values()))
        for name, layer in layers.items():
            part = parts[name].to(layer.weight.device)
            to.replace(name, QuantizedLayer(layer, self._weight(layer.weight), part))

    def _input(self, record: InputRecord, embedding: dict[str, Any], listener: TimestepListener) -> TimedActivation:
        offset = offset_of(record)
        part = TimedActivation(self.options.activation_bits, offset, embedding, listener)
        size, share = (record.all_values - (offset or 0.0)).abs(), record.all_weights / record.all_weights.sum()
        mean = (share * size).sum()
        part.start(mean, (share * (size - mean).square()).sum().sqrt())
        return part

    def _weight(self, weight: Tensor) -> WeightPart:
        bits = self.options.bits
        if bits is None:
            return DenseWeight(weight)
        scale, _ = weight_levels(self.options.weight_range, weight, bits)
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


def sinusoids_of(network: nn.Module, largest_time: float) -> dict[str, Any]:
    """The sinusoidal embedding that `network` makes of its timestep, as arguments of `Timesteps`.

    A network told times up to 1 multiplies them by 1000 itself, which the embedding here does in its place.
    """
    found = next((module for module in network.modules() if isinstance(module, Timesteps)), None)
    unit = 1000.0 if largest_time <= 1 else 1.0
    if found is None:
        return {"num_channels": DEFAULT_WIDTH, "flip_sin_to_cos": True, "downscale_freq_shift": 0.0, "scale": unit}
    return {
        "num_channels": found.num_channels,
        "flip_sin_to_cos": found.flip_sin_to_cos,
        "downscale_freq_shift": float(found.downscale_freq_shift),
        "scale": unit * float(found.scale),
    }


def offset_of(record: InputRecord) -> float | None:
    """The smallest value of the activation function that inputs come from, 0 of ReLU or SILU_MINIMUM; None: they have
    both signs."""
    low, high = float(record.low.min()), float(record.high.max())
    if low >= 0:
        return 0.0
    return SILU_MINIMUM if low >= SILU_MINIMUM - 1e-3 and high > -SILU_MINIMUM else None


def best_scales(record: InputRecord, bits: int, offset: float | None) -> Tensor:
    """The scale `(T,)` of least error at each timestep by itself (`ranges`)."""
    x, weights = record.rows(FIT_VALUES)
    low, high = least_error(
        x - (offset or 0.0), bits, offset is None,
        exact_zero=offset is not None, weights=weights, power=activation_power(bits),
    )  # fmt: skip
    bound, levels = (high, 2**bits - 1) if offset is not None else (torch.maximum(-low, high), 2 ** (bits - 1) - 1)
    best: Tensor = bound.squeeze(1) / levels
    return best.clamp(min=SMALLEST_SCALE)


def fit(parts: Sequence[TimedActivation], records: Sequence[InputRecord]) -> None:
    """Train the predictors alone, all at once, on the logarithms of the best scale of each timestep.

    As scales differ by orders of magnitude over time, the logarithm is what has an error of one size.
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(tuple(record.times.tolist()), []).append(index)
    for members in groups.values():
        _fit([parts[i] for i in members], [records[i] for i in members])


def _fit(parts: list[TimedActivation], records: list[InputRecord]) -> None:
    device = next(parts[0].parameters()).device
    goal = torch.stack([best_scales(r, p.bits, p.offset) for p, r in zip(parts, records, strict=True)]).log().to(device)
    embedded = parts[0].embedding(records[0].times.to(device))
    weights, _ = stack_module_state([part.predictor for part in parts])
    predicted = vmap(partial(predicted_scale, parts[0].predictor, embedded=embedded))
    learned = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    optimizer = torch.optim.Adam(learned.values(), lr=FIT_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    with torch.enable_grad():
        for _ in range(FIT_STEPS):
            loss = (predicted(learned).log() - goal).square().mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for index, part in enumerate(parts):
        part.predictor.load_state_dict({name: value[index].detach() for name, value in learned.items()})
