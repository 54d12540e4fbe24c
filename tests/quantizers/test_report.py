"""What the report tells of every layer, and what is written of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import quantization_of, quantize, size_of
from ts_adapt.quantizers.report import plot, report, save_report, write_table


def test_the_report_tells_bits_errors_and_ranges(denoiser: Any, calls: list[Call], tmp_path: Path) -> None:
    network = denoiser.network
    quantize(network, build("minmax-w4a8")[0], calls)
    rows = report(network, calls)
    assert len(rows) == len(quantization_of(network).planned)
    by_name = {row.name: row for row in rows}
    assert by_name["conv_in"].reason == "first layer" and by_name["conv_in"].bits is None
    name = "down_blocks.0.resnets.0.conv1"
    row, layer = by_name[name], network.get_submodule(name)
    original = quantization_of(network).originals[name].weight
    assert row.bits == 4 and row.activation_bits == 8 and 4 < row.true_bits < 8
    assert row.weight_mse == pytest.approx(float((layer.weight - original).square().mean()))
    assert row.weight_mae == pytest.approx(float((layer.weight - original).abs().mean()))
    assert row.timesteps == sorted({float(t) for call in calls for t in call.timestep})
    assert len(row.low) == len(row.high) == len(row.activation_mse) == len(row.activation_mae) == 4
    step = float(layer.activation.scale)
    assert 0 < max(row.activation_mae) <= step / 2 * 1.1 and max(row.activation_mse) < step**2
    save_report(rows, network, tmp_path / "report.json")
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["size"]["weight_bytes"] == size_of(network).weight_bytes and len(kept["layers"]) == len(rows)
    write_table(rows, tmp_path / "report.csv")
    with open(tmp_path / "report.csv") as file:
        lines = list(csv.DictReader(file))
    own = [line for line in lines if line["name"] == name]
    assert [float(line["timesteps"]) for line in own] == row.timesteps
    assert [float(line["activation_mae"]) for line in own] == row.activation_mae
    assert [float(line["high"]) for line in own] == row.high and {line["bits"] for line in own} == {"4"}
    (first,) = (line for line in lines if line["name"] == "conv_in")
    assert first["reason"] == "first layer" and first["bits"] == first["timesteps"] == first["low"] == ""
    ranges, errors, weights = plot(rows, "minmax-w4a8").axes
    quantized = [row for row in rows if row.reason is None]
    assert len(errors.lines) == len(weights.patches) == len(quantized) == len(ranges.lines) / 2


def test_a_report_of_weights_alone_needs_no_calls(make: Callable[..., Any]) -> None:
    rows = report(quantize(make("sd"), build("hqq3")[0]))
    assert all(not row.timesteps for row in rows) and {row.activation_bits for row in rows} == {None}
    with pytest.raises(TsAdaptError, match="not quantized"):
        report(make("sd"))
