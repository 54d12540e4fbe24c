"""VQDM: additive codebooks, their search, their cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.layers.codebooks import FORMATS, CodebookWeight, Codes, Format, LearnedCodebooks
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.methods.vqdm import (
    VQDM,
    VQDMOptions,
    beam_search,
    block_of,
    choose_format,
    find_codes,
    output_share,
    residual_kmeans,
)
from ts_adapt.quantizers.quantization import quantization_of, quantize, quantized_layers, restore, size_of
from ts_adapt.quantizers.storage import load, save

QUICK = VQDMOptions(rounds=2, steps=10, beam=4, lr=1e-3)


def problem(outputs: int = 32, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs whose channels go together and differ in size."""
    torch.manual_seed(0)
    x = torch.randn(512, inputs) @ torch.randn(inputs, inputs) * torch.logspace(-1, 0.5, inputs)
    return torch.randn(outputs, inputs), (x.T @ x).double() / len(x)


@pytest.mark.parametrize("bits", FORMATS)
def test_formats_have_the_bits_that_they_are_listed_under(bits: int) -> None:
    for count, code_bits, group in FORMATS[bits]:
        assert count * code_bits == bits * group


def test_the_format_goes_by_the_size_of_the_layer() -> None:
    large, cifar, small = torch.Size([768, 768, 3, 3]), torch.Size([128, 256, 3, 3]), torch.Size([16, 16, 3, 3])
    assert choose_format(large, 4, 0.25) == Format(4, 8, 8)
    assert choose_format(cifar, 4, 0.05) == Format(1, 8, 2)
    assert choose_format(small, 4, 0.25) == Format(1, 4, 1)
    assert Format(4, 8, 8).overhead(torch.Size([16384])) == 8
    assert Format(4, 8, 8).overhead(torch.Size([589824])) == pytest.approx(0.22, abs=0.01)


