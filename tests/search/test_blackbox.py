"""The gradient-free search: it starts at the start, goes on where it was stopped, and finds a planted optimum."""

from __future__ import annotations

import pytest
import torch

from ts_adapt.grids import fixed
from ts_adapt.grids.parametric import logits_to_times
from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.search.blackbox import BlackboxOptions, search_blackbox


def planted(noise):
    goal = noise.log_snr(logits_to_times(torch.tensor([0.8, -0.4, -0.4]), noise))

    def score(grid):
        return float((noise.log_snr(grid.times) - goal).square().mean())

    return score


def test_approaches_a_planted_optimum_and_resumes(mixture, tmp_path):
    noise, start = mixture.noise, TimeGrid(fixed.make("log_snr", mixture.noise, 3))
    calls = []

    def score(grid):
        calls.append(1)
        return planted(noise)(grid)

    place = {"storage": f"sqlite:///{tmp_path}/optuna.db", "study": "a", "progress": False}
    search_blackbox(score, noise, start, BlackboxOptions(trials=10), **place)
    result = search_blackbox(score, noise, start, BlackboxOptions(trials=60), **place)
    assert len(calls) == result.trials == 60
    assert result.start_distance == pytest.approx(planted(noise)(start))
    assert result.distance < 0.2 * result.start_distance
    assert planted(noise)(result.grid) == pytest.approx(result.distance)


def test_unknown_sampler_is_refused(mixture):
    start = TimeGrid(fixed.make("log_snr", mixture.noise, 3))
    with pytest.raises(TsAdaptError, match="known: tpe"):
        search_blackbox(
            planted(mixture.noise), mixture.noise, start, BlackboxOptions(sampler="x"), storage="sqlite://", study="b"
        )
