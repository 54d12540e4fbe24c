"""Calibration sets: which calls of the network are collected along the trajectory, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import SELECTIONS, Call, check_calls, collect, entropy_of, shares
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import quantize
from ts_adapt.sampling import integrate


def test_active_selection_visits_every_step_once_before_any_repeats() -> None:
    times, equal = torch.arange(20.0), torch.full((20,), 0.7, dtype=torch.float64)
    for count in (1, 7, 20, 33, 40, 60):
        chosen = shares("active", times, equal, count, 100)
        assert int(chosen.sum()) == count and int(chosen.max()) - int(chosen.min()) <= 1


def test_active_selection_prefers_what_is_uncertain() -> None:
    entropy = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    chosen = shares("active", torch.arange(3.0), entropy, 30, 100)
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
        chosen = shares(select, times, entropy, count, limit)
        assert int(chosen.sum()) == count and int(chosen.max()) <= limit and int(chosen.min()) >= 0


def test_uniform_and_normal_shares() -> None:
    times, entropy = torch.linspace(1000, 0, 11), torch.zeros(11)
    assert shares("uniform", times, entropy, 44, 100).tolist() == [4] * 11
    normal = shares("normal", times, entropy, 1100, 1100).double()
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


def test_entropy_is_between_nothing_and_one() -> None:
    assert entropy_of(torch.zeros(100)) == pytest.approx(0, abs=1e-6)
    assert entropy_of(torch.linspace(-3, 3, 64000)) == pytest.approx(1, abs=1e-3)
    assert entropy_of(torch.randn(10000)) < 1
