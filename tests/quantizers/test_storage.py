"""Quantizations on disk: read back exactly, small, refused for other networks and where damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.layers.plan import LayerOptions
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import is_quantized, quantization_of, quantize, quantized_layers, restore, size_of
from ts_adapt.quantizers.storage import load, save
from ts_adapt.storage.files import read_json, write_json

METHODS = ["minmax-w8", "minmax-w3a8", "minmax-w4a8+dynamic+split", "hqq4", "hqq3+split", "bf16+split", "fp16"]


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


@pytest.mark.parametrize("method", ["minmax-w8", "hqq4"])
def test_damaged_weights_are_refused(make: Callable[..., Any], tmp_path: Path, method: str) -> None:
    save(quantize(make("unet"), build(method)[0]), tmp_path)
    path, network = tmp_path / "model.safetensors", make("unet")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    flips = [header + step * (len(whole) - header) // 7 for step in range(7)]
    spoiled = [whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :] for place in flips]
    for data in (whole[:-1], whole[: header - 1], b"", *spoiled):
        path.write_bytes(data)
        with pytest.raises(TsAdaptError, match=str(path)):
            load(network, tmp_path)
        assert not is_quantized(network)
    path.write_bytes(whole)
    assert is_quantized(load(network, tmp_path))
