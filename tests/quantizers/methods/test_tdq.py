"""TDQ: scales that follow the timestep, tables, learned weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import InputRecord, Recorder
from ts_adapt.quantizers.calibration.ranges import SHRINKS, activation_power, least_error
from ts_adapt.quantizers.layers.activations import TableActivation, TimedActivation
from ts_adapt.quantizers.layers.affine import fake_quantize
from ts_adapt.quantizers.layers.weights import AffineWeight, LSQWeight
from ts_adapt.quantizers.methods import tdq
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.methods.tdq import (
    SILU_MINIMUM,
    TDQ,
    TDQOptions,
    best_scales,
    fit,
    freeze,
    offset_of,
    sinusoids_of,
)
from ts_adapt.quantizers.quantization import quantize, quantized_layers, restore, size_of
from ts_adapt.quantizers.storage import load, save

SEEN = torch.linspace(1000, 0, 26)[:-1]
UNSEEN = SEEN - 20
EMBEDDING = {"num_channels": 128, "flip_sin_to_cos": True, "downscale_freq_shift": 0.0, "scale": 1.0}


def planted(times: Tensor, growth: float = 100, seed: int = 0) -> list[Tensor]:
    """g(t) N(0, 1), g growing `growth` times from noise to data."""
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * growth ** (1 - t / 1000) * torch.randn(2048, generator=generator) for t in times]


def recorded(times: Tensor, inputs: list[Tensor]) -> InputRecord:
    recorder = Recorder()
    for time, x in zip(times, inputs, strict=True):
        recorder.visit("layer", x[None], time[None])
    return recorder.records(["layer"])["layer"]


def share(inputs: list[Tensor], rounded: list[Tensor]) -> float:
    """The error, normalised per time."""
    pairs = zip(inputs, rounded, strict=True)
    return sum(float((y - x).square().mean() / x.square().mean()) for x, y in pairs) / len(inputs)


def static(inputs: list[Tensor], bits: int) -> float:
    """The share of one scale of least squared error for all times."""
    low, high = least_error(torch.cat(inputs)[None], bits, True)
    scale = torch.maximum(-low, high).squeeze() / (2 ** (bits - 1) - 1)
    return share(inputs, [fake_quantize(x, scale, torch.zeros(()), bits, True) for x in inputs])


def fitted(times: Tensor, inputs: list[Tensor], bits: int) -> TimedActivation:
    torch.manual_seed(0)
    record = recorded(times, inputs)
    part = TimedActivation(bits, None, EMBEDDING, None)
    part.start(record.all_values.abs().mean(), record.all_values.std())
    fit([part], [record])
    return part


@pytest.mark.parametrize("bits", [4, 8])
def test_the_scale_of_inputs_with_an_offset_is_searched_with_the_quantizers_own_zero(bits: int) -> None:
    """A bounded input whose smallest value lies far from code 0."""
    torch.manual_seed(0)
    x = 0.8 + 0.2 * torch.distributions.StudentT(3.0).sample((1600,)).abs()
    record = recorded(torch.tensor([5.0]), [x])
    part = TableActivation(bits, offset_of(record), torch.zeros(1), torch.ones(1), None)

    def error(scale: Tensor) -> float:
        return float((part.quantized(x[None], scale) - x).abs().pow(activation_power(bits)).mean())

    tried = [error(record.high * k / SHRINKS / (2**bits - 1)) for k in range(1, SHRINKS + 1)]
    assert part.offset == 0 and error(best_scales(record, bits, part.offset)) == pytest.approx(min(tried), rel=1e-3)


@pytest.fixture(scope="module")
def follower() -> TimedActivation:
    """Fitted to a planted range, 4 bits."""
    return fitted(SEEN, planted(SEEN), bits=4)


@pytest.fixture
def calls(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Of a whole network; its predictors are fitted in fewer steps."""
    monkeypatch.setattr(tdq, "FIT_STEPS", 60)
    return calls


