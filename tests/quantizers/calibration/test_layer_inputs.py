"""What layers receive: ranges by time, values that stand for others, second moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.noise import BetaTable
from ts_adapt.quantizers.calibration.collect import Call, collect
from ts_adapt.quantizers.calibration.layer_inputs import (
    Recorder,
    input_rows,
    observe,
    output_error,
    record_inputs,
    second_moments,
    strata,
)
from ts_adapt.quantizers.calibration.ranges import Range, least_error
from ts_adapt.quantizers.layers.affine import fake_quantize, scale_and_zero


class Two(nn.Module):
    """One layer whose input is known: x times a gain of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.layer(x * timestep.view(-1, 1, 1, 1))  # type: ignore[no-any-return]


def test_records_hold_ranges_by_time() -> None:
    network, x = Two(), torch.randn(4, 2, 6, 6)
    mixed = Call.of(network, x, torch.tensor([1.0, 10.0, 1.0, 100.0]))
    again = Call.of(network, x[:1], torch.tensor(10.0))
    record = record_inputs(network, ["layer"], [mixed, again])["layer"]
    assert record.times.tolist() == [1.0, 10.0, 100.0]
    at_ten = torch.stack([x[1], x[0]]) * 10
    assert float(record.low[1]) == float(at_ten.min()) and float(record.high[1]) == float(at_ten.max())
    assert torch.allclose(record.channel_bound[1], at_ten.abs().amax((0, 2, 3)))
    assert len(record.values) == 3 and record.all_values.numel() == 5 * 72
    assert record.all_weights.tolist() == [1] * 5 * 72
    rows, weights = record.rows(200)
    assert torch.equal(rows[1][weights[1] > 0], at_ten.flatten().sort().values), "a row is filled up with nothing"
    assert weights.sum(1).tolist() == [144, 144, 72]


@pytest.mark.parametrize("most", [1, 2, 3, 10, 256, 2048])
@pytest.mark.parametrize("count", [1, 2, 7, 300, 100_000])
def test_strata_hold_every_rank_once_and_the_extremes_alone(count: int, most: int) -> None:
    edges = strata(count, most)
    sizes = edges.diff()
    assert int(edges[0]) == 0 and int(edges[-1]) == count and int(sizes.min()) > 0 and len(sizes) <= most
    if most >= 10 and count > 2:
        assert int(sizes[0]) == int(sizes[-1]) == 1
        assert int(sizes.max()) <= -(-count // (most // 2))


def error_at(x: torch.Tensor, found: Range, bits: int) -> float:
    scale, zero = scale_and_zero(*found, bits, False, exact_zero=True)
    return float((fake_quantize(x, scale, zero, bits, False) - x).square().mean())


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize(("bits", "excess"), [(4, 0.01), (8, 0.05)])
def test_what_is_kept_of_heavy_tails_finds_the_range_of_all(bits: int, excess: float, calls: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.distributions.StudentT(3.0).sample((10, 10_000))
        recorder = Recorder()
        for part in x.chunk(calls):
            recorder.visit("layer", part, torch.full((len(part),), 7.0))
        record, x = recorder.records(["layer"])["layer"], x.reshape(1, -1)
        least = error_at(x, least_error(x, bits, False, exact_zero=True), bits)
        for values, weights in ((record.all_values[None], record.all_weights[None]), record.rows(1024)):
            found = least_error(values, bits, False, exact_zero=True, weights=weights)
            assert values.shape[1] < 10_500 and error_at(x, found, bits) < (1 + excess) * least


def test_a_step_of_many_samples_weighs_more_than_one_of_few() -> None:
    recorder = Recorder(keep=256)
    recorder.visit("layer", torch.randn(64, 4, 16, 16), torch.full((64,), 10.0))
    recorder.visit("layer", torch.randn(2, 4, 16, 16), torch.full((2,), 900.0))
    record = recorder.records(["layer"])["layer"]
    assert [float(weights.sum()) for weights in record.weights] == [64 * 1024, 2 * 1024]
    assert all(len(values) <= 256 for values in record.values)


def test_observe_stops_listening_when_a_call_fails() -> None:
    network = Two()
    good = Call.of(network, torch.randn(1, 2, 3, 3), torch.tensor(1.0))
    bad = Call((torch.randn(1, 5, 3, 3), torch.tensor([1.0])), {}, torch.tensor([1.0]))
    names: list[str] = []
    with pytest.raises(RuntimeError):
        observe(network, ["layer"], [good, bad], lambda name, x, t: names.append(name))
    assert names[0] == "layer" and not network.layer._forward_pre_hooks


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (9, 7, 6)),
    "conv": (lambda: nn.Conv2d(6, 4, 3, padding=1), (3, 6, 8, 8)),
    "strided": (lambda: nn.Conv2d(6, 4, (3, 2), stride=2, padding=(2, 1), dilation=2), (3, 6, 9, 8)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (3, 6, 8, 8)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (3, 6, 8, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_second_moment_gives_the_error_of_the_output(name: str) -> None:
    builder, shape = LAYERS[name]
    layer, x = builder().double(), torch.randn(shape, dtype=torch.float64)
    other = builder().double()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        other.weight += 0.1 * torch.randn_like(other.weight)
    rows = input_rows(layer, x)
    gram = rows.transpose(1, 2) @ rows / rows.shape[1]
    expected = (layer(x) - other(x)).square().mean()
    assert torch.allclose(output_error(layer.weight - other.weight, gram), expected)


def test_second_moments_are_means_over_all_calls(denoiser: Any, calls: list[Call]) -> None:
    network, name = denoiser.network, "down_blocks.0.resnets.0.conv1"
    layers = {name: network.get_submodule(name)}
    whole = second_moments(network, layers, calls)[name]
    halves = [call.rows(torch.arange(k, 6, 2)) for call in calls for k in (0, 1)]
    assert whole.dtype == torch.float64 and torch.allclose(
        whole, second_moments(network, layers, halves)[name], rtol=1e-4
    )
    assert whole.shape == (1, 72, 72)


def test_a_denoiser_with_another_time_unit_is_calibrated_in_the_networks() -> None:
    network = Two()
    denoiser = NetworkDenoiser(
        network, BetaTable(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)), "sample", shape=(2, 4, 4),
        time_scale=0.5,
    )  # fmt: skip
    from ts_adapt.solvers import DDIM

    grid = torch.tensor([900.0, 400.0, 0.0], dtype=torch.float64)
    calls = collect(denoiser, DDIM(denoiser.noise_schedule), grid, torch.randn(2, 2, 4, 4))
    assert [float(call.timestep[0]) for call in calls] == [450.0, 200.0]
