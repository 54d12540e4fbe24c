"""torchao's int8 Linear layers: integers are computed with; what has no kernel is left and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.layers.plan import summary
from ts_adapt.quantizers.layers.quantized_layer import SplitLayer
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.methods.torchao import TorchAO, TorchAOOptions
from ts_adapt.quantizers.quantization import quantization_of, quantize, quantized_layers, restore, size_of
from ts_adapt.quantizers.report import report
from ts_adapt.quantizers.storage import load, save

installed = pytest.mark.packages


class Spy(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def sample(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return network(x, torch.tensor([10.0, 500.0]), encoder_hidden_states=text).sample  # type: ignore[no-any-return]


@installed
@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_linear_layers_run_in_int8_and_convolutions_are_left(make: Callable[..., Any], mode: str) -> None:
    network = make("sd")
    full = sample(network)
    quantize(network, TorchAO(TorchAOOptions(mode=mode)))
    with Spy() as spy:
        near = sample(network)
    assert any("_int_mm" in name for name in spy.seen) == (mode == "dynamic")
    assert 0 < (near - full).abs().max() < 0.05 * full.abs().max()
    planned = quantization_of(network).planned
    assert {layer.kind for layer in planned if layer.reason is None} == {"Linear"}
    assert "Conv2d, which torchao's kernels do not take" in summary(planned)
    size = size_of(network)
    assert 8 < size.bits < 13 and size.weight_bytes < size.full_bytes
    rows = {row.name: row for row in report(network)}
    assert all(rows[name].bits == 8 and 0 < rows[name].weight_relative < 1e-3 for name, _ in quantized_layers(network))
    assert torch.equal(sample(restore(network)), full)


@installed
def test_it_is_made_again_from_the_networks_own_weights(make: Callable[..., Any], tmp_path: Path) -> None:
    network = quantize(make("sd"), build("torchao")[0])
    save(network, tmp_path)
    twin = load(make("sd"), tmp_path)
    assert torch.equal(sample(twin), sample(network))
    assert summary(quantization_of(twin).planned) == summary(quantization_of(network).planned)


@installed
def test_gradients_are_refused_and_not_lost(make: Callable[..., Any]) -> None:
    network = quantize(make("dit"), build("torchao")[0])
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with pytest.raises(TsAdaptError, match="computes with integers, which pass no gradient on"):
        network(x, timestep=torch.tensor([3.0]), class_labels=torch.tensor([1]))
    network = quantize(make("dit"), build("torchao+weight-only")[0])
    network(x, timestep=torch.tensor([3.0]), class_labels=torch.tensor([1])).sample.sum().backward()
    assert x.grad is not None and bool(x.grad.any())


@installed
def test_a_network_of_convolutions_is_refused() -> None:
    network = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(3)))
    with pytest.raises(TsAdaptError, match="has no Linear layer"):
        quantize(network, build("torchao")[0])
    assert all(type(layer) is nn.Conv2d for layer in network)


def test_split_shortcuts_are_refused(make: Callable[..., Any]) -> None:
    network, (method, layers) = make("sd"), build("torchao-int8+split")
    with pytest.raises(TsAdaptError, match="no convolutions, and split shortcuts are some"):
        quantize(network, method, layers=layers)
    assert not any(isinstance(module, SplitLayer) for module in network.modules())


def test_without_the_package_the_error_says_how_to_get_it(make: Callable[..., Any], monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    network = make("dit")
    with pytest.raises(TsAdaptError, match=r"pip install 'ts_adapt\[quant\]'"):
        quantize(network, build("torchao")[0])
    assert not quantized_layers(network)


@pytest.mark.parametrize(
    ("options", "message"), [({"mode": "static"}, "unknown torchao mode"), ({"bits": 4}, "at 8 bits here, not 4")]
)
def test_options_that_make_no_sense_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        TorchAO(TorchAOOptions(**options))


@pytest.mark.parametrize(
    ("device", "capability", "here"),
    [("cpu", (9, 0), "on a CPU"), ("cuda", (8, 0), "on a GPU of compute capability 8.0"), ("cuda", (8, 9), None)],
)
def test_float8_needs_a_gpu_that_has_it(
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int],
    here: str | None,
) -> None:
    from ts_adapt.quantizers.methods.torchao import _check_float8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    if here is None:
        _check_float8(torch.device(device))
        return
    with pytest.raises(TsAdaptError, match=f"{here}; take torchao-int8"):
        _check_float8(torch.device(device))
    if device == "cpu":
        network = make("sd")
        before = sample(network)
        with pytest.raises(TsAdaptError, match="need a GPU of compute capability"):
            quantize(network, build("torchao-fp8")[0])
        assert torch.equal(sample(network), before)
