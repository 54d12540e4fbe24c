"""What quantization does to every layer: bits, the error of the weight, the range and the error of the activation.

    weight      MSE, MAE and the error relative to the weight, mean (W - W^)^2 / mean W^2
    activation  at each timestep of a calibration set: the smallest and largest input, MSE and MAE of x^ against x

Errors are of the layer's own doing: x is what reaches it in the quantized network.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import observe, rows_by_time
from ts_adapt.quantizers.layers.plan import PlannedLayer
from ts_adapt.quantizers.layers.quantized_layer import Layer, QuantizedLayer
from ts_adapt.quantizers.quantization import quantization_of, quantized_layers, size_of
from ts_adapt.storage.files import write_bytes, write_json


@dataclass
class LayerReport:
    """bits, activation_bits   nominal; None: full precision
    true_bits               of a weight, with all that is kept of it
    reason                  why the layer stays in full precision; None: it is quantized
    timesteps and the lists behind it have an entry for each timestep, in rising order
    """

    name: str
    kind: str
    weights: int
    bits: int | None
    true_bits: float
    activation_bits: int | None
    reason: str | None = None
    weight_mse: float = 0.0
    weight_mae: float = 0.0
    weight_relative: float = 0.0
    timesteps: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    activation_mse: list[float] = field(default_factory=list)
    activation_mae: list[float] = field(default_factory=list)


def report(network: nn.Module, calls: Sequence[Call] = ()) -> list[LayerReport]:
    """Every layer of the quantized `network` with a weight matrix; ranges and activation errors on `calls`, if given.

    Raises TsAdaptError for a network that is not quantized.
    """
    of = quantization_of(network)
    originals = of.layers()
    rows = [_kept(layer, network.get_submodule(layer.name)) for layer in of.planned if layer.reason is not None]
    rows += [_quantized(name, layer, originals[name]) for name, layer in quantized_layers(network)]
    if calls:
        _add_activations(network, {row.name: row for row in rows if row.reason is None}, calls)
    return rows


def save_report(rows: Sequence[LayerReport], network: nn.Module, path: Path) -> None:
    """The report and the sizes of `network` as JSON at `path`."""
    write_json(path, {"size": asdict(size_of(network)), "layers": [asdict(row) for row in rows]})


TIMED = ("timesteps", "low", "high", "activation_mse", "activation_mae")
"""Of a report what has an entry for each timestep."""


def write_table(rows: Sequence[LayerReport], path: Path) -> None:
    """The report as CSV at `path`: a line for each layer and timestep, one alone for a layer that was not observed."""
    plain = [f.name for f in fields(LayerReport) if f.name not in TIMED]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *TIMED])
    for row in rows:
        own = ["" if value is None else value for value in (getattr(row, name) for name in plain)]
        times = list(zip(*(getattr(row, name) for name in TIMED), strict=True)) or [("",) * len(TIMED)]
        writer.writerows([*own, *at] for at in times)
    write_bytes(path, text.getvalue().encode())


def plot(rows: Sequence[LayerReport], title: str = "") -> Figure:
    """Ranges of the inputs and their errors over time, a line for each layer, and the error of each layer's weight."""
    quantized = [row for row in rows if row.reason is None]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    ranges, errors, weights = figure.subplots(1, 3)
    shades = colormaps["viridis"]
    for place, row in enumerate(quantized):
        color = shades(place / max(1, len(quantized) - 1))
        ranges.fill_between(row.timesteps, row.low, row.high, color=color, alpha=0.15, linewidth=0)
        ranges.plot(row.timesteps, row.high, color=color, linewidth=0.8)
        ranges.plot(row.timesteps, row.low, color=color, linewidth=0.8)
        errors.plot(row.timesteps, row.activation_mse, color=color, linewidth=0.8)
        weights.bar(place, row.weight_relative, color=color)
    ranges.set(title="range of the input", xlabel="timestep", yscale="symlog")
    errors.set(title="error of the input, MSE", xlabel="timestep")
    errors.set_yscale("symlog", linthresh=1e-8)
    weights.set(title="relative error of the weight", xlabel="layer, first to last", yscale="log")
    figure.suptitle(title)
    return figure


def _kept(layer: PlannedLayer, module: Any) -> LayerReport:
    bits = 8 * module.weight.element_size()
    return LayerReport(layer.name, layer.kind, layer.numel, None, bits, None, reason=layer.reason)


def _quantized(name: str, layer: QuantizedLayer, original: Layer) -> LayerReport:
    weight = original.weight.detach().float()
    error = weight - layer.weight.detach().float()
    return LayerReport(
        name,
        type(original).__name__,
        layer.numel,
        layer.stored.bits,
        8 * layer.stored.bytes / layer.numel,
        None if layer.activation is None else layer.activation.bits,
        weight_mse=float(error.square().mean()),
        weight_mae=float(error.abs().mean()),
        weight_relative=float(error.square().mean() / weight.square().mean().clamp(min=1e-30)),
    )


def _add_activations(network: nn.Module, rows: dict[str, LayerReport], calls: Sequence[Call]) -> None:
    seen: dict[str, dict[float, list[Tensor]]] = {name: {} for name in rows}

    def visit(name: str, x: Tensor, timestep: Tensor) -> None:
        activation = layers[name].activation
        error = torch.zeros_like(x) if activation is None else activation(x) - x
        for time, here in rows_by_time(x, timestep):
            own, wrong = x[here].double(), error[here].double()
            sums = [own.amin(), own.amax(), wrong.square().sum(), wrong.abs().sum(), own.new_tensor(own.numel())]
            seen[name].setdefault(time, []).append(torch.stack(sums).cpu())

    layers = dict(quantized_layers(network))
    observe(network, rows, calls, visit)
    for name, by_time in seen.items():
        row = rows[name]
        for time in sorted(by_time):
            stats = torch.stack(by_time[time])
            total = stats[:, 2:].sum(0)
            row.timesteps.append(time)
            row.low.append(float(stats[:, 0].min()))
            row.high.append(float(stats[:, 1].max()))
            row.activation_mse.append(float(total[0] / total[2]))
            row.activation_mae.append(float(total[1] / total[2]))