def rounded(part: Any, times: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [part.quantized(x[None], part.scale_at(t[None]))[0] for t, x in zip(times, inputs, strict=True)]


def test_scales_follow_a_planted_range_at_seen_and_unseen_times(follower: TimedActivation) -> None:
    seen, unseen = planted(SEEN), planted(UNSEEN, seed=1)
    part = follower
    assert static(seen, 4) > 0.239
    assert share(seen, rounded(part, SEEN, seen)) < 0.013
    assert share(unseen, rounded(part, UNSEEN, unseen)) < 0.026
    both = torch.stack([part.scale_at(SEEN).log(), torch.stack([x.std() for x in seen]).log()])
    assert torch.corrcoef(both)[0, 1] > 0.98


def test_a_table_by_step_is_for_no_other_grid(follower: TimedActivation) -> None:
    """As many steps at other times: scales by the number of the step are lost there, those by time are not."""
    times = 40 + 960 * (1 - torch.linspace(0, 1, 26)[:-1]) ** 6
    inputs = planted(times, seed=2)
    by_step = [follower.quantized(x[None], follower.scale_at(t[None]))[0] for x, t in zip(inputs, SEEN, strict=True)]
    assert share(inputs, by_step) > 0.3
    assert share(inputs, rounded(follower, times, inputs)) < 0.026


def test_a_constant_range_is_no_harm() -> None:
    inputs = planted(SEEN, growth=1)
    part = fitted(SEEN, inputs, bits=4)
    assert share(inputs, rounded(part, SEEN, inputs)) < 1.02 * static(inputs, 4)


def test_the_first_scale_is_the_published_one() -> None:
    part = TimedActivation(4, None, EMBEDDING, None)
    part.start(torch.tensor(0.8), torch.tensor(0.6))
    part.predictor[-1].weight.zero_()  # type: ignore[operator, union-attr]
    first = (0.8 + 3 * 0.6) / (15 // 2 - 1)
    assert torch.allclose(part.scale_at(torch.tensor([3.0, 700.0])), torch.full((2,), first))
    assert math.isclose(float(part.predictor[-1].bias), math.log(math.expm1(first)), rel_tol=1e-5)  # type: ignore[arg-type, union-attr]


def test_a_batch_of_mixed_times_gets_a_scale_for_each_sample(follower: TimedActivation) -> None:
    part = follower
    part.listener = SimpleNamespace(now=lambda batch: UNSEEN[:batch])  # type: ignore[assignment]
    x = torch.randn(5, 3, 4, 4)
    alone = torch.cat([part.quantized(x[i : i + 1], part.scale_at(UNSEEN[i : i + 1])) for i in range(5)])
    assert torch.equal(part(x), alone)
    assert len(part.scale_at(UNSEEN[:5]).unique()) == 5


def test_a_table_is_the_predictor_exactly_and_interpolates_between(follower: TimedActivation) -> None:
    part = follower
    times = torch.arange(0.0, 1000.0, 7)
    table = part.table(times)
    assert torch.equal(table.scale_at(times), part.scale_at(times))
    assert torch.equal(table.scale_at(times[20:33]), part.scale_at(times[20:33]))
    ends, inside = table.scale_at(torch.tensor([-5.0, 2000.0])), table.scale_at(torch.tensor([10.5]))
    assert torch.equal(ends, table.scales[[0, -1]])
    assert torch.allclose(inside, table.scales[1:3].mean())


def test_inputs_of_activation_functions_have_an_offset() -> None:
    times = torch.tensor([0.0, 500.0])
    x = [3 * torch.randn(4096) for _ in times]
    assert offset_of(recorded(times, x)) is None
    assert offset_of(recorded(times, [nn.functional.silu(v) for v in x])) == SILU_MINIMUM
    assert offset_of(recorded(times, [v.relu() for v in x])) == 0
    for offset, inputs in ((SILU_MINIMUM, [nn.functional.silu(v) for v in x]), (0.0, [v.relu() for v in x])):
        part = TimedActivation(4, offset, EMBEDDING, None)
        part.start(torch.tensor(1.0), torch.tensor(1.0))
        fit([part], [recorded(times, inputs)])
        ours = rounded(part, times, inputs)
        assert share(inputs, ours) < static(inputs, 4)
        assert min(float(v.min()) for v in ours) == pytest.approx(offset, abs=1e-6)
        assert max(len(v.unique()) for v in ours) <= 16


def test_the_embedding_is_the_networks_own(make: Any) -> None:
    ours = sinusoids_of(make("unet"), 999.0)
    assert ours["num_channels"] == 8 and ours["scale"] == 1
    assert sinusoids_of(make("flux"), 1.0)["scale"] == 1000
    assert sinusoids_of(nn.Linear(2, 2), 999.0)["num_channels"] == 128


def test_ptq_beats_min_max_and_comes_off_exactly(denoiser: Any, calls: list[Call], error: Callable[[], float]) -> None:
    found = []
    for name in ("tdq-w8a4", "minmax-w8a4"):
        quantize(denoiser.network, build(name)[0], calls)
        found.append(error())
        restore(denoiser.network)
        assert error() == 0
    assert found[0] < found[1]


def test_frozen_networks_say_the_same_and_weigh_less(denoiser: Any, calls: list[Call]) -> None:
    network = quantize(denoiser.network, build("tdq-w4a8+qat")[0], calls)
    assert all(isinstance(layer.stored, LSQWeight) for _, layer in quantized_layers(network))
    before, heavy = [call.run(network) for call in calls], size_of(network)
    times = torch.cat([call.timestep for call in calls])
    assert freeze(network, times) is network
    assert all(isinstance(layer.stored, AffineWeight) for _, layer in quantized_layers(network))
    for call, y in zip(calls, before, strict=True):
        assert float((call.run(network) - y).norm() / y.norm()) < 0.05
    assert size_of(network).bits < 5.5 < 32 < heavy.bits
    assert size_of(network).weight_bytes < 0.5 * heavy.weight_bytes
    x = torch.cat([call.x[:1] for call in calls])
    mixed = Call.of(network, x, torch.stack([call.timestep[0] for call in calls])).run(network)
    alone = torch.cat([call.rows(torch.tensor([0])).run(network) for call in calls])
    assert float((mixed - alone).norm() / alone.norm()) < 0.02, "each sample of a batch has the scales of its own time"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["tdq-w8a8", "tdq-w4a8+qat"])
def test_round_trip_is_exact(
    denoiser: Any, calls: list[Call], make: Any, tmp_path: Path, name: str, frozen: bool
) -> None:
    network = quantize(denoiser.network, build(name)[0], calls)
    if frozen:
        freeze(network, torch.arange(1000))
    save(network, tmp_path)
    twin = load(make("unet"), tmp_path)
    assert torch.equal(calls[2].run(twin), calls[2].run(network))
    assert size_of(twin) == size_of(network)


def test_lsq_weights_round_as_their_codes_do() -> None:
    weight = torch.randn(4, 3, 3, 3)
    part = LSQWeight(weight, torch.full((4, 1), 0.3), 4)
    assert torch.allclose(part(), part.frozen()(), atol=1e-3)
    part.requires_grad_()
    part().square().sum().backward()
    assert part.log_scale.grad is not None and bool((part.log_scale.grad != 0).all())
    assert tdq.MODES == ("ptq", "qat")


def test_bad_input_is_explained(denoiser: Any, calls: list[Call]) -> None:
    with pytest.raises(TsAdaptError, match="mode of tdq 'qta'; did you mean 'qat'"):
        TDQOptions(mode="qta")
    with pytest.raises(TsAdaptError, match="unknown range 'msr'; did you mean 'mse'"):
        TDQOptions(weight_range="msr")
    with pytest.raises(TsAdaptError, match="bits is None"):
        TDQOptions(bits=None, mode="qat")
    with pytest.raises(TsAdaptError, match="activation_bits is 9"):
        build("tdq-w8a9")
    with pytest.raises(TsAdaptError, match="calibration set is empty"):
        quantize(denoiser.network, TDQ())
    with pytest.raises(TsAdaptError, match="not quantized"):
        freeze(denoiser.network, torch.tensor([1.0]))
    quantize(denoiser.network, TDQ(TDQOptions(bits=None)), calls)
    with pytest.raises(TsAdaptError, match="finite timesteps"):
        freeze(denoiser.network, torch.tensor([]))
