"""Quantized and restored: the network behind is the one before; sizes, copies, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ts_adapt.denoisers.load import load_pipeline
from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.layers.activations import DynamicActivation
from ts_adapt.quantizers.layers.plan import LayerOptions
from ts_adapt.quantizers.layers.quantized_layer import QuantizedLayer, SplitLayer
from ts_adapt.quantizers.layers.weights import DenseWeight
from ts_adapt.quantizers.methods.minmax import MinMax, MinMaxOptions
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import (
    Quantization,
    begin,
    is_quantized,
    quantization_of,
    quantize,
    quantized_layers,
    restore,
    size_of,
)
from ts_adapt.sampling import integrate

METHODS = ["minmax-w8", "minmax-w4a8", "minmax-w8a8+dynamic", "minmax-w8a8+split", "hqq4", "hqq3", "bf16", "fp16+split"]


def snapshot(network: nn.Module) -> Any:
    tensors = {name: (id(p), p.detach().clone()) for name, p in network.state_dict(keep_vars=True).items()}
    return tensors, {name: id(module) for name, module in network.named_modules()}


def check_same(network: nn.Module, before: Any) -> None:
    tensors, modules = snapshot(network)
    assert modules == before[1]
    assert tensors.keys() == before[0].keys()
    for name, (identity, value) in tensors.items():
        assert identity == before[0][name][0] and torch.equal(value, before[0][name][1])
    assert not network._forward_pre_hooks and not is_quantized(network)


@pytest.mark.parametrize("method", METHODS)
def test_off_again_is_the_very_network_that_was_there(denoiser: Any, calls: list[Call], method: str) -> None:
    network = denoiser.network
    before, y = snapshot(network), calls[0].run(network)
    quantizer, layers = build(method)
    assert quantize(network, quantizer, calls, layers=layers) is network
    assert not torch.equal(calls[0].run(network), y)
    assert restore(network) is network
    check_same(network, before)
    assert torch.equal(calls[0].run(network), y)


@pytest.mark.parametrize("options", [{"bits": 16}, {"bits": 16, "activation_bits": 16}, {"bits": 16, "group": 64}])
@pytest.mark.parametrize("split", [False, True])
def test_sixteen_bits_change_nothing_but_rounding(
    denoiser: Any, solve: Any, calls: list[Call], options: dict[str, Any], split: bool
) -> None:
    full = integrate(denoiser, *solve).x
    quantize(denoiser.network, MinMax(MinMaxOptions(**options)), calls, layers=LayerOptions(split_shortcuts=split))
    assert (integrate(denoiser, *solve).x - full).abs().max() < 2e-3 * full.abs().max()


@pytest.mark.parametrize("name", ["unet", "sd", "dit", "flux"])
def test_planned_layers_are_replaced_and_no_others(make: Callable[..., Any], name: str) -> None:
    network = make(name)
    quantize(network, build("hqq4")[0])
    planned = quantization_of(network).planned
    assert [n for n, _ in quantized_layers(network)] == [layer.name for layer in planned if layer.reason is None]
    for layer in planned:
        if layer.reason is not None:
            assert not isinstance(network.get_submodule(layer.name), QuantizedLayer)


LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "linear-no-bias": lambda: nn.Linear(6, 5, bias=False),
    "conv": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "stride-dilation-groups": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
    "circular": lambda: nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="circular"),
    "same": lambda: nn.Conv2d(6, 4, 3, padding="same"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_its_own_weight_is_the_layer(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, 7, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)
    quantized = QuantizedLayer(layer, DenseWeight(layer.weight))
    assert torch.equal(quantized(x), layer(x))
    assert torch.equal(quantized.weight, layer.weight)
    if getattr(layer, "groups", 1) == 1:
        assert torch.allclose(SplitLayer(layer, 2)(x), layer(x), atol=1e-6)


def test_activation_and_weight_are_both_quantized() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    activation = DynamicActivation(3)
    quantized = QuantizedLayer(layer, DenseWeight(layer.weight), activation)
    assert torch.equal(quantized(x), F.linear(activation(x), layer.weight, layer.bias))
    assert "activation bits=3" in repr(quantized)


def test_sizes_are_true(denoiser: Any) -> None:
    network = denoiser.network
    whole = sum(4 * p.numel() for p in network.parameters())
    assert size_of(network).weight_bytes == size_of(network).full_bytes == whole
    quantize(network, build("hqq4")[0], layers=LayerOptions(split_shortcuts=True))
    size = size_of(network)
    stored = sum(layer.stored.bytes for _, layer in quantized_layers(network))
    kept = sum(4 * p.numel() for p in network.parameters())
    assert size.full_bytes == whole and size.weight_bytes == stored + kept
    assert size.all_weights == whole // 4 and size.bits == 8 * stored / size.quantized_weights
    assert 4.5 < size.bits < 5.5


def test_gradients_reach_the_times_through_a_quantized_network(denoiser: Any, solve: Any, calls: list[Call]) -> None:
    solver, grid, x_T = solve
    quantize(denoiser.network, build("minmax-w8a8")[0], calls)
    gradients = []
    for checkpoint in (False, True):
        times = grid.clone().requires_grad_()
        integrate(denoiser, solver, times, x_T, checkpoint=checkpoint).x.square().sum().backward()
        assert times.grad is not None and bool(torch.isfinite(times.grad).all()) and bool(times.grad.any())
        gradients.append(times.grad)
    assert torch.allclose(*gradients)


def test_a_copy_of_a_quantized_network_is_its_own(denoiser: Any, calls: list[Call]) -> None:
    network = denoiser.network
    quantize(network, build("minmax-w4a8")[0], calls)
    assert quantization_of(network).listener.timestep is None
    twin = copy.deepcopy(network)
    y = calls[0].run(network)
    assert torch.equal(calls[0].run(twin), y)
    restore(twin)
    assert not twin._forward_pre_hooks and network._forward_pre_hooks
    assert torch.equal(calls[0].run(network), y)


def test_a_module_with_two_names_is_replaced_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.a, self.end = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.end(self.b(self.a(self.start(x))))  # type: ignore[no-any-return]

    network = Twice()
    before = snapshot(network)
    quantize(network, build("hqq4")[0])
    assert isinstance(network.a, QuantizedLayer) and network.b is network.a
    assert size_of(network).quantized_weights == 16
    restore(network)
    check_same(network, before)


def test_a_method_that_fails_leaves_the_network_as_it_was(denoiser: Any) -> None:
    class Fails(MinMax):
        def apply(self, to: Quantization, calls: Any) -> None:
            super().apply(to, calls)
            raise RuntimeError("in the middle")

    before = snapshot(denoiser.network)
    with pytest.raises(RuntimeError, match="in the middle"):
        quantize(denoiser.network, Fails(MinMaxOptions(bits=4)))
    check_same(denoiser.network, before)


def test_attributes_that_are_no_modules_are_put_back(make: Callable[..., Any]) -> None:
    network = make("unet")
    before, name = snapshot(network), "mid_block.attentions.0.processor"
    processor = network.mid_block.attentions[0].processor
    to = begin(network, "test", {}, LayerOptions())
    to.replace(name, nn.Identity())
    assert isinstance(network.mid_block.attentions[0].processor, nn.Identity)
    restore(network)
    assert network.mid_block.attentions[0].processor is processor
    check_same(network, before)


def test_a_network_that_was_moved_is_restored_where_it_is(denoiser: Any, calls: list[Call]) -> None:
    network, expected = denoiser.network, copy.deepcopy(denoiser.network).bfloat16()
    quantize(network, build("minmax-w4a8")[0], calls)
    network.bfloat16()
    call = calls[0].rows(torch.arange(2))
    half = Call((call.x.bfloat16(), *call.args[1:]), call.kwargs, call.timestep)
    quantized = half.run(network)
    assert quantized.dtype == torch.bfloat16 and bool(torch.isfinite(quantized).all())
    restore(network)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert torch.equal(half.run(network), half.run(expected))


def test_twice_and_not_at_all_are_refused(denoiser: Any) -> None:
    network = denoiser.network
    with pytest.raises(TsAdaptError, match="not quantized; call quantize first"):
        restore(network)
    quantize(network, build("hqq4")[0])
    with pytest.raises(TsAdaptError, match="quantized already, by hqq; restore it first"):
        quantize(network, build("hqq3")[0])


def test_a_quantized_pipeline_is_not_saved_as_if_it_were_whole(tiny: Any, tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd")
    quantize(pipe.unet, build("hqq4")[0])
    for saved in (pipe, pipe.unet, copy.deepcopy(pipe.unet)):
        with pytest.raises(TsAdaptError, match="the network is quantized"):
            saved.save_pretrained(tmp_path / "quantized")
    restore(pipe.unet)
    pipe.save_pretrained(tmp_path / "whole")
    weights = load_pipeline(str(tmp_path / "whole")).unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in pipe.unet.state_dict().items())
