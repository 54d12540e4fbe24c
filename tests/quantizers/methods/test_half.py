"""bf16 and fp16: what autocast makes of a layer, with the gradient of the rounded weight, at half the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.layers.half import HALVES, HalfActivation, HalfWeight
from ts_adapt.quantizers.layers.quantized_layer import QuantizedLayer
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import quantization_of, quantize, quantized_layers, size_of
from ts_adapt.quantizers.report import report

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYERS: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "linear": lambda: (nn.Linear(48, 24), torch.randn(2, 5, 48)),
    "conv": lambda: (nn.Conv2d(8, 12, 3, padding=1, bias=False), torch.randn(2, 8, 6, 6)),
    "circular": lambda: (nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), torch.randn(2, 8, 6, 6)),
}


def made(layer: Any, dtype: str) -> QuantizedLayer:
    return QuantizedLayer(layer, HalfWeight(layer.weight, dtype), HalfActivation(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("learning", [False, True])
def test_a_layer_is_run_as_by_autocast(name: str, dtype: str, learning: bool) -> None:
    """Up to the last bit, which the order of a sum decides; one bit of 16 is far above float32's own rounding."""
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    half, bit = HALVES[dtype], torch.finfo(HALVES[dtype]).eps
    with torch.no_grad(), torch.autocast("cpu", half):
        expected = layer(x)
    y = made(layer, dtype)(x.clone().requires_grad_(learning))
    assert expected.dtype == half and y.dtype == x.dtype and torch.equal(y, y.to(half).float())
    assert torch.allclose(y, expected.float(), rtol=bit, atol=bit)
    assert (y == expected.float()).float().mean() > 0.97 and not torch.allclose(y, layer(x), rtol=bit / 64, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_those_of_the_rounded_weight_and_small_ones_stay(dtype: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), torch.randn(3, 16, requires_grad=True)
    small = 1e-9 * torch.randn(3, 8)
    (gradient,) = torch.autograd.grad(made(layer, dtype)(x), x, small)
    assert torch.allclose(gradient, small @ layer.weight.detach().to(HALVES[dtype]).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_takes_half_the_bytes_and_says_so(denoiser: Any, calls: list[Call], name: str) -> None:
    network, full = denoiser.network, [call.run(denoiser.network) for call in calls]
    quantize(network, *build(name)[:1])
    size, eps = size_of(network), torch.finfo(NAMES[name]).eps
    assert size.bits == 16 and size.full_bytes - size.weight_bytes == 2 * size.quantized_weights
    for call, before in zip(calls, full, strict=True):
        assert 0 < (call.run(network) - before).abs().max() < 8 * eps * before.abs().max()
    rows = [row for row in report(network, calls) if row.reason is None]
    assert rows and {(row.bits, row.activation_bits) for row in rows} == {(16, 16)}
    assert all(0 < row.weight_relative < eps**2 for row in rows) and any(max(row.activation_mse) > 0 for row in rows)


def test_a_weight_that_is_too_large_for_fp16_stays(make: Callable[..., Any]) -> None:
    network = make("unet")
    quantize(network, build("bf16")[0])
    (name, _), *others = quantized_layers(network)
    again = make("unet")
    with torch.no_grad():
        again.get_submodule(name).weight.view(-1)[0] = 1e5
    quantize(again, build("fp16")[0])
    assert [other for other, _ in quantized_layers(again)] == [other for other, _ in others]
    assert "weight beyond 65504" in quantization_of(again).left[name]
