"""Calibration sets along the trajectory, what layers receive on them, and the error of their outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.noise import BetaTable
from ts_adapt.quantizers.affine import fake_quantize, scale_and_zero
from ts_adapt.quantizers.calibration import (
    SELECTIONS,
    Recorder,
    collect,
    entropy_of,
    observe,
    record_inputs,
    select_active,
    strata,
)
from ts_adapt.quantizers.calls import Call, check_calls
from ts_adapt.quantizers.gram import grams, input_rows, output_error
from ts_adapt.quantizers.network import quantize
from ts_adapt.quantizers.ranges import Range, mse
from ts_adapt.quantizers.registry import build
from ts_adapt.sampling import integrate


def test_active_selection_visits_every_step_once_before_any_repeats() -> None:
    times, equal = torch.arange(20.0), torch.full((20,), 0.7, dtype=torch.float64)
    for count in (1, 7, 20, 33, 40, 60):
        chosen = select_active(times, equal, count, 100)
        assert int(chosen.sum()) == count and int(chosen.max()) - int(chosen.min()) <= 1


def test_active_selection_prefers_what_is_uncertain() -> None:
    entropy = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    chosen = select_active(torch.arange(3.0), entropy, 30, 100)
    assert chosen[1] > chosen[2] > chosen[0] > 0
    best: list[int] = [0, 0, 0]
    for _ in range(30):
        gains = [float(h) + 1.5 / (n + 1) for h, n in zip(entropy, best, strict=True)]
        best[gains.index(max(gains))] += 1
    assert chosen.tolist() == best


@pytest.mark.parametrize("select", SELECTIONS)
def test_selections_give_the_count_and_keep_the_limit(select: str) -> None:
    times, entropy = torch.linspace(999, 0, 10), torch.rand(10, dtype=torch.float64)
    for count, limit in ((1, 5), (23, 5), (50, 5), (17, 17)):
        chosen = SELECTIONS[select](times, entropy, count, limit)
        assert int(chosen.sum()) == count and int(chosen.max()) <= limit and int(chosen.min()) >= 0


def test_uniform_and_normal_shares() -> None:
    times, entropy = torch.linspace(1000, 0, 11), torch.zeros(11)
    assert SELECTIONS["uniform"](times, entropy, 44, 100).tolist() == [4] * 11
    normal = SELECTIONS["normal"](times, entropy, 1100, 1100).double()
    u = times.double() / 1000
    weights = torch.exp(-((u - 0.4) ** 2) / (2 * 0.4**2))
    assert (normal - 1100 * weights / weights.sum()).abs().max() <= 1
    assert int(normal.argmax()) == 6, "the mean lies towards the data"


def test_collected_calls_are_those_that_the_solver_made(denoiser: Any, solve: Any) -> None:
    solver, grid, x_T = solve
    solution = integrate(denoiser, solver, grid, x_T, keep_trajectory=True)
    calls = collect(denoiser, solver, grid, x_T)
    assert len(calls) == 4 and not denoiser.network._forward_pre_hooks and not denoiser.network._forward_hooks
    for index, call in enumerate(calls):
        assert torch.equal(call.x, solution.states[:, index])
        assert torch.allclose(call.timestep, grid[index].float().expand(6))
        by_hand = Call.of(denoiser.network, call.x, call.timestep)
        assert torch.equal(call.run(denoiser.network), by_hand.run(denoiser.network))


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_count_of_samples_is_spread_over_steps_and_solves(denoiser: Any, solve: Any, select: str) -> None:
    calls = collect(denoiser, *solve, select=select, count=10)
    assert sum(call.batch for call in calls) == 10
    everything = {(float(c.timestep[0]), i): c.x[i] for c in collect(denoiser, *solve) for i in range(6)}
    seen = set()
    for call in calls:
        for x, t in zip(call.x, call.timestep, strict=True):
            matches = [i for (time, i), y in everything.items() if time == float(t) and torch.equal(x, y)]
            assert len(matches) == 1
            seen.add(matches[0])
    assert len(seen) == 6, "different steps give different samples"


def test_calls_can_be_cut_with_their_conditions(make: Any) -> None:
    network = make("sd")
    x, text = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    call = Call.of(network, x, torch.tensor([5.0, 50.0, 500.0]), encoder_hidden_states=text)
    one = call.rows(torch.tensor([1]))
    assert one.batch == 1 and float(one.timestep) == 50
    assert torch.allclose(one.run(network), call.run(network)[1:2], atol=1e-5)
    assert Call.of(network, x, torch.tensor(7.0), encoder_hidden_states=text).timestep.tolist() == [7.0] * 3


def test_bad_requests_are_explained(denoiser: Any, solve: Any, mixture: GaussianMixtureDenoiser) -> None:
    solver, grid, x_T = solve
    with pytest.raises(TsAdaptError, match="did you mean 'active'"):
        collect(denoiser, *solve, select="activ")
    with pytest.raises(TsAdaptError, match="between 1 and 24 samples"):
        collect(denoiser, *solve, count=25)
    with pytest.raises(TsAdaptError, match="would be empty"):
        collect(denoiser, solver, grid, x_T[:0])
    with pytest.raises(TsAdaptError, match="has no network to quantize"):
        collect(mixture, solver, grid, x_T)


def test_empty_and_foreign_calibration_sets_are_refused(denoiser: Any, calls: list[Call]) -> None:
    network, method = denoiser.network, build("minmax-w8a8")[0]
    with pytest.raises(TsAdaptError, match="the calibration set is empty"):
        quantize(network, method, [])
    with pytest.raises(TsAdaptError, match="the calibration set is empty"):
        check_calls(network, [calls[0].rows(torch.arange(0))])
    wide = [Call((torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0])), {}, torch.tensor([1.0, 2.0]))]
    with pytest.raises(TsAdaptError, match=r"does not take the calibration set's samples of shape \(3, 8, 8\)"):
        quantize(network, method, wide)
    with pytest.raises(TsAdaptError, match=r"call 1 of the calibration set has samples of shape \(1, 4, 4\)"):
        check_calls(network, [calls[0], Call.of(network, torch.randn(2, 1, 4, 4), torch.tensor(3.0))])
    with pytest.raises(TsAdaptError, match="NaN"):
        check_calls(network, [Call.of(network, torch.full((1, 1, 8, 8), float("nan")), torch.tensor(3.0))])
    assert not network._forward_pre_hooks


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
    assert torch.allclose(record.mean[1], at_ten.mean(), atol=1e-5)
    assert torch.allclose(record.std[1], at_ten.std(correction=0), rtol=1e-5)
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
        least = error_at(x, mse(x, bits, False, exact_zero=True), bits)
        for values, weights in ((record.all_values[None], record.all_weights[None]), record.rows(1024)):
            found = mse(values, bits, False, exact_zero=True, weights=weights)
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
def test_the_gram_gives_the_error_of_the_output(name: str) -> None:
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


def test_grams_are_means_over_all_calls(denoiser: Any, calls: list[Call]) -> None:
    network, name = denoiser.network, "down_blocks.0.resnets.0.conv1"
    layers = {name: network.get_submodule(name)}
    whole = grams(network, layers, calls)[name]
    halves = [call.rows(torch.arange(k, 6, 2)) for call in calls for k in (0, 1)]
    assert whole.dtype == torch.float64 and torch.allclose(whole, grams(network, layers, halves)[name], rtol=1e-4)
    assert whole.shape == (1, 72, 72)


def test_entropy_is_between_nothing_and_one() -> None:
    assert entropy_of(torch.zeros(100)) == pytest.approx(0, abs=1e-6)
    assert entropy_of(torch.linspace(-3, 3, 64000)) == pytest.approx(1, abs=1e-3)
    assert entropy_of(torch.randn(10000)) < 1


def test_a_denoiser_with_another_time_unit_is_calibrated_in_the_networks() -> None:
    network = Two()
    denoiser = NetworkDenoiser(
        network, BetaTable(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)), "sample", shape=(2, 4, 4),
        time_scale=0.5,
    )  # fmt: skip
    from ts_adapt.solvers import DDIM

    grid = torch.tensor([900.0, 400.0, 0.0], dtype=torch.float64)
    calls = collect(denoiser, DDIM(denoiser.noise), grid, torch.randn(2, 2, 4, 4))
    assert [float(call.timestep[0]) for call in calls] == [450.0, 200.0]
