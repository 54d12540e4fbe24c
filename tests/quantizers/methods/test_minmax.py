"""Min-max: errors by bits, AdaRound, split shortcuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import input_rows, output_error, second_moments
from ts_adapt.quantizers.layers.activations import DynamicActivation, StaticActivation
from ts_adapt.quantizers.layers.plan import LayerOptions, plan
from ts_adapt.quantizers.layers.quantized_layer import QuantizedLayer, SplitLayer
from ts_adapt.quantizers.layers.weights import DenseWeight
from ts_adapt.quantizers.methods.adaround import learned_codes
from ts_adapt.quantizers.methods.minmax import MinMax, MinMaxOptions
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import begin, quantization_of, quantize, quantized_layers, restore


class Single(nn.Module):
    """One layer between two that stay."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Identity(), layer, nn.Identity()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


ALL = LayerOptions(keep_ends=False)


def relative(y: Tensor, target: Tensor) -> float:
    return float(((y - target).square().mean().sqrt() / target.square().mean().sqrt()).detach())


def test_more_bits_have_less_error(denoiser: Any) -> None:
    network, errors = denoiser.network, []
    calls = [Call.of(network, torch.randn(4, 1, 8, 8), torch.tensor(time)) for time in (30.0, 700.0)]
    full = calls[1].run(network)
    for name in ("minmax-w2a8", "minmax-w3a8", "minmax-w4a8", "minmax-w8a8"):
        quantize(network, build(name)[0], calls)
        errors.append(relative(calls[1].run(network), full))
        restore(network)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]


def test_a_split_shortcut_keeps_the_small_half() -> None:
    """Ranges 200 apart, W4A8: quantized together the small half is lost, in the input and in the weights."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 32, 1)
    x = torch.randn(8, 64, 8, 8)
    x[:, :32] *= 200
    with torch.no_grad():
        layer.weight[:, :32] /= 200
    target = layer(x).detach() - _bias(layer)
    network, options = Single(layer), MinMaxOptions(bits=4, activation_bits=8)
    call = Call.of(network, x, torch.tensor(1.0))
    joint = relative(quantize(network, MinMax(options), [call], layers=ALL)(x, 1.0) - _bias(layer), target)
    restore(network)
    to = begin(network, "minmax", {}, ALL)
    to.replace("layer", SplitLayer(layer, 32))
    MinMax(options).apply(to, [call])
    split = relative(network(x, torch.tensor(1.0)) - _bias(layer), target)
    assert joint > 0.985 and split < 0.13
    restore(network)
    assert network.layer is layer


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias.detach().view(-1, 1, 1)


def test_split_shortcuts_are_quantized_by_halves(denoiser: Any, calls: list[Call]) -> None:
    network = denoiser.network
    quantize(network, build("minmax-w4a8+split")[0], calls, layers=build("minmax-w4a8+split")[1])
    split = [name for name, module in network.named_modules() if isinstance(module, SplitLayer)]
    assert len(split) == 4 and all(name.endswith("conv_shortcut") for name in split)
    names = [name for name, _ in quantized_layers(network)]
    assert all(f"{name}.parts.{part}" in names for name in split for part in (0, 1))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("group", ["channel", 16])
def test_adaround_keeps_the_output_better_than_rounding_to_the_nearest(kind: str, group: int | str) -> None:
    """Inputs with few directions, as activations have: errors of weights can cancel."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 16) if kind == "linear" else nn.Conv2d(8, 16, 3, padding=1)
    if kind == "linear":
        x = torch.randn(400, 6) @ torch.randn(6, 48) + 0.05 * torch.randn(400, 48)
    else:
        x = F.interpolate(torch.randn(8, 8, 3, 3), size=(12, 12), mode="bicubic")
    rows = input_rows(layer, x).double()  # type: ignore[arg-type]
    moment = rows.transpose(1, 2) @ rows / rows.shape[1]
    part = MinMax(MinMaxOptions(bits=4, group=group)).weight(layer)  # type: ignore[arg-type]
    nearest = output_error((layer.weight - part()).detach(), moment)  # type: ignore[operator]
    codes = part.read().clone()  # type: ignore[operator]
    learned = learned_codes(layer.weight, part, moment, 400)  # type: ignore[arg-type]
    assert (learned - codes).abs().max() <= 1, "each weight goes to one of its two neighbours"
    part.write(learned)  # type: ignore[operator]
    ratio = (output_error((layer.weight - part()).detach(), moment) / nearest).sqrt()  # type: ignore[operator]
    assert float(ratio) < 0.6


def test_adaround_brings_the_error_of_the_output_to_a_third() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 16)
    x = torch.randn(400, 6) @ torch.randn(6, 48) + 0.05 * torch.randn(400, 48)
    moment = input_rows(layer, x).double()
    moment = moment.transpose(1, 2) @ moment / moment.shape[1]
    errors = []
    for learned in (None, moment):
        part = MinMax(MinMaxOptions(bits=3, adaround=400)).weight(layer, learned)
        ratio = output_error((layer.weight - part()).detach(), moment) / output_error(layer.weight.detach(), moment)
        errors.append(float(ratio.sqrt()))
    assert errors[0] > 0.15 and errors[1] < 0.05


def test_adaround_is_never_worse_on_its_own_inputs(denoiser: Any, calls: list[Call]) -> None:
    network, some = denoiser.network, LayerOptions(skip=("*_blocks.*",))
    inputs = second_moments(
        network, {layer.name: network.get_submodule(layer.name) for layer in plan(network, some)}, calls[:1]
    )  # type: ignore[misc]
    errors: list[dict[str, float]] = []
    for options in (MinMaxOptions(bits=3), MinMaxOptions(bits=3, adaround=5)):
        quantize(network, MinMax(options), calls[:1], layers=some)
        originals = quantization_of(network).originals
        errors.append(
            {n: float(output_error(originals[n].weight - q.weight, inputs[n])) for n, q in quantized_layers(network)}
        )
        restore(network)
    assert all(errors[1][name] <= errors[0][name] for name in errors[0])
    assert sum(errors[1].values()) < sum(errors[0].values())


def test_parts_follow_the_options(denoiser: Any, calls: list[Call]) -> None:
    network = denoiser.network
    for options, stored, activation in (
        ({"bits": None, "activation_bits": 8}, DenseWeight, StaticActivation),
        ({"bits": None, "activation_bits": 8, "activation_range": "mse"}, DenseWeight, StaticActivation),
        ({"bits": None, "activation_bits": 6, "dynamic": True}, DenseWeight, DynamicActivation),
    ):
        quantize(network, MinMax(MinMaxOptions(**options)), calls)  # type: ignore[arg-type]
        layer = network.mid_block.attentions[0].to_q
        assert isinstance(layer, QuantizedLayer)
        assert isinstance(layer.stored, stored) and isinstance(layer.activation, activation)
        restore(network)


def test_layers_that_the_calibration_does_not_reach_are_named() -> None:
    class Lazy(Single):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))
            self.unused = nn.Linear(4, 4)

    network = Lazy()
    call = Call.of(network, torch.randn(3, 4), torch.tensor(1.0))
    with pytest.raises(TsAdaptError, match="does not reach unused"):
        quantize(network, build("minmax-w8a8")[0], [call], layers=ALL)
    assert type(network.layer) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": None}, "neither bits nor activation_bits"),
        ({"weight_range": "max"}, "did you mean 'minmax'"),
        ({"group": 0}, "group is 0"),
    ],
)
def test_options_that_make_no_sense_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        MinMax(MinMaxOptions(**options))