@pytest.mark.parametrize("layout", [Format(2, 4, 4), Format(1, 4, 1), Format(3, 3, 5)])
def test_packed_codes_come_back(layout: Format) -> None:
    weight = torch.randn(6, 4, 3, 3)
    found = residual_kmeans(nn.functional.pad(weight.flatten(1), (0, -36 % layout.group)), layout, 0)
    part = CodebookWeight.of(found, weight.shape, layout, 4)
    assert torch.equal(part.read().codes, found.codes)
    assert torch.allclose(part(), found.rows()[:, :36].view(6, 4, 3, 3), rtol=2e-3, atol=2e-3)
    codes = -(-6 * (-(-36 // layout.group)) * layout.books * layout.code_bits // 8)
    assert codes <= part.bytes - 2 * (layout.books * 2**layout.code_bits * layout.group + 6) - 4 <= codes + 4


def test_the_search_finds_the_best_choice_of_a_group() -> None:
    """Two codebooks of four: with a beam of all, as good as trying all sixteen sums."""
    rows, moment = problem(8, 4)
    moment = moment.float()
    found = residual_kmeans(rows, Format(2, 2, 4), 0)
    beam_search(rows, found, moment, 16)
    for row in range(8):
        errors = []
        for a in range(4):
            for b in range(4):
                d = rows[row] - found.scale[row] * (found.books[0, a] + found.books[1, b])
                errors.append(float(d @ moment @ d))
        d = rows[row] - found.rows()[row]
        assert float(d @ moment @ d) == pytest.approx(min(errors), rel=1e-4)


def test_search_and_training_never_raise_the_error() -> None:
    rows, moment = problem()
    moment = moment.float() / moment.diagonal().mean().float()
    found = residual_kmeans(rows, Format(2, 4, 4), 0)
    errors = [float(output_share(rows, found, moment))]
    for _ in range(3):
        beam_search(rows, found, moment, 4)
        errors.append(float(output_share(rows, found, moment)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


def test_codes_are_chosen_for_the_output() -> None:
    """Against rounding to the nearest at as many bits, and against codebooks that do not look at the inputs."""
    weight, moment = problem()
    rows, normal = weight, moment.float()
    found = find_codes(weight, moment, Format(1, 8, 2), QUICK)
    blind = residual_kmeans(rows, Format(1, 8, 2), 0)
    scale = weight.abs().amax(1, keepdim=True) / 7
    nearest = Codes(torch.zeros(32, 64, 1, dtype=torch.long), torch.zeros(1, 1, 1), scale)
    nearest.rows = lambda: (weight / scale).round().clamp(-8, 7) * scale  # type: ignore[method-assign]
    ours, unseeing, rounding = (float(output_share(rows, codes, normal)) for codes in (found, blind, nearest))
    assert ours < 0.7 * unseeing and ours < 0.5 * rounding


def test_every_layer_is_quantized_with_true_bits_and_less_error_than_rounding(
    denoiser: Any, calls: list[Call], error: Callable[[], float]
) -> None:
    network = denoiser.network
    quantize(network, VQDM(VQDMOptions(rounds=1, steps=5)), calls)
    ours, size = error(), size_of(network)
    stored = sum(layer.stored.bytes for _, layer in quantized_layers(network))
    assert size.bits == 8 * stored / size.quantized_weights and 4 < size.bits < 5.5
    restore(network)
    assert error() == 0
    quantize(network, build("minmax-w4")[0])
    assert ours < error()


def test_fine_tuning_comes_closer_to_the_teacher(denoiser: Any, calls: list[Call], error: Callable[[], float]) -> None:
    network, errors = denoiser.network, []
    for steps in (0, 12):
        options = VQDMOptions(bits=2, rounds=0, fine_tune=steps, fine_tune_lr=3e-3, fine_tune_batch=6)
        quantize(network, VQDM(options), calls)
        errors.append(error())
        assert all(type(layer.stored) is CodebookWeight for _, layer in quantized_layers(network))
        restore(network)
    assert errors[1] < 0.8 * errors[0]


def test_round_trip_is_exact(denoiser: Any, calls: list[Call], make: Any, tmp_path: Path) -> None:
    network = quantize(denoiser.network, VQDM(VQDMOptions(rounds=0)), calls)
    save(network, tmp_path)
    twin = load(make("unet"), tmp_path)
    assert torch.equal(calls[1].run(twin), calls[1].run(network)) and size_of(twin) == size_of(network)


def test_a_part_inside_a_part_is_counted_once(denoiser: Any, calls: list[Call]) -> None:
    network = quantize(denoiser.network, VQDM(VQDMOptions(rounds=0)), calls)
    for _, layer in quantized_layers(network):
        layer.stored = LearnedCodebooks(layer.stored)  # type: ignore[arg-type]
    assert size_of(network).weight_bytes == sum(t.numel() * t.element_size() for t in network.state_dict().values())


class Grouped(nn.Module):
    """A grouped convolution between two layers of the same kind as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.unused = nn.Linear(2, 2)
        self.b, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.b(self.a(self.first(x))))  # type: ignore[no-any-return]


def test_layers_that_cannot_be_taken_are_left_and_named() -> None:
    network = Grouped()
    del network.unused
    calls = [Call.of(network, torch.randn(2, 4, 6, 6), torch.tensor(5.0))]
    quantize(network, VQDM(VQDMOptions(rounds=0)), calls)
    assert "grouped convolution" in quantization_of(network).left["a"]
    assert [name for name, _ in quantized_layers(network)] == ["b"]


def test_blocks_are_those_of_the_network() -> None:
    assert block_of("down_blocks.0.resnets.1.conv1") == "down_blocks.0" and block_of("mid_block.x.y") == "mid_block"


def test_bad_input_is_explained(denoiser: Any) -> None:
    with pytest.raises(TsAdaptError, match="codebooks for 2, 3, 4"):
        build("vqdm8")
    with pytest.raises(TsAdaptError, match=r"option vqdm\.beam is 0"):
        VQDM(VQDMOptions(beam=0))
    with pytest.raises(TsAdaptError, match="calibration set is empty"):
        quantize(denoiser.network, VQDM())
    network = Grouped()
    calls = [Call.of(network, torch.randn(2, 4, 6, 6), torch.tensor(5.0))]
    with pytest.raises(TsAdaptError, match="does not reach unused"):
        quantize(network, VQDM(VQDMOptions(rounds=0)), calls, layers=None)
