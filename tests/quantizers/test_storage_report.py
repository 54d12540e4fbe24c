"""A quantization on disk comes back bit for bit, on its own network only; the report tells of every layer."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ts_adapt.files import read_json, write_json
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.quantizers.calls import Call
from ts_adapt.quantizers.network import quantization_of, quantize, quantized_layers, restore, size_of
from ts_adapt.quantizers.registry import build
from ts_adapt.quantizers.report import plot, report, save_report, write_table
from ts_adapt.quantizers.storage import load, save
from ts_adapt.quantizers.traversal import LayerOptions

METHODS = ["minmax-w8", "minmax-w3a8", "minmax-w4a8+dynamic+split", "hqq4", "hqq3+split"]


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact(denoiser: Any, calls: list[Call], tmp_path: Path, make: Any, method: str) -> None:
    network = denoiser.network
    quantizer, layers = build(method)
    quantize(network, quantizer, calls, layers=layers)
    save(network, tmp_path)
    twin = make("unet")
    assert load(twin, tmp_path) is twin
    assert torch.equal(calls[1].run(twin), calls[1].run(network))
    assert size_of(twin) == size_of(network)
    assert quantization_of(twin).options == quantization_of(network).options
    for (name, ours), (other, theirs) in zip(quantized_layers(network), quantized_layers(twin), strict=True):
        assert name == other
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]) and value.dtype == theirs.state_dict()[key].dtype
    y = calls[1].run(make("unet"))
    assert torch.equal(calls[1].run(restore(twin)), y)  # type: ignore[arg-type]


def test_the_files_are_as_small_as_promised(make: Callable[..., Any], tmp_path: Path) -> None:
    network = quantize(make("unet"), build("hqq4")[0])
    save(network, tmp_path)
    biases = sum(4 * layer.bias.numel() for _, layer in quantized_layers(network) if layer.bias is not None)
    stored = sum(layer.stored.bytes for _, layer in quantized_layers(network))
    header = 60_000
    assert stored + biases <= (tmp_path / "model.safetensors").stat().st_size <= stored + biases + header
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_layer_options_come_back(make: Callable[..., Any], tmp_path: Path) -> None:
    options = LayerOptions(keep_ends=False, skip=("mid_block.*",))
    save(quantize(make("unet"), build("hqq4")[0], layers=options), tmp_path)
    twin = load(make("unet"), tmp_path)
    assert quantization_of(twin).layer_options == options


def test_other_networks_are_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    save(quantize(make("unet"), build("hqq4")[0]), tmp_path)
    for other in (make("sd"), make("unet", seed=1), make("unet").to(torch.bfloat16)):
        with pytest.raises(TsAdaptError, match="holds the quantization of another UNet2DModel than this"):
            load(other, tmp_path)
        assert not quantized_layers(other)
    with pytest.raises(TsAdaptError, match="quantized already; restore it before"):
        load(load(make("unet"), tmp_path), tmp_path)
    with pytest.raises(TsAdaptError, match="not quantized"):
        save(make("unet"), tmp_path)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = read_json(path / "config.json")
    change(config)
    write_json(path / "config.json", config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c.update(format="other"), "of the format 'other'"),
        (lambda c: c.pop("replaced"), "has no 'replaced'"),
        (lambda c: c["replaced"].update(nowhere={"kind": "layer"}), "no valid quantization"),
        (lambda c: next(iter(c["replaced"].values())).update(kind="pickle"), "'pickle' is no kind"),
        (lambda c: next(iter(c["replaced"].values()))["weight"].update(bits=2), "no valid quantization"),
        (lambda c: c["layers"].update(unknown=1), "no valid quantization"),
    ],
)
def test_damaged_files_are_explained(
    make: Callable[..., Any], tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    save(quantize(make("unet"), build("hqq4")[0]), tmp_path)
    _edit(tmp_path, change)
    network = make("unet")
    with pytest.raises(TsAdaptError, match=message):
        load(network, tmp_path)
    assert not quantized_layers(network) and not network._forward_pre_hooks


def test_missing_and_truncated_tensors_are_explained(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TsAdaptError, match="there is no file"):
        load(make("unet"), tmp_path)
    save(quantize(make("unet"), build("hqq4")[0]), tmp_path)
    tensors = tmp_path / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-100])
    with pytest.raises(TsAdaptError, match="truncated"):
        load(make("unet"), tmp_path)
    import safetensors.torch

    some = safetensors.torch.load(whole)
    some.pop(next(name for name in some if name.endswith("codes")))
    tensors.write_bytes(safetensors.torch.save(some))
    with pytest.raises(TsAdaptError, match="codes"):
        load(make("unet"), tmp_path)


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
